"""The running servers of one repository, and how they take up a release in each model control mode.

In mode `explicit` the fleet tells the servers to load a release. In mode `poll` the servers see it by themselves, and
the fleet waits for them. Servers in mode `none` keep the models that they loaded at the start, so a fleet does not
include them.
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
#: After this long, the log says that the fleet waits for a server that polls.
SAY_SECONDS = 5.0
#: A server that does not list the model by then reads another folder. On a network file system, a listing may be a
#: minute old (NFS: acdirmax).
UNSEEN_SECONDS = 75.0
#: Requests that were under way in the replaced release get this long to finish in it.
GRACE_SECONDS = 5.0
#: The reason that a server gives for a model that was unloaded normally. Such a model may be loaded again.
_GONE = "unloaded"


class Fleet:
    """The servers that load a new release while they run, as a context manager with a connection to each.

    A fleet without servers is false. Every wait for one server and one of its models ends after
    client.LOAD_TIMEOUT_SECONDS.
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
        """Check that every server answers, that it runs in the configured mode, and that all have the same version.

        A proof on one version of Triton says nothing about another version.

        Raises:
            ServerError: A server does not answer, or has another mode or version.
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
        """Have every server load a model of the repository that is pinned to a release.

        Args:
            repository: The repository that the servers read.
            name: The public model, or a second ensemble of the release.
            number: The number of the release that the model is pinned to.

        Raises:
            ServerError: A server cannot load the model, for the reason that it gives, or does not take it up in time.
        """
        for client in self.clients:
            if self._polling:
                self._await(client, repository, name, number)
            else:  # one after the other, because two loads at once take the cores from running requests
                _load(client, repository, name)

    def ask_aside(self, repository: Location, release: Release) -> None:
        """Have every server load the release under a name of its own, and check that it answers.

        The caller holds the repository's lock. The models that serve are not touched.

        Raises:
            ServerError: A server cannot load the release, or does not answer with it.
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
        """Have every server serve the release that the public model names, and check that it answers.

        Raises:
            ServerError: A server cannot load the release, or does not answer with it.
        """
        self.hold(repository, release.model, release.number)
        for client in self.clients:
            ask(client, repository, release)

    def go_back(self, repository: Location, model: str) -> list[str]:
        """Have every server serve the release that the public model names, and return the failures as sentences.

        A publish or a rollback calls this after it has put the pointer back. If the public model is gone, servers in
        explicit control unload it.
        """
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
        """Have every server unload models that no pointer names any more.

        A server keeps the models that its loaded ensemble still uses. Servers that poll unload models by themselves.
        """
        if self._polling:
            return
        names = list(names)
        models = {parsed[0] for name in names if (parsed := parse_internal(name)) is not None}
        for client in self.clients:
            used: set[str] = set()
            for model in models:
                with suppress(ServerError):  # the server has no model of that name
                    used.update(client.steps(model))
            client.unload_all(name for name in names if name not in used)

    def leave(self, names: Sequence[str]) -> None:
        """Unload the models of a replaced release, after the time that its requests under way get to finish."""
        if names and not self._polling:
            time.sleep(GRACE_SECONDS)
            self.retire(names)

    def served(self, model: str) -> list[int | None]:
        """Return the number of the release that each server serves, or None where it serves no release."""
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
            with suppress(ServerError):  # the server has no model of that name yet
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
        if name not in client.models():  # for such a model Triton only says "failed to poll"
            raise _elsewhere(client, repository, name) from error
        raise


def _elsewhere(client: TextClient, repository: Location, name: str) -> ServerError:
    return ServerError(
        f"The server at {client.address} does not see {name} of {repository}, so it probably reads another folder. "
        "Start it on that one (--model-repository), or have REFINERY_TRITON_REPOSITORIES name the folder above the one "
        "that it reads."
    )
