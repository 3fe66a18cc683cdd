"""Load on a text model of a Triton server, over gRPC: how many requests a second it answers, and how fast.

So many clients that each wait for their answer: a closed loop (Schroeder, Wierman and Harchol-Balter, "Open Versus
Closed: A Cautionary Tale", 2006). It finds what a server can do; a server that stalls is asked less meanwhile.
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

#: The first requests meet caches that are empty and threads that have not begun.
WARM_UP_SECONDS = 1.0


@dataclass(frozen=True)
class LoadResult:
    """What a load met. `latencies_ms`: of each request that was answered, in the order of the answers.

    Requests that were asked within the time are in it, however late their answers came. concurrency: clients.
    answers: how many came within `seconds`, whenever they were asked. failures are not among the latencies;
    `first_error`: what the first of them said.
    Percentiles are NaN where nothing was answered.
    """

    concurrency: int
    seconds: float
    answers: int
    latencies_ms: tuple[float, ...] = field(repr=False)
    failures: int
    first_error: str

    @property
    def requests(self) -> int:
        """How many were answered."""
        return len(self.latencies_ms)

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return self.answers / self.seconds

    @property
    def p50_ms(self) -> float:
        return self._percentile(0.5)

    @property
    def p90_ms(self) -> float:
        return self._percentile(0.9)

    @property
    def p99_ms(self) -> float:
        return self._percentile(0.99)

    def _percentile(self, share: float) -> float:
        return percentile(sorted(self.latencies_ms), share) if self.latencies_ms else float("nan")


@dataclass(frozen=True)
class ModelStatistics:
    """What one Triton model did. `executions`: how often its backend ran; `rows`: what it was given in all.

    Times in nanoseconds, summed over requests: waiting for an instance, and within the backend reading the inputs,
    computing, and writing the outputs. `batches`: executions by the number of rows that ran together.
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
        """Rows an execution; 0 for a model that did nothing."""
        return self.rows / self.executions if self.executions else 0.0

    def since(self, before: ModelStatistics) -> ModelStatistics:
        """What it did after `before`. A model that was loaded anew counts from 0: then all of it is new."""
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
    """`concurrency` clients, each with its next request as soon as the last is answered.

    items: one request each, asked in shuffled rounds, so that what is passed is the mix that is met. Counted is what
    was asked in the `seconds` after the warm-up, and every failure. Not to be called where an event loop runs.
    Raises ServerError where nothing at all is answered.
    """
    return asyncio.run(
        _over_grpc(address, model, contract, items, concurrency, seconds, warm_up_seconds, seed, connection)
    )


#: One request, by the number of its item; raises where it is not answered.
Ask = Callable[[int], Coroutine[Any, Any, None]]


async def closed(
    ask: Ask, count: int, *, concurrency: int, seconds: float, warm_up_seconds: float = 0.0, seed: int = 0
) -> LoadResult:
    """A closed loop over anything that can be asked `count` kinds of requests. Raises ValueError for no client."""
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
                await asyncio.sleep(0.01)  # a server that is gone refuses at once
                continue
            within += begin <= now < end
            if asked >= begin:  # the slowest are those that are answered after the end
                answered.append((now - asked) * 1000)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return LoadResult(concurrency, seconds, within, tuple(answered), len(failed), failed[0] if failed else "")


def shuffled_rounds(count: int, seed: int) -> Iterator[int]:
    """0 to `count` - 1 in another order each round, for ever: every round holds the same mix.

    Raises ValueError for none.
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
    """What each of the named Triton models has done since it was loaded. Raises ServerError."""
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
    """What each model of `after` did since `before`, by name."""
    return {name: found.since(before.get(name, ModelStatistics())) for name, found in after.items()}


def read_statistics(response: Any) -> ModelStatistics:
    """Of one model, all its versions together, from Triton's `ModelStatisticsResponse`."""
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
    """The clients on one connection, with requests that were made before."""
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
    """What the server said instead of an answer; None: it was answered."""
    try:
        await ask(number)
    except Exception as error:  # gRPC's, the client's or a connection's: all are failures of this request alone
        return _words(error)
    return None


def _words(error: Exception) -> str:
    return str(getattr(error, "message", lambda: first_line(error))()).strip()


def _trouble(address: str, what: str, error: Exception) -> ServerError:
    return ServerError(f"The server at {address} (gRPC) {what}: {_words(error)}.")
