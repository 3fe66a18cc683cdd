"""The steps `serving_benchmark/<target>`: throughput and latency of the release that serves, on a real server."""

from __future__ import annotations

from pathlib import Path

from resources.artifacts.fingerprint import Fingerprint, code_versions
from resources.artifacts.records import ServingReport
from resources.machine.device import describe_device
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.evaluation_set import EVALUATION_SET
from resources.steps.step import Recipe, Step, Work
from resources.steps.triton_repository import ReleaseStep
from resources.triton.layout import current_release


class ServingBenchmarkStep(Step[ServingReport]):
    """Measure the release that serves. ReleaseError and ServerError say why it could not be measured."""

    record = ServingReport
    code = (
        "resources.triton.serving_report",
        "resources.triton.load",
        "resources.triton.mix",
        "resources.triton.launch",
        "resources.steps.serving_benchmark",
    )

    def __init__(self, target: str, release: ReleaseStep) -> None:
        super().__init__(f"serving_benchmark/{target}", [release])
        self.target, self.release = target, release

    def recipe(self, work: Work) -> Recipe[ServingReport]:
        """See Step."""
        # Here, because definitions are loaded for every step.
        from resources.triton.environment import requirements
        from resources.triton.mix import load_of
        from resources.triton.perf_analyzer import find_perf_analyzer
        from resources.triton.serving_report import levels_of, measure_release, why_not_measured

        entry, workspace = work.entry, work.workspace
        work.get(self.release.champion)
        work.require_done(self.release)
        checkpoint, evaluation = work.get(CHECKPOINT), work.get(EVALUATION_SET)
        release, serving = current_release(workspace.repository(self.target), entry.name), entry.serving
        device, native = describe_device(self.target), release is not None and release.flavour == "native"
        made_of = Fingerprint.of(
            "serving_report",
            model=entry.name,
            release=[release.number, release.content_digest] if release is not None else None,
            load=load_of(evaluation, checkpoint),
            levels=levels_of(serving.clients),
            seconds=serving.benchmark_seconds,
            device=device,
            perf_analyzer=str(find_perf_analyzer() or ""),
            server=workspace.triton.servers[:1] if native else requirements(),
            code=code_versions(*self.code),
        )
        record = ServingReport(
            digest=made_of.digest,
            model=entry.name,
            target=self.target,
            release=release.number if release is not None else 0,
            engine=release.engine if release is not None else "",
            status="skipped",
            device=device,
        )
        why_not = why_not_measured(workspace, release, serving.benchmark_seconds)
        if release is None or why_not:
            return Recipe.of_ready(made_of, record.model_copy(update={"reason": why_not}))
        measured = release

        def make(folder: Path) -> ServingReport:
            del folder
            work.store.require_whole(evaluation)
            return measure_release(workspace, entry, self.target, measured, checkpoint, evaluation, record)

        return Recipe(made_of, make)
