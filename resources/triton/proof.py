"""Prove a release: a real server must answer real requests as PyTorch does.

The requests are sent one by one, in batches and concurrently, over gRPC and HTTP.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from resources.errors import ServerError
from resources.settings.connection import PLAIN, Connection, Protocol
from resources.tasks.base import broken_answers
from resources.triton.client import Contract, TextClient

if TYPE_CHECKING:
    from resources.pipelines.base import Item

#: This many items, spread over all lengths, are sent one by one and from several threads. Batches hold every item.
ITEMS = 96
THREADS = 6
_INVALID = b"\xff\xfe not text"
#: Part of a release's answer to a request that needs more rows of its engine than the catalog's `limits` allow.
TOO_MANY_ROWS = "rows of the engine or more"
#: Unusual texts that a user may send. Each must get a finite answer.
ODD_TEXTS = ("", " ", "\n\t", "🙂🙃", "e\u0301", "word " * 4000, "a" * 10_000, 'quoted "\\', "nul \x00 inside")


class Proof(BaseModel):
    """The result of proving a release on a server.

    Args:
        failures: The failures, each as a sentence. A proven release has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    passed: bool
    server: str
    items: int
    requests: int
    seconds: float
    metrics: dict[str, dict[str, float]] = Field(description="The task's metrics by protocol and way of asking.")
    failures: tuple[str, ...] = ()


#: A function that takes indices of items and the answers to them, and returns metrics and a sentence per missed gate.
Verdict = Callable[[Sequence[int], Sequence[Any]], tuple[dict[str, float], list[str]]]


@dataclass(frozen=True)
class Exam:
    """The requests of a proof, and how their answers are judged.

    Args:
        odd: Unusual requests that must be answered.
        refused: Requests that have no answer and must be refused.
    """

    contract: Contract
    items: Sequence[Item]
    verdict: Verdict
    max_batch_size: int
    odd: Sequence[Item]
    refused: Sequence[Item] = ()


def choose_items(items: Sequence[Item], count: int = ITEMS) -> list[int]:
    """Return the indices of up to `count` items that are spread evenly over all lengths.

    The shortest and the longest item are included. The indices are shuffled with a fixed seed.
    """
    lengths = [sum(map(len, item.values())) for item in items]
    order = sorted(range(len(items)), key=lambda index: (lengths[index], index))
    count = min(count, len(order))
    chosen = [order[round(place * (len(order) - 1) / max(1, count - 1))] for place in range(count)]
    random.Random(0).shuffle(chosen)  # noqa: S311 - an order, not a secret
    return list(dict.fromkeys(chosen))


