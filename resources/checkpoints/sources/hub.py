"""Checkpoints on the Hugging Face Hub or a mirror of it."""

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

#: The time that the Hub has to name the commit of a branch.
_ASK_SECONDS = 10.0


def hub_download(
    repository: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool, access: Access
) -> Located:
    """Download the repository's snapshot in a child process.

    huggingface_hub sets no time limit for a response that arrives slowly, so the parent process watches the download.

    Raises:
        CheckpointError: The repository cannot be downloaded, or cannot be used.
    """
    arriving = access.hub_cache.expanduser() / f"models--{repository.replace('/', '--')}" / "blobs"
    # Tokens and passwords come with the job, so the variable has the address without them.
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
        "network, HF_ENDPOINT and HF_HUB_OFFLINE. The next run resumes with the data that has arrived."
    )


def _hub_snapshot(
    repository: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool, access: Access
) -> Located:
    """Download the files of the snapshot that the Hub cache does not have yet, and return the snapshot.

    huggingface_hub itself honours HF_HUB_OFFLINE. If the Hub does not answer, it takes the snapshot in the cache.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    named = f"{repository}@{revision}" if revision else repository
    wanted = [*WANTED, *(WANTED_CODE if trust_remote_code else ())]
    asked: dict[str, Any] = {**_asked(access), "cache_dir": access.hub_cache.expanduser(), "ignore_patterns": UNWANTED}
    try:
        # The small files come first, because they tell whether the checkpoint can be used at all.
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
    except Exception as error:  # the client's releases use different transport libraries, each with its own errors
        raise _hub_unfetched(repository, revision, error) from error
    return Located(folder, folder.name)


def _asked(access: Access) -> dict[str, Any]:
    """Return the address and the credentials for huggingface_hub.

    The header's name is in lower case, because huggingface_hub looks for that form when it follows a redirect.
    """
    login = {} if access.hub_token else access.hub_endpoint.authorization
    headers = {name.lower(): value for name, value in login.items()}
    return {"endpoint": str(access.hub_endpoint), "token": access.hub_token, "headers": headers or None}


def hub_cached(repository: str, revision: str | None, access: Access) -> Located:
    """Return the snapshot in the Hub cache of the commit that the Hub names now.

    If the Hub does not answer, the snapshot is that of the last known commit.

    Raises:
        UnfetchedError: The cache does not have the snapshot.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        ask = partial(HfApi(**_asked(access)).model_info, repository, revision=revision, timeout=_ASK_SECONDS)
        commit = None if access.hub_offline else within(_ASK_SECONDS, ask).sha
    except Exception:  # the cache may hold a snapshot all the same; if it does not, the run's download reports why
        commit = None
    try:
        where: dict[str, Any] = {"cache_dir": access.hub_cache.expanduser(), "local_files_only": True}
        folder = Path(snapshot_download(repository, revision=commit or revision, **where))
    except Exception as error:
        raise UnfetchedError(repository, commit or revision or "default HEAD") from error
    return Located(folder, folder.name)


def hub_refusal(code: str, repository: str, revision: str | None) -> CheckpointError:
    """Return the error for one of the Hub's own codes of refusals (`X-Error-Code`)."""
    if code == "GatedRepo":
        named = f"{repository}@{revision}" if revision else repository
        return CheckpointError(
            f"source: {named} is gated. Ask for access on its page, then set HF_TOKEN to your token."
        )
    if code == "RevisionNotFound":
        return CheckpointError(
            f"source: {repository} has no revision {revision!r} on the Hub. Give a branch, a tag or a full commit id."
        )
    return CheckpointError(
        f"source: the Hub has no model {repository!r}, or it is private. Check the spelling, or set HF_TOKEN for "
        "a private model. If you mean a folder, write / or ./ before it."
    )


def _has_pickle(repository: str, commit: str, access: Access) -> bool:
    """Return whether the repository holds pickled weights.

    If the Hub cannot be asked, the result is False, and validation decides.
    """
    from huggingface_hub import HfApi

    try:
        names = HfApi(**_asked(access)).list_repo_files(repository, revision=commit)
    except Exception:
        return False
    return any(fnmatch(name, pattern) for name in names for pattern in WANTED_PICKLE)
