"""Checkpoints of the Hugging Face Hub, or of a mirror of it."""

from __future__ import annotations

from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from resources.boundary.deadlines import within
from resources.checkpoints.kinds import read_config, why_of_no_use
from resources.checkpoints.sources.reference import Located, source_forms
from resources.checkpoints.sources.wanted import (
    PICKLE_REMEDY,
    UNWANTED,
    WANTED,
    WANTED_CODE,
    WANTED_PICKLE,
    WANTED_WEIGHTS,
)
from resources.errors import CheckpointError, UnfetchedError, first_line
from resources.processes.downloads import download_apart
from resources.processes.variables import HUGGING_FACE, NETWORK, PROGRAM, PYTHON, inherited
from resources.settings.sources import Access

#: What the Hub has to say which commit a branch is at.
_ASK_SECONDS = 10.0


def hub_download(
    repository: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool, access: Access
) -> Located:
    """The repository's snapshot, by a process of its own: huggingface_hub has no limit for an answer that drips."""
    arriving = access.hub_cache.expanduser() / f"models--{repository.replace('/', '--')}" / "blobs"
    # Tokens and passwords come with the job, and the address without them.
    variables = inherited(PROGRAM, PYTHON, HUGGING_FACE, NETWORK, HF_ENDPOINT=str(access.hub_endpoint))
    arguments = (repository, revision, allow_pickle, trust_remote_code, access)
    try:
        return download_apart(_hub_snapshot, *arguments, folder=arriving, variables=variables)
    except (TimeoutError, ConnectionError) as error:
        raise _hub_unfetched(repository, revision, error) from error


def _hub_unfetched(repository: str, revision: str | None, error: BaseException) -> CheckpointError:
    named = f"{repository}@{revision}" if revision else repository
    return CheckpointError(
        f"source: {named} is not in the Hub cache and cannot be fetched: {first_line(error).rstrip('.')}. Check the "
        "network, HF_ENDPOINT and HF_HUB_OFFLINE; what has arrived is kept, and the next run goes on from there."
    )


def _hub_snapshot(
    repository: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool, access: Access
) -> Located:
    """The repository's snapshot in the Hub cache, downloaded as far as it is not there already.

    huggingface_hub itself honours HF_HUB_OFFLINE. Where the Hub does not answer, the snapshot that the cache holds is
    taken.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    named = f"{repository}@{revision}" if revision else repository
    wanted = [*WANTED, *(WANTED_CODE if trust_remote_code else ())]
    asked: dict[str, Any] = {**_asked(access), "cache_dir": access.hub_cache.expanduser(), "ignore_patterns": UNWANTED}
    try:
        # The small files say whether the large ones are of any use.
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=["*.json"], **asked))
        if why := why_of_no_use(folder, read_config(folder)):
            raise CheckpointError(f"source: {named}: {why}.")
        folder = Path(snapshot_download(repository, revision=folder.name, allow_patterns=wanted, **asked))
        weights = [path for pattern in WANTED_WEIGHTS for path in folder.glob(pattern)]
        if not weights and _has_pickle(repository, folder.name, access):
            if not allow_pickle:
                raise CheckpointError(f"source: {named}: its weights are a pickle. {PICKLE_REMEDY}.")
            wanted += WANTED_PICKLE
            snapshot_download(repository, revision=folder.name, allow_patterns=wanted, **asked)
    except CheckpointError:
        raise
    except hub.HFValidationError as error:
        raise CheckpointError(f"source: {source_forms(named)} {first_line(error)}") from error
    except hub.GatedRepoError as error:
        raise hub_refusal("GatedRepo", repository, revision) from error
    except hub.RevisionNotFoundError as error:
        raise hub_refusal("RevisionNotFound", repository, revision) from error
    except hub.RepositoryNotFoundError as error:
        raise hub_refusal("RepoNotFound", repository, revision) from error
    except Exception as error:  # the transport library, and with it its errors, changed between releases of the client
        raise _hub_unfetched(repository, revision, error) from error
    return Located(folder, folder.name)


def _asked(access: Access) -> dict[str, Any]:
    """Whom huggingface_hub asks, and as whom. The header's name is as it looks for it where it is led elsewhere."""
    login = {} if access.hub_token else access.hub_endpoint.authorization
    headers = {name.lower(): value for name, value in login.items()}
    return {"endpoint": str(access.hub_endpoint), "token": access.hub_token, "headers": headers or None}


def hub_cached(repository: str, revision: str | None, access: Access) -> Located:
    """The snapshot in the Hub cache of the commit that the Hub names; where it does not answer, of the last one."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        ask = partial(HfApi(**_asked(access)).model_info, repository, revision=revision, timeout=_ASK_SECONDS)
        commit = None if access.hub_offline else within(_ASK_SECONDS, ask).sha
    except Exception:  # the run itself goes on with what the cache holds, and says what is wrong where it holds nothing
        commit = None
    try:
        where: dict[str, Any] = {"cache_dir": access.hub_cache.expanduser(), "local_files_only": True}
        folder = Path(snapshot_download(repository, revision=commit or revision, **where))
    except Exception as error:
        raise UnfetchedError(repository, commit or revision or "its default branch") from error
    return Located(folder, folder.name)


def hub_refusal(code: str, repository: str, revision: str | None) -> CheckpointError:
    """What the Hub's own codes (`X-Error-Code`) for its refusals mean to a user."""
    if code == "GatedRepo":
        named = f"{repository}@{revision}" if revision else repository
        return CheckpointError(
            f"source: {named} is gated. Ask for access on its page, then set HF_TOKEN to a token of yours."
        )
    if code == "RevisionNotFound":
        return CheckpointError(
            f"source: {repository} has no revision {revision!r} on the Hub. Give a branch, a tag or a whole commit id."
        )
    return CheckpointError(
        f"source: the Hub has no model {repository!r}, or it is private. Check its spelling; a private one needs "
        "HF_TOKEN. A folder is written with / or ./ before it."
    )


def _has_pickle(repository: str, commit: str, access: Access) -> bool:
    """Whether pickled weights are in the repository; False where the Hub cannot be asked: validation then decides."""
    from huggingface_hub import HfApi

    try:
        names = HfApi(**_asked(access)).list_repo_files(repository, revision=commit)
    except Exception:
        return False
    return any(fnmatch(name, pattern) for name in names for pattern in WANTED_PICKLE)
