"""Publish a release: stage it outside the repository, prove it, rename whole folders in, and replace the pointer last.

The pointer `<model>/config.pbtxt` alone decides which release serves, and it is only ever replaced whole. A publisher
that is killed leaves a staging folder, and perhaps folders in the repository that no public model names. The next
publisher removes them. If only the pointer had not been moved yet, it moves the pointer instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from resources.artifacts.records import sha256_file
from resources.errors import ReleaseError, ServerError, StorageError
from resources.storage.atomic import sync_tree, write_whole
from resources.storage.locations import Location, contents
from resources.storage.objects import RemotePath
from resources.triton.files import (
    bring_in,
    clear_disk_errors,
    clear_staging,
    discard,
    keep_note,
    last_number,
    leave_note,
    remember_number,
    replace_file,
    repository_lock,
    staging_folder,
    staging_root,
    sync,
    take_note_back,
)
from resources.triton.layout import (
    CONFIG,
    MANIFEST,
    current_number,
    current_release,
    damaged_files,
    highest_number,
    internal_names,
    is_published_here,
    is_whole,
    list_releases,
    named_internals,
    parse_internal,
    pinned_number,
    read_release,
)
from resources.triton.proof import Proof
from resources.triton.release import Release, ReleasePlan, check_plan, content_digest
from resources.triton.stage import stage

#: While a release is moved into the repository, its staging folder keeps a copy of the former pointer in this file.
_REPLACES = "replaces.pbtxt"


@dataclass(frozen=True)
class Published:
    """The result of publishing a plan.

    Args:
        release: The release that serves now, or that waits for its proof.
        changed: Whether this publish made the release.
        advice: A sentence that tells the user what is left to do.
        current: Whether the release holds what was to be published. False after a rollback, because publishing again
            does not undo a rollback.
    """

    release: Release
    changed: bool
    advice: str = ""
    current: bool = True


@dataclass(frozen=True)
class Steps:
    """The steps of publishing that need a server.

    If both `prove` and `prove_inside` are None, the publisher stages the release and does not publish it.

    Args:
        prove: Proves the release on the staging folder, before anything of it is visible in the repository. It gets
            the folder, which is a repository that holds the release alone.
        prove_inside: Proves the release in the repository, which it gets. It runs after the internal models are there
            and before the public model names them.
        announce: Has the servers answer with the release once the public model names it, also if the publish changed
            nothing. If this fails for a new release, the publisher puts the pointer back.
        go_back: Has the servers serve what the public model names after the pointer was put back, if it names
            anything. Returns a sentence for each failure.
        leave: Gets the names of the internal models that served before. The servers may drop them once the requests
            under way are answered.
        ready: Raises ServerError if the other steps could not be done. It runs before anything is written.
        retire: Gets the names of folders that were removed from the repository and that a server may still hold.
    """

    prove: Callable[[Path, Release], Proof] | None = None
    prove_inside: Callable[[Location, Release, ReleasePlan], Proof] | None = None
    announce: Callable[[Release], None] | None = None
    go_back: Callable[[str], list[str]] | None = None
    leave: Callable[[list[str]], None] | None = None
    ready: Callable[[], None] | None = None
    retire: Callable[[list[str]], None] | None = None

    @property
    def provable(self) -> bool:
        """Return whether a server can prove the release."""
        return self.prove is not None or self.prove_inside is not None


def unverified_root(repository: Location, model: str) -> Location:
    """Return the place where a release waits that no server could prove.

    It is a model repository of its own, which a person can try with a server.
    """
    return repository.parent / "unverified" / repository.name / model


def publish(plan: ReleasePlan, repository: Location, steps: Steps) -> Published:
    """Publish the plan as the next release of its model, unless the repository holds the same release already.

    An unchanged plan publishes nothing and moves no pointer, so it never undoes a rollback. The servers are told of
    the current release again. After an error, the release that served before serves on, and nothing of the new release
    stays in the repository, unless the pointer may still name it or a server may still answer with it.

    Raises:
        ReleaseError: No release can be made of the plan, the proof failed, or the repository could not be written.
        ServerError: A server does not answer, or did not take up the release.
        StorageError: Object storage does not answer, or refuses.
    """
    check_plan(plan)
    engine_bytes = plan.engine.size_bytes
    with clear_disk_errors(plan.model, repository, engine_bytes):
        repository.mkdir(parents=True, exist_ok=True)
        with repository_lock(repository):
            if steps.ready is not None:
                steps.ready()
            waiting = waiting_release(repository, plan.model)
            highest = max(
                highest_number(repository, plan.model),
                waiting.number if waiting else 0,
                last_number(repository, plan.model),
            )
            sweep_public(repository)
            _require_ours(repository, plan.model)
            removed = sweep(repository)
            if steps.retire is not None and removed:
                steps.retire(removed)
            unchanged = unchanged_release(plan, repository, waiting, provable=steps.provable)
            if unchanged is None:
                return _publish_next(plan, repository, steps, highest + 1)
            if steps.announce is not None and unchanged.release.status == "published":
                steps.announce(unchanged.release)
            return unchanged


def unchanged_release(
    plan: ReleasePlan, repository: Location, waiting: Release | None, *, provable: bool
) -> Published | None:
    """Return the result of publishing the plan if that changes nothing, or None if it would make a release.

    Args:
        plan: The plan to publish.
        repository: The repository to publish to.
        waiting: The model's unverified release, if there is one.
        provable: Whether a server would prove the release.
    """
    digest = content_digest(plan)
    same = [release.number for release in list_releases(repository, plan.model) if release.content_digest == digest]
    current = current_release(repository, plan.model)
    if same and current is not None:
        # If the same content is older than the current release, a former champion won again and is published again.
        # If it is newer, somebody rolled back. The rollback stays, whatever has become of the newer release.
        rolled_back = max(same) > current.number
        if rolled_back or (max(same) == current.number and not _edited(repository, current)):
            return Published(current, changed=False, current=current.content_digest == digest)
    if waiting is not None and waiting.content_digest == digest and not provable:
        return Published(waiting, changed=False, advice=_advice(repository, plan.model))
    return None


def _edited(repository: Location, release: Release) -> bool:
    """Return whether the release differs from what was published.

    This check equals `resources.triton.verify.differences_from_manifest`, except that it reads only the files that are
    younger than the manifest. The manifest is written last, so a younger file was changed after publishing.
    """
    public, internals = f"{release.model}/{release.number}", internal_names(release)
    manifest, pointer = f"{public}/{MANIFEST}", f"{public}/{CONFIG}"
    published = {**release.files, **({pointer: release.pointer} if release.pointer is not None else {})}
    there = _times(repository, [*internals, public])
    if any(name not in published and name.split("/")[0] in internals for name in there):
        return True
    younger = (name for name in published if there[name] > there[manifest])
    return any(_sha256(repository / name, published[name].size_bytes) != published[name].sha256 for name in younger)


def _times(repository: Location, folders: Sequence[str]) -> dict[str, float]:
    """Return when each file of the folders was written, in seconds by the clock of its disk or store."""
    found: dict[str, float] = {}
    for folder in folders:
        place = repository / folder
        if isinstance(place, RemotePath):
            found |= {f"{folder}/{name}": one.modified for name, one in place.listing().items()}
        else:
            paths = (path for path in place.rglob("*") if path.is_file())
            found |= {f"{folder}/{path.relative_to(place).as_posix()}": path.stat().st_mtime for path in paths}
    return found


def _sha256(path: Location, size_bytes: int) -> str:
    if not isinstance(path, RemotePath):
        return sha256_file(path)
    path.store.scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.store.scratch) as folder:
        path.download(Path(folder) / path.name, size_bytes)
        return sha256_file(Path(folder) / path.name)


def _publish_next(plan: ReleasePlan, repository: Location, steps: Steps, number: int) -> Published:
    with staging_folder(repository) as staged:
        release = stage(plan, number, staged)
        if steps.prove is not None:
            prove = steps.prove
            release = _accept(release, lambda: prove(staged, release))
        sync_tree(staged)
        if not steps.provable:
            _set_aside(release, staged, unverified_root(repository, plan.model))
            return Published(release, changed=True, advice=_advice(repository, plan.model))
        release = _bring_in(plan, release, staged, repository, steps)
        with suppress(OSError, ReleaseError, StorageError):  # the release is published even if this removal fails
            discard(unverified_root(repository, plan.model), staged.parent)
    return Published(release, changed=True)


def _bring_in(plan: ReleasePlan, release: Release, staged: Path, repository: Location, steps: Steps) -> Release:
    public, number = repository / plan.model, str(release.number)
    internals = internal_names(release)
    told = False  # whether an object store was asked to move the pointer
    remember_number(repository, plan.model, release.number)
    try:
        for name in internals:
            bring_in(staged / name, repository / name)
        if steps.prove_inside is not None:
            prove = steps.prove_inside
            release = _accept(release, lambda: prove(repository, release, plan))
        damaged = damaged_files(repository, release)
        if damaged:
            raise ReleaseError(
                f"{release.model}: release {release.number} was not published: {damaged[0]} is not what was written "
                "there. Look after the disk and run again."
            )
        _write_manifest(release, staged)
        sync(repository)
        replaced = [_REPLACES] if (public / CONFIG).exists() else []
        if replaced:
            write_whole(staged / _REPLACES, (public / CONFIG).read_bytes())
        leave_note(staged, repository, [*replaced, f"{plan.model}/{CONFIG}"])
        if public.exists() or isinstance(public, RemotePath):
            bring_in(staged / plan.model / number, public / number)
            sync(public)
            told = isinstance(public, RemotePath)
            replace_file(staged / plan.model / CONFIG, public / CONFIG)
        else:
            # The first release comes as one whole folder. Otherwise a server could see a model without a configuration.
            bring_in(staged / plan.model, public)
        # A later step may put the pointer back, and the next publisher must not move it again.
        take_note_back(staged, repository)
    except BaseException as error:
        if told:
            # The store did not confirm the move and may still make it later. The release has to stay, so that the
            # pointer never names a release that is gone.
            keep_note(staged)
            if isinstance(error, ReleaseError | StorageError):
                raise ReleaseError(
                    f"{error} The store was told to point to release {number} and may do so yet, so it stays. The "
                    f"next publish points to it if the store did not: refinery optimize {plan.model}."
                ) from error
        elif not _may_be_pointed_to(repository, release):
            # If this fails, the next publisher removes the folders, and the first error is the one to report.
            with suppress(OSError, ReleaseError, StorageError):
                for folder in (public / number, *(repository / name for name in internals)):
                    discard(folder, staging_root(repository))
            if steps.retire is not None:
                steps.retire(internals)
        raise
    sync(public)
    sync(repository)
    if steps.announce is not None:
        try:
            steps.announce(release)
        except BaseException as error:
            failed = _take_back(release, staged, repository, steps)
            if isinstance(error, ServerError | ReleaseError | StorageError):
                raise type(error)(
                    f"{release.model}: release {release.number} was taken back: {error} "
                    f"{' '.join(failed) or 'What served before serves again.'}"
                ) from error
            raise
    if steps.leave is not None and replaced:
        steps.leave(named_internals((staged / _REPLACES).read_text(encoding="utf-8")))
    return release


def _may_be_pointed_to(repository: Location, release: Release) -> bool:
    try:
        return current_number(repository, release.model) == release.number
    except (ReleaseError, StorageError):  # the pointer cannot be read, so assume that it names the release
        return True


def _take_back(release: Release, staged: Path, repository: Location, steps: Steps) -> list[str]:
    """Undo a release that the servers did not take up, and return a sentence for each part that could not be undone."""
    public, internals = repository / release.model, internal_names(release)
    failed: list[str] = []
    first = not (staged / _REPLACES).exists()
    try:
        if first:
            discard(public, staging_root(repository))
        else:
            replace_file(staged / _REPLACES, public / CONFIG)
            sync(public)
    except (OSError, ReleaseError, StorageError) as error:
        failed.append(f"The release may still be pointed to, so it stays: {error}")
    pointed = bool(failed)
    try:
        failed += steps.go_back(release.model) if steps.go_back is not None else []
        if not pointed and not first:
            discard(public / str(release.number), staging_root(repository))
        if failed:  # a server may still answer with the internal models
            return failed
        for name in internals:
            discard(repository / name, staging_root(repository))
    except (OSError, ReleaseError, StorageError) as error:
        return [*failed, f"Not all of it could be undone: {error}"]
    if steps.retire is not None:
        steps.retire(internals)
    return []


def _accept(release: Release, prove: Callable[[], Proof]) -> Release:
    try:
        proof = prove()
    except OSError as error:
        raise ServerError(f"{release.model}: release {release.number} could not be proven: {error}") from error
    if not proof.passed:
        raise ReleaseError(
            f"{release.model}: release {release.number} ({release.engine}, revision {release.revision}) was not "
            f"published: {proof.server} did not answer as PyTorch does. " + "; ".join(proof.failures[:5])
        )
    return release.model_copy(update={"proof": proof, "status": "published"})


def _set_aside(release: Release, staged: Path, place: Location) -> None:
    """Keep the staged repository for a person's own server, in place of the one that waited before."""
    _write_manifest(release, staged)
    place.parent.mkdir(parents=True, exist_ok=True)
    discard(place, staged.parent)
    bring_in(staged, place)
    sync(place.parent)


