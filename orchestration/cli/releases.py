"""The commands on a model's releases: `refinery rollback`, `promote`, `retain` and `verify`."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from contextlib import suppress

from orchestration.cli.serving import DEFAULT_ADDRESS
from orchestration.settings import read_workspace, tracker_of
from resources.errors import ServerError
from resources.settings.triton import TritonSettings
from resources.steps import promote as promoting
from resources.triton import retain as removing
from resources.triton.client import TextClient, serves
from resources.triton.layout import current_number
from resources.triton.rollback import Moved, roll_back
from resources.triton.verify import verify_release

#: `refinery serve` looks for new releases every second, and loads one in less than this time.
_TAKEN_UP_SECONDS = 15.0


def rollback(options: Namespace) -> int:
    """Point to an older release, and print what serves now."""
    workspace = read_workspace(os.environ)
    log = workspace.log(options.model, f"triton-{options.target}")
    repository = workspace.repository(options.target)
    done = roll_back(repository, options.model, workspace.triton, to=options.to, log=log)
    _tell(options.model, done, workspace.triton, " Optimizing again without a change does not undo the rollback.")
    return 0


def promote(options: Namespace) -> int:
    """Point to the newest release, and print what serves now."""
    workspace = read_workspace(os.environ)
    log = workspace.log(options.model, f"triton-{options.target}")
    done = promoting.promote(
        workspace, tracker_of(workspace), options.model, options.target, dagster_run="refinery promote", log=log
    )
    _tell(options.model, done, workspace.triton)
    return 0


def _tell(model: str, done: Moved, triton: TritonSettings, remark: str = "") -> None:
    """Print where the model points to now, and whether the server on the usual port has taken it up."""
    release = done.release
    print(
        f"{model} points to release {release.number} ({release.engine}, revision {release.revision})"
        f"{done.instead}.{remark}"
    )
    if not triton.servers:
        _await(triton, model, release.number)


def _await(settings: TritonSettings, model: str, number: int) -> None:
    """Wait until the server on the usual port answers with the release, and print whether it does.

    Nothing is printed if no server there has the model. The server may be one of another repository.
    """
    deadline, connection = time.monotonic() + _TAKEN_UP_SECONDS, settings.connection_to(DEFAULT_ADDRESS)
    if not serves(DEFAULT_ADDRESS, model, connection):
        return
    with TextClient(DEFAULT_ADDRESS, connection=connection) as client, suppress(ServerError):  # it may end meanwhile
        found = client.release_of(model)
        while found != number and time.monotonic() < deadline:
            time.sleep(0.2)
            found = client.release_of(model)
        if found == number:
            print(f"The server at {DEFAULT_ADDRESS} serves this release.")
        else:
            print(
                f"The server at {DEFAULT_ADDRESS} still serves release {found}. It may serve another "
                "repository, or it may have refused this release. Check its output.",
                file=sys.stderr,
            )


def retain(options: Namespace) -> int:
    """Remove old releases, except those that are pointed to, served, or the champion in MLflow."""
    workspace = read_workspace(os.environ)
    champion = tracker_of(workspace).champion_release(options.model, options.target)
    done = removing.retain(
        workspace.repository(options.target),
        options.model,
        keep=options.keep,
        wanted={} if champion is None else {champion: "the champion in MLflow"},
        settings=workspace.triton,
        asked=[DEFAULT_ADDRESS],
    )
    for number, why in done.kept.items():
        print(f"release {number} stays: {why}")
    print(f"removed: {', '.join(map(str, done.removed)) or 'none'}")
    return 0


def verify(options: Namespace) -> int:
    """Compare every file of a release with the manifest, then have a server answer with the release."""
    workspace = read_workspace(os.environ)
    repository = workspace.repository(options.target)
    if options.release is None and current_number(repository, options.model) is None:
        workspace.entry(options.model)  # raises an error if the model is unknown
    log = workspace.log(options.model, f"verify-{options.target}")
    release, server = verify_release(repository, options.model, workspace.triton, options.release, log=log)
    count, size = len(release.files), sum(file.size_bytes for file in release.files.values()) / 1e6
    print(
        f"{options.model}: all {count} files of release {release.number} ({size:.1f} MB) are as published, and "
        f"{server} answers with it."
    )
    return 0