def make_batches(indices: Sequence[int], largest: int) -> list[list[int]]:
    """Return batches of mixed sizes, up to `largest`, that hold every index at least once.

    Indices are repeated where a batch takes more than there are.
    """
    sizes = list(dict.fromkeys(min(size, largest) for size in (largest, 1, 2, 3, max(1, largest // 2))))
    endless, asked = itertools.cycle(indices), 0
    groups: list[list[int]] = []
    for size in itertools.cycle(sizes):
        if asked >= len(indices) and len(groups) >= len(sizes):
            return groups
        # Only the first round, which has one batch of each size, may repeat indices.
        count = size if len(groups) < len(sizes) else min(size, len(indices) - asked)
        groups.append(list(itertools.islice(endless, count)))
        asked += count
    return groups


def prove(exam: Exam, model: str, *, grpc: str, http: str | None, connection: Connection = PLAIN) -> Proof:
    """Send the exam's requests one by one, in batches, and from several threads.

    They are sent over gRPC and, if `http` is an address, over HTTP. A wrong or missing answer is a failure of the proof
    and raises nothing. Every request has a time limit, and the first request without an answer ends the examination of
    its protocol.

    Raises:
        ServerError: There is no server.
    """
    started = time.monotonic()
    with TextClient(grpc, connection=connection) as client:
        server = client.version()
    examiner = _Examiner(exam, model, connection)
    addresses: list[tuple[Protocol, str]] = [("grpc", grpc)]
    if http is not None:
        addresses.append(("http", http))
    for protocol, address in addresses:
        try:
            examiner.examine(protocol, address)
        except ServerError as error:
            examiner.failures.append(str(error))
    return Proof(
        passed=not examiner.failures,
        server=server,
        items=len(examiner.chosen),
        requests=examiner.requests,
        seconds=round(time.monotonic() - started, 2),
        metrics=examiner.metrics,
        failures=tuple(examiner.failures),
    )


class _Examiner:
    def __init__(self, exam: Exam, model: str, connection: Connection) -> None:
        self.exam, self.model, self.connection = exam, model, connection
        self.chosen = choose_items(exam.items)
        self.requests = 0
        self.metrics: dict[str, dict[str, float]] = {}
        self.failures: list[str] = []

    def examine(self, protocol: Protocol, address: str) -> None:
        """Send all requests of the exam over one protocol."""
        singles = [[index] for index in self.chosen]
        with TextClient(address, protocol, self.connection) as client:
            self._judge(f"{protocol}, one by one", singles, [self._ask(client, group) for group in singles])
            # Batches hold all items, because a gate such as .99 is a rate over the whole set, and 96 items are too few.
            groups = make_batches(choose_items(self.exam.items, len(self.exam.items)), self.exam.max_batch_size)
            self._judge(f"{protocol}, in batches", groups, [self._ask(client, group) for group in groups])
            self._odd(client)
            self._refused(client)
            self._too_many(client)
        # Concurrent batches of every size are the most likely to reveal a server that mixes up answers.
        shares = _deal(make_batches(self.chosen, min(4, self.exam.max_batch_size)) + singles[::2], THREADS)
        with ThreadPoolExecutor(THREADS) as pool:
            answers = list(pool.map(lambda share: self._ask_many(protocol, address, share), shares))
        asked = [group for share in shares for group in share]
        self._judge(f"{protocol}, {THREADS} threads", asked, [answer for share in answers for answer in share])
        if protocol == "grpc":
            self._invalid_beside_valid(address)

    def _ask(self, client: TextClient, group: Sequence[int]) -> list[Any]:
        try:
            return client.ask(self.model, self.exam.contract, [self.exam.items[index] for index in group])
        except ServerError as error:
            # Long texts or many labels together need too many rows. A client then has to send smaller batches, and so
            # does the proof.
            if TOO_MANY_ROWS not in str(error) or len(group) == 1:
                raise
            half = len(group) // 2
            return self._ask(client, group[:half]) + self._ask(client, group[half:])

    def _ask_many(self, protocol: Protocol, address: str, groups: Sequence[Sequence[int]]) -> list[list[Any]]:
        with TextClient(address, protocol, self.connection) as client:
            return [self._ask(client, group) for group in groups]

    def _judge(self, how: str, groups: Sequence[Sequence[int]], answers: Sequence[list[Any]]) -> None:
        self.requests += len(groups)
        indices = [index for group in groups for index in group]
        metrics, missed = self.exam.verdict(indices, [answer for group in answers for answer in group])
        self.metrics[how] = metrics
        self.failures += [f"{how}: {sentence}" for sentence in missed]

    def _odd(self, client: TextClient) -> None:
        """Require that odd texts are answered. Over HTTP they are sent as plain JSON, as curl sends them."""
        as_json = client.protocol == "http"
        for item in self.exam.odd:
            self.requests += 1
            try:
                answers = client.ask(self.model, self.exam.contract, [item], as_json=as_json)
            except ServerError as error:
                self.failures.append(f"{client.protocol}: {_shown(item)} was refused: {error}")
                continue
            broken = broken_answers(answers, answers)
            if broken:
                self.failures.append(f"{client.protocol}: {_shown(item)} was answered with {broken}")

    def _refused(self, client: TextClient) -> None:
        """Require that meaningless requests are refused."""
        for item in self.exam.refused:
            self.requests += 1
            try:
                answers = client.ask(self.model, self.exam.contract, [item])
            except ServerError:
                continue
            self.failures.append(f"{client.protocol}: {_shown(item)} was not refused but answered: {answers[0]}")

    def _too_many(self, client: TextClient) -> None:
        """Require that a batch beyond the limit is refused and not truncated."""
        self.requests += 1
        item = self.exam.items[self.chosen[0]]
        try:
            client.ask(self.model, self.exam.contract, [item] * (self.exam.max_batch_size + 1))
        except ServerError:
            return
        self.failures.append(f"{client.protocol}: a batch of {self.exam.max_batch_size + 1} was not refused")

    def _invalid_beside_valid(self, address: str) -> None:
        """Require that bytes that are not UTF-8 are refused, and that requests arriving with them are still answered.

        Many requests are sent concurrently over one open connection. Otherwise the server would hardly ever put two
        of them into one execution.
        """
        valid = [[index] for index in self.chosen[: 8 * THREADS]]
        with TextClient(address, connection=self.connection) as client, ThreadPoolExecutor(2 * THREADS) as pool:
            refused = [pool.submit(self._is_refused, client) for _ in range(THREADS)]
            answers = []
            for group in valid:
                answers.append(pool.submit(self._ask, client, group))
                refused.append(pool.submit(self._is_refused, client))
            if not all(future.result() for future in refused):
                self.failures.append("grpc: bytes that are not UTF-8 were not refused as such")
            self.requests += len(refused)
            self._judge("grpc, beside invalid bytes", valid, [future.result() for future in answers])

    def _is_refused(self, client: TextClient) -> bool:
        try:
            client.ask(self.model, self.exam.contract, [dict.fromkeys(self.exam.contract.inputs, _INVALID)])
        except ServerError as error:
            return "UTF-8" in str(error)
        return False


def _deal(groups: Sequence[Sequence[int]], hands: int) -> list[list[Sequence[int]]]:
    return [list(groups[start::hands]) for start in range(hands)]


def _shown(item: Item) -> str:
    return " | ".join(repr(text[:20]) for text in item.values())
