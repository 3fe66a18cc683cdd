"""The commit to which a branch or tag of a Hub repository points."""

from __future__ import annotations

import re
from urllib.error import HTTPError
from urllib.parse import quote

from resources.boundary.http import get_json
from resources.checkpoints.sources.hub import hub_refusal
from resources.checkpoints.sources.reference import hub_reference
from resources.errors import CheckpointError, first_line
from resources.settings.sources import Access

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_pinned(source: str) -> bool:
    """Return whether the source names a commit, which never changes."""
    return _COMMIT.fullmatch(hub_reference(source)[1] or "") is not None


def hub_commit(source: str, access: Access) -> str:
    """Return the commit that the source names now, by one request to the Hub's API.

    A source that names a commit needs no request. If the Hub is set to offline, the commit comes from the cache.

    Raises:
        CheckpointError: The Hub refuses the source or does not answer, or the cache does not have it.
    """
    repository, revision = hub_reference(source)
    if is_pinned(source):
        return str(revision)
    if access.hub_offline:
        return _cached_commit(source, access)
    # This is the request of huggingface_hub's HfApi.model_info, restricted to the commit.
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    url = f"{access.hub_endpoint}/api/models/{repository}{at}?expand=sha"
    try:
        answer = get_json(url, access.hub_headers)
        commit = answer.get("sha") if isinstance(answer, dict) else None
    except HTTPError as error:
        with error:
            code = error.headers.get("X-Error-Code", "")
        if code in ("GatedRepo", "RevisionNotFound", "RepoNotFound") or error.code in (401, 404):
            raise hub_refusal(code, repository, revision) from error
        raise _unanswered(source, access, error) from error
    except (OSError, ValueError) as error:
        raise _unanswered(source, access, error) from error
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise _unanswered(source, access, ValueError("its answer does not name a commit"))
    return commit


def _unanswered(source: str, access: Access, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"source: the Hub at {access.hub_endpoint} did not report the commit of {source}: {first_line(error)}. The "
        "sensor asks again; if the problem persists, check the network and HF_ENDPOINT."
    )


def _cached_commit(source: str, access: Access) -> str:
    """Read the commit from the Hub cache, where huggingface_hub keeps it in a file named after the branch or tag."""
    repository, revision = hub_reference(source)
    path = access.hub_cache / f"models--{repository.replace('/', '--')}" / "refs" / (revision or "main")
    try:
        return path.read_text().strip()
    except OSError as error:
        raise CheckpointError(
            f"source: {source} is not in the Hub cache, and HF_HUB_OFFLINE is set. "
            "Unset that variable once to download it."
        ) from error
