"""Find the engine that serves now, so that it can be measured again beside newly built engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resources.artifacts.records import Checkpoint, Engine
from resources.artifacts.store import ArtifactStore
from resources.benchmark.champion import Served
from resources.engines.specs import SERVED
from resources.errors import ReleaseError, StorageError
from resources.settings.workspace import Workspace
from resources.triton.layout import current_release


@dataclass(frozen=True)
class Incumbent:
    """The release that serves, as a rival of the candidates.

    Args:
        served: The release, and the engine that represents it in the measurement. None if there is no rival.
        engine: The engine to measure again. None if one of the candidates is the same engine, or if the engine cannot
            be measured. In the latter case, `served` may still be a rival without figures.
        story: A phrase that names the engine, or says why there is none to measure.
    """

    served: Served | None
    engine: Engine | None
    story: str


@dataclass(frozen=True)
class Candidate:
    """An engine that competes, identified by its name and digests."""

    name: str
    digest: str
    content_digest: str


def find_incumbent(
    workspace: Workspace,
    store: ArtifactStore,
    model: str,
    target: str,
    checkpoint: Checkpoint,
    candidates: Sequence[Candidate],
) -> Incumbent:
    """Return the release that the target's repository points to. A release of another checkpoint is no rival."""
    try:
        release = current_release(workspace.repository(target), model)
    except (ReleaseError, StorageError) as error:
        return Incumbent(None, None, f"what serves cannot be read: {error}")
    if release is None:
        return Incumbent(None, None, "no release serves yet")
    named = f"release {release.number}"
    if release.checkpoint_digest != checkpoint.digest:
        return Incumbent(None, None, f"{named} serves another checkpoint, revision {release.revision}")
    engine = store.find(Engine, release.engine_digest)
    for one in candidates:
        # An engine that another toolkit built may still be the same, byte for byte.
        if one.digest == release.engine_digest or (engine and one.content_digest == engine.content_digest):
            return Incumbent(Served(release.number, one.digest), None, f"{named} serves {one.name}, a candidate")
    if engine is None:
        unmeasurable = Served(release.number, release.engine_digest)
        return Incumbent(unmeasurable, None, f"the engine of {named}, {release.engine}, is not in the store any more")
    return Incumbent(
        Served(release.number, engine.digest),
        engine.model_copy(update={"name": SERVED}),
        f"{release.engine} of {named}",
    )
