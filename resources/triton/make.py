"""Making a release of the champion: on the embedded server, on a configured one, or staged without proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.artifacts.records import Champion, Checkpoint, Engine, EvaluationSet, ThreadSetting
from resources.catalog import ModelEntry
from resources.errors import ServerError
from resources.evaluation.reference import read_evaluation_set
from resources.tasks import TASKS, Gates, Metrics
from resources.tasks.base import broken_answers
from resources.triton.client import Contract, TextClient
from resources.triton.files import discard, staging_folder, staging_root
from resources.triton.layout import CONFIG, called_internals, internal_name
from resources.triton.proof import ODD_TEXTS, Exam, Proof, prove
from resources.triton.publish import Published, Steps, publish
from resources.triton.release import RESULT, Release, ReleasePlan
from resources.triton.server import EmbeddedServer
from resources.triton.stage import stage_alias
from resources.workspace import Workspace

if TYPE_CHECKING:
    from resources.pipelines.base import Item


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
    threads = champion.setting or ThreadSetting(threads=workspace.threads(entry))
    plan = ReleasePlan(
        model=entry.name,
        target=champion.target,
        flavour=settings.flavour,
        checkpoint=checkpoint,
        checkpoint_folder=store.folder(checkpoint),
        engine=engine,
        engine_folder=store.folder(engine),
        max_batch_size=entry.max_batch_size,
        threads=threads.threads,
        spinning=threads.spinning,
        cores=workspace.threads(entry),
        lineage={"refinery_dagster_run": dagster_run, "refinery_champion": champion.digest},
    )

    def exam() -> Exam:
        known = read_evaluation_set(store.folder(evaluation))
        return make_exam(plan, entry.accuracy_gates(), known.items, known.reference)

    def prove_embedded(staged: Path, release: Release) -> Proof:
        log = workspace.log(entry.name, f"triton-{champion.target}")
        with EmbeddedServer(staged, settings, models=[release.model], log=log) as server:
            return prove(exam(), release.model, grpc=server.grpc_address, http=server.http_address)

    if settings.server is not None:
        steps = _server_steps(settings.server, settings.server_http, exam, workspace.repository(champion.target))
    elif settings.flavour == "python":
        steps = Steps(prove=prove_embedded)
    else:  # the embedded server has no native backend, so there is nobody to prove it on
        steps = Steps()
    return publish(plan, workspace.repository(champion.target), steps)


def make_exam(plan: ReleasePlan, gates: Gates, items: Sequence[Item], reference: Sequence[Any]) -> Exam:
    """What a server has to answer. reference: PyTorch's answers to the items."""
    task, settings = TASKS[plan.checkpoint.task], plan.checkpoint.settings

    def verdict(indices: Sequence[int], answers: Sequence[Any]) -> tuple[Metrics, list[str]]:
        broken = broken_answers([reference[index] for index in indices], answers)
        if broken:
            return {}, [broken]
        # Some are asked several times over: every round has each of its items once.
        rounds: list[dict[int, Any]] = [{}]
        for index, answer in zip(indices, answers, strict=True):
            place = next((one for one in rounds if index not in one), None)
            if place is None:
                rounds.append(place := {})
            place[index] = answer
        first: Metrics = {}
        missed: list[str] = []
        for one in rounds:
            asked, expected = [items[index] for index in one], [reference[index] for index in one]
            metrics = task.compare(settings, asked, expected, list(one.values()))
            # In other company than when it was measured, an answer at the edge may fall on the other side: one may.
            allowed = gates.for_some(len(one) / len(items), chance=1 / len(items))
            missed += [miss for miss in task.misses(task.gate_names(settings), metrics, allowed) if miss not in missed]
            first = first or metrics
        return first, missed

    return Exam(
        contract=Contract(plan.texts, RESULT if plan.structured else plan.output, plan.structured),
        items=items,
        verdict=verdict,
        max_batch_size=plan.max_batch_size,
        odd=[item for text in ODD_TEXTS for item in task.odd_items(settings, text)],
        refused=task.refused_items(settings),
    )


def _server_steps(grpc: str, http: str | None, exam: Callable[[], Exam], home: Path) -> Steps:
    """Proving on a running server in explicit control that serves the repository `home`, and telling it to load."""

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
                client.load(name, called_internals((repository / name / CONFIG).read_text(encoding="utf-8")))
                return prove(exam(), name, grpc=grpc, http=http)
            finally:
                retire([name])
                discard(repository / name, staging_root(repository))

    def announce(release: Release) -> None:
        try:
            pointer = home / release.model / CONFIG
            with TextClient(grpc) as client:
                client.load(release.model, called_internals(pointer.read_text(encoding="utf-8")))
        except ServerError as error:
            raise ServerError(
                f"{release.model}: release {release.number} is in the repository, and the server does not serve it "
                f"yet; what served before does. Optimize again to have it loaded. {error}"
            ) from error

    def retire(names: list[str]) -> None:
        with TextClient(grpc) as client:
            client.unload_all(names)

    return Steps(prove_inside=prove_inside, announce=announce, retire=retire)
