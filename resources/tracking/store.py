"""The connection to MLflow, and this machine's links to the runs that it wrote there."""

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

#: MLflow cuts parameters at this many characters, and refuses longer ones in some stores.
_LONGEST_PARAMETER = 6000
#: The time for one call to a server or a remote database. It includes MLflow's own retries and the files of a report.
ANSWER_SECONDS = 120.0
#: MLflow's error codes for something that does not exist, and for something that another process made first.
_ABSENT, _THERE = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"


@dataclass(frozen=True)
class RunLink:
    """One MLflow run, and the address where people see it: the tracking server's page, if one is configured."""

    run_id: str
    url: str


class TrackingStore:
    """One tracking store.

    Args:
        uri: The address of the store.
        ui: The address of the store's pages.
        folder: The folder for the links to runs that are already written, so that an unchanged optimization neither
            writes again nor waits for the import of MLflow. It also holds the artifacts of a store that is a file.
    """

    def __init__(self, uri: str, *, ui: str | None, folder: Path) -> None:
        self.uri, self.folder, self._ui = Address(uri), folder, ui
        self._file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
        self._client: MlflowClient | None = None

    @property
    def shared(self) -> bool:
        """Return whether other machines may write to the store. A file belongs to one machine."""
        return self._file is None

    @property
    def unmade(self) -> bool:
        """Return whether the store is a file that does not exist yet. Reading would make it, with all its tables."""
        return self._file is not None and not self._file.exists()

    @property
    def client(self) -> MlflowClient:
        """The client of the store, which is made if it does not exist."""
        if self._client is None:
            # The first use of a store would otherwise log two hundred lines of schema migrations.
            for name in ("alembic", "mlflow.store.db.utils"):
                logging.getLogger(name).setLevel(logging.WARNING)
            # Errors of the database are raised too, so the log leaves out the records with their tracebacks.
            logging.getLogger("mlflow.store.db.utils").addFilter(_has_no_traceback)
            from mlflow import MlflowClient

            # Processes that open a fresh sqlite store at once crash, so the first one makes it and the others wait.
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
                if fresh:  # The links may point to the runs of an earlier store at this address, which is gone.
                    self._forget_links()
            # Calls to a database file need no time limit, because no remote server has to answer them.
            self._client = client if self._file is not None else cast("MlflowClient", _Bounded(client))
        return self._client

    def _remove_half_made(self) -> None:
        """Remove a database whose creation failed, because MLflow would refuse it. The caller holds its lock."""
        assert self._file is not None
        for suffix in ("", "-journal", "-wal", "-shm"):  # SQLite uses these suffixes for the files beside a database.
            self._file.with_name(self._file.name + suffix).unlink(missing_ok=True)

    def experiment(self, model: str) -> str:
        """Return the id of the model's experiment, and make the experiment if it does not exist."""
        found = self.client.get_experiment_by_name(model)
        if found is None:
            # A server keeps artifacts itself. With a database, MLflow would put them into the current folder.
            served = self.uri.startswith(("http:", "https:", "databricks"))
            location = None if served else (self.folder / "artifacts" / model).resolve().as_uri()
            # Without this kind, the experiment's page opens on traces of language models and not on runs.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            with already_there():
                return str(self.client.create_experiment(model, artifact_location=location, tags=tags))
            found = self.client.get_experiment_by_name(model)
        # A person may have deleted the experiment, and MLflow gives its name to no other experiment.
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def find(self, model: str, query: str, *, by: str = "start_time") -> Run | None:
        """Return the newest of the model's runs that the query finds, or None if there is none."""
        return next(iter(self.search(model, query, by=by)), None)

    def search(self, model: str, query: str, *, by: str = "start_time") -> list[Run]:
        """Return the model's runs that the query finds, the newest first, without deleted ones.

        Args:
            model: The model's name.
            query: The filter, in MLflow's syntax.
            by: The attribute with the time that runs are ordered by.
        """
        experiment = self.client.get_experiment_by_name(model)
        if experiment is None:
            return []
        return list(self.client.search_runs([experiment.experiment_id], query, order_by=[f"attributes.{by} DESC"]))

    def run(self, run_id: str) -> Run | None:
        """Return the run, or None if it is gone: a person may have deleted it, or the store may be another one."""
        try:
            run = self.client.get_run(run_id)
        except exceptions() as error:
            if getattr(error, "error_code", "") != _ABSENT:
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def recall_run(self, name: str) -> RunLink | None:
        """Return the link of that name, as `recall` does, if its run still exists and can be written to."""
        link = self.recall(name)
        return link if link is not None and self.run(link.run_id) is not None else None

    def link(self, run: Run) -> RunLink:
        """Return the link to a run that MLflow returned."""
        return RunLink(run.info.run_id, self.address(f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}"))

    def address(self, page: str) -> str:
        """Return the address of one of MLflow's pages."""
        return f"{self._ui or ''}/#/{page}"

    def log(self, run_id: str, parameters: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write a run's parameters, and its metrics without a time of their own."""
        from mlflow.entities import Metric, Param

        self.client.log_batch(
            run_id,
            metrics=[Metric(name, value, 0, 0) for name, value in metrics.items()],
            params=[Param(name, str(value)[:_LONGEST_PARAMETER]) for name, value in parameters.items()],
        )

    def log_files(self, run_id: str, files: Mapping[str, bytes]) -> None:
        """Write a run's artifacts by name, and replace those that exist already."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.write_bytes(content)
                self.client.log_artifact(run_id, str(path))

    def read_file(self, run_id: str, name: str) -> bytes | None:
        """Return the content of a run's artifact, or None if the run has no artifact of that name."""
        if name not in {item.path for item in self.client.list_artifacts(run_id)}:
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.client.download_artifacts(run_id, name, folder)).read_bytes()

    def recall(self, name: str, what: str = "") -> RunLink | None:
        """Return the link that was kept under that name, or None if there is none.

        Args:
            name: The link's name.
            what: The value that `remember` must have got with the link. Empty accepts any value.
        """
        try:
            data = json.loads((self.folder / "links" / f"{name}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        if data.get("store") != self.uri:  # The run was written to another server, and this one does not know it.
            return None
        if self._file is not None and not self._file.exists():
            return None
        if what and data.get("what") != what:
            return None
        return RunLink(data["run_id"], f"{self._ui or ''}{data['path']}")

    def recall_all(self, prefix: str) -> list[RunLink]:
        """Return the links whose names begin with the prefix."""
        names = sorted(path.name.removesuffix(".json") for path in (self.folder / "links").glob(f"{prefix}*.json"))
        return [link for name in names if (link := self.recall(name)) is not None]

    def remember(self, name: str, link: RunLink, what: str = "") -> None:
        """Keep a link under that name for later steps and runs.

        Args:
            name: The link's name.
            link: The link.
            what: A value that `recall` can ask for, such as the digest of the champion.
        """
        path = self.folder / "links" / f"{name}.json"
        where = link.url.removeprefix(self._ui or "")
        write_json(path, {"store": self.uri, "run_id": link.run_id, "path": where, "what": what})

    def forget(self, name: str) -> None:
        """Delete the link that was kept under that name."""
        (self.folder / "links" / f"{name}.json").unlink(missing_ok=True)

    def _forget_links(self) -> None:
        for path in (self.folder / "links").glob("*.json"):
            if json.loads(path.read_text()).get("store") == self.uri:
                path.unlink()

    @contextlib.contextmanager
    def clear_errors(self) -> Iterator[None]:
        """Turn the errors of MLflow and of the network into one TrackingError that names the store."""
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
    """A client whose calls all end within `ANSWER_SECONDS`.

    MLflow's own time limits start again with each byte of an answer.
    """

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *args, **options: within(ANSWER_SECONDS, partial(method, *args, **options))


@contextlib.contextmanager
def already_there() -> Iterator[None]:
    """Ignore the error that something exists already.

    Another process, for example one for another target, may make the same thing at the same time.
    """
    try:
        yield
    except exceptions() as error:
        if getattr(error, "error_code", "") != _THERE:
            raise


def exceptions() -> tuple[type[Exception], ...]:
    """Return the exceptions that MLflow and its stores raise.

    The imports are heavy, so callers evaluate this only in an `except` clause, once something has been raised.
    """
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, requests.RequestException, SQLAlchemyError, TimeoutError)
