"""Making a release of the champion: on the embedded server, on a configured one, or staged without proof."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from resources.artifacts.records import Champion, Checkpoint, Engine, EvaluationSet
from resources.catalog import ModelEntry
from resources.errors import ServerError
from resources.evaluation.reference import read_evaluation_set
from resources.tasks import TASKS
from resources.triton.client import TextClient
from resources.triton.config import public_config, write_config
from resources.triton.layout import CONFIG, internal_name
from resources.triton.proof import Exam, Proof, prove
from resources.triton.publish import Published, Steps, publish
from resources.triton.release import Release, ReleasePlan
from resources.triton.server import EmbeddedServer
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

    def prove_inside(repository: Path, release: Release, plan: ReleasePlan) -> Proof:
        assert settings.server is not None
        return _prove_on(settings.server, settings.server_http, repository, release, plan, exam())

    def announce(release: Release) -> None:
        assert settings.server is not None
        with TextClient(settings.server) as client:
            client.load(release.model)

    if settings.server is not None:
        steps = Steps(prove_inside=prove_inside, announce=announce)
    elif settings.flavour == "python":
        steps = Steps(prove=prove_embedded)
    else:  # the embedded server has no native backend, so there is nobody to prove it on
        steps = Steps()
    return publish(plan, workspace.repository(champion.target), steps)


def _prove_on(grpc: str, http: str | None, repository: Path, release: Release, plan: ReleasePlan, exam: Exam) -> Proof:
    """Prove through a temporary ensemble on a running server that serves this repository in explicit mode."""
    name = internal_name(release.model, release.number, "proof")
    parts = [internal_name(release.model, release.number, part) for part in ("tokenizer", "engine")]
    with TextClient(grpc) as client:
        if not client.is_live():
            raise ServerError(
                f"No Triton answers gRPC at {grpc} (REFINERY_TRITON_GRPC). Start it, or unset the variable."
            )
        try:
            with tempfile.TemporaryDirectory(dir=repository.parent, prefix=f".{repository.name}.proof-") as scratch:
                folder = Path(scratch) / name
                (folder / str(release.number)).mkdir(parents=True)
                write_config(public_config(plan, release.number, name), folder / CONFIG)
                (folder / str(release.number) / "placeholder").touch()
                folder.rename(repository / name)
            client.load(name)
            proof = prove(exam, name, grpc=grpc, http=http)
        except BaseException:
            _forget(client, [name, *parts])
            raise
        else:
            _forget(client, [name] if proof.passed else [name, *parts])
            return proof
        finally:
            shutil.rmtree(repository / name, ignore_errors=True)


def _forget(client: TextClient, models: list[str]) -> None:
    for model in models:
        with suppress(ServerError):
            client.unload(model)
