"""The runs about serving, beside those of the candidates: tried settings, and the release under load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resources.artifacts.records import ServingConfiguration, ServingReport, ServingSetting, ServingTrial
from resources.tracking.names import PARENT, TAG, note, run_name, yes
from resources.tracking.store import RunLink, TrackingStore


def log_trials(
    store: TrackingStore, parent: RunLink, configuration: ServingConfiguration, tags: Mapping[str, str]
) -> RunLink:
    """Write a child run for each setting that was tried, and return the parent.

    Args:
        store: The tracking store.
        parent: The parent run of the optimization.
        configuration: The serving configuration with its trials.
        tags: The tags that all runs of the optimization have.
    """
    for trial in last_of_each(configuration.trials):
        setting = trial.setting
        taken = setting == configuration.setting
        said = {**tags, f"{TAG}taken": yes(taken)}
        parameters = {
            "engine": configuration.engine,
            **setting.model_dump(),
            "clients": configuration.clients,
            "stages": trial.stage,
        }
        figures = trial.model_dump(include={"throughput_per_s", "p50_ms", "p99_ms", "mean_batch", "requests"})
        what = f"serving {setting.instances}x{setting.threads}, {setting.queue_delay_us} us"
        name = run_name(what, tags.get(f"{TAG}revision", ""), configuration.target)
        metrics = {} if trial.reason else {f"serving_{key}": float(value) for key, value in figures.items()}
        said |= note(trial.reason or (f"Taken. {configuration.reason}" if taken else "Not taken."))
        _log_child(store, parent, configuration, name, "serving_trial", said, parameters, metrics, bool(trial.reason))
    return parent


def log_load(store: TrackingStore, parent: RunLink, report: ServingReport, tags: Mapping[str, str]) -> RunLink:
    """Write a child run with the release's figures under load for each number of clients, and return its link."""
    metrics = {}
    for level in report.levels:
        for key in ("throughput_per_s", "p50_ms", "p99_ms", "batches_per_request", "mean_batch"):
            metrics[f"{level.tool}_{level.clients}_clients_{key}"] = float(getattr(level, key))
    said = {**tags, f"{TAG}release": str(report.release), **note(f"On {report.server}.")}
    parameters = {"release": report.release, "engine": report.engine, "server": report.server}
    name = run_name(f"release {report.release} under load", tags.get(f"{TAG}revision", ""), report.target)
    return _log_child(store, parent, report, name, "serving_benchmark", said, parameters, metrics, failed=False)


def _log_child(
    store: TrackingStore,
    parent: RunLink,
    record: ServingConfiguration | ServingReport,
    name: str,
    kind: str,
    tags: Mapping[str, str],
    parameters: dict[str, Any],
    metrics: dict[str, float],
    failed: bool,
) -> RunLink:
    common = {
        PARENT: parent.run_id,
        f"{TAG}kind": kind,
        f"{TAG}model": record.model,
        f"{TAG}target": record.target,
        f"{TAG}device": record.device,
        f"{TAG}report": record.digest,
    }
    run = store.client.create_run(store.experiment(record.model), run_name=name, tags={**common, **tags})
    store.log(run.info.run_id, parameters, metrics)
    store.client.set_terminated(run.info.run_id, "FAILED" if failed else "FINISHED")
    return store.link(run)


def last_of_each(trials: Sequence[ServingTrial]) -> list[ServingTrial]:
    """Return the last trial of each setting, which is also its longest."""
    found: dict[ServingSetting, ServingTrial] = {}
    for trial in trials:
        if trial.setting not in found or trial.stage > found[trial.setting].stage:
            found[trial.setting] = trial
    return list(found.values())
