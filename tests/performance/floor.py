"""How far ONNX Runtime's fp32 engine is from what the processor allows: `python -m tests.performance.floor`.

A run of all-MiniLM-L6-v2 reads each matrix of the encoder once and multiplies it with every token. So no run can be
faster than reading those bytes, nor than that arithmetic; both rates are measured here with the same threads, the one
by summing an array far larger than the caches, the other by a product of large square matrices. Attention's own
products are left out, 5 percent at 128 tokens. Then the engine, medians in turns, with each way in which threads may
wait: asleep, spinning within a run, spinning on between runs (ONNX Runtime's default, which takes cores from others).
For a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from resources.catalog.entries import Shape
from resources.engines.specs import engine_spec
from resources.processes.isolation import run_isolated
from resources.settings.workspace import Workspace
from tests.making import collect_checkpoint, make_engine, make_graph, sources_of
from tests.performance.cpu import SHAPES, make_entry

#: Far more than the last level of any cache of a server's share.
STREAMED_BYTES = 1 << 30
SQUARE = 2048
ROUNDS = 9


def best_seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The fastest of several: a floor is what is possible."""
    times = []
    for _ in range(rounds + 1):  # the first one touches the memory
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def rates(threads: int) -> tuple[float, float]:
    """Bytes a second that are read from memory, and fp32 operations a second. In a child: torch is imported there."""
    import torch

    torch.set_num_threads(threads)
    stream = torch.ones(STREAMED_BYTES // 4)
    square = torch.rand(SQUARE, SQUARE)
    read = STREAMED_BYTES / best_seconds(stream.sum)
    computed = 2 * SQUARE**3 / best_seconds(lambda: square @ square)
    return read, computed


def encoder_parameters(model: Path) -> int:
    """Elements of the matrices that every token is multiplied with. In a child: onnx_ir is imported there."""
    from resources.engines.fusion import fuse
    from resources.engines.precision.quantization import find_operators

    fused, _ = fuse(model)
    return sum(operator.rows * operator.columns * len(operator.nodes) for operator in find_operators(fused))


def engine_ms(model: Path, inputs: tuple[str, ...], threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by shape and way of waiting. In a child: its threads end with it."""
    import onnxruntime

    def session(spinning: str, stop: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        options.add_session_config_entry("session.force_spinning_stop", stop)
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    ways = {"asleep": session("0", "1"), "spinning": session("1", "1"), "spinning on": session("1", "0")}
    found: dict[str, dict[str, float]] = {}
    for text in SHAPES:
        shape = Shape.parse(text)
        feed = {name: np.ones((shape.batch, shape.sequence), np.int64) for name in inputs}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds):
            first = turn % len(ways)  # nobody always follows the one that still spins
            for name, way in [*ways.items()][first:] + [*ways.items()][:first]:
                way.run(None, feed)  # the others have just had the caches, or still spin
                for _ in range(max(1, 20 // shape.batch)):
                    started = time.perf_counter()
                    way.run(None, feed)
                    times[name].append(1000 * (time.perf_counter() - started))
        found[text] = {name: round(statistics.median(samples), 3) for name, samples in times.items()}
    return found


def main() -> int:
    """Print the rates, and a line a shape: both floors beside what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each way of waiting")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        workspace = Workspace(home=Path(home), catalog_path=Path(home) / "models.yaml")
        entry = make_entry({}, 1.0)
        checkpoint = collect_checkpoint(entry, workspace.store, workspace.limits).record
        sources = sources_of(workspace, entry, checkpoint, make_graph(workspace, entry, checkpoint).record)
        engine = make_engine(workspace, entry, engine_spec("onnxruntime_fp32"), "cpu", sources).record
        assert engine.status == "built", engine.reason

        def child(function: Callable[..., Any], *arguments: Any) -> Any:
            what = f"measuring {function.__name__}"
            return run_isolated(function, *arguments, limits=workspace.limits, what=what)[0]

        # By its name: children know no `__main__`, which is what this module is where it is run.
        from tests.performance import floor

        read, computed = child(floor.rates, given.threads)
        parameters = child(floor.encoder_parameters, sources.graph_folder / "model.onnx")
        model = workspace.store.folder(engine) / engine.entry_file
        measured = child(floor.engine_ms, model, engine.inputs, given.threads, given.rounds)
    rate = {"read_gb_per_s": round(read / 1e9, 1), "gflop_per_s": round(computed / 1e9, 1)}
    print(json.dumps({"threads": given.threads, "encoder_mb": round(4 * parameters / 1e6, 1), **rate}))
    for text, times in measured.items():
        shape = Shape.parse(text)
        floors = {
            "bytes_ms": round(1000 * 4 * parameters / read, 3),
            "arithmetic_ms": round(1000 * 2 * parameters * shape.batch * shape.sequence / computed, 3),
        }
        times_floor = round(times["spinning"] / max(floors.values()), 2)
        print(json.dumps({"shape": text, **floors, "measured_ms": times, "times_the_floor": times_floor}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
