"""The asset of the release.

A release is published to a target's Triton repository once a real server has answered with it as PyTorch does.
"""

import shlex

import dagster as dg

from assets.executor_tags import placement
from assets.factory import Look, asset
from assets.materialization import Cell, file_table, linked, table
from assets.partitions import models
from resources.settings.workspace import Workspace
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.graph import TargetSteps
from resources.steps.step import Work
from resources.tasks import TASKS
from resources.tracking import Tracker
from resources.triton.layout import current_release, list_releases
from resources.triton.proof import Proof


def triton_repository_assets(steps: TargetSteps) -> tuple[dg.AssetsDefinition, dg.AssetChecksDefinition]:
    """Return the asset of the release, and its check."""
    look = Look.of(
        "serving",
        {"file"},
        "The champion as a numbered, immutable release that answers text, proven on a real Triton server.",
    )

    def materialize(context: dg.AssetExecutionContext, work: Work, tracker: Tracker) -> dg.MaterializeResult:
        published = steps.release.publish(work, tracker, dagster_run=context.run.run_id)
        release, champion = published.release, work.get(steps.champion)
        pages = {
            "mlflow_version": tracker.released(champion, release.number),
            "mlflow_run": tracker.chosen_in(champion),
            "report": tracker.report(champion),
        }
        return dg.MaterializeResult(
            metadata={
                "release": f"release {release.number} ({release.engine})",
                "reused": dg.MetadataValue.bool(not published.changed),
                "status": release.status,
                **({"advice": published.advice} if published.advice else {}),
                "flavour": release.flavour,
                "serving": str(release.serving) if release.serving is not None else "–",
                "revision": release.revision,
                "content_digest": release.content_digest,
                "release_number": release.number,
                "size_bytes": sum(file.size_bytes for file in release.files.values()),
                **_proof_metadata(release.proof),
                "repository": dg.MetadataValue.path(str(work.workspace.repository(steps.target))),
                "query": dg.MetadataValue.md(f"`{query_command(work, steps.target)}`"),
                **linked(**pages),
                "contents": file_table(release.files),
            },
            data_version=dg.DataVersion(release.content_digest),
        )

    triton_repository = asset(steps.release, look, materialize)

    @dg.asset_check(asset=triton_repository, partitions_def=models, op_tags=placement(steps.target))
    def served_answers_equal(
        context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.AssetCheckResult:
        """The answers of the newest release on a real server were PyTorch's answers to the same texts."""
        # This is imported late because definitions are loaded again for every step.
        from resources.triton.publish import unverified_root

        repository, model = workspace.repository(steps.target), context.partition_key
        waiting = list_releases(unverified_root(repository, model), model)
        release = waiting[-1] if waiting else current_release(repository, model)
        proof = release.proof if release is not None else None
        if release is None:
            description = f"{model}: no release is in {repository}"
        elif proof is None:
            description = f"{model}: release {release.number} waits unverified: no server has answered with it"
        else:
            description = "; ".join([f"release {release.number} on {proof.server}", *proof.failures])
        return dg.AssetCheckResult(
            passed=proof is not None and proof.passed,
            severity=dg.AssetCheckSeverity.WARN,  # the pointer never names an unproven release
            description=description,
            metadata=_proof_metadata(proof),
        )

    return triton_repository, served_answers_equal


def _proof_metadata(proof: Proof | None) -> dict[str, dg.MetadataValue | str | int | float | list[str]]:
    """Return the comparison of the server's answers with PyTorch's, by protocol and kind of request.

    Without a proof there is no metadata.
    """
    if proof is None:
        return {}
    rows: list[list[Cell]] = [
        [way, name, float(value)] for way, metrics in proof.metrics.items() for name, value in metrics.items()
    ]
    columns = {"asked": "over which protocol, and how", "metric": "of answers beside PyTorch's in fp32", "measured": ""}
    return {
        "server": proof.server,
        "proof_requests": proof.requests,
        "proof_seconds": round(proof.seconds, 2),
        "answers": table(columns, rows),
        "failures": list(proof.failures),
    }


def query_command(work: Work, target: str) -> str:
    """Return the command that sends a request to the model in the target's repository."""
    checkpoint = work.get(CHECKPOINT)
    example = TASKS[checkpoint.task].example(checkpoint.settings)
    return f"{_where(work.workspace)}refinery query {work.entry.name} {example}{_target(target)}"


def serve_command(workspace: Workspace, target: str) -> str:
    """Return the command that serves the target's repository."""
    return f"{_where(workspace)}refinery serve{_target(target)}"


def _where(workspace: Workspace) -> str:
    folder = workspace.triton.repositories
    return f"REFINERY_TRITON_REPOSITORIES={shlex.quote(str(folder))} " if folder is not None else ""


def _target(target: str) -> str:
    return "" if target == "cpu" else f" --target {target}"
