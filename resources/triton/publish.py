"""Publishing: stage outside the repository, prove, rename whole folders in, and replace one file last.

What serves is decided by `<model>/config.pbtxt` alone, and that file is only ever replaced whole. A publisher that is
killed leaves a staging folder, and perhaps folders in the repository that no public model names; the next one sweeps
them up, and moves the pointer where that was all that was missing.
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

#: In a staging folder whose release is being brought in: the pointer that it is about to replace.
_REPLACES = "replaces.pbtxt"


@dataclass(frozen=True)
class Published:
    """The release that serves now, or waits for its proof, and whether it is new.

    `current`: it holds what was to be published; False after a rollback, which publishing again does not undo.
    `advice`: what is left to do.
    """

    release: Release
    changed: bool
    advice: str = ""
    current: bool = True


@dataclass(frozen=True)
class Steps:
    """What the publisher needs done by a server. Provers get the repository the release's folders lie in.

    ready: raises ServerError where what follows could not be done; nothing has been written yet.
    prove: before anything of the release is visible, on the staging folder alone.
    prove_inside: after the internals are in the repository, before the public model names them.
    announce: once the public model names it, also of an unchanged publish: servers have to answer with it, or the
        pointer is put back.
    leave: what a server answered with before, and may drop once nobody waits for it.
    go_back: after that; the servers have to serve what the public model names then, if anything. What failed.
    retire: names of folders that are in the repository no more; a server may still hold them.
    Without `prove` and `prove_inside` the release is staged, not published.
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
        return self.prove is not None or self.prove_inside is not None


def unverified_root(repository: Location, model: str) -> Location:
    """Where a release waits that nobody could prove: a repository of its own, which a person's server can try."""
    return repository.parent / "unverified" / repository.name / model


def publish(plan: ReleasePlan, repository: Location, steps: Steps) -> Published:
    """Publish the plan as the next release of its model, unless the repository holds just that already.

    An unchanged plan publishes nothing and moves no pointer, so it never undoes a rollback; servers are told again.
    Raises ReleaseError or ServerError; then what served before serves on, and nothing of the new release stays in the
    repository.
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
    """What publishing the plan leaves as it is; None where it would make a release.

    waiting: the model's unverified release. provable: whether a server would prove the release.
    """
    digest = content_digest(plan)
    same = [release.number for release in list_releases(repository, plan.model) if release.content_digest == digest]
    current = current_release(repository, plan.model)
    if same and current is not None:
        # An older one than what is pointed to: the champion of before is champion again, and is published again. A
        # newer one: somebody rolled back, and that stays, whatever has become of the newer one.
        rolled_back = max(same) > current.number
        if rolled_back or (max(same) == current.number and not _edited(repository, current)):
            return Published(current, changed=False, current=current.content_digest == digest)
    if waiting is not None and waiting.content_digest == digest and not provable:
        return Published(waiting, changed=False, advice=_advice(repository, plan.model))
    return None


def _edited(repository: Location, release: Release) -> bool:
    """Return whether the release is no longer what was published.

    This is `resources.triton.verify.differences_from_manifest`, except that it reads the bytes of those files alone
    that are younger than the manifest, which was written last.
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
    """When each file of the folders was written, in seconds by its disk's or store's own clock."""
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
        with suppress(OSError, ReleaseError, StorageError):  # it is published; what waited before is only in the way
            discard(unverified_root(repository, plan.model), staged.parent)
    return Published(release, changed=True)


def _bring_in(plan: ReleasePlan, release: Release, staged: Path, repository: Location, steps: Steps) -> Release:
    public, number = repository / plan.model, str(release.number)
    internals = internal_names(release)
    told = False  # a store, to move the pointer
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
            # The first release: the whole folder at once, or a server could see a model without a configuration.
            bring_in(staged / plan.model, public)
        # What follows may put the pointer back, and nobody is to move it again.
        take_note_back(staged, repository)
    except BaseException as error:
        if told:
            # Without its answer nobody knows: it may even do so later, and must not point to what is gone then.
            keep_note(staged)
            if isinstance(error, ReleaseError | StorageError):
                raise ReleaseError(
                    f"{error} The store was told to point to release {number} and may do so yet, so it stays. The "
                    f"next publish points to it if the store did not: refinery optimize {plan.model}."
                ) from error
        elif not _may_be_pointed_to(repository, release):
            with suppress(OSError, ReleaseError, StorageError):  # the next one sweeps it up, and what was first is said
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
    except (ReleaseError, StorageError):  # nobody can tell
        return True


def _take_back(release: Release, staged: Path, repository: Location, steps: Steps) -> list[str]:
    """Undo a release that the servers did not take up; what could not be undone, a sentence each."""
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
        if failed:  # they may be what a server still answers with
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
    """Keep the staged repository for a person's own server; the one that waited before goes."""
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
    """The unverified release of a model, if there is one."""
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
    """Undo what a killed publisher left, or, with `finish`, finish it where only the pointer was missing; with `later`
    that is left to the next publisher.

    Returns the names of the folders that are gone from the repository.
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
        if foreign[model]:  # named as ours are, beside a model that is not
            continue
        # A pinned release serves, whatever happened to its manifest.
        kept = (repository / model / str(number) / MANIFEST).is_file() or current_number(repository, model) == number
        if part == "proof" or not kept:
            discard(path, root)
            removed.append(path.name)
    clear_staging(repository, but=unfinished)
    return removed


def sweep_public(repository: Location) -> None:
    """In object storage, where folders come file by file: a release's pointer may have come and its manifest not."""
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
    """Pointers to proven releases that are whole in the repository, each with the one it was to replace, unless
    somebody has moved that meanwhile.
    """
    for config in staged.glob(f"*/{CONFIG}"):
        public, number = repository / config.parent.name, pinned_number(config.read_text(encoding="utf-8"))
        release = read_release(repository, public.name, number) if number is not None else None
        if release is None or release.status != "published" or not is_whole(repository, release):
            continue
        replaces, now = staged / _REPLACES, public / CONFIG
        if now.exists() == replaces.exists() and (not now.exists() or now.read_bytes() == replaces.read_bytes()):
            yield config, now
