"""Keep the models of a running server able to answer: repair broken models, and load unloaded ones again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from resources.errors import ServerError
from resources.triton.client import Contract, TextClient
from resources.triton.layout import named_internals
from resources.triton.stubs import Stubs

#: How often the guard asks the server which models it holds and how many requests failed.
CHECK_SECONDS = 1.0
#: After this many repairs the server is started again instead. For each process that was killed, Triton 2.51 never
#: frees a thread and 1 MB or more of shared memory.
MOST_REPAIRS = 10
#: After this many failed repairs of one model the server is started again.
_TRIES = 3
#: Part of Triton's error when the process of a Python model does not react at all.
_UNHEALTHY = "is not healthy"
#: The gRPC status of a request that is refused because of the request itself.
_REFUSED = "StatusCode.INVALID_ARGUMENT"
#: The text of a test request, how often it is sent, and how long the guard waits for any answer. While it waits,
#: nothing is repaired.
_PROBE, _PROBES, _ANSWER_SECONDS = "Is anybody there?", 3, 2.0


class BeyondRepairError(ServerError):
    """The error for a server that has to be started again."""


class Guard:
    """A guard that finds and repairs broken public models of one server.

    Args:
        leader: The id of the process that the server runs below.
        client: A connection that may use the restricted APIs.
        serving: Returns the configurations of the public models that should serve, by name.
        explicit: Whether models can be loaded and unloaded. Otherwise the server has to be started again.
        say: Called with a message for each repair.
        show: Called with the reasons of the models that do not answer, by model. The mapping is empty once all answer.
    """

    def __init__(
        self,
        leader: int,
        client: TextClient,
        serving: Callable[[], Mapping[str, str]],
        *,
        explicit: bool,
        say: Callable[[str], None],
        show: Callable[[Mapping[str, str]], None],
    ) -> None:
        self._client, self._serving, self._explicit = client, serving, explicit
        self._say, self._show = say, show
        self._stubs = Stubs(leader)
        self._broken: dict[str, str] = {}
        self._tries: dict[str, int] = {}
        self._repairs = 0
        self._checked = time.monotonic()
        self._missing: set[str] = set()
        self._failed: dict[str, int] = {}  # a server that has just started counts from 0

    def look(self) -> None:
        """Find the models that broke since the last look, and repair them.

        Raises:
            BeyondRepairError: The server has to be started again.
        """
        lost = self._stubs.lost()
        serving = self._serving()
        for model, config in serving.items():
            for internal in named_internals(config):
                if internal in lost:
                    self._broken.setdefault(model, f"the process of {internal} {lost[internal]}")
        if time.monotonic() - self._checked > CHECK_SECONDS:
            self._checked = time.monotonic()
            for find in (self._find_unloaded, self._find_unhealthy):
                with suppress(ServerError):  # the server is too busy, or it ends, which the caller notices
                    find(serving)
        for model in [model for model in self._broken if model not in serving]:
            del self._broken[model]
        self._show(self._broken)
        for model, reason in list(self._broken.items()):
            self._repair(model, serving[model], reason)
        self._show(self._broken)

    def _find_unloaded(self, serving: Mapping[str, str]) -> None:
        if not self._explicit:
            return
        ready = self._client.ready_models(seconds=_ANSWER_SECONDS)
        missing = set()
        for model, config in serving.items():
            if gone := [name for name in (*named_internals(config), model) if name not in ready]:
                missing.add(model)
                if model in self._missing:  # missing once may mean that a change is under way
                    self._broken.setdefault(model, f"somebody unloaded {gone[0]}")
        self._missing = missing

    def _find_unhealthy(self, serving: Mapping[str, str]) -> None:
        """Send test requests to each model with newly failed requests, and end its processes if it is at fault.

        A model that is slow or refuses a request is not broken. If a process does not react for a second, Triton 2.51
        refuses the request and goes on. If the process reacts later, the next request gets the answer to the refused
        one, and so on with every later request. Such a process must be ended.
        """
        failed = self._client.failed_requests(seconds=_ANSWER_SECONDS)
        before, self._failed = self._failed, failed
        for model, config in serving.items():
            internals = named_internals(config)
            more = any(failed.get(name, 0) > before.get(name, 0) for name in internals)
            if not more or (reason := self._fault(model)) is None:
                continue
            for name in internals:
                self._stubs.kill(name)
            self._broken.setdefault(model, f"{reason}, so its process was ended")

    def _fault(self, model: str) -> str | None:
        """Send the same request several times, and return what is wrong with the answers, or None.

        If answers arrive one request late, only the first answer differs, because the later ones belong to the same
        request.
        """
        found = []
        try:
            number, contract = self._client.release_of(model), self._client.contract(model)
            for _ in range(_PROBES):
                found.append(self._answer(model, contract))
            if self._client.release_of(model) != number:
                return None  # another release gives other answers, from another process
        except ServerError as error:
            return "Triton says that its process is not healthy" if _UNHEALTHY in str(error) else None
        if all(_is_like(found[0], one) for one in found):
            return None
        return "it gave answers that belong to other requests"

    def _answer(self, model: str, contract: Contract) -> Any:
        """Return the answer to the test request, or the text of its refusal, because not every model takes any text.

        Raises:
            ServerError: The request failed in another way.
        """
        item = dict.fromkeys(contract.inputs, _PROBE)
        try:
            return self._client.ask(model, contract, [item], seconds=_ANSWER_SECONDS)[0]
        except ServerError as error:
            cause = error.__cause__
            # An error without a cause means that an answer came and does not fit the contract.
            if cause is None or getattr(cause, "status", lambda: "")() == _REFUSED:
                return str(error)
            raise

    def _repair(self, model: str, config: str, reason: str) -> None:
        if not self._explicit:
            raise BeyondRepairError(f"{model}: {reason}")
        if self._repairs >= MOST_REPAIRS:
            raise BeyondRepairError(f"{model}: {reason}, and {self._repairs} repairs have left memory behind")
        begun, internals = time.monotonic(), named_internals(config)
        self._repairs += 1
        try:
            self._client.unload_all(internals)
            self._client.load(internals[-1], internals[:-1])
            # Triton usually loads the public model again by itself. The guard loads it only if Triton has not, because
            # a load reads the pointer, which by now may name a release that was refused.
            if model not in self._client.ready_models():
                self._client.load(model)
        except ServerError as error:
            self._tries[model] = self._tries.get(model, 0) + 1
            if self._tries[model] >= _TRIES:
                raise BeyondRepairError(f"{model}: {reason}, and it could not be loaded again ({error})") from error
            return
        self._tries.pop(model, None)
        del self._broken[model]
        self._missing.discard(model)
        self._stubs.search()
        self._say(f"{model}: {reason}; loaded again within {time.monotonic() - begun:.1f} s")


def _is_like(first: Any, other: Any) -> bool:
    """Return whether two answers may belong to the same request.

    They may differ slightly, because answers that are computed in other batches differ in the last digits.
    """
    import numpy as np

    if type(first) is not type(other):
        return False
    if isinstance(first, np.ndarray):
        return first.shape == other.shape and bool(np.linalg.norm(first - other) <= 0.1 * np.linalg.norm(first))
    if isinstance(first, float):
        return abs(first - other) <= 0.1
    if isinstance(first, list):
        return len(first) == len(other) and all(map(_is_like, first, other))
    if isinstance(first, dict):
        return first.keys() == other.keys() and all(_is_like(first[name], other[name]) for name in first)
    return bool(first == other)