def _write_manifest(release: Release, root: Path) -> None:
    folder = root / release.model / str(release.number)
    (folder / MANIFEST).write_text(release.model_dump_json(indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def waiting_release(repository: Location, model: str) -> Release | None:
    """Return the unverified release of a model, or None if there is none."""
    found = list_releases(unverified_root(repository, model), model)
    return found[-1] if found else None


def _advice(repository: Location, model: str) -> str:
    return (
        f"Nobody has seen it answer, so it is not published. It waits in {unverified_root(repository, model)}, a model "
        f"repository of its own. To publish it, start a Triton that has its backend on {repository} with "
        "--model-control-mode=explicit or poll, set REFINERY_TRITON_GRPC to its address and REFINERY_TRITON_CONTROL to "
        "that mode, and optimize again."
    )


def _require_ours(repository: Location, model: str) -> None:
    if (repository / model).exists() and not is_published_here(repository, model):
        raise ReleaseError(
            f"{model}: {repository / model} is there already and was not published by transformer-refinery. "
            "Move it away, or give the model another name."
        )


def sweep(repository: Location, *, finish: bool = True, later: bool = False) -> list[str]:
    """Remove what killed publishers left, and finish releases of which only the pointer had not been moved.

    Args:
        repository: The repository to clean up. The caller holds its lock.
        finish: Whether to move the pointer to such an unfinished release.
        later: Whether to keep an unfinished release for the next publisher. It has no effect with `finish`.

    Returns:
        The names of the folders that were removed from the repository.
    """
    root = staging_root(repository)
    unfinished = []
    for staged in contents(root) if root.is_dir() else []:
        if finish:
            _finish(staged, repository)
        elif later and any(_unfinished(staged, repository)):
            unfinished.append(staged.name)
    sweep_public(repository)
    removed = []
    foreign: dict[str, bool] = {}
    for path in contents(repository):
        parsed = parse_internal(path.name)
        if parsed is None:
            continue
        model, number, part = parsed
        if model not in foreign:
            foreign[model] = (repository / model).exists() and not is_published_here(repository, model)
        # The name matches our scheme, but the public model beside it was not published here, so the folder is not ours.
        if foreign[model]:
            continue
        # A pinned release serves even if its manifest is lost, so it is kept.
        kept = (repository / model / str(number) / MANIFEST).is_file() or current_number(repository, model) == number
        if part == "proof" or not kept:
            discard(path, root)
            removed.append(path.name)
    clear_staging(repository, but=unfinished)
    return removed


def sweep_public(repository: Location) -> None:
    """Remove public release folders in object storage that have a configuration but no manifest.

    Folders are uploaded there file by file, so a killed publisher may have uploaded the one without the other.
    """
    for public in contents(repository) if isinstance(repository, RemotePath) else []:
        if isinstance(public, RemotePath) and parse_internal(public.name) is None:
            _sweep_public(public, repository)


def _sweep_public(public: RemotePath, repository: Location) -> None:
    names = public.sizes()
    for name in names:
        number, _, file = name.partition("/")
        if file != CONFIG or not re.fullmatch("[0-9]+", number) or f"{number}/{MANIFEST}" in names:
            continue
        config = (public / name).read_bytes().decode("utf-8", errors="replace")
        internals = [parse_internal(internal) for internal in named_internals(config)]
        ours = any(found is not None and found[:2] == (public.name, int(number)) for found in internals)
        if ours and current_number(repository, public.name) != int(number):
            discard(public / number, staging_root(repository))


def _finish(staged: Location, repository: Location) -> None:
    for config, pointer in _unfinished(staged, repository):
        replace_file(config, pointer)
        sync(pointer.parent)


def _unfinished(staged: Location, repository: Location) -> Iterator[tuple[Location, Location]]:
    """Yield each staged pointer to a proven release that is whole in the repository, with the pointer to be replaced.

    Pointers that somebody has moved in the meantime are left out.
    """
    for config in staged.glob(f"*/{CONFIG}"):
        public, number = repository / config.parent.name, pinned_number(config.read_text(encoding="utf-8"))
        release = read_release(repository, public.name, number) if number is not None else None
        if release is None or release.status != "published" or not is_whole(repository, release):
            continue
        replaces, now = staged / _REPLACES, public / CONFIG
        if now.exists() == replaces.exists() and (not now.exists() or now.read_bytes() == replaces.read_bytes()):
            yield config, now
