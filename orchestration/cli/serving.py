"""The commands `refinery query`, `refinery serve` and `refinery setup`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from orchestration.settings import read_workspace
from resources.errors import ReleaseError, ServerError, StorageError
from resources.settings.triton import TritonSettings
from resources.settings.workspace import Workspace
from resources.storage.locations import Location
from resources.storage.objects import RemotePath
from resources.triton.client import Contract, TextClient, serves
from resources.triton.environment import install
from resources.triton.foreground import serve_foreground
from resources.triton.launch import caching, limited
from resources.triton.layout import current_release, public_models
from resources.triton.limits import require_resources
from resources.triton.mirror import Mirror, served_folder
from resources.triton.pointer import current_problem, require_current
from resources.triton.release import require_embeddable
from resources.triton.server import EmbeddedServer

_SHOWN = 8
DEFAULT_ADDRESS = "127.0.0.1:8001"
#: The time between two looks for new releases in object storage. Each look costs a few requests.
_FOLLOW_SECONDS = 5.0


def query(options: Namespace) -> int:
    """Ask a model, and print its answers.

    The server is the one of `--url`, or else the first of REFINERY_TRITON_GRPC that has the model. If neither is given,
    it is the one on the usual port or, if that does not have the model, one that is started for this question.
    """
    workspace = read_workspace(os.environ)
    repository = workspace.repository(options.target)
    with ExitStack() as stack:
        address = options.url or _configured(workspace.triton, options.model) or DEFAULT_ADDRESS
        connection = workspace.triton.connection_to(address)
        # If the user named a server, no other server may answer.
        if options.url is None and not workspace.triton.servers and not serves(address, options.model, connection):
            folder = served_folder(repository, workspace.copies, say=lambda line: print(line, file=sys.stderr))
            # The folder may be a copy of the repository. An error has to name the repository.
            release = require_current(repository if current_problem(folder, options.model) else folder, options.model)
            require_embeddable(
                release,
                "Give the address of a server that has these backends with --url, or set REFINERY_TRITON_GRPC",
            )
            log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "triton.log"
            print(f"No server at {address} has the model, so one is started for this request.", file=sys.stderr)
            server = EmbeddedServer(folder, workspace.triton, models=[options.model], log=log)
            address, connection = stack.enter_context(server).grpc_address, server.connection
        with TextClient(address, connection=connection) as client:
            contract = client.contract(options.model)
            items = _items(options, contract.inputs)
            # Each text is a request of its own, because batching is the server's work.
            answers = [client.ask(options.model, contract, [item])[0] for item in items]
            labels = [] if options.json else _labels(client, options.model, contract, items, answers)
    if options.json:
        for answer in answers:
            print(json.dumps(answer if contract.structured else answer.tolist(), ensure_ascii=False))
    else:
        _show(options.text, answers, labels)
    return 0


def _configured(settings: TritonSettings, model: str) -> str | None:
    """Return the first of the configured servers that has the model, or None if no server is configured.

    Raises:
        ServerError: No configured server answers, or none has the model.
    """
    servers = settings.servers
    found = next((address for address in servers if serves(address, model, settings.connection_to(address))), None)
    if servers and found is None:
        for address in servers:
            with TextClient(address, connection=settings.connection_to(address)) as client:
                if client.is_live():
                    break
        else:
            raise ServerError(f"No Triton answers gRPC at {' or '.join(servers)} (REFINERY_TRITON_GRPC). Start one.")
        raise ServerError(
            f"{model} is not served by any of {', '.join(servers)} (REFINERY_TRITON_GRPC). Load it on one of them, "
            "name another server with --url, or unset the variable so that this command starts one."
        )
    return found


def _items(options: Namespace, inputs: Sequence[str]) -> list[dict[str, str]]:
    """Return a request for each text.

    Raises:
        ServerError: The model takes other inputs than those that were given.
    """
    labels = options.labels and json.dumps([label.strip() for label in options.labels.split(",")])
    given = {"QUERY": options.query, "QUESTION": options.question, "LABELS": labels}
    for name, value in given.items():
        if (value is None) == (name in inputs):
            raise ServerError(
                f"{options.model} takes {' and '.join(inputs)}: {'give' if value is None else 'leave out'} "
                f"--{name.lower()}."
            )
    main = next(name for name in inputs if name not in given)
    beside = {name: value for name, value in given.items() if value is not None}
    return [{main: text, **beside} for text in options.text]


def _labels(
    client: TextClient, model: str, contract: Contract, items: Sequence[dict[str, str]], answers: Sequence[Any]
) -> list[list[tuple[str, float]]]:
    """Return the best labels of each answer, as the server itself names them.

    The repository here is not asked for the labels, because the server may serve another one.
    """
    ranked: list[list[tuple[str, float]]] = []
    for item, answer in zip(items, answers, strict=True):
        if contract.structured or (ranked and not ranked[0]):
            ranked.append([])
        else:
            ranked.append(client.rank(model, contract, item, min(_SHOWN, len(answer))))
    return ranked


def _show(texts: list[str], answers: Sequence[Any], ranked: Sequence[list[tuple[str, float]]]) -> None:
    """Print the answers.

    Documents are printed one on a line, and labels with their probabilities. A vector is printed as its first values
    and its cosine similarity with the vector of the first text.
    """
    for number, (text, answer, labels) in enumerate(zip(texts, answers, ranked, strict=True)):
        print(f"{text!r}")
        if isinstance(answer, list | dict):
            for part in answer if isinstance(answer, list) else [answer]:
                print("  " + json.dumps(part, ensure_ascii=False))
            continue
        if labels:
            print("  " + ", ".join(f"{label} {value:.4f}" for label, value in labels))
            continue
        values = " ".join(f"{value:+.4f}" for value in answer[:_SHOWN])
        print(f"  {len(answer)} values: {values}{' ...' if len(answer) > _SHOWN else ''}")
        if number and len(answer) > 1:
            first = answers[0]
            cosine = float(first @ answer / ((first @ first) * (answer @ answer)) ** 0.5)
            print(f"  cosine similarity with the first text: {cosine:.4f}")


def setup(options: Namespace) -> int:
    """Install the embedded Triton's environment."""
    del options
    install(read_workspace(os.environ).triton.environment, progress=lambda line: print(line, flush=True))
    return 0


