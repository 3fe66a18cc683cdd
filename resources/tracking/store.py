"""The connection to MLflow, and what this machine remembers of what it wrote there."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from resources.artifacts.hashes import write_json
from resources.boundary.addresses import Address
from resources.boundary.deadlines import within
from resources.errors import TrackingError, disk_remedy, disk_trouble, first_line
from resources.storage.locks import file_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

#: MLflow cuts parameters there, and refuses longer ones in some stores.
_LONGEST_PARAMETER = 6000
#: For one call of a server or of a database elsewhere, its own tries again and the files of a report included.
ANSWER_SECONDS = 120.0
#: MLflow's codes: for what is not there, and for what another process made first.
_ABSENT, _THERE = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"


@dataclass(frozen=True)
class RunLink:
    """One MLflow run, and where to see it (the tracking server's page, if one is configured)."""

    run_id: str
    url: str


class TrackingStore:
    """One tracking store. uri: its address. ui: that of its pages. folder: keeps the links to runs already written,
    so that an unchanged optimization neither writes again nor waits for MLflow to be imported, and the artifacts of a
    store that is a file.
    """

    def __init__(self, uri: str, *, ui: str | None, folder: Path) -> None:
        self.uri, self.folder, self._ui = Address(uri), folder, ui
        self._file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
        self._client: MlflowClient | None = None

    @property
    def shared(self) -> bool:
        """Whether other machines may write to it: a file belongs to one."""
        return self._file is None

    @property
    def unmade(self) -> bool:
        """Whether it is a file that nobody has written yet. Looking into it would make it, with all of its tables."""
        return self._file is not None and not self._file.exists()

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            # Two hundred lines of schema migrations otherwise, on the first use of a store.
            for name in ("alembic", "mlflow.store.db.utils"):
                logging.getLogger(name).setLevel(logging.WARNING)
            # Every error of the database is raised too.
            logging.getLogger("mlflow.store.db.utils").addFilter(_has_no_traceback)
            from mlflow import MlflowClient

            # Processes that open a fresh sqlite store at once crash: the first makes it, the others wait.
            with file_lock(self.folder / "store.lock"):
                fresh = self.unmade
                try:
                    client = within(ANSWER_SECONDS, partial(MlflowClient, self.uri.for_library))
                    within(ANSWER_SECONDS, partial(client.search_experiments, max_results=1))
                except BaseException as error:
                    if fresh:
                        self._remove_half_made()
                    if not isinstance(error, ImportError):
                        raise
                    raise TrackingError(
                        f"MLflow at {self.uri} cannot be opened: {first_line(error)}. Install the driver of that "
                        "database, such as psycopg2-binary or PyMySQL."
                    ) from error
                if fresh:  # what was written to one that lay there before is gone with it
                    self._forget_links()
            # A database file is on this machine: nobody else's server answers for it.
            self._client = client if self._file is not None else cast("MlflowClient", _Bounded(client))
        return self._client

    def _remove_half_made(self) -> None:
        """Remove a database that could not be made whole, which MLflow would refuse. The caller holds its lock."""
        assert self._file is not None
        for suffix in ("", "-journal", "-wal", "-shm"):  # as SQLite names what lies beside it
            self._file.with_name(self._file.name + suffix).unlink(missing_ok=True)

    def experiment(self, model: str) -> str:
        """The id of the model's experiment, made if it is not there."""
        found = self.client.get_experiment_by_name(model)
        if found is None:
            # A server keeps artifacts itself; beside a database MLflow would take the folder that one stands in.
            served = self.uri.startswith(("http:", "https:", "databricks"))
            location = None if served else (self.folder / "artifacts" / model).resolve().as_uri()
            # Without the kind, the page opens on traces of language models and not on runs.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            with already_there():
                return str(self.client.create_experiment(model, artifact_location=location, tags=tags))
            found = self.client.get_experiment_by_name(model)
        if found.lifecycle_stage == "deleted":  # by a person; MLflow gives its name to no other
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def find(self, model: str, query: str, *, by: str = "start_time") -> Run | None:
        """The newest of the model's runs that the query finds."""
        return next(iter(self.search(model, query, by=by)), None)

    def search(self, model: str, query: str, *, by: str = "start_time") -> list[Run]:
        """The model's runs that the query finds, the newest first: by the time of that name. Deleted ones are none."""
        experiment = self.client.get_experiment_by_name(model)
        if experiment is None:
            return []
        return list(self.client.search_runs([experiment.experiment_id], query, order_by=[f"attributes.{by} DESC"]))

    def run(self, run_id: str) -> Run | None:
        """The run, as far as it is still there: a person may have deleted it, or the store may be another one."""
        try:
            run = self.client.get_run(run_id)
        except exceptions() as error:
            if getattr(error, "error_code", "") != _ABSENT:
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def recall_run(self, name: str) -> RunLink | None:
        """As `recall`, for what is to be written to: None where that run is not there any more."""
        link = self.recall(name)
        return link if link is not None and self.run(link.run_id) is not None else None

    def link(self, run: Run) -> RunLink:
        """The link to a run that MLflow gave."""
        return RunLink(run.info.run_id, self.address(f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}"))

    def address(self, page: str) -> str:
        """Of one of MLflow's pages."""
        return f"{self._ui or ''}/#/{page}"

    def log(self, run_id: str, parameters: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Parameters, and metrics without a time of their own."""
        from mlflow.entities import Metric, Param

        self.client.log_batch(
            run_id,
            metrics=[Metric(name, value, 0, 0) for name, value in metrics.items()],
            params=[Param(name, str(value)[:_LONGEST_PARAMETER]) for name, value in parameters.items()],
        )

    def log_files(self, run_id: str, files: Mapping[str, bytes]) -> None:
        """Artifacts of a run, by name; those that are there already are replaced."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.write_bytes(content)
                self.client.log_artifact(run_id, str(path))

    def read_file(self, run_id: str, name: str) -> bytes | None:
        """One artifact of a run; None where it has none of that name."""
        if name not in {item.path for item in self.client.list_artifacts(run_id)}:
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.client.download_artifacts(run_id, name, folder)).read_bytes()

    def recall(self, name: str, what: str = "") -> RunLink | None:
        """The link of that name; `what`: only if it was remembered for that."""
        try:
            data = json.loads((self.folder / "links" / f"{name}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        if data.get("store") != self.uri:  # written to another server: this one does not know it
            return None
        if self._file is not None and not self._file.exists():
            return None
        if what and data.get("what") != what:
            return None
        return RunLink(data["run_id"], f"{self._ui or ''}{data['path']}")

    def recall_all(self, prefix: str) -> list[RunLink]:
        """The links whose names begin so."""
        names = sorted(path.name.removesuffix(".json") for path in (self.folder / "links").glob(f"{prefix}*.json"))
        return [link for name in names if (link := self.recall(name)) is not None]

    def remember(self, name: str, link: RunLink, what: str = "") -> None:
        """Keep a link, for the steps and runs that come after."""
        path = self.folder / "links" / f"{name}.json"
        where = link.url.removeprefix(self._ui or "")
        write_json(path, {"store": self.uri, "run_id": link.run_id, "path": where, "what": what})

    def forget(self, name: str) -> None:
        """Recall it no more."""
        (self.folder / "links" / f"{name}.json").unlink(missing_ok=True)

    def _forget_links(self) -> None:
        for path in (self.folder / "links").glob("*.json"):
            if json.loads(path.read_text()).get("store") == self.uri:
                path.unlink()

    @contextlib.contextmanager
    def clear_errors(self) -> Iterator[None]:
        """MLflow's own errors, and the network's, as one TrackingError that names the store."""
        try:
            yield
        except exceptions() as error:
            shown = self.uri.without_secrets(error)
            if not self.shared and disk_trouble(error):
                remedy = disk_remedy(errno.ENOSPC)
            else:
                remedy = (
                    "Start that server or mend REFINERY_MLFLOW_URI, then run again: what was measured is kept and will "
                    "be written then."
                )
            said = first_line(shown).rstrip(".")
            raise TrackingError(f"MLflow at {self.uri} cannot be written: {said}. {remedy}") from shown


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None


class _Bounded:
    """A client each of whose calls ends: MLflow's own limits begin anew with each byte of an answer."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *args, **options: within(ANSWER_SECONDS, partial(method, *args, **options))


@contextlib.contextmanager
def already_there() -> Iterator[None]:
    """Another process, of another target say, may make the same at the same time; then it is there all the same."""
    try:
        yield
    except exceptions() as error:
        if getattr(error, "error_code", "") != _THERE:
            raise


def exceptions() -> tuple[type[Exception], ...]:
    """What MLflow and its stores raise; asked for only once something has been raised."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, requests.RequestException, SQLAlchemyError, TimeoutError)
