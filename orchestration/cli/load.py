"""`refinery load`: a measurement of a served model under load."""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path

from orchestration.settings import read_workspace
from orchestration.terminal.output import print_table, table_console
from resources.accuracy.evaluation_set import read_evaluation_set
from resources.errors import ReleaseError, ServerError
from resources.machine.lock import benchmarking
from resources.pipelines import open_pipeline
from resources.report.tables import load_table
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.evaluation_set import EVALUATION_SET
from resources.steps.step import Work
from resources.triton.client import TextClient
from resources.triton.mirror import served_folder
from resources.triton.mix import request_mix
from resources.triton.pointer import require_current
from resources.triton.release import require_embeddable
from resources.triton.server import EmbeddedServer
from resources.triton.serving_report import measure_load, measure_with_perf_analyzer


def load(options: Namespace) -> int:
    """Put load on a server by closed loops of clients, and print a table of the results.

    The server is the one of `--url`, or one that is started for this measurement.
    """
    workspace = read_workspace(os.environ)
    repository, work = workspace.repository(options.target), Work(workspace, workspace.entry(options.model))
    if options.url is None:
        require_embeddable(
            require_current(repository, options.model),
            "Give the address of a server that has these backends with --url. The load delays its users' requests",
        )
    checkpoint, evaluation = work.get(CHECKPOINT), work.get(EVALUATION_SET)
    folder = work.folder(checkpoint)
    items = request_mix(read_evaluation_set(work.folder(evaluation)).items, checkpoint, folder)
    if options.tokens is not None:
        rows = open_pipeline(str(folder)).rows(items)
        longest = [max(row.tokens for row in found) for found in rows]
        items = [item for item, tokens in zip(items, longest, strict=True) if tokens <= options.tokens]
        if not items:
            raise ReleaseError(
                f"--tokens {options.tokens}: the shortest request has {min(longest)} tokens. Give that number or more."
            )
    with ExitStack() as stack:
        address = options.url
        if address is not None:
            connection = workspace.triton.connection_to(address)
        else:
            stack.enter_context(
                benchmarking(lambda who: print(f"waiting for other work on this machine to end: {who}", flush=True))
            )
            log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "triton.log"
            server = EmbeddedServer(
                served_folder(repository, workspace.copies), workspace.triton, models=[options.model], log=log
            )
            address, connection = stack.enter_context(server).grpc_address, server.connection
        with TextClient(address, connection=connection) as client:
            title = f"{options.model}, release {client.release_of(options.model)}, on {client.version()} at {address}"
        found = measure_load(address, options.model, items, options.clients, options.seconds, connection)
        try:
            found += measure_with_perf_analyzer(
                address, options.model, items, options.clients, options.seconds, connection
            )
        except ServerError as error:  # perf_analyzer is optional
            print(f"refinery: {error}", file=sys.stderr)
    print_table(table_console(), title, *load_table(found))
    return 0
