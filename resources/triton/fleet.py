"""The running servers behind one repository, told of releases in the way that their control mode wants.

explicit: they are told to load. poll: they see it by themselves, and are waited for. Servers without model control
(`none`) hold what they loaded when they started, so there is nothing that they could be told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Self

from resources.errors import ServerError
from resources.settings.triton import TritonSettings
from resources.storage.locations import Location
from resources.triton.asking import ask, write_alias
from resources.triton.client import LOAD_TIMEOUT_SECONDS, TextClient, with_remedy
from resources.triton.files import bring_in, discard, staging_folder, staging_root
from resources.triton.layout import CONFIG, named_internals, parse_internal, pinned_number, read_release
from resources.triton.release import Release

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 0.1
#: Who polls is waited for in silence for so long.
SAY_SECONDS = 5.0
#: A server that lists its folder without the model by then reads another: on a network's disk, a listing may be a
#: minute old (NFS: acdirmax).
UNSEEN_SECONDS = 75.0
#: Requests that were under way in the release before may finish in it.
GRACE_SECONDS = 5.0
#: What a server says of a model that left it in good order, and that may come again.
_GONE = "unloaded"


class Fleet:
    """The servers that can be told. A context manager: it holds one connection to each. False: there are none.

    Every wait for one server and one of its models ends after client.LOAD_TIMEOUT_SECONDS.
    """

    def __init__(self, settings: TritonSettings) -> None:
        self._polling = settings.control == "poll"
        self._settings = settings
        self._stack = ExitStack()
        self.clients: list[TextClient] = []

    def __bool__(self) -> bool:
        return bool(self._settings.driven)

    def __enter__(self) -> Self:
        for address in self._settings.driven:
            client = TextClient(address, connection=self._settings.connection_to(address))
            self.clients.append(self._stack.enter_context(client))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def require_ready(self) -> None:
        """Raise ServerError unless every server answers, in the mode that is configured, all of one version: proven on
        one means nothing elsewhere.
        """
        dead = [client.address for client in self.clients if not client.is_live()]
        if dead:
            raise ServerError(
                f"No Triton answers gRPC at {' and '.join(dead)} (REFINERY_TRITON_GRPC), and nothing was changed. "
                "Start it, or leave it out of the variable."
            )
        for client in self.clients:
            explicit = client.runs_explicit()
            if explicit is not None and explicit == self._polling:
                runs, wanted = ("runs", "poll") if explicit else ("does not run", "explicit")
                raise ServerError(
                    f"The server at {client.address} {runs} in explicit model control, where REFINERY_TRITON_CONTROL "
                    f"says {wanted}, and nothing was changed. Start it with --model-control-mode={wanted}, or set "
                    "REFINERY_TRITON_CONTROL to the mode that it runs in."
                )
        versions = {client.address: client.version() for client in self.clients}
        if len(set(versions.values())) > 1:
            found = ", ".join(f"{address}: {version}" for address, version in versions.items())
            raise ServerError(
                f"The servers of REFINERY_TRITON_GRPC are not of one version ({found}): what is proven on one may not "
                "load on another, so nothing was changed. Bring them to one version, or give each its own repository."
            )

    def hold(self, repository: Location, name: str, number: int) -> None:
        """Have every server hold a model that lies in the repository and is pinned to that release.

        Raises ServerError with the server's reason.
        """
        for client in self.clients:
            if self._polling:
                self._await(client, repository, name, number)
            else:  # one after the other, or two at once take the cores from those that are answered
                _load(client, repository, name)

    def ask_aside(self, repository: Location, release: Release) -> None:
        """Have every server load the release under a name that is there for this alone, and answer with it.

        For who holds the repository's lock. What serves stays as it is. Raises ServerError.
        """
        with staging_folder(repository) as scratch:
            name = write_alias(repository, release, scratch)
            bring_in(scratch / name, repository / name)
        try:
            self.hold(repository, name, release.number)
            for client in self.clients:
                ask(client, repository, release, name)
        finally:
            self.retire([name])
            discard(repository / name, staging_root(repository))

    def take_up(self, repository: Location, release: Release) -> None:
        """Have every server serve the release that the public model names, and answer with it. Raises ServerError."""
        self.hold(repository, release.model, release.number)
        for client in self.clients:
            ask(client, repository, release)

    def go_back(self, repository: Location, model: str) -> list[str]:
        """Have every server serve what the public model names again, or nothing; what failed, a sentence each."""
        failed = []
        for client in self.clients:
            try:
                self._go_back(client, repository, model)
            except ServerError as error:
                failed.append(str(error))
        return failed

    def _go_back(self, client: TextClient, repository: Location, model: str) -> None:
        pointer = repository / model / CONFIG
        if not pointer.exists():
            if not self._polling:
                client.unload_all([model])
            return
        number = pinned_number(pointer.read_text(encoding="utf-8"))
        if self._polling and number is not None:
            self._await(client, repository, model, number)
        elif not self._polling:
            _load(client, repository, model)
        release = read_release(repository, model, number) if number is not None else None
        if release is not None:
            ask(client, repository, release)

    def retire(self, names: Iterable[str]) -> None:
        """Have every server drop models that nothing names any more, but what it answers with all the same.

        Servers that poll do so by themselves.
        """
        if self._polling:
            return
        names = list(names)
        models = {parsed[0] for name in names if (parsed := parse_internal(name)) is not None}
        for client in self.clients:
            used: set[str] = set()
            for model in models:
                with suppress(ServerError):  # it has no model of the name
                    used.update(client.steps(model))
            client.unload_all(name for name in names if name not in used)

    def leave(self, names: Sequence[str]) -> None:
        """Drop what another release has replaced, once requests under way have had the time to be answered."""
        if names and not self._polling:
            time.sleep(GRACE_SECONDS)
            self.retire(names)

    def served(self, model: str) -> list[int | None]:
        """The release that each server answers with; None: none of ours."""
        found: list[int | None] = []
        for client in self.clients:
            number = None
            with suppress(ServerError):
                number = client.release_of(model)
            found.append(number)
        return found

    def _await(self, client: TextClient, repository: Location, name: str, number: int) -> None:
        begun, said, there = time.monotonic(), False, {*_parts(repository, name), name}
        while (waited := time.monotonic() - begun) < LOAD_TIMEOUT_SECONDS:
            with suppress(ServerError):  # it has no model of the name yet
                if client.release_of(name) == number:
                    return
            seen = client.models()
            for model in there & seen.keys():
                if seen[model] not in ("", _GONE):
                    raise ServerError(
                        f"The server at {client.address} cannot load {model}: {with_remedy(seen[model])}."
                    )
            if name not in seen and waited > UNSEEN_SECONDS:
                raise _elsewhere(client, repository, name)
            if waited > SAY_SECONDS and not said:
                said = True
                _LOG.warning(
                    "waiting up to %g s for the server at %s to look at %s by itself and take %s up (release %d)",
                    LOAD_TIMEOUT_SECONDS,
                    client.address,
                    repository,
                    name,
                    number,
                )
            time.sleep(_LOOK_SECONDS)
        raise ServerError(
            f"The server at {client.address} sees {repository}, but did not take {name} up within "
            f"{LOAD_TIMEOUT_SECONDS:g} s. It probably runs without --model-control-mode=poll, which "
            "REFINERY_TRITON_CONTROL says, or looks less often (--repository-poll-secs); else its log says why."
        )


def _parts(repository: Location, name: str) -> list[str]:
    return named_internals((repository / name / CONFIG).read_text(encoding="utf-8"))


def _load(client: TextClient, repository: Location, name: str) -> None:
    try:
        client.load(name, _parts(repository, name))
    except ServerError as error:
        if name not in client.models():  # Triton says that it "failed to poll"
            raise _elsewhere(client, repository, name) from error
        raise


def _elsewhere(client: TextClient, repository: Location, name: str) -> ServerError:
    return ServerError(
        f"The server at {client.address} does not see {name} of {repository}, so it probably reads another folder. "
        "Start it on that one (--model-repository), or have REFINERY_TRITON_REPOSITORIES name the folder above the one "
        "that it reads."
    )
