"""MLflow: an experiment a model, a parent run an optimization, a child run a candidate.

Not dagster-mlflow, which pins an older Dagster; all that is needed is `MlflowClient`.
A run that changes nothing writes nothing: the parent run is made with its first child.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.artifacts.fingerprint import library_versions
from resources.artifacts.records import (
    BenchmarkReport,
    Champion,
    Checkpoint,
    Engine,
    ServingConfiguration,
    ServingReport,
    ServingSetting,
    ServingTrial,
)
from resources.errors import TrackingError
from resources.locks import file_lock
from resources.reporting import length_plot

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

#: MLflow's codes for something that does not exist.
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_TAG = "refinery."
#: Of a version: before the number of each release that was made of it.
_RELEASES = f"{_TAG}release_"
#: MLflow cuts parameters there, and refuses longer ones in some stores.
_LONGEST_PARAMETER = 6000
ALIAS = "champion"


@dataclass(frozen=True)
class RunLink:
    """One MLflow run, and where to see it (the tracking server's page, if one is configured)."""

    run_id: str
    url: str


class Tracker:
    """All writing to MLflow.

    uri: the tracking store. ui: the address of its pages. folder: keeps the links to runs already written, so that an
    unchanged optimization neither writes again nor waits for MLflow to be imported, and the artifacts of a local store.
    """

    def __init__(self, uri: str, *, ui: str | None, folder: Path) -> None:
        self._uri, self._ui, self._folder = uri, ui, folder
        self._known_client: MlflowClient | None = None

    def prepare(self) -> None:
        """Make the store if it is not there. Two processes that open a fresh sqlite store at once crash."""
        with _clear_errors(self._uri):
            self._client()

    def candidate(
        self, dagster_run: str, checkpoint: Checkpoint, engine: Engine, report: BenchmarkReport, missed: Sequence[str]
    ) -> RunLink | None:
        """The child run of a candidate; written, under this Dagster run's parent, unless it was before.

        An unsupported engine has none: there is nothing to compare.
        """
        if report.status == "skipped":
            return None
        known = self._recall(_candidate_name(report))
        if known is not None and report.status == "measured":
            return known
        with _clear_errors(self._uri):
            link = self._log_candidate(dagster_run, checkpoint, engine, report, missed)
        self._remember(_candidate_name(report), link)
        return link

    def champion(
        self,
        dagster_run: str,
        champion: Champion,
        reports: Sequence[BenchmarkReport],
        table: str,
        plot: bytes | None,
    ) -> RunLink | None:
        """Close this Dagster run's parent with its verdict, table (Markdown) and latency plot (PNG).

        The winner becomes a version of the registered model, under the alias `champion-<target>`. Without a parent,
        nothing was measured anew: the answer is the run that chose this champion before, or, where a gate or objective
        was changed, the one that measured it.
        """
        name, current = f"champion-{champion.digest}", f"current-{champion.model}-{champion.target}"
        known, parent = self._recall(name), self._recall(f"parent-{dagster_run}")
        with _clear_errors(self._uri):
            if parent is None and known is None:  # written by another machine
                parent = self._find(champion.model, self._parent_filter(dagster_run))
            if parent is not None:
                self._adopt(parent, reports)
                self._log_champion(parent, champion, reports, table, plot)
            elif known is not None and self._recall(current, champion.digest) is not None:
                return known
            else:
                best = next(report for report in reports if report.engine == champion.engine)
                parent = known or self._recall(_candidate_name(best))
                if parent is None:
                    return None
                self._register(champion, self._recall(_candidate_name(best)) or parent)
        self._remember(name, parent)
        self._remember(current, parent, champion.digest)
        return parent

    def serving(self, dagster_run: str, champion: Champion, configuration: ServingConfiguration) -> None:
        """A child run for each setting that was tried on a server, beside the candidates of the run that chose it."""
        if not configuration.trials:
            return
        self._once(
            f"serving-{configuration.digest}",
            lambda: self._log_serving(self._parent_of(dagster_run, champion), configuration),
        )

    def load(self, dagster_run: str, champion: Champion, report: ServingReport) -> None:
        """A child run with what the published release did under load, by clients."""
        if report.status != "measured":
            return
        self._once(f"load-{report.digest}", lambda: self._log_load(self._parent_of(dagster_run, champion), report))

    def _once(self, name: str, write: Callable[[], RunLink | None]) -> None:
        if self._recall(name) is not None:
            return
        with _clear_errors(self._uri):
            link = write()
        if link is not None:
            self._remember(name, link)

    def _parent_of(self, dagster_run: str, champion: Champion) -> RunLink | None:
        """This Dagster run's parent, or the run that chose the champion."""
        own = self._recall(f"parent-{dagster_run}") or self._recall(f"champion-{champion.digest}")
        return own or self._find(champion.model, self._parent_filter(dagster_run))

    def _log_serving(self, parent: RunLink | None, configuration: ServingConfiguration) -> RunLink | None:
        if parent is None:
            return None
        for trial in last_of_each(configuration.trials):
            setting = trial.setting
            tags = {
                f"{_TAG}taken": _yes(setting == configuration.setting),
                "mlflow.note.content": trial.reason or configuration.reason,
            }
            parameters = {**setting.model_dump(), "clients": configuration.clients, "stages": trial.stage}
            figures = trial.model_dump(include={"throughput_per_s", "p50_ms", "p99_ms", "mean_batch", "requests"})
            name = f"serving {setting.instances}x{setting.threads}, {setting.queue_delay_us} us"
            metrics = {} if trial.reason else {f"serving_{key}": float(value) for key, value in figures.items()}
            self._log_child(parent, configuration, name, "serving_trial", tags, parameters, metrics, bool(trial.reason))
        return parent

    def _log_load(self, parent: RunLink | None, report: ServingReport) -> RunLink | None:
        if parent is None:
            return None
        metrics = {}
        for level in report.levels:
            for key in ("throughput_per_s", "p50_ms", "p99_ms", "batches_per_request", "mean_batch"):
                metrics[f"{level.tool}_{level.clients}_clients_{key}"] = float(getattr(level, key))
        tags = {f"{_TAG}release": str(report.release), "mlflow.note.content": f"On {report.server}."}
        parameters = {"release": report.release, "engine": report.engine, "server": report.server}
        name = f"release {report.release} under load"
        return self._log_child(parent, report, name, "serving_benchmark", tags, parameters, metrics, failed=False)

    def _log_child(
        self,
        parent: RunLink,
        record: ServingConfiguration | ServingReport,
        name: str,
        kind: str,
        tags: dict[str, str],
        parameters: dict[str, Any],
        metrics: dict[str, float],
        failed: bool,
    ) -> RunLink:
        client, experiment = self._client(), self._experiment(record.model)
        common = {
            "mlflow.parentRunId": parent.run_id,
            f"{_TAG}kind": kind,
            f"{_TAG}model": record.model,
            f"{_TAG}target": record.target,
            f"{_TAG}device": record.device,
            f"{_TAG}report": record.digest,
        }
        run_id = client.create_run(experiment, run_name=name, tags={**common, **tags}).info.run_id
        self._log(run_id, parameters, metrics)
        client.set_terminated(run_id, "FAILED" if failed else "FINISHED")
        return RunLink(run_id, self._url(experiment, run_id))

    def release_runs(self, model: str, target: str) -> dict[int, RunLink]:
        """The run that measured the engine of each release, by the release's number, as far as MLflow knows them."""
        with _clear_errors(self._uri):
            client, found = self._client(), dict[int, RunLink]()
            for version in client.search_model_versions(f"name = '{model}'"):
                numbers = [key.removeprefix(_RELEASES) for key in version.tags if key.startswith(_RELEASES)]
                if version.tags.get(f"{_TAG}target") != target or not numbers or not version.run_id:
                    continue
                experiment = client.get_run(version.run_id).info.experiment_id
                link = RunLink(version.run_id, self._url(experiment, version.run_id))
                found |= {int(number): link for number in numbers if number.isdigit()}
        return found

    def release(self, checkpoint: Checkpoint, champion: Champion, number: int) -> None:
        """Tag the champion's registered version, and the run that measured it, with its Triton release's number."""
        name = f"release-{champion.target}-{number}-{champion.digest}"
        if self._recall(name) is not None:
            return
        with _clear_errors(self._uri):
            link = self._tag_release(checkpoint, champion, number)
        if link is not None:
            self._remember(name, link)

    def champion_release(self, model: str, target: str) -> int | None:
        """The Triton release of the version that has the champion's alias; None where there is none."""
        with _clear_errors(self._uri):
            version = self._champion_version(model, target)
        number = version.tags.get(f"{_TAG}release", "") if version is not None else ""
        return int(number) if number.isdigit() else None

    def _champion_version(self, model: str, target: str) -> ModelVersion | None:
        try:
            version: ModelVersion = self._client().get_model_version_by_alias(model, f"{ALIAS}-{target}")
        except _exceptions() as error:
            if getattr(error, "error_code", "") not in _NOT_THERE:
                raise
            return None
        return version

    def _tag_release(self, checkpoint: Checkpoint, champion: Champion, number: int) -> RunLink | None:
        client, name = self._client(), champion.model
        version = self._champion_version(name, champion.target)
        if version is None or version.tags.get(f"{_TAG}engine") != champion.engine_digest:
            return None
        # The newest by one name, and all of them: one champion may be released again, served in another way.
        tags = {
            f"{_TAG}release": str(number),
            f"{_RELEASES}{number}": champion.digest,
            f"{_TAG}revision": checkpoint.revision,
        }
        for key, value in tags.items():
            client.set_model_version_tag(name, version.version, key, value)
        if not version.run_id:
            return None
        client.set_tag(version.run_id, f"{_TAG}release", str(number))
        return RunLink(version.run_id, self._url(client.get_run(version.run_id).info.experiment_id, version.run_id))

    def abandon(self, dagster_run: str, model: str, why: str) -> None:
        """Close this Dagster run's parent as failed, if it has one. Its children go to the parent of the next run."""
        parent = self._recall(f"parent-{dagster_run}")
        if parent is None:  # nothing was written
            return
        with _clear_errors(self._uri):
            client = self._client()
            client.set_tag(parent.run_id, "mlflow.note.content", f"{model}: {why}"[:4000])
            client.set_terminated(parent.run_id, "FAILED")

    def _adopt(self, parent: RunLink, reports: Sequence[BenchmarkReport]) -> None:
        """Take over the candidates that runs measured which then failed: they compete here."""
        client = self._client()
        for report in reports:
            link = self._recall(_candidate_name(report))
            owner = client.get_run(link.run_id).data.tags.get("mlflow.parentRunId") if link is not None else None
            if link is None or owner is None or owner == parent.run_id:
                continue
            if client.get_run(owner).info.status != "FINISHED":
                client.set_tag(link.run_id, "mlflow.parentRunId", parent.run_id)

    def _log_candidate(
        self, dagster_run: str, checkpoint: Checkpoint, engine: Engine, report: BenchmarkReport, missed: Sequence[str]
    ) -> RunLink:
        client = self._client()
        parent = self._parent(dagster_run, checkpoint, report)
        tags = {
            "mlflow.parentRunId": parent.run_id,
            f"{_TAG}report": report.digest,
            f"{_TAG}engine": engine.digest,
            f"{_TAG}status": report.status,
            f"{_TAG}target": report.target,
            f"{_TAG}accurate": _yes(report.status == "measured" and not missed),
            "mlflow.note.content": report.reason or "; ".join(missed) or "Every accuracy gate is kept.",
            **self._common_tags(dagster_run, checkpoint, report),
        }
        experiment = self._experiment(checkpoint.model)
        run_id = client.create_run(experiment, run_name=report.engine, tags=tags).info.run_id
        parameters = {
            "engine": engine.name,
            "runtime": engine.runtime,
            "precision": engine.precision,
            "target": engine.target,
            **thread_parameters(report),
            **engine.parameters,
        }
        if engine.steps:
            parameters["kept_in_higher_precision"] = ", ".join(engine.kept) or "none"
            client.log_dict(run_id, {"kept": engine.kept, "tried": engine.steps}, "precision.json")
        self._log(run_id, parameters, candidate_metrics(engine, report))
        if report.thread_trials:
            client.log_dict(run_id, {"trials": [trial.model_dump() for trial in report.thread_trials]}, "threads.json")
        if report.accuracy is not None:
            client.log_dict(run_id, report.accuracy.model_dump(), "accuracy.json")
            client.log_dict(run_id, {"timings": [timing.model_dump() for timing in report.timings]}, "timings.json")
        client.set_terminated(run_id, "FINISHED" if report.status == "measured" else "FAILED")
        return RunLink(run_id, self._url(experiment, run_id))

    def _log_champion(
        self,
        parent: RunLink,
        champion: Champion,
        reports: Sequence[BenchmarkReport],
        table: str,
        plot: bytes | None,
    ) -> None:
        client = self._client()
        best = next(report for report in reports if report.engine == champion.engine)
        client.log_text(parent.run_id, table, "candidates.md")
        client.log_dict(parent.run_id, {"verdicts": [v.model_dump() for v in champion.verdicts]}, "verdicts.json")
        if plot is not None:
            self._log_picture(parent.run_id, "latency.png", plot)
        metrics = {"champion_score": champion.score, **speedups(best)}
        self._log(parent.run_id, {"objective": champion.objective}, metrics)
        tags = {
            "champion": champion.engine,
            "champion_reason": champion.reason,
            "model_version": self._register(champion, self._recall(_candidate_name(best)) or parent),
        }
        for name, value in tags.items():
            client.set_tag(parent.run_id, _TAG + name, value)
        client.set_terminated(parent.run_id)

    def _register(self, champion: Champion, link: RunLink) -> str:
        client, name = self._client(), champion.model
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name, description="Engines chosen by transformer-refinery.")
        found = client.search_model_versions(f"name = '{name}'")
        same = [item for item in found if item.tags.get(f"{_TAG}champion") == champion.digest]
        version = (
            same[0]
            if same
            else client.create_model_version(
                name,
                # The bytes live in the artifact store and in the Triton repository; this is their address. A tracking
                # server takes absolute paths alone.
                source=f"refinery:/engine/{champion.engine_digest}",
                run_id=link.run_id,
                tags={
                    f"{_TAG}champion": champion.digest,
                    f"{_TAG}engine": champion.engine_digest,
                    f"{_TAG}target": champion.target,
                    f"{_TAG}engine_name": champion.engine,
                },
                description=champion.reason,
            )
        )
        client.set_registered_model_alias(name, f"{ALIAS}-{champion.target}", version.version)
        return str(version.version)

    def _parent(self, dagster_run: str, checkpoint: Checkpoint, report: BenchmarkReport) -> RunLink:
        """This Dagster run's parent. Steps in processes of their own must not make two."""
        name = f"parent-{dagster_run}"
        with file_lock(self._folder / "parent.lock"):
            parent = self._recall(name) or self._find(checkpoint.model, self._parent_filter(dagster_run))
            parent = parent or self._begin_parent(dagster_run, checkpoint, report)
            self._remember(name, parent)
        return parent

    def _begin_parent(self, dagster_run: str, checkpoint: Checkpoint, report: BenchmarkReport) -> RunLink:
        client, experiment = self._client(), self._experiment(checkpoint.model)
        tags = {f"{_TAG}parent": "true", **self._common_tags(dagster_run, checkpoint, report)}
        run = client.create_run(experiment, run_name=f"{checkpoint.revision[:12]} {dagster_run[:8]}", tags=tags)
        self._log(
            run.info.run_id,
            {
                "source": checkpoint.source,
                "revision": checkpoint.revision,
                "task": checkpoint.task,
                "architecture": checkpoint.architecture,
                "max_tokens": checkpoint.max_tokens,
                "allow_pickle": checkpoint.allow_pickle,
                "trust_remote_code": checkpoint.trust_remote_code,
            },
            {"checkpoint_bytes": float(checkpoint.weights_bytes), **_length_metrics(checkpoint)},
        )
        if checkpoint.lengths is not None:
            title = f"{checkpoint.model}: rows of {checkpoint.lengths.requests} sampled requests"
            self._log_picture(run.info.run_id, "lengths.png", length_plot(checkpoint.lengths, title))
            client.log_dict(run.info.run_id, checkpoint.lengths.model_dump(), "lengths.json")
        return RunLink(run.info.run_id, self._url(experiment, run.info.run_id))

    @staticmethod
    def _parent_filter(dagster_run: str) -> str:
        return f"tags.`{_TAG}parent` = 'true' and tags.`{_TAG}dagster_run` = '{dagster_run}'"

    @staticmethod
    def _common_tags(dagster_run: str, checkpoint: Checkpoint, report: BenchmarkReport) -> dict[str, str]:
        versions = library_versions("torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu", "openvino")
        return {
            f"{_TAG}dagster_run": dagster_run,
            f"{_TAG}model": checkpoint.model,
            f"{_TAG}revision": checkpoint.revision,
            f"{_TAG}device": report.device,
            f"{_TAG}libraries": json.dumps(versions),
            f"{_TAG}allow_pickle": _yes(checkpoint.allow_pickle),
            f"{_TAG}trust_remote_code": _yes(checkpoint.trust_remote_code),
        }

    def _find(self, model: str, query: str) -> RunLink | None:
        client = self._client()
        experiment = client.get_experiment_by_name(model)
        if experiment is None:
            return None
        runs = client.search_runs([experiment.experiment_id], query, max_results=1)
        if not runs:
            return None
        return RunLink(runs[0].info.run_id, self._url(experiment.experiment_id, runs[0].info.run_id))

    def _experiment(self, model: str) -> str:
        client = self._client()
        found = client.get_experiment_by_name(model)
        if found is not None:
            return str(found.experiment_id)
        location = (
            None if not self._uri.startswith("sqlite:") else (self._folder / "artifacts" / model).resolve().as_uri()
        )
        # Without the kind, the page opens on traces of language models and not on runs.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(model, artifact_location=location, tags=tags))

    def _log(self, run_id: str, parameters: dict[str, Any], metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric, Param

        self._client().log_batch(
            run_id,
            metrics=[Metric(name, value, 0, 0) for name, value in metrics.items()],
            params=[Param(name, str(value)[:_LONGEST_PARAMETER]) for name, value in parameters.items()],
        )

    def _log_picture(self, run_id: str, name: str, png: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(png)
            self._client().log_artifact(run_id, str(path))

    def _recall(self, name: str, what: str = "") -> RunLink | None:
        """The link of that name; `what`: only if it was remembered for that."""
        try:
            data = json.loads((self._folder / "links" / f"{name}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        if data.get("store") != self._uri:  # written to another server: this one does not know it
            return None
        if what and data.get("what") != what:
            return None
        return RunLink(data["run_id"], f"{self._ui or ''}{data['path']}")

    def _remember(self, name: str, link: RunLink, what: str = "") -> None:
        path = self._folder / "links" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        where = link.url.removeprefix(self._ui or "")
        draft.write_text(json.dumps({"store": self._uri, "run_id": link.run_id, "path": where, "what": what}))
        draft.replace(path)

    def _url(self, experiment: str, run_id: str) -> str:
        return f"{self._ui or ''}/#/experiments/{experiment}/runs/{run_id}"

    def _client(self) -> MlflowClient:
        if self._known_client is None:
            import logging

            # Two hundred lines of schema migrations otherwise, on the first use of a store.
            for name in ("alembic", "mlflow.store.db.utils"):
                logging.getLogger(name).setLevel(logging.WARNING)
            from mlflow import MlflowClient

            # Processes that open a fresh sqlite store at once crash: the first makes it, the others wait.
            with file_lock(self._folder / "store.lock"):
                client = MlflowClient(self._uri)
                client.search_experiments(max_results=1)
            self._known_client = client
        return self._known_client


def _length_metrics(checkpoint: Checkpoint) -> dict[str, float]:
    """What the sample says about lengths: tokens a row, and the share of all tokens that is padding."""
    lengths = checkpoint.lengths
    if lengths is None:
        return {}
    return {
        "tokens_p50": float(lengths.percentile(0.5)),
        "tokens_p95": float(lengths.percentile(0.95)),
        "padding_share": lengths.padding,
    }


def last_of_each(trials: Sequence[ServingTrial]) -> list[ServingTrial]:
    """The longest trial of each setting, which is its last."""
    found: dict[ServingSetting, ServingTrial] = {}
    for trial in trials:
        if trial.setting not in found or trial.stage > found[trial.setting].stage:
            found[trial.setting] = trial
    return list(found.values())


def _candidate_name(report: BenchmarkReport) -> str:
    """What a candidate's run is remembered as. One that failed is measured again under the same digest."""
    return f"candidate-{report.digest}" if report.status == "measured" else f"candidate-{report.digest}-{report.status}"


def candidate_metrics(engine: Engine, report: BenchmarkReport) -> dict[str, float]:
    """Flat names, latencies in milliseconds by shape: `p50_ms.8x128`, `speedup.8x128`, `accuracy.cosine_mean`."""
    metrics = {"build_seconds": engine.build_seconds, "size_bytes": float(report.engine_size_bytes)}
    for timing in report.timings:
        latency = timing.candidate
        values = {
            "p50_ms": latency.p50_ms,
            "p90_ms": latency.p90_ms,
            "p99_ms": latency.p99_ms,
            "mean_ms": latency.mean_ms,
            "std_ms": latency.std_ms,
            "max_ms": latency.max_ms,
            "throughput_per_s": latency.throughput_per_s,
            "peak_memory_bytes": float(timing.candidate_memory_bytes),
        }
        metrics |= {f"{name}.{timing.shape}": value for name, value in values.items() if value is not None}
    metrics |= speedups(report)
    if report.accuracy is not None:
        metrics |= {f"accuracy.{name}": value for name, value in report.accuracy.metrics.items()}
    return metrics


def thread_parameters(report: BenchmarkReport) -> dict[str, int | str]:
    """What PyTorch and the engine were measured with."""
    setting = report.setting
    if setting is None:
        return {"threads": report.threads}
    return {"threads": setting.threads, "spinning": _yes(setting.spinning), "baseline_threads": report.baseline_threads}


def speedups(report: BenchmarkReport) -> dict[str, float]:
    """Times faster than PyTorch, by shape."""
    return {f"speedup.{timing.shape}": timing.speedup for timing in report.timings}


def _yes(value: bool) -> str:
    return "true" if value else "false"


@contextlib.contextmanager
def _clear_errors(uri: str) -> Iterator[None]:
    """MLflow's own errors, and the network's, as one TrackingError that names the store."""
    try:
        yield
    except _exceptions() as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrackingError(
            f"MLflow at {uri} cannot be written: {first[:300]} Start that server or mend REFINERY_MLFLOW_URI, then run "
            "again: what was measured is kept and will be written then."
        ) from error


def _exceptions() -> tuple[type[Exception], ...]:
    """What MLflow and its stores raise; asked for only once something has been raised."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, requests.RequestException, SQLAlchemyError)
