"""Put load on a text model of a Triton server over gRPC, and measure its answers a second and their latencies.

The load is a closed loop: a fixed number of clients that each wait for an answer before the next request (Schroeder,
Wierman and Harchol-Balter, "Open Versus Closed: A Cautionary Tale", 2006). A closed loop finds the capacity of a
server. A server that stalls gets fewer requests in that time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resources.benchmark.statistics import percentile
from resources.errors import ServerError, first_line
from resources.settings.connection import PLAIN, Connection
from resources.triton.client import TIMEOUT_SECONDS, Contract, text_tensors

#: The first requests are not counted, because they meet empty caches and threads that have not started.
WARM_UP_SECONDS = 1.0


@dataclass(frozen=True)
class LoadResult:
    """The result of a load. Percentiles are NaN if no request was answered.

    Args:
        concurrency: The number of clients.
        seconds: The time that was measured, after the warm-up.
        answers: The number of answers within `seconds`, whenever their requests were sent.
        latencies_ms: The latency of each answered request that was sent within `seconds`, however late its answer
            came, in the order of the answers.
        failures: The number of failed requests, including those of the warm-up. They have no latency.
        first_error: The message of the first failure.
    """

    concurrency: int
    seconds: float
    answers: int
    latencies_ms: tuple[float, ...] = field(repr=False)
    failures: int
    first_error: str

    @property
    def requests(self) -> int:
        """The number of answered requests."""
        return len(self.latencies_ms)

    @property
    def throughput(self) -> float:
        """The answers a second."""
        return self.answers / self.seconds

    @property
    def p50_ms(self) -> float:
        """The median latency."""
        return self._percentile(0.5)

    @property
    def p90_ms(self) -> float:
        """The 90th percentile of the latencies."""
        return self._percentile(0.9)

    @property
    def p99_ms(self) -> float:
        """The 99th percentile of the latencies."""
        return self._percentile(0.99)

    def _percentile(self, share: float) -> float:
        return percentile(sorted(self.latencies_ms), share) if self.latencies_ms else float("nan")


@dataclass(frozen=True)
class ModelStatistics:
    """The statistics of one Triton model. Times are sums over all requests.

    Args:
        rows: The number of rows in all requests.
        executions: How often the model's backend ran.
        queue_ns: The time of waiting for an instance.
        input_ns: The time in which the backend read the inputs.
        compute_ns: The time in which the backend computed.
        output_ns: The time in which the backend wrote the outputs.
        batches: The number of executions by the number of rows that ran together.
    """

    requests: int = 0
    rows: int = 0
    executions: int = 0
    failures: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    compute_ns: int = 0
    output_ns: int = 0
    batches: Mapping[int, int] = field(default_factory=dict)

    @property
    def mean_batch(self) -> float:
        """The mean number of rows of an execution, or 0 for a model that did nothing."""
        return self.rows / self.executions if self.executions else 0.0

    def since(self, before: ModelStatistics) -> ModelStatistics:
        """Return the statistics since `before`, or all of them if the model was reloaded and so counts from 0 again."""
        if before.executions > self.executions or before.requests > self.requests:
            return self
        batches = {size: count - before.batches.get(size, 0) for size, count in self.batches.items()}
        return ModelStatistics(
            requests=self.requests - before.requests,
            rows=self.rows - before.rows,
            executions=self.executions - before.executions,
            failures=self.failures - before.failures,
            queue_ns=self.queue_ns - before.queue_ns,
            input_ns=self.input_ns - before.input_ns,
            compute_ns=self.compute_ns - before.compute_ns,
            output_ns=self.output_ns - before.output_ns,
            batches={size: count for size, count in batches.items() if count},
        )


def closed_loop(
    address: str,
    model: str,
    contract: Contract,
    items: Sequence[Mapping[str, str]],
    *,
    concurrency: int,
    seconds: float,
    warm_up_seconds: float = WARM_UP_SECONDS,
    seed: int = 0,
    connection: Connection = PLAIN,
) -> LoadResult:
    """Put load on a model with clients that each send the next request as soon as the last one is answered.

    The caller must not run in an event loop. The result covers the requests that were sent in the `seconds` after the
    warm-up, and every failure.

    Args:
        address: The server's gRPC address.
        model: The public model.
        contract: The model's inputs and output.
        items: The items, with one request for each. They are sent in shuffled rounds, so that the server gets them in
            the mix in which they were passed.
        concurrency: The number of clients.
        seconds: The time to measure.
        warm_up_seconds: The time before that.
        seed: The seed of the rounds.
        connection: The key, the headers and the TLS settings that the server needs.

    Raises:
        ServerError: No request was answered.
    """
    return asyncio.run(
        _over_grpc(address, model, contract, items, concurrency, seconds, warm_up_seconds, seed, connection)
    )


#: A function that sends the request of an item, given the item's number, and raises if there is no answer.
Ask = Callable[[int], Coroutine[Any, Any, None]]


async def closed(
    ask: Ask, count: int, *, concurrency: int, seconds: float, warm_up_seconds: float = 0.0, seed: int = 0
) -> LoadResult:
    """Run a closed loop over any function that can send `count` different requests.

    Args:
        ask: Sends the request of a number.
        count: The number of different requests.
        concurrency: The number of clients.
        seconds: The time to measure.
        warm_up_seconds: The time before that.
        seed: The seed of the order of the requests.

    Raises:
        ValueError: There is no client, or no request.
    """
    if concurrency < 1:
        raise ValueError("a closed loop needs at least one client")
    numbers, answered, failed = shuffled_rounds(count, seed), list[float](), list[str]()
    begin, within = time.perf_counter() + warm_up_seconds, 0
    end = begin + seconds

    async def client() -> None:
        nonlocal within
        while (asked := time.perf_counter()) < end:
            error = await _attempt(ask, next(numbers))
            now = time.perf_counter()
            if error is not None:
                failed.append(error)
                await asyncio.sleep(0.01)  # a dead server refuses at once, and the clients would spin
                continue
            within += begin <= now < end
            if asked >= begin:  # also after the end, because the slowest answers come then
                answered.append((now - asked) * 1000)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return LoadResult(concurrency, seconds, within, tuple(answered), len(failed), failed[0] if failed else "")


def shuffled_rounds(count: int, seed: int) -> Iterator[int]:
    """Return an endless iterator of rounds. Each round has the numbers 0 to `count` - 1, in another order.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError("no requests to ask")
    numbers, generator = list(range(count)), random.Random(seed)  # noqa: S311 - the order of a load is no secret

    def rounds() -> Iterator[int]:
        while True:
            generator.shuffle(numbers)
            yield from numbers

    return rounds()


