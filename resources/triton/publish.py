"""Publishing: stage outside the repository, prove, rename whole folders in, and replace one file last.

A killed publisher leaves staging folders and internals that no public model names; the next one sweeps them up. What
serves is decided by `<model>/config.pbtxt` alone, and that file is only ever replaced whole.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from resources.errors import ReleaseError
from resources.locks import file_lock
from resources.triton.config import engine_config, public_config, tokenizer_config, write_config, write_warm_up
from resources.triton.layout import (
    CONFIG,
    MANIFEST,
    current_release,
    highest_number,
    internal_name,
    list_releases,
    parse_internal,
)
from resources.triton.proof import Proof
from resources.triton.release import (
    LABELS_FILE,
    Release,
    ReleasePlan,
    content_digest,
    list_files,
    new_release,
    write_engine,
    write_tokenizer,
)


@dataclass(frozen=True)
class Published:
    """The release that serves now (or waits for its proof), and whether it is new."""

    release: Release
    changed: bool


@dataclass(frozen=True)
class Steps:
    """What the publisher needs done by a server. Each gets the repository the release's folders lie in.

    prove: before anything of the release is visible, on the staging folder alone; None: it is proven by `prove_inside`.
    prove_inside: after the internals are in the repository, before the public model names them.
    announce: after the pointer is replaced; a server that does not watch the repository is told to reload.
    """

    prove: Callable[[Path, Release], Proof] | None = None
    prove_inside: Callable[[Path, Release, ReleasePlan], Proof] | None = None
    announce: Callable[[Release], None] | None = None


def staging_root(repository: Path) -> Path:
    """Beside the repository, on its file system: a dot folder inside would be polled as a model."""
    return repository.parent / f".{repository.name}.staging"


def publish(plan: ReleasePlan, repository: Path, steps: Steps) -> Published:
    """Publish the plan as the next release of its model, unless the repository holds just that already.

    An unchanged plan publishes nothing and moves no pointer, so it never undoes a rollback. Raises ReleaseError; then
    what served before serves on, and nothing of the new release stays.
    """
    repository.mkdir(parents=True, exist_ok=True)
    with file_lock(repository.parent / f".{repository.name}.lock"), _clear_disk_errors(plan, repository):
        sweep(repository)
        digest = content_digest(plan)
        for release in reversed(list_releases(repository, plan.model)):
            if release.content_digest == digest and release.status == "published":
                return Published(current_release(repository, plan.model) or release, changed=False)
        number = highest_number(repository, plan.model) + 1
        staged = staging_root(repository) / uuid.uuid4().hex
        try:
            release = stage(plan, number, staged)
            return Published(_bring_in(plan, release, staged, repository, steps), changed=True)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def stage(plan: ReleasePlan, number: int, root: Path) -> Release:
    """Write all folders of a release below an empty root, which is then a repository of its own."""
    tokenizer, engine = (internal_name(plan.model, number, part) for part in ("tokenizer", "engine"))
    write_tokenizer(plan, root / tokenizer / "1")
    write_config(tokenizer_config(plan, number), root / tokenizer / CONFIG)
    write_engine(plan, root / engine / "1")
    write_warm_up(root / engine)
    if plan.checkpoint.labels:
        (root / engine / LABELS_FILE).write_text("\n".join(plan.checkpoint.labels) + "\n", encoding="utf-8")
    write_config(engine_config(plan, number), root / engine / CONFIG)
    folder = root / plan.model / str(number)
    folder.mkdir(parents=True)
    write_config(public_config(plan, number), folder / CONFIG)
    shutil.copyfile(folder / CONFIG, root / plan.model / CONFIG)
    release = new_release(plan, number)
    return release.model_copy(update={"files": list_files(root, [tokenizer, engine])})


def _bring_in(plan: ReleasePlan, release: Release, staged: Path, repository: Path, steps: Steps) -> Release:
    internals = [internal_name(plan.model, release.number, part) for part in ("tokenizer", "engine")]
    if steps.prove is not None:
        release = _accept(release, steps.prove(staged, release))
    _sync_tree(staged)
    try:
        for name in internals:
            (staged / name).rename(repository / name)
        if steps.prove_inside is not None:
            release = _accept(release, steps.prove_inside(repository, release, plan))
    except BaseException:
        for name in internals:
            shutil.rmtree(repository / name, ignore_errors=True)
        raise
    folder = staged / plan.model / str(release.number)
    (folder / MANIFEST).write_text(release.model_dump_json(indent=1), encoding="utf-8")
    _sync_tree(folder)
    public = repository / plan.model
    if release.status != "published":
        # Nobody has seen it answer: it is there whole, and the public model does not name it.
        public.mkdir(exist_ok=True)
        folder.rename(public / str(release.number))
    elif (public / CONFIG).exists():
        folder.rename(public / str(release.number))
        (staged / plan.model / CONFIG).replace(public / CONFIG)
    else:
        # The first release: the whole folder at once, or a server could see a model without a configuration.
        shutil.rmtree(public, ignore_errors=True)
        (staged / plan.model).rename(public)
    _sync(public)
    _sync(repository)
    if steps.announce is not None and release.status == "published":
        steps.announce(release)
    return release


def _accept(release: Release, proof: Proof) -> Release:
    if not proof.passed:
        raise ReleaseError(
            f"{release.model}: release {release.number} ({release.engine}, revision {release.revision}) was not "
            f"published: {proof.server} did not answer as PyTorch does. " + "; ".join(proof.failures[:5])
        )
    return release.model_copy(update={"proof": proof, "status": "published"})


def sweep(repository: Path) -> list[str]:
    """Remove what a killed publisher left: staging, and internals of releases that were never completed."""
    shutil.rmtree(staging_root(repository), ignore_errors=True)
    removed = []
    for path in sorted(repository.iterdir()):
        parsed = parse_internal(path.name)
        if parsed is None:
            continue
        model, number, part = parsed
        if part == "proof" or not (repository / model / str(number) / MANIFEST).is_file():
            shutil.rmtree(path)
            removed.append(path.name)
    return removed


@contextmanager
def _clear_disk_errors(plan: ReleasePlan, repository: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        needed = sum(file.size_bytes for file in plan.engine.files.values()) + 20 * 2**20
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            f"It needs about {needed / 1e6:.0f} MB there; make room and run again."
            if full
            else "Mend it and run again."
        )
        raise ReleaseError(
            f"{plan.model}: the release could not be written to {repository}: {error.strerror or error}. {remedy} "
            "What served before goes on serving."
        ) from error


def _sync_tree(root: Path) -> None:
    """Files first, then folders from the deepest up: a rename must not reach the disk before what it names."""
    for path in sorted(root.rglob("*"), reverse=True):
        _sync(path)
    _sync(root)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
