"""The search for a source of any kind, with the download if it is not on this machine."""

from __future__ import annotations

from resources.checkpoints.sources import objects, registry
from resources.checkpoints.sources.hub import hub_cached, hub_download
from resources.checkpoints.sources.local import local_folder
from resources.checkpoints.sources.reference import Located, hub_reference, kind_of
from resources.settings.sources import SourceSettings


def locate(
    source: str,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    settings: SourceSettings | None = None,
    fetch: bool = True,
) -> Located:
    """Find a source, and download it if it is not on this machine.

    Args:
        source: An absolute path is that folder. `package:NAME/path` is a folder inside an installed Python package.
            `models:/...` is a version in MLflow's registry. `s3://`, `gs://` and `as://` are prefixes in object
            storage. Anything else is a Hub id: `org/name`, with `@revision` (a branch, tag or commit) for another than
            the default branch.
        allow_pickle: Whether to download pickled weights if there are no others.
        trust_remote_code: Whether to download the checkpoint's own code.
        settings: The addresses and credentials for sources, and the folder for copies.
        fetch: Whether to download. If it is false, servers are asked for the revision alone.

    Raises:
        CheckpointError: The source cannot be found or fetched. The message has the remedy.
        UnfetchedError: `fetch` is false, and the revision is not on this machine.
    """
    settings = settings or SourceSettings()
    kind = kind_of(source)
    if kind == "registry":
        return Located(*registry.fetch_version(source, settings, fetch=fetch))
    if kind == "objects":
        allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        return Located(*objects.fetch_objects(source, settings, **allowed, fetch=fetch))
    if kind == "hub":
        if not fetch:
            return hub_cached(*hub_reference(source), settings.access)
        return hub_download(*hub_reference(source), allow_pickle, trust_remote_code, settings.access)
    return Located(local_folder(source), None)
