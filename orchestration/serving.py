"""`refinery query` and `refinery serve`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.settings import read_workspace
from resources.errors import ReleaseError
from resources.triton.client import query_ranked, query_texts, serves
from resources.triton.layout import current_release, public_models
from resources.triton.server import EmbeddedServer, serve_foreground

if TYPE_CHECKING:
    import numpy as np

_SHOWN = 8
DEFAULT_ADDRESS = "127.0.0.1:8001"


def query(options: Namespace) -> int:
    """Ask the server at `--url`; without one, that on the usual port, or, where none listens, one started for this."""
    workspace = read_workspace(os.environ)
    repository = workspace.repository(options.target)
    release = current_release(repository, options.model)
    with ExitStack() as stack:
        address = options.url or DEFAULT_ADDRESS
        # Who names a server wants that one's answer and no other.
        if options.url is None and not serves(address, options.model):
            if release is None:
                raise _nothing_served(options.model, repository)
            log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "triton.log"
            print(f"No server at {address} has it; starting one for this question.", file=sys.stderr)
            server = EmbeddedServer(repository, workspace.triton, models=[options.model], log=log)
            address = stack.enter_context(server).grpc_address
        if options.json:
            for answer in query_texts(address, options.model, options.text):
                print(json.dumps([float(value) for value in answer]))
        else:
            # The server itself names the labels: it may not be that of the repository here.
            _show(options.text, *query_ranked(address, options.model, options.text))
    return 0


def _show(texts: list[str], answers: np.ndarray, ranked: list[list[tuple[str, float]]]) -> None:
    """Labels with their probabilities where the model has labels, else the vector's beginning and likenesses."""
    for number, (text, answer, labels) in enumerate(zip(texts, answers, ranked, strict=True)):
        print(f"{text!r}")
        if labels:
            print("  " + ", ".join(f"{label} {value:.4f}" for label, value in labels[:_SHOWN]))
            continue
        values = " ".join(f"{value:+.4f}" for value in answer[:_SHOWN])
        print(f"  {len(answer)} values: {values}{' ...' if len(answer) > _SHOWN else ''}")
        if number:
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