def server_statistics(address: str, names: Sequence[str], connection: Connection = PLAIN) -> dict[str, ModelStatistics]:
    """Return the statistics of each of the named Triton models since it was loaded.

    Raises:
        ServerError: The server does not give the statistics.
    """
    import tritonclient.grpc as api

    with connection.open(api, address, "grpc") as client:
        try:
            return {
                name: read_statistics(client.get_inference_statistics(name, client_timeout=TIMEOUT_SECONDS))
                for name in names
            }
        except Exception as error:
            raise _trouble(address, "does not say what its models did", error) from error


def statistics_since(
    before: Mapping[str, ModelStatistics], after: Mapping[str, ModelStatistics]
) -> dict[str, ModelStatistics]:
    """Return the statistics since `before` of each model in `after`, by name."""
    return {name: found.since(before.get(name, ModelStatistics())) for name, found in after.items()}


def read_statistics(response: Any) -> ModelStatistics:
    """Return the statistics of one model, summed over its versions, from Triton's `ModelStatisticsResponse`."""
    versions = list(response.model_stats)
    batches: dict[int, int] = {}
    for version in versions:
        for batch in version.batch_stats:
            batches[batch.batch_size] = batches.get(batch.batch_size, 0) + batch.compute_infer.count

    def total(name: str, value: str) -> int:
        return sum(int(getattr(getattr(version.inference_stats, name), value)) for version in versions)

    return ModelStatistics(
        requests=total("success", "count"),
        rows=sum(version.inference_count for version in versions),
        executions=sum(version.execution_count for version in versions),
        failures=total("fail", "count"),
        queue_ns=total("queue", "ns"),
        input_ns=total("compute_input", "ns"),
        compute_ns=total("compute_infer", "ns"),
        output_ns=total("compute_output", "ns"),
        batches=dict(sorted(batches.items())),
    )


async def _over_grpc(
    address: str,
    model: str,
    contract: Contract,
    items: Sequence[Mapping[str, str]],
    concurrency: int,
    seconds: float,
    warm_up_seconds: float,
    seed: int,
    connection: Connection,
) -> LoadResult:
    """Run the loop with all clients on one connection. The requests are built before it starts."""
    import tritonclient.grpc as api
    import tritonclient.grpc.aio as aio

    tensors = [text_tensors(api, contract, [item]) for item in items]
    wanted = [api.InferRequestedOutput(contract.output)]
    async with connection.open(aio, address, "grpc") as client:

        async def ask(number: int) -> None:
            answer = await client.infer(model, tensors[number], outputs=wanted, client_timeout=TIMEOUT_SECONDS)
            if not answer.get_response().raw_output_contents:
                raise ServerError(f"{model} answered with nothing.")

        result = await closed(
            ask, len(items), concurrency=concurrency, seconds=seconds, warm_up_seconds=warm_up_seconds, seed=seed
        )
    if not result.requests:
        why = result.first_error or f"none came within {result.seconds:g} s"
        raise ServerError(f"The server at {address} (gRPC) answered no request to {model}: {why}.")
    return result


async def _attempt(ask: Ask, number: int) -> str | None:
    """Send a request, and return the message of its error, or None if it was answered."""
    try:
        await ask(number)
    except Exception as error:  # errors of gRPC, the client and the connection concern this request alone
        return _words(error)
    return None


def _words(error: Exception) -> str:
    return str(getattr(error, "message", lambda: first_line(error))()).strip()


def _trouble(address: str, what: str, error: Exception) -> ServerError:
    return ServerError(f"The server at {address} (gRPC) {what}: {_words(error)}.")
