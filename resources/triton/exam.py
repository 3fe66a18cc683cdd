"""The exam that a release must pass before the pointer names it, and the steps that put it to running servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from resources.storage.locations import Location
from resources.tasks import TASKS, Gates, Metrics
from resources.tasks.base import broken_answers
from resources.triton.asking import ask
from resources.triton.client import Contract
from resources.triton.files import bring_in, discard, staging_folder, staging_root
from resources.triton.fleet import Fleet
from resources.triton.layout import internal_name
from resources.triton.proof import ODD_TEXTS, Exam, Proof, prove
from resources.triton.publish import Steps
from resources.triton.release import RESULT, Release, ReleasePlan
from resources.triton.stage import stage_alias

if TYPE_CHECKING:
    from resources.pipelines.base import Item

#: The pause after a proof on running servers. A proof sends many requests, and the users' requests that they delayed
#: are answered in this time, before the release changes.
REST_SECONDS = 3.0


def make_exam(plan: ReleasePlan, gates: Gates, items: Sequence[Item], baseline: Sequence[Any]) -> Exam:
    """Return the requests that a server has to answer, and the verdict on its answers.

    Args:
        plan: The release to prove.
        gates: The gates of the task's metrics.
        items: The items of the requests.
        baseline: PyTorch's answers to the items.
    """
    task, settings = TASKS[plan.checkpoint.task], plan.checkpoint.settings

    def verdict(indices: Sequence[int], answers: Sequence[Any]) -> tuple[Metrics, list[str]]:
        broken = broken_answers([baseline[index] for index in indices], answers)
        if broken:
            return {}, [broken]
        # Some items are sent several times. The answers are split into rounds that hold each item at most once.
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
            # In a batch with other rows than when it was measured, a borderline answer may change. One item may do so.
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
    """Return whether the item's texts are within the release's length limit."""
    return max(len(text.encode()) for text in item.values()) <= plan.limits.text_bytes


def fleet_steps(fleet: Fleet, exam: Callable[[], Exam], home: Location, *, http: Sequence[str] = ()) -> Steps:
    """Return the steps that prove a release on running servers and have the servers take it up.

    The first server gets the whole exam, over gRPC and, if `http` has its address, over HTTP. The others get the
    few short requests of `resources.triton.asking.ask`.

    Args:
        fleet: The running servers.
        exam: Returns the exam. It is called once for each proof.
        home: The repository that the servers serve.
        http: The HTTP addresses of the servers, in the fleet's order.
    """

    def prove_inside(repository: Location, release: Release, plan: ReleasePlan) -> Proof:
        """Prove the release through a second ensemble that exists for the proof only."""
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
