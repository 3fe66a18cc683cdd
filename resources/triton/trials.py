"""Measure settings under load: a real server loads one release again and again, each time with another setting.

A release of the `python` flavour is loaded by an embedded server of its own. A release of the `native` flavour needs a
backend that only the configured servers have. The first of them loads it in addition to the models that it serves,
under names that no published release has.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from resources.artifacts.records import ServingSetting, ServingTrial
from resources.errors import ServerError
from resources.settings.triton import TritonSettings
from resources.storage.locations import Location
from resources.triton.client import TextClient
from resources.triton.config import engine_config, front_config, write_config
from resources.triton.files import (
    bring_in,
    clear_disk_errors,
    discard,
    replace_file,
    repository_lock,
    staging_folder,
    staging_root,
)
from resources.triton.fleet import Fleet
from resources.triton.layout import CONFIG, internal_name, internal_names
from resources.triton.load import WARM_UP_SECONDS, closed_loop, server_statistics, statistics_since
from resources.triton.publish import sweep
from resources.triton.release import ReleasePlan, check_plan
from resources.triton.server import EmbeddedServer
from resources.triton.stage import stage, stage_alias

if TYPE_CHECKING:
    from resources.pipelines.base import Item

#: The 99th percentile of fewer requests says nothing.
FEWEST_REQUESTS = 50
#: The figures of a shorter trial say nothing.
SHORTEST_SECONDS = 0.5
#: The number of a release that exists for trials only. Published releases have numbers from 1.
_NUMBER = 0

#: A function that takes a setting, the seconds of its trial and the stage of the search, and returns the trial.
Measure = Callable[[ServingSetting, float, int], ServingTrial]


@contextmanager
def embedded_trials(
    plan: ReleasePlan, settings: TritonSettings, items: Sequence[Item], clients: int, log: Path
) -> Iterator[Measure]:
    """Yield a function that measures settings on an embedded server, which holds only the plan's release.

    Raises:
        ServerError: The embedded server cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="refinery-serving-") as scratch:
        root, pipeline = Path(scratch) / "models", internal_name(plan.model, _NUMBER, "pipeline")
        root.mkdir()
        stage(plan, _NUMBER, root)
        with (
            EmbeddedServer(root, settings, models=[plan.model], log=log) as server,
            server.client() as client,
        ):

            def serve_with(setting: ServingSetting) -> None:
                write_config(front_config(replace(plan, serving=setting), _NUMBER), root / pipeline / CONFIG)
                client.load(pipeline)

            yield _measuring(client, plan, plan.model, pipeline, items, clients, serve_with)


@contextmanager
def configured_trials(
    plan: ReleasePlan, settings: TritonSettings, repository: Location, items: Sequence[Item], clients: int
) -> Iterator[Measure]:
    """Yield a function that measures settings on the first configured server, which goes on serving its models.

    The server has to run in explicit model control. The repository's lock is held until the context ends. The next
    publisher removes what a killed search leaves behind.

    Raises:
        ReleaseError: No release can be made of the plan, or the repository cannot be written.
        ServerError: The server does not answer, or cannot load the release.
    """
    check_plan(plan)
    alias, engine = internal_name(plan.model, _NUMBER, "proof"), internal_name(plan.model, _NUMBER, "engine")
    with clear_disk_errors(plan.model, repository, plan.engine.size_bytes):
        repository.mkdir(parents=True, exist_ok=True)
        with repository_lock(repository), Fleet(replace(settings, servers=settings.servers[:1])) as fleet:
            fleet.require_ready()
            fleet.retire(sweep(repository, finish=False, later=True))
            names = [alias]
            try:
                with staging_folder(repository) as scratch:
                    names += internal_names(stage(plan, _NUMBER, scratch))
                    stage_alias(plan, _NUMBER, alias, scratch)
                    for name in reversed(names):
                        bring_in(scratch / name, repository / name)
                fleet.hold(repository, alias, _NUMBER)

                def serve_with(setting: ServingSetting) -> None:
                    with staging_folder(repository) as scratch:
                        write_config(engine_config(replace(plan, serving=setting), _NUMBER), scratch / CONFIG)
                        replace_file(scratch / CONFIG, repository / engine / CONFIG)
                    fleet.clients[0].load(engine)

                yield _measuring(fleet.clients[0], plan, alias, engine, items, clients, serve_with)
            finally:
                fleet.retire(names)
                for name in names:
                    discard(repository / name, staging_root(repository))


def _measuring(
    client: TextClient,
    plan: ReleasePlan,
    model: str,
    counted: str,
    items: Sequence[Item],
    clients: int,
    serve_with: Callable[[ServingSetting], None],
) -> Measure:
    """Return a function that measures settings of the model on the client's server, which has loaded the plan.

    `counted` is the internal model that runs the engine. `serve_with` has the server load that model again, with
    another setting.
    """
    address, connection = client.address, client.connection
    contract, loaded = client.contract(model), plan.serving

    def measure(setting: ServingSetting, seconds: float, number: int) -> ServingTrial:
        nonlocal loaded
        trial = ServingTrial(setting=setting, stage=number)
        started = time.monotonic()
        try:
            if setting != loaded:
                serve_with(setting)
                loaded = setting
            before = server_statistics(address, [counted], connection)
            # The time of loading is part of the trial's time, because the limit of the search includes it.
            left = seconds - (time.monotonic() - started) - WARM_UP_SECONDS / 2
            result = closed_loop(
                address,
                model,
                contract,
                items,
                concurrency=clients,
                seconds=max(left, SHORTEST_SECONDS),
                warm_up_seconds=WARM_UP_SECONDS / 2,
                seed=number,
                connection=connection,
            )
            after = server_statistics(address, [counted], connection)
        except ServerError as error:
            return trial.model_copy(update={"reason": str(error)})
        if result.requests < FEWEST_REQUESTS:
            few = f"{result.requests} requests in {result.seconds:.1f} s are too few to say anything"
            return trial.model_copy(update={"requests": result.requests, "reason": few})
        if result.failures:
            return trial.model_copy(update={"reason": f"{result.failures} requests failed: {result.first_error}"})
        figures = {
            "requests": result.requests,
            "throughput_per_s": result.throughput,
            "p50_ms": result.p50_ms,
            "p99_ms": result.p99_ms,
            "mean_batch": statistics_since(before, after)[counted].mean_batch,
        }
        return trial.model_copy(update=figures)

    return measure
