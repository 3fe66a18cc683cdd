"""Open ONNX Runtime sessions on the CPU.

The benchmark and the served release use the same module. A release carries a copy of this file beside its `model.py`,
so the file imports nothing else of this project.
"""

import onnxruntime

#: Measured with MiniLM in int8 on two cores: 1x16 takes 1.28 ms (1.44 with ONNX Runtime's default), 1x128 takes 6.74 ms
#: (6.75). Two such sessions side by side answer 290 requests a second (220).
_SPIN_MICROSECONDS = 100


def open_session(
    path: str, threads: int, *, spinning: bool = True, as_written: bool = False
) -> onnxruntime.InferenceSession:
    """Open a session on the CPU that runs with the given number of threads.

    Errors of ONNX Runtime are raised unchanged. With `spinning`, threads keep their cores while they wait for the next
    operator of a run. With `as_written`, QuantizeLinear and DequantizeLinear stay operators of their own.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Without this setting idle threads spin for a while after each run, on cores that other work needs by then.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    # This time covers the gaps between parallel operators. ONNX Runtime's longer default is no faster, and it slows
    # other work down.
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
    if as_written:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # The CPU's provider is named, because asking for CUDA on a machine without it logs an error and falls back
    # silently.
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def session_of_bytes(graph: bytes) -> onnxruntime.InferenceSession:
    """Open a session for a small graph in memory, to find out what the graph computes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