def serve(options: Namespace) -> int:
    """Run the embedded Triton in the foreground. It picks up new releases while it runs."""
    workspace = read_workspace(os.environ)
    repository = workspace.repository(options.target)

    def say(line: str) -> None:
        print(line, flush=True)

    folder = served_folder(repository, workspace.copies, prune=True, say=say)
    if not public_models(folder):
        if options.control == "none":  # Triton would not take up a release that comes later
            raise ReleaseError(f"{repository} holds no release yet. Publish one: refinery optimize MODEL.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ReleaseError(
                f"{folder} does not exist and could not be created: {error.strerror or error}. Correct this, or change "
                "REFINERY_TRITON_REPOSITORIES."
            ) from error
        say(f"{repository} holds no release yet. The server waits for the first one: refinery optimize MODEL")
    _require_embeddable(folder, options.control)
    flags = caching(workspace.triton.environment, options.cache_mb) if options.cache_mb else []
    resources = dict(options.resource)
    for name in require_resources(folder, resources, options.control):
        say(f"no model of {repository} uses the resource {name!r} of --resource yet")
    flags += limited(resources)
    log = workspace.home / "logs" / f"triton-{options.target}-{options.grpc_port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    serve_foreground(
        folder,
        workspace.triton,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        health_port=options.health_port,
        log=log,
        control=options.control,
        options=flags,
        say=say,
        refresh=_follow(workspace, repository, say),
    )
    return 0


def _require_embeddable(repository: Path, control: str) -> None:
    """Raise ReleaseError if the embedded server would end because of models of the `native` flavour.

    With explicit control it skips such models, and ends only if there is no other. Otherwise one of them ends it.
    """
    served = [current_release(repository, model) for model in public_models(repository)]
    native = [release for release in served if release is not None and release.flavour == "native"]
    if native and (control != "explicit" or len(native) == len(served)):
        require_embeddable(
            native[0],
            f"Start a Triton server that has these backends on {repository}, or publish with "
            "REFINERY_TRITON_FLAVOUR=python",
        )


def _follow(workspace: Workspace, repository: Location, say: Callable[[str], None]) -> Callable[[], None]:
    """Return a function that brings the local copy of a repository in object storage up to date.

    It may be called often, and looks every _FOLLOW_SECONDS. It reports a failure that repeats itself only once.
    """
    if not isinstance(repository, RemotePath):
        return lambda: None
    mirror, said, last = Mirror(repository, workspace.copies), "", time.monotonic()

    def refresh() -> None:
        nonlocal said, last
        if time.monotonic() - last < _FOLLOW_SECONDS:
            return
        try:
            mirror.refresh()
            said = ""
        except (ReleaseError, StorageError, OSError) as error:
            if str(error) != said:
                said = str(error)
                say(f"{error} Until then, the local copy is served.")
        last = time.monotonic()

    return refresh
