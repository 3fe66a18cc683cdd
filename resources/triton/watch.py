"""Keep a running server in step with its repository: load new pointers, and unload the releases that they replace."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from resources.errors import ServerError
from resources.triton.client import TextClient
from resources.triton.layout import named_internals, pinned_number, public_pointers

#: Requests that were under way in the replaced release get this long to finish in it.
GRACE_SECONDS = 5.0


class Watcher:
    """A watcher of the pointer `<model>/config.pbtxt` of every public model. It looks only when `look` is called.

    The attribute `serving` holds the pointers that are loaded, by model.
    """

    def __init__(self, repository: Path, client: TextClient, say: Callable[[str], None]) -> None:
        self._repository, self._client, self._say = repository, client, say
        self.serving: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._left: dict[str, float] = {}

    def look(self) -> None:
        """Load every new or changed pointer once, and unload models that left the repository.

        A pointer that cannot be loaded is reported once, and the release that served goes on serving.
        """
        for model, config in public_pointers(self._repository).items():
            if self.serving.get(model) != config and self._refused.get(model) != config:
                self._load(model, config)
        for model in [model for model in self.serving if not (self._repository / model).exists()]:
            self._leave(self.serving.pop(model))
            with suppress(ServerError):
                self._client.unload(model)
            self._say(f"{model}: serves no more; it left the repository")
        self._unload_left()

    def _load(self, model: str, config: str) -> None:
        try:
            # Models are loaded one after the other, because two loads at once take the cores from running requests.
            self._client.load(model, named_internals(config))
        except ServerError as error:
            self._refused[model] = config
            self._leave(config)  # parts of it may have been loaded
            self._say(f"{error} What served before goes on serving.")
            return
        self._refused.pop(model, None)
        before = self.serving.get(model)
        self.serving[model] = config
        if before is not None:
            self._leave(before)
        self._say(f"{model}: release {pinned_number(config)} serves")

    def _leave(self, config: str) -> None:
        for name in named_internals(config):
            self._left.setdefault(name, time.monotonic())

    def _unload_left(self) -> None:
        """Unload replaced internal models after the grace period.

        Only models that this process has loaded are unloaded, because a publisher may be proving a release on the same
        server.
        """
        named = {name for config in self.serving.values() for name in named_internals(config)}
        for name, since in list(self._left.items()):
            if name in named:  # a rollback
                del self._left[name]
            elif time.monotonic() - since > GRACE_SECONDS:
                del self._left[name]
                with suppress(ServerError):
                    self._client.unload(name)
