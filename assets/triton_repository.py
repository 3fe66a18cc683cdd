"""The release: published to a target's Triton repository once a real server has answered as PyTorch does."""

import shlex

import dagster as dg

from assets.executor_tags import placement
from assets.materialization import OWNERS, Cell, closing_tracking, file_table, linked, table
from assets.partitions import models
from resources.artifacts.records import Champion, Checkpoint
from resources.settings.workspace import Workspace
from resources.tasks import TASKS
from resources.tracking import Tracker
from resources.triton.layout import current_release, list_releases
from resources.triton.promote import publish_champion
from resources.triton.proof import Proof
from resources.triton.publish import unverified_root


def triton_repository_assets(target: str) -> tuple[dg.AssetsDefinition, dg.AssetChecksDefinition]:
    """The asset `triton_repository/<target>` and its check."""

    @dg.asset(
        key=["triton_repository", target],
        deps=[dg.AssetKey(["champion", target]), dg.AssetKey(["serving_configuration", target])],
        partitions_def=models,
        group_name="serving",
        kinds={"file"},
        owners=OWNERS,
        description="The champion as a numbered, immutable release that answers text, proven on a real Triton server.",
        tags={"target": target},
        op_tags=placement(target),
    )
    @closing_tracking
    def triton_repository(
        context: dg.AssetExecutionContext,
        workspace: dg.ResourceParam[Workspace],
        tracker: dg.ResourceParam[Tracker],
    ) -> dg.MaterializeResult:
        entry = workspace.entry(context.partition_key)
        published = publish_champion(workspace, tracker, entry, target, dagster_run=context.run.run_id)
        release = published.release
        champion = workspace.store.current(Champion, f"champion/{target}/{entry.name}")
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
                "repository": dg.MetadataValue.path(str(workspace.repository(target))),
                "query": dg.MetadataValue.md(f"`{query_command(workspace, entry.name, target)}`"),
                **linked(**pages),
                "contents": file_table(release.files),
            },
            data_version=dg.DataVersion(release.content_digest),
        )

    @dg.asset_check(asset=triton_repository, partitions_def=models, op_tags=placement(target))
    def served_answers_equal(
        context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.AssetCheckResult:
        """What the newest release answered on a real server was what PyTorch answers to the same texts."""
        repository, model = workspace.repository(target), context.partition_key
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
            severity=dg.AssetCheckSeverity.WARN,  # an unproven release is never pointed to
            description=description,
            metadata=_proof_metadata(proof),
        )

    return triton_repository, served_answers_equal


def _proof_metadata(proof: Proof | None) -> dict[str, dg.MetadataValue | str | int | float | list[str]]:
    """What the server answered, compared with PyTorch, by protocol and way of asking; nothing without a proof."""
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


def query_command(workspace: Workspace, model: str, target: str) -> str:
    """How to ask a model of that repository."""
    checkpoint = workspace.store.current(Checkpoint, f"checkpoint/{model}")
    example = TASKS[checkpoint.task].example(checkpoint.settings)
    return f"{_where(workspace)}refinery query {model} {example}{_target(target)}"


def serve_command(workspace: Workspace, target: str) -> str:
    """How to serve that repository."""
    return f"{_where(workspace)}refinery serve{_target(target)}"


def _where(workspace: Workspace) -> str:
    folder = workspace.triton.repositories
    return f"REFINERY_TRITON_REPOSITORIES={shlex.quote(str(folder))} " if folder is not None else ""


def _target(target: str) -> str:
    return "" if target == "cpu" else f" --target {target}"
