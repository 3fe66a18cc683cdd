"""A code location whose one step waits until it is told to go on: what runs are killed in.

It holds the only slot of a pool, so that nothing runs after it unless its slot was given back.
"""

import os
import time
from pathlib import Path

import dagster as dg

FOLDER = "WAITING_FOLDER"
POOL = "machine"
LONGEST_SECONDS = 300


@dg.asset(pool=POOL)
def waiting(context: dg.AssetExecutionContext) -> None:
    folder = Path(os.environ[FOLDER])
    (folder / context.run.run_id).touch()
    deadline = time.monotonic() + LONGEST_SECONDS
    while not (folder / "go").exists():
        assert time.monotonic() < deadline, "nobody said go"
        time.sleep(0.05)


defs = dg.Definitions(
    assets=[waiting],
    jobs=[dg.define_asset_job("wait", selection=[waiting])],
    executor=dg.in_process_executor,
)
