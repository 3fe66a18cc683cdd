"""A store that makes nothing: it says what would be made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from resources.artifacts.fingerprint import Fingerprint
from resources.artifacts.records import Record
from resources.artifacts.store import ArtifactStore, Made

R = TypeVar("R", bound=Record)


class WouldMakeError(Exception):
    """Something is not in the store. record: what it would be, where making it costs nothing."""

    def __init__(self, made_of: Fingerprint, damaged: tuple[str, ...], record: Record | None) -> None:
        super().__init__(made_of.kind)
        self.made_of, self.damaged, self.record = made_of, damaged, record


class PlanningStore(ArtifactStore):
    """Another store's artifacts, read without leaving a trace; nothing is ever made in it but what is light."""

    def __init__(self, store: ArtifactStore, scratch: Path) -> None:
        super().__init__(store.root, store.remote)
        self._scratch = scratch

    def get_or_make(
        self, kind: type[R], made_of: Fingerprint | str, make: Callable[[Path], R], *, light: bool = False
    ) -> Made[R]:
        """Raises WouldMakeError for what is nowhere. What failed before is answered as it is."""
        assert isinstance(made_of, Fingerprint), "only what is named part by part can be planned"
        found, damaged = self._here_or_there(kind, made_of.digest)
        if found is not None:
            return Made(found, reused=True)
        made = make(self._scratch).model_copy(update={"made_of": made_of.parts}) if light else None
        raise WouldMakeError(made_of, damaged, made)

    def _here_or_there(self, kind: type[R], digest: str) -> tuple[R | None, tuple[str, ...]]:
        """The record that a run would find, without its files where those are another machine's."""
        found, damaged = self.look(kind, digest)
        if self.remote is None or (found is not None and found.reusable):
            return found, damaged
        return self.remote.record(kind, digest) or found, damaged

    def _touch(self, file: Path) -> None:
        """Looking is no use."""

    def _note_verified(self, folder: Path, seen: dict[str, list[int]]) -> None:
        """Nor is it written down."""
