"""The release: published to a target's Triton repository once a real server has answered as PyTorch does."""

import dagster as dg

from assets.materialization import OWNERS
from assets.partitions import models
from resources.artifacts.records import Champion, Checkpoint, Engine, EvaluationSet
from resources.tracking import Tracker
from resources.triton.layout import current_release
from resources.triton.make import make_release
from resources.workspace import Workspace


def triton_repository_assets(target: str) -> tuple[dg.AssetsDefinition, dg.AssetChecksDefinition]:
    """The asset `triton_repository/<target>` and its check."""

    @dg.asset(
        key=["triton_repository", target],
        deps=[dg.AssetKey(["champion", target])],
        partitions_def=models,
        group_name="serving",
        kinds={"triton"},
        owners=OWNERS,
        description="The champion as a numbered, immutable release that answers text, proven on a real Triton server.",
        tags={"target": target},
    )
    def triton_repository(
        context: dg.AssetExecutionContext,
        workspace: dg.ResourceParam[Workspace],
        tracker: dg.ResourceParam[Tracker],
    ) -> dg.MaterializeResult:
        entry, store = workspace.entry(context.partition_key), workspace.store
        champion = store.current(Champion, f"champion/{target}/{entry.name}")
        checkpoint = store.current(Checkpoint, f"checkpoint/{entry.name}")
        engine = store.current(Engine, f"engines/{target}/{champion.engine}/{entry.name}")
        evaluation = store.current(EvaluationSet, f"evaluation_set/{entry.name}")
        published = make_release(
            workspace, entry, checkpoint, engine, evaluation, champion, dagster_run=context.run.run_id
        )
        release = published.release
        if published.changed and release.status == "published":
            tracker.release(checkpoint, champion, release.number)
        return dg.MaterializeResult(
            metadata={
                "release": f"release {release.number} ({release.engine})",
                "reused": dg.MetadataValue.bool(not published.changed),
                "status": release.status,
                "advice": published.advice or "–",
                "flavour": release.flavour,
                "revision": release.revision,
                "content_digest": release.content_digest,
                "proof": dg.MetadataValue.json(release.proof.model_dump() if release.proof else {}),
                "repository": dg.MetadataValue.path(workspace.repository(target)),
                "query": dg.MetadataValue.md(f'`refinery query {entry.name} "any text"`'),
            },
            data_version=dg.DataVersion(release.content_digest),
        )

    @dg.asset_check(asset=triton_repository, partitions_def=models)
    def served_answers_equal(
        context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.AssetCheckResult:
        """What the pointed-to release answered on a real server was what PyTorch answers to the same texts."""
        release = current_release(workspace.repository(target), context.partition_key)
        proof = release.proof if release is not None else None
        return dg.AssetCheckResult(
            passed=proof is not None and proof.passed,
            description=f"release {release.number}" if release is not None else "no release is served",
            metadata={"proof": dg.MetadataValue.json(proof.model_dump() if proof else {})},
        )

    return triton_repository, served_answers_equal
