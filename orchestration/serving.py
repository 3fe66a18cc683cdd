"""`refinery query` and `refinery serve`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from orchestration.settings import read_workspace
from resources.errors import ReleaseError, ServerError
from resources.triton.client import TextClient, is_live
from resources.triton.layout import current_release, public_models
from resources.triton.release import Release
from resources.triton.server import EmbeddedServer, serve_foreground

_SHOWN = 8


def query(options: Namespace) -> int:
    """Ask the server at `--url`, or, where none listens, one started for this question."""
    workspace = read_workspace(os.environ)
    repository = workspace.repository(options.target)
    release = current_release(repository, options.model)
    with ExitStack() as stack:
        address = options.url
        if not is_live(address):
            if release is None:
                raise _nothing_served(options.model, repository)
            log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "triton.log"
            print(f"No server at {options.url}; starting one for this question.", file=sys.stderr)
            server = EmbeddedServer(repository, workspace.triton, models=[options.model], log=log)
            address = stack.enter_context(server).grpc_address
        with TextClient(address) as client:
            contract = client.contract(options.model)
            items = _items(options, contract.inputs)
            # One request each: batching is the server's work.
            answers = [client.ask(options.model, contract, [item])[0] for item in items]
    if options.json:
        for answer in answers:
            print(json.dumps(answer if contract.structured else answer.tolist(), ensure_ascii=False))
    else:
        _show(options.text, answers, release)
    return 0


def _items(options: Namespace, inputs: Sequence[str]) -> list[dict[str, str]]:
    """One request a text. Raises ServerError where the model takes something else than was given."""
    labels = options.labels and json.dumps([label.strip() for label in options.labels.split(",")])
    given = {"QUERY": options.query, "QUESTION": options.question, "LABELS": labels}
    for name, value in given.items():
        if (value is None) == (name in inputs):
            raise ServerError(
                f"{options.model} takes {' and '.join(inputs)}: {'give' if value is None else 'leave out'} "
                f"--{name.lower()}."
            )
    main = next(name for name in inputs if name not in given)
    return [
        {main: text, **{name: value for name, value in given.items() if value is not None}} for text in options.text
    ]


def _show(texts: list[str], answers: Sequence[Any], release: Release | None) -> None:
    """Documents a line each; labels with their probabilities; else a vector's beginning, and likenesses."""
    labels = release.labels if release is not None else ()
    for number, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        print(f"{text!r}")
        if isinstance(answer, list | dict):
            for part in answer if isinstance(answer, list) else [answer]:
                print("  " + json.dumps(part, ensure_ascii=False))
            continue
        if labels and len(labels) == len(answer):
            ranked = sorted(zip(answer.tolist(), labels, strict=True), reverse=True)
            print("  " + ", ".join(f"{label} {value:.4f}" for value, label in ranked[:_SHOWN]))
            continue
        values = " ".join(f"{value:+.4f}" for value in answer[:_SHOWN])
        print(f"  {len(answer)} values: {values}{' ...' if len(answer) > _SHOWN else ''}")
        if number and len(answer) > 1:
            first = answers[0]
            cosine = float(first @ answer / ((first @ first) * (answer @ answer)) ** 0.5)
            print(f"  cosine similarity with the first text: {cosine:.4f}")


def serve(options: Namespace) -> int:
    """The embedded Triton in the foreground; new releases are picked up while it runs."""
    workspace = read_workspace(os.environ)
    repository = workspace.repository(options.target)
    if not public_models(repository):
        raise ReleaseError(f"{repository} holds no release yet. Publish one: refinery optimize MODEL.")
    log = workspace.home / "logs" / f"triton-{options.target}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    serve_foreground(
        repository,
        workspace.triton,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        log=log,
        say=lambda line: print(line, flush=True),
    )
    return 0


def _nothing_served(model: str, repository: Path) -> ReleaseError:
    return ReleaseError(
        f"{model}: no release of it is in {repository} (there: {', '.join(public_models(repository)) or 'none'}). "
        f"Publish one: refinery optimize {model}."
    )
