"""The step `checkpoint`: a checkpoint, copied from its source, checked, and completed."""

from __future__ import annotations

from pathlib import Path

from resources.artifacts.fingerprint import Fingerprint
from resources.artifacts.records import Checkpoint
from resources.checkpoints.collect import (
    CODE,
    collect,
    complete_copy,
    expected_checkpoint,
    require_source,
    unfetched_fingerprint,
)
from resources.errors import UnfetchedError
from resources.steps.step import Expected, NotYetKnownError, Recipe, Step, Work


class CheckpointStep(Step[Checkpoint]):
    """Copy the checkpoint of a catalog entry into the store.

    It is copied and never linked: a folder that is trained into goes on changing, and what was measured must be what
    serves.
    """

    record = Checkpoint
    code = CODE

    def __init__(self) -> None:
        super().__init__("checkpoint")

    def recipe(self, work: Work) -> Recipe[Checkpoint]:
        """See Step.

        Raises:
            CheckpointError: The source cannot be found, or is of no use.
            UnfetchedError: Downloads are not allowed, and no local copy shows what the source holds.
        """
        entry, workspace = work.entry, work.workspace
        try:
            found = collect(entry, work.store.caches, settings=workspace.sources, fetch=work.fetch)
        except UnfetchedError as error:
            now = work.last(self)
            made_of = unfetched_fingerprint(entry, error.revision, now) if now is not None else None
            if made_of is None or now is None:
                raise
            return Recipe(made_of, None)

        def make(folder: Path) -> Checkpoint:
            log = workspace.log(entry.name, "checkpoint")
            return complete_copy(entry, found, folder, workspace.limits, log)

        return Recipe(found.made_of, make, confirm=lambda record: require_source(record, found.hashes, work.store))

    def expect(self, made_of: Fingerprint, digest: str, now: Checkpoint | None) -> Checkpoint | Expected:
        """Return what is known of the new checkpoint, judged by the current one."""
        del digest
        if now is None or not now.made_of:
            raise NotYetKnownError(self.name)
        return expected_checkpoint(made_of, now)


CHECKPOINT = CheckpointStep()
