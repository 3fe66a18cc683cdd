"""What optimizing an unchanged model costs: `python -m tests.performance.rerun MODEL [--profile]`.

`refinery optimize` where everything is there already, in turns with a process that runs a job of as many steps, with
the same graph, checks, partitions, executor and kind of instance, of which no step does anything. Prints the seconds of
both and the median of their ratios, pair by pair; with `--profile`, where the unchanged run's time goes.

Its home is that of REFINERY_HOME, where the model was optimized before.
"""

import json
import logging
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAIRS = 9
_LONGEST_SECONDS = 300
_ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))}


def seconds(command: list[str], **environment: str) -> float:
    """One process, from start to exit."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, **_ENVIRONMENT, **environment},
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=_LONGEST_SECONDS,
    )
    return time.perf_counter() - started


def graph() -> dict[str, Any]:
    """Assets with those before them, and checks, of the real job."""
    from orchestration.definitions import defs

    job = defs.resolve_job_def("optimize")
    layer, keys = job.asset_layer, sorted(job.asset_layer.executable_asset_keys)
    return {
        "assets": {
            key.to_user_string(): [one.to_user_string() for one in layer.asset_graph.get(key).parent_keys]
            for key in keys
        },
        "checks": [[key.asset_key.to_user_string(), key.name] for key in sorted(layer.asset_graph.asset_check_keys)],
    }


def run_empty(wanted: dict[str, Any]) -> int:
    """The other job; the number of its steps."""
    import dagster as dg

    partitions = dg.DynamicPartitionsDefinition(name="model")

    def asset(name: str, before: list[str]) -> dg.AssetsDefinition:
        @dg.asset(key=name.split("/"), deps=[dg.AssetKey(one.split("/")) for one in before], partitions_def=partitions)
        def nothing(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            return dg.MaterializeResult(metadata={"reused": True})

        return nothing

    def check(name: str, title: str) -> dg.AssetChecksDefinition:
        @dg.asset_check(asset=dg.AssetKey(name.split("/")), name=title, partitions_def=partitions)
        def nothing(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
            return dg.AssetCheckResult(passed=True)

        return nothing

    @dg.logger(config_schema={})
    def silent(context: dg.InitLoggerContext) -> logging.Logger:
        return logging.Logger("silent", logging.CRITICAL)

    job = dg.Definitions(
        loggers={"silent": silent},
        assets=[asset(name, before) for name, before in wanted["assets"].items()],
        asset_checks=[check(name, title) for name, title in wanted["checks"]],
        jobs=[dg.define_asset_job("empty", dg.AssetSelection.all(), executor_def=dg.in_process_executor)],
    ).resolve_job_def("empty")
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions("model", ["nothing"])
        result = job.execute_in_process(
            partition_key="nothing", instance=instance, run_config={"loggers": {"silent": {}}}
        )
    assert result.success
    return len(result.get_step_success_events())


def profile(model: str) -> None:
    """Print where the time of an unchanged run goes, imports included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile"
        code = (
            "import cProfile; profile = cProfile.Profile(); profile.enable()\n"
            f"from orchestration.cli import main; main(['optimize', {model!r}])\n"
            f"profile.disable(); profile.dump_stats({str(path)!r})"
        )
        environment = {**os.environ, **_ENVIRONMENT}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=_LONGEST_SECONDS)
        pstats.Stats(str(path)).sort_stats("cumulative").print_stats(90)


def main(model: str) -> int:
    """Print the figures."""
    from orchestration.runs.instance import prepare_instance
    from resources.settings.workspace import Workspace

    with tempfile.TemporaryDirectory() as folder:
        os.environ.pop("DAGSTER_HOME", None)
        wanted = Path(folder) / "graph.json"
        wanted.write_text(json.dumps(graph()))
        home = prepare_instance(Workspace(home=Path(folder), catalog_path=Path(folder) / "none"))
        del os.environ["DAGSTER_HOME"]
        empty = ["tests.performance.rerun", "--empty", str(wanted)]
        full = ["orchestration.cli", "optimize", model]
        seconds(empty, DAGSTER_HOME=str(home)), seconds(full)  # the first makes the instance's store
        pairs = [(seconds(empty, DAGSTER_HOME=str(home)), seconds(full)) for _ in range(PAIRS)]
        steps = len(json.loads(wanted.read_text())["assets"]) + len(json.loads(wanted.read_text())["checks"])
    nothing, unchanged = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(full / empty for empty, full in pairs)
    print(f"{steps} empty steps {nothing:.2f} s; the unchanged run {unchanged:.2f} s; ratio {ratio:.2f}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--empty"]:
        run_empty(json.loads(Path(sys.argv[2]).read_text()))
    elif "--profile" in sys.argv:
        profile(sys.argv[1])
    else:
        sys.exit(main(sys.argv[1]))
