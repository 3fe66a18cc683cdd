"""Making a release of the champion: on the embedded server, on a configured one, or staged without proof."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from resources.artifacts.records import Champion, Checkpoint, Engine, EvaluationSet
from resources.catalog import ModelEntry
from resources.errors import ServerError
from resources.evaluation.reference import read_evaluation_set
from resources.tasks import TASKS
from resources.triton.client import TextClient
from resources.triton.files import discard, staging_folder, staging_root
from resources.triton.layout import internal_name
from resources.triton.proof import Exam, Proof, prove
from resources.triton.publish import Published, Steps, publish
from resources.triton.release import Release, ReleasePlan
from resources.triton.server import EmbeddedServer
from resources.triton.stage import stage_alias
from resources.workspace import Workspace


def make_release(
    workspace: Workspace,
    entry: ModelEntry,
    checkpoint: Checkpoint,
    engine: Engine,
    evaluation: EvaluationSet,
    champion: Champion,
    *,
    dagster_run: str,
) -> Published:
    """Publish the champion's engine, proven. Raises ReleaseError, ServerError; what served before serves on."""
    store, settings = workspace.store, workspace.triton
    plan = ReleasePlan(
        model=entry.name,
        target=champion.target,
        flavour=settings.flavour,
        checkpoint=checkpoint,
        checkpoint_folder=store.folder(checkpoint),
        engine=engine,
        engine_folder=store.folder(engine),
        max_batch_size=entry.max_batch_size,
        threads=workspace.threads(entry),
        lineage={"refinery_dagster_run": dagster_run, "refinery_champion": champion.digest},
    )

    def exam() -> Exam:
        task, gates = TASKS[entry.task], entry.accuracy_gates()
        texts, reference = read_evaluation_set(store.folder(evaluation))
        return Exam(
            output=task.output,
            texts=texts,
            reference=reference,
            verdict=lambda expected, found: task.verdict(expected, found, gates),
            max_batch_size=entry.max_batch_size,
        )

    def prove_embedded(staged: Path, release: Release) -> Proof:
        log = workspace.log(entry.name, f"triton-{champion.target}")
        with EmbeddedServer(staged, settings, models=[release.model], log=log) as server:
            return prove(exam(), release.model, grpc=server.grpc_address, http=server.http_address)

    if settings.server is not None:
        steps = _server_steps(settings.server, settings.server_http, exam)
    elif settings.flavour == "python":
        steps = Steps(prove=prove_embedded)
    else:  # the embedded server has no native backend, so there is nobody to prove it on
        steps = Steps()
    return publish(plan, workspace.repository(champion.target), steps)


def _server_steps(grpc: str, http: str | None, exam: Callable[[], Exam]) -> Steps:
    """Proving on a running server in explicit control that serves the repository itself, and telling it to load."""

    def prove_inside(repository: Path, release: Release, plan: ReleasePlan) -> Proof:
        """Through a second ensemble, which is there for the proof alone."""
        name = internal_name(release.model, release.number, "proof")
        with TextClient(grpc) as client:
            if not client.is_live():
                raise ServerError(
                    f"No Triton answers gRPC at {grpc} (REFINERY_TRITON_GRPC). Start it, or unset the variable."
                )
            try:
                with staging_folder(repository) as scratch:
                    stage_alias(plan, release.number, name, scratch).rename(repository / name)
                client.load(name)
                return prove(exam(), name, grpc=grpc, http=http)
            finally:
                retire([name])
                discard(repository / name, staging_root(repository))

    def announce(release: Release) -> None:
        try:
            with TextClient(grpc) as client:
                client.load(release.model)
        except ServerError as error:
            raise ServerError(
                f"{release.model}: release {release.number} is in the repository, and the server does not serve it "
                f"yet; what served before does. Optimize again to have it loaded. {error}"
            ) from error

    def retire(names: list[str]) -> None:
        with TextClient(grpc) as client:
            for name in names:
                with suppress(ServerError):  # most were never loaded
                    client.unload(name)

    return Steps(prove_inside=prove_inside, announce=announce, retire=retire)
