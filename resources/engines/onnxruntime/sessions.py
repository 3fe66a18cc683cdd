"""Opening an ONNX Runtime session: one module for what is measured and for what serves.

A release carries a copy of this file beside its `model.py`, so it needs nothing else of this project.
"""

import onnxruntime

#: MiniLM in int8 on two cores: 1x16 in 1.28 ms (as ONNX Runtime likes 1.44), 1x128 in 6.74 (6.75); and two of them side
#: by side 290 requests a second (220).
_SPIN_MICROSECONDS = 100


def open_session(
    path: str, threads: int, *, spinning: bool = True, as_written: bool = False
) -> onnxruntime.InferenceSession:
    """A session on the CPU with so many threads. Raises what ONNX Runtime raises.

    spinning: whether threads keep their cores while they wait for the next operator of a run. as_written:
    QuantizeLinear and DequantizeLinear stay operators of their own.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle threads would otherwise spin for a while after each run, on cores that others need by then.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    # Long enough for the gaps between parallel operators; for as long as it likes costs no less time, and others more.
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
    if as_written:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # The provider by name: asking for CUDA where there is none logs an error and falls back in silence.
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def session_of_bytes(graph: bytes) -> onnxruntime.InferenceSession:
    """A session over a small graph in memory, to see what it computes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
