"""Making a release of the champion: proven on the embedded server, on configured ones, or staged without proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.accuracy.evaluation_set import read_evaluation_set
from resources.artifacts.records import Champion, Checkpoint, Engine, EvaluationSet, ServingConfiguration
from resources.catalog.entries import ModelEntry
from resources.settings.triton import TritonSettings
from resources.settings.workspace import Workspace
from resources.storage.locations import Location
from resources.tasks import TASKS, Gates, Metrics
from resources.tasks.base import broken_answers
from resources.triton.asking import ask
from resources.triton.client import Contract
from resources.triton.files import bring_in, discard, staging_folder, staging_root
from resources.triton.fleet import Fleet
from resources.triton.layout import internal_name
from resources.triton.proof import ODD_TEXTS, Exam, Proof, prove
from resources.triton.publish import Published, Steps, publish
from resources.triton.release import RESULT, Release, ReleasePlan
from resources.triton.server import EmbeddedServer
from resources.triton.stage import stage_alias

if TYPE_CHECKING:
    from resources.pipelines.base import Item

#: After a proof on running servers: those whom its many requests kept waiting are answered before the release changes.
REST_SECONDS = 3.0


def make_release(
    workspace: Workspace,
    entry: ModelEntry,
    checkpoint: Checkpoint,
    engine: Engine,
    evaluation: EvaluationSet,
    champion: Champion,
    configuration: ServingConfiguration,
    *,
    dagster_run: str,
) -> Published:
    """Publish the champion's engine, proven. Raises ReleaseError, ServerError; what served before serves on."""
    store, settings = workspace.store, workspace.triton
    lineage = {"refinery_dagster_run": dagster_run, "refinery_champion": champion.digest}
    plan = plan_release(workspace, entry, checkpoint, engine, champion, configuration, lineage)

    def exam() -> Exam:
        store.require_whole(evaluation)
        known = read_evaluation_set(store.folder(evaluation))
        return make_exam(plan, entry.accuracy_gates(), known.items, known.baseline)

    def prove_embedded(staged: Path, release: Release) -> Proof:
        log = workspace.log(entry.name, f"triton-{champion.target}")
        with EmbeddedServer(staged, settings, models=[release.model], log=log) as server:
            return prove(exam(), release.model, grpc=server.grpc_address, http=server.http_address)

    repository = workspace.repository(champion.target)
    if settings.driven:
        with Fleet(settings) as fleet:
            return publish(plan, repository, fleet_steps(fleet, exam, repository, http=settings.servers_http))
    # Triton's own backends are not embedded, so there is nobody to prove such a release on.
    steps = Steps(prove=prove_embedded) if is_provable(settings) else Steps()
    published = publish(plan, repository, steps)
    if settings.servers and published.release.status == "published":
        advice = f"{' and '.join(settings.servers)}, without model control, serves it once it is started anew."
        return replace(published, advice=f"{published.advice} {advice}".strip())
    return published


def plan_release(
    workspace: Workspace,
    entry: ModelEntry,
    checkpoint: Checkpoint,
    engine: Engine,
    champion: Champion,
    configuration: ServingConfiguration,
    lineage: dict[str, str],
) -> ReleasePlan:
    """What the champion's release is to hold."""
    return ReleasePlan(
        model=entry.name,
        target=champion.target,
        flavour=workspace.triton.flavour,
        checkpoint=checkpoint,
        checkpoint_folder=workspace.store.folder(checkpoint),
        engine=engine,
        engine_folder=workspace.store.folder(engine),
        max_batch_size=entry.max_batch_size,
        serving=configuration.setting,
        response_cache=entry.serving.response_cache,
        rate_limiter=entry.serving.rate_limiter,
        limits=entry.limits,
        lineage=lineage,
    )


def is_provable(settings: TritonSettings) -> bool:
    """Whether a server proves what is published: the embedded one, or those that are configured."""
    return bool(settings.driven) or settings.flavour == "python"


def make_exam(plan: ReleasePlan, gates: Gates, items: Sequence[Item], baseline: Sequence[Any]) -> Exam:
    """What a server has to answer. baseline: PyTorch's answers to the items."""
    task, settings = TASKS[plan.checkpoint.task], plan.checkpoint.settings

    def verdict(indices: Sequence[int], answers: Sequence[Any]) -> tuple[Metrics, list[str]]:
        broken = broken_answers([baseline[index] for index in indices], answers)
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
            asked, expected = [items[index] for index in one], [baseline[index] for index in one]
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
        odd=[item for text in ODD_TEXTS for item in task.odd_items(settings, text) if _is_allowed(item, plan)],
        refused=task.refused_items(settings),
    )


def _is_allowed(item: Item, plan: ReleasePlan) -> bool:
    """Whether the release takes texts of such a length."""
    return max(len(text.encode()) for text in item.values()) <= plan.limits.text_bytes


def fleet_steps(fleet: Fleet, exam: Callable[[], Exam], home: Location, *, http: Sequence[str] = ()) -> Steps:
    """Proving on running servers that serve the repository `home`, and having them take the release up.

    The first is asked everything, over gRPC and, where `http` has its address, HTTP; the others a question each.
    """

    def prove_inside(repository: Location, release: Release, plan: ReleasePlan) -> Proof:
        """Through a second ensemble, which is there for the proof alone."""
        name = internal_name(release.model, release.number, "proof")
        try:
            with staging_folder(repository) as scratch:
                bring_in(stage_alias(plan, release.number, name, scratch), repository / name)
            fleet.hold(repository, name, release.number)
            for client in fleet.clients[1:]:
                ask(client, repository, release, name)
            first = fleet.clients[0]
            proof = prove(exam(), name, grpc=first.address, http=http[0] if http else None, connection=first.connection)
            time.sleep(REST_SECONDS)
            return proof
        finally:
            fleet.retire([name])
            discard(repository / name, staging_root(repository))

    return Steps(
        ready=fleet.require_ready,
        prove_inside=prove_inside,
        announce=lambda release: fleet.take_up(home, release),
        leave=fleet.leave,
        go_back=lambda model: fleet.go_back(home, model),
        retire=fleet.retire,
    )
