"""Measure a published release under load on a real server, by the number of clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from resources.accuracy.evaluation_set import read_evaluation_set
from resources.artifacts.records import Checkpoint, EvaluationSet, LoadLevel, ServingReport
from resources.catalog.entries import ModelEntry
from resources.errors import ReleaseError, ServerError
from resources.machine.lock import benchmarking
from resources.settings.connection import PLAIN, Connection
from resources.settings.workspace import Workspace
from resources.triton.client import TextClient
from resources.triton.environment import is_installed
from resources.triton.load import closed_loop, server_statistics, statistics_since
from resources.triton.mirror import served_folder
from resources.triton.mix import request_mix
from resources.triton.perf_analyzer import find_perf_analyzer, run_perf_analyzer
from resources.triton.release import Release
from resources.triton.server import EmbeddedServer

if TYPE_CHECKING:
    from resources.pipelines.base import Item

_BY_HAND = "measure one of yours with `refinery load --url`"
#: The share of a level's time that warms the server up.
_WARM_UP_SHARE = 0.15


def levels_of(clients: int) -> tuple[int, ...]:
    """Return the numbers of clients to measure with: one, the square root of `clients`, and `clients`."""
    return tuple(sorted({1, round(clients**0.5), clients}))


def measure_load(
    address: str,
    model: str,
    items: Sequence[Item],
    levels: Sequence[int],
    seconds: float,
    connection: Connection = PLAIN,
) -> list[LoadLevel]:
    """Measure the model at each number of clients, with closed loops of tritonclient's asyncio client over gRPC.

    All levels together take `seconds`.

    Raises:
        ReleaseError: Requests fail.
        ServerError: The server does not answer.
    """
    with TextClient(address, connection=connection) as client:
        contract, steps = client.contract(model), client.steps(model)
    engines = steps[-1:]
    share, found = seconds / len(levels), []
    for clients in levels:
        warm_up = share * _WARM_UP_SHARE
        # The server's own statistics are read before and after. They include the warm-up, which changes no ratio.
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
    """Measure the same levels with NVIDIA's perf_analyzer.

    perf_analyzer takes headers only on its command line, which every user of the machine can read, so it is not used
    for a server that requires headers. It calls no restricted API, so it needs no key.

    Returns:
        The levels. The list is empty if perf_analyzer is not installed or the server requires headers.

    Raises:
        ServerError: perf_analyzer could not measure the model.
    """
    program = find_perf_analyzer()
    if program is None or connection.headers:
        return []
    return run_perf_analyzer(program, address, model, items, levels, seconds / len(levels), connection)


def measure_release(
    workspace: Workspace,
    entry: ModelEntry,
    target: str,
    release: Release,
    checkpoint: Checkpoint,
    evaluation: EvaluationSet,
    record: ServingReport,
) -> ServingReport:
    """Measure the release that the pointer names.

    A release of the `python` flavour is measured on an embedded server of its own, because the configured servers have
    users. A release of the `native` flavour needs a configured server, so it is measured on the first of them.

    Args:
        workspace: The workspace with the store, the repositories and the Triton settings.
        entry: The model's catalog entry.
        target: The target whose repository holds the release.
        release: The release.
        checkpoint: The model's checkpoint.
        evaluation: The evaluation set whose items are sent as requests.
        record: The report, with all fields that are known before the measurement.

    Raises:
        ReleaseError: Requests fail.
        ServerError: There is no server, or it serves another release.
    """
    store, seconds = workspace.store, entry.serving.benchmark_seconds
    levels = levels_of(entry.serving.clients)
    items = request_mix(read_evaluation_set(store.folder(evaluation)).items, checkpoint, store.folder(checkpoint))
    with benchmarking(), _server(workspace, release, target) as client:
        version, reason = client.version(), ""
        found = measure_load(client.address, entry.name, items, levels, seconds, client.connection)
        try:
            found += measure_with_perf_analyzer(client.address, entry.name, items, levels, seconds, client.connection)
        except ServerError as error:  # perf_analyzer's figures are optional
            reason = str(error)
    return record.model_copy(update={"status": "measured", "reason": reason, "server": version, "levels": tuple(found)})


def why_not_measured(workspace: Workspace, release: Release | None, seconds: float) -> str:
    """Return why the release cannot be measured. The text is empty if it can be measured."""
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
def _server(workspace: Workspace, release: Release, target: str) -> Iterator[TextClient]:
    """Yield a connection to the server that the release is measured on.

    Raises:
        ServerError: The server serves another release, or does not answer.
    """
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
