"""What a published release does under load on a real server, by the number of clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from resources.accuracy.evaluation_set import read_evaluation_set
from resources.artifacts.fingerprint import Fingerprint, code_versions
from resources.artifacts.records import Checkpoint, EvaluationSet, LoadLevel, ServingReport
from resources.artifacts.store import Made
from resources.catalog.entries import ModelEntry
from resources.errors import ReleaseError, ServerError
from resources.machine.device import describe_device
from resources.machine.lock import benchmarking
from resources.settings.connection import PLAIN, Connection
from resources.settings.workspace import Workspace
from resources.triton.client import TextClient
from resources.triton.environment import is_installed, requirements
from resources.triton.layout import current_release
from resources.triton.load import closed_loop, server_statistics, statistics_since
from resources.triton.mirror import served_folder
from resources.triton.mix import load_of, request_mix
from resources.triton.perf_analyzer import find_perf_analyzer, run_perf_analyzer
from resources.triton.release import Release
from resources.triton.server import EmbeddedServer

if TYPE_CHECKING:
    from resources.pipelines.base import Item

#: What a report depends on, beside the release.
CODE = (
    "resources.triton.serving_report",
    "resources.triton.load",
    "resources.triton.mix",
    "resources.triton.launch",
)
_BY_HAND = "measure one of yours with `refinery load --url`"
#: Of a level's time, what warms it up.
_WARM_UP_SHARE = 0.15


def levels_of(clients: int) -> tuple[int, ...]:
    """Numbers of clients to measure with: one, the square root, and the whole load."""
    return tuple(sorted({1, round(clients**0.5), clients}))


def measure_load(
    address: str,
    model: str,
    items: Sequence[Item],
    levels: Sequence[int],
    seconds: float,
    connection: Connection = PLAIN,
) -> list[LoadLevel]:
    """The model under closed loops of tritonclient's asyncio client over gRPC, one a level, `seconds` in all.

    Raises ServerError; ReleaseError where requests fail.
    """
    with TextClient(address, connection=connection) as client:
        contract, steps = client.contract(model), client.steps(model)
    engines = steps[-1:]
    share, found = seconds / len(levels), []
    for clients in levels:
        warm_up = share * _WARM_UP_SHARE
        # A model that counts is asked before and after; what the warm-up did is in it too, and changes no ratio.
        before = server_statistics(address, [model, *engines], connection)
        result = closed_loop(
            address,
            model,
            contract,
            items,
            concurrency=clients,
            seconds=share - warm_up,
            warm_up_seconds=warm_up,
            connection=connection,
        )
        if result.failures:
            raise ReleaseError(
                f"{model}: {result.failures} of {result.failures + result.requests} requests failed under {clients} "
                f"clients: {result.first_error}"
            )
        done = statistics_since(before, server_statistics(address, [model, *engines], connection))
        engine = done[engines[0]] if engines else None
        asked = done[model].requests
        found.append(
            LoadLevel(
                clients=clients,
                tool="tritonclient",
                requests=result.requests,
                throughput_per_s=result.throughput,
                p50_ms=result.p50_ms,
                p99_ms=result.p99_ms,
                mean_batch=engine.mean_batch if engine else 0.0,
                batches_per_request=engine.executions / asked if engine and asked else 0.0,
            )
        )
    return found


def measure_with_perf_analyzer(
    address: str,
    model: str,
    items: Sequence[Item],
    levels: Sequence[int],
    seconds: float,
    connection: Connection = PLAIN,
) -> list[LoadLevel]:
    """The same by NVIDIA's perf_analyzer; nothing where it is not installed. Raises ServerError.

    It takes headers by its command line alone, which every user of the machine can read, so it is not asked to
    measure a server that wants any. It calls no restricted API, so it needs no key.
    """
    program = find_perf_analyzer()
    if program is None or connection.headers:
        return []
    return run_perf_analyzer(program, address, model, items, levels, seconds / len(levels), connection)


def make_serving_report(
    workspace: Workspace, entry: ModelEntry, target: str, checkpoint: Checkpoint, evaluation: EvaluationSet
) -> Made[ServingReport]:
    """The report on the release that is pointed to. Raises ReleaseError, ServerError.

    A release of the `python` flavour is measured on an embedded server of its own, because the configured ones have
    users. One of the `native` flavour runs nowhere else, so the first of those is asked.
    """
    repository = workspace.repository(target)
    release, serving = current_release(repository, entry.name), entry.serving
    levels = levels_of(serving.clients)
    made_of = Fingerprint.of(
        "serving_report",
        model=entry.name,
        release=[release.number, release.content_digest] if release is not None else None,
        load=load_of(evaluation, checkpoint),
        levels=levels,
        seconds=serving.benchmark_seconds,
        device=describe_device(target),
        perf_analyzer=str(find_perf_analyzer() or ""),
        server=workspace.triton.servers[:1] if release is not None and release.flavour == "native" else requirements(),
        code=code_versions(*CODE),
    )
    record = ServingReport(
        digest=made_of.digest,
        model=entry.name,
        target=target,
        release=release.number if release is not None else 0,
        engine=release.engine if release is not None else "",
        status="skipped",
        device=describe_device(target),
    )

    why_not = _why_not(workspace, release, serving.benchmark_seconds)

    def make(folder: Path) -> ServingReport:
        del folder
        if why_not:
            return record.model_copy(update={"reason": why_not})
        workspace.store.require_whole(evaluation)
        known = read_evaluation_set(workspace.store.folder(evaluation))
        items = request_mix(known.items, checkpoint, workspace.store.folder(checkpoint))
        seconds = serving.benchmark_seconds
        with benchmarking(), _server(workspace, release, target) as client:
            version, reason = client.version(), ""
            found = measure_load(client.address, entry.name, items, levels, seconds, client.connection)
            try:
                found += measure_with_perf_analyzer(
                    client.address, entry.name, items, levels, seconds, client.connection
                )
            except ServerError as error:  # it is an extra
                reason = str(error)
        return record.model_copy(
            update={"status": "measured", "reason": reason, "server": version, "levels": tuple(found)}
        )

    return workspace.store.get_or_make(ServingReport, made_of, make, light=bool(why_not))


def _why_not(workspace: Workspace, release: Release | None, seconds: float) -> str:
    """Why the release cannot be measured; empty where it can."""
    if release is None:
        return "no release is published yet"
    if seconds == 0:
        return "benchmark_seconds is 0"
    settings = workspace.triton
    if release.flavour == "python":
        return "" if is_installed(settings.environment) else f"there is no embedded server; {_BY_HAND}"
    if not settings.servers:
        return f"no server with Triton's own backends is configured (REFINERY_TRITON_GRPC); {_BY_HAND}"
    if not settings.driven:
        return f"servers without model control serve it once they are started anew; {_BY_HAND} then"
    return ""


@contextmanager
def _server(workspace: Workspace, release: Release | None, target: str) -> Iterator[TextClient]:
    """A connection to the server that the release is measured on. Raises ServerError where that serves another."""
    assert release is not None, "else there is nothing to measure"
    if release.flavour == "python":
        folder = served_folder(workspace.repository(target), workspace.copies)
        log = workspace.log(release.model, f"load-{target}")
        with (
            EmbeddedServer(folder, workspace.triton, models=[release.model], log=log) as server,
            server.client() as client,
        ):
            yield client
        return
    address = workspace.triton.servers[0]
    with TextClient(address, connection=workspace.triton.connection_to(address)) as client:
        number = client.release_of(release.model)
        if number != release.number:
            served = f"release {number}" if number else "no release"
            raise ServerError(
                f"{release.model}: the server at {client.address} serves {served} and not release {release.number}, "
                "which is to be measured. Have it load that, or set benchmark_seconds to 0."
            )
        yield client
