"""What the pipeline costs beyond its tools: `python -m tests.performance.overhead [MODEL]`.

Runs `refinery optimize` twice on a fresh home, then does in one plain process what the tools themselves had to do for
the first: load, answer the evaluation texts, export, fuse, quantize, and the same number of benchmark and verification
calls, one after the other. Prints both, their ratio, and the memory of every step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from resources.artifacts.records import BenchmarkReport, Checkpoint, Engine, EvaluationSet, OnnxGraph
from resources.artifacts.store import ArtifactStore
from resources.catalog.entries import ModelEntry
from resources.engines.specs import ENGINES

RATIO_LIMIT = 1.35
SECOND_RUN_LIMIT = 1 / 5
#: For everything but what measures, which is benchmarks and the builds whose ladders try engine after engine.
WORK_LIMIT_S = 60


def optimize(model: str, home: Path) -> float:
    """Seconds of one `refinery optimize`, everything included, as a user waits for it."""
    started = time.perf_counter()
    command = [str(Path(sys.executable).with_name("refinery")), "optimize", model]
    subprocess.run(command, check=True, env={**os.environ, "REFINERY_HOME": str(home)})
    return time.perf_counter() - started


def direct(model: str, home: Path) -> dict[str, float]:
    """Seconds of each tool, called directly in a process of its own: this module again, as `--direct`."""
    command = [sys.executable, "-m", "tests.performance.overhead", "--direct", model, str(home)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    times: dict[str, float] = json.loads(output.splitlines()[-1])
    return times


def run_tools(model: str, home: Path) -> dict[str, float]:
    """All that the tools do, timed one by one. Reads from the first run only what and how often."""
    store = ArtifactStore(home / "artifacts")
    checkpoint = store.current(Checkpoint, f"checkpoint/{model}")
    graph = store.current(OnnxGraph, f"onnx_graph/{model}")
    evaluation = store.current(EvaluationSet, f"evaluation_set/{model}")
    times: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        times[name] = times.get(name, 0.0) + time.perf_counter() - clock
        clock = time.perf_counter()

    import numpy as np
    import torch

    from resources.accuracy.batches import equal_length_batches, plan_alone, plan_batches
    from resources.accuracy.evaluation_set import read_evaluation_set
    from resources.benchmark.texts import batch_of_shape, texts_of
    from resources.engines.interface import Sources
    from resources.engines.interface import build as build_engine
    from resources.engines.interface import load as load_engine
    from resources.engines.specs import engine_spec
    from resources.export.exporter import export
    from resources.pipelines.tokenization import TextEncoder
    from resources.processes import preload
    from resources.settings.workspace import Workspace
    from tests.making import goal_of

    assert preload.torch is torch
    lap("imports")
    source = store.folder(checkpoint)
    sources = Sources(checkpoint, source, graph, store.folder(graph))
    # The ladder's trials are the tools' own work: the builder gets what the pipeline gives it.
    entry = ModelEntry(name=model, source=checkpoint.source, task=checkpoint.task)
    goal = goal_of(Workspace(home=home, catalog_path=home / "unused"), entry, evaluation)
    encoder = TextEncoder.from_folder(str(source))
    texts = texts_of(read_evaluation_set(store.folder(evaluation)).items)
    encodings = encoder.tokens(texts)
    lengths = [len(encoding.ids) for encoding in encodings]
    with tempfile.TemporaryDirectory() as scratch:
        export(checkpoint, source, entry.trust, Path(scratch), 2**31)
        lap("load, export, parity")
        for spec in ENGINES:
            engine = store.current(Engine, f"engines/cpu/{spec.name}/{model}")
            report = store.current(BenchmarkReport, f"benchmarks/cpu/{spec.name}/{model}")
            if report.status != "measured":
                continue
            if spec.runtime != "torch":
                folder = Path(scratch) / spec.name
                folder.mkdir()
                build_engine(sources, engine_spec(spec.name), folder, goal if spec.examined else None)
                lap(f"build {spec.name}")
            threads = report.threads
            runner = load_engine(engine, store.folder(engine), sources, threads)
            baseline = load_engine(store.current(Engine, f"engines/cpu/torch/{model}"), source, sources, threads)
            lap("load for benchmarks")

            def answer(what: Any, batches: Any) -> None:
                for batch in batches:
                    what.run(encoder.pad([encodings[index] for index in batch.indices], batch.length))

            if spec.runtime == "torch":
                answer(baseline, equal_length_batches(lengths, 16))
                lap("reference answers")
            answer(runner, plan_batches(lengths, encoder.bucket, 32))
            answer(runner, plan_alone([[length] for length in lengths], encoder.bucket, 32))
            lap("accuracy calls")
            samples = json.loads((store.folder(report) / "samples.json").read_text())
            for shape, pairs in samples.items():
                rows, tokens = (int(part) for part in shape.split("x"))
                batch = batch_of_shape(texts, encoder, rows, tokens)
                for _ in range(pairs["baseline_runs"]):
                    baseline.run(batch)
                for _ in range(pairs["candidate_runs"]):
                    runner.run(batch)
            lap("benchmark calls")
    champion = json.loads((home / "artifacts" / "current" / "champion" / "cpu" / f"{model}.json").read_text())
    record = json.loads((home / "artifacts" / "champion" / champion["digest"][:32] / "record.json").read_text())
    engine = store.current(Engine, f"engines/cpu/{record['engine']}/{model}")
    runner = load_engine(engine, store.folder(engine), sources, os.cpu_count() or 1)
    manifests = sorted((home / "triton_models" / "cpu" / model).glob("*/release.json"))
    requests = json.loads(manifests[-1].read_text())["proof"]["requests"]
    order = np.random.default_rng(0).integers(0, len(texts), requests)
    for index in order:
        runner.run(encoder.encode([texts[index]]))
    lap("verification calls")
    return times


def memory(home: Path, model: str) -> list[tuple[str, int]]:
    """Peak resident bytes of every step's child, by the step's name."""
    store = ArtifactStore(home / "artifacts")
    found = [
        ("checkpoint", store.current(Checkpoint, f"checkpoint/{model}").peak_memory_bytes),
        ("evaluation_set", store.current(EvaluationSet, f"evaluation_set/{model}").peak_memory_bytes),
        ("onnx_graph", store.current(OnnxGraph, f"onnx_graph/{model}").peak_memory_bytes),
    ]
    for spec in ENGINES:
        engine = store.current(Engine, f"engines/cpu/{spec.name}/{model}")
        report = store.current(BenchmarkReport, f"benchmarks/cpu/{spec.name}/{model}")
        found += [(f"engines/cpu/{spec.name}", engine.peak_memory_bytes)]
        found += [(f"benchmarks/cpu/{spec.name}", report.peak_memory_bytes)]
    return [(name, peak) for name, peak in found if peak]


def main(model: str) -> int:
    """Print the figures; 1 if a limit is missed."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        first, second = optimize(model, home), optimize(model, home)
        times = direct(model, home)
        store = ArtifactStore(home / "artifacts")
        reports = [store.current(BenchmarkReport, f"benchmarks/cpu/{spec.name}/{model}") for spec in ENGINES]
        searching = [
            store.current(Engine, f"engines/cpu/{spec.name}/{model}").build_seconds for spec in ENGINES if spec.examined
        ]
        measuring = sum(report.build_seconds for report in reports) + sum(searching)
        allowed = 4 * store.current(Checkpoint, f"checkpoint/{model}").weights_bytes + 10**9
        peaks = memory(home, model)
    for name, seconds in times.items():
        print(f"  {name:24} {seconds:7.1f} s")
    total = sum(times.values())
    print(
        f"tools alone {total:.1f} s; refinery optimize {first:.1f} s: {first / total:.2f} times (limit {RATIO_LIMIT})"
    )
    print(
        f"  of that, benchmarks, ladders {measuring:.1f} s, all else {first - measuring:.1f} s (limit {WORK_LIMIT_S})"
    )
    print(f"again, unchanged: {second:.1f} s, {second / first:.3f} of the first (limit {SECOND_RUN_LIMIT})")
    for name, peak in peaks:
        print(f"  {name:32} {peak / 1e9:.2f} GB (limit {allowed / 1e9:.2f})")
    kept = first <= RATIO_LIMIT * total and second <= SECOND_RUN_LIMIT * first and first - measuring <= WORK_LIMIT_S
    return 0 if kept and all(peak <= allowed for _, peak in peaks) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--direct"]:
        print(json.dumps(run_tools(sys.argv[2], Path(sys.argv[3]))))
        sys.exit(0)
    sys.exit(main(*(sys.argv[1:] or ["all-minilm-l6-v2"])))
