"""The commit that a branch or tag of a Hub repository is at."""

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
    """Whether the source names a commit, which never changes."""
    return _COMMIT.fullmatch(hub_reference(source)[1] or "") is not None


def hub_commit(source: str, access: Access) -> str:
    """One question to the Hub's API; offline, what the cache holds. Raises CheckpointError."""
    repository, revision = hub_reference(source)
    if is_pinned(source):
        return str(revision)
    if access.hub_offline:
        return _cached_commit(source, access)
    # As huggingface_hub's HfApi.model_info asks, but for the commit alone.
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
        raise _unanswered(source, access, ValueError("its answer names no commit"))
    return commit


def _unanswered(source: str, access: Access, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"source: the Hub at {access.hub_endpoint} could not be asked for {source}: {first_line(error)}. It is asked "
        "again; if this stays, check the network and HF_ENDPOINT."
    )


def _cached_commit(source: str, access: Access) -> str:
    """As huggingface_hub keeps it: a file that is called as the branch or tag."""
    repository, revision = hub_reference(source)
    path = access.hub_cache / f"models--{repository.replace('/', '--')}" / "refs" / (revision or "main")
    try:
        return path.read_text().strip()
    except OSError as error:
        raise CheckpointError(
            f"source: {source} is not in the Hub cache, and HF_HUB_OFFLINE is set. Fetch it once with the network on."
        ) from error
