"""A Dagster logger that prints the progress of a run from the run's own events, one line for each step."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import dagster as dg

from orchestration.terminal.output import print_step, step_console

if TYPE_CHECKING:
    from rich.console import Console


class ProgressHandler(logging.Handler):
    """A log handler that prints what a step made when it ends. On a terminal, a spinner shows the step under way."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.DEBUG)
        self._console = console
        self._status = console.status("starting") if console.is_terminal else None
        self._run_started = self._step_started = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line for the event or the warning of a record."""
        event: dg.DagsterEvent | None = record.__dict__.get("dagster_event")
        try:
            if event is not None:
                self._event(event)
            elif record.levelno == logging.WARNING:  # errors come from Dagster: one for every step that did not run
                message = record.__dict__.get("dagster_meta", {}).get("orig_message", record.getMessage())
                self._line("warning", str(message), "yellow")
        except Exception:
            self.handleError(record)

    def _event(self, event: dg.DagsterEvent) -> None:
        kind = event.event_type
        if kind is dg.DagsterEventType.STEP_START:
            self._step_started = time.monotonic()
            if self._status is not None:
                self._status.update(str(event.step_key).replace("__", "/"))
                self._status.start()
        elif kind is dg.DagsterEventType.ASSET_MATERIALIZATION:
            materialization = event.step_materialization_data.materialization
            metadata = {name: value.value for name, value in materialization.metadata.items()}
            name = "/".join(materialization.asset_key.path)
            # These two are the same in every run, and the summary has them.
            if metadata.get("status") not in ("unsupported", "skipped"):
                self._line(name, describe(metadata, time.monotonic() - self._step_started))
        elif kind is dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            check = event.asset_check_evaluation_data
            unmeasured = "measured" in check.metadata and check.metadata["measured"].value is False
            if not check.passed and not unmeasured:  # the reason why it was not measured was printed before
                colour = "red" if check.severity is dg.AssetCheckSeverity.ERROR else "yellow"
                name = f"{'/'.join(check.asset_key.path)}: {check.check_name}"
                self._line(name, f"not passed. {check.description or ''}", colour)
        elif kind is dg.DagsterEventType.STEP_FAILURE:
            self._line(str(event.step_key).replace("__", "/"), "failed", "red")
        elif kind in (
            dg.DagsterEventType.RUN_SUCCESS,
            dg.DagsterEventType.RUN_FAILURE,
            dg.DagsterEventType.RUN_CANCELED,
        ):
            self.close()

    def close(self) -> None:
        """Stop the spinner, and close the handler."""
        if self._status is not None:
            self._status.stop()
        super().close()

    def _line(self, name: str, text: str, colour: str = "default") -> None:
        elapsed = time.monotonic() - self._run_started
        print_step(self._console, elapsed, name, text, colour)


def describe(metadata: dict[str, Any], seconds: float) -> str:
    """Return in a few words what a step made, from the metadata of its materialization."""
    if metadata.get("status") == "failed":
        return f"FAILED: {str(metadata.get('reason', '')).removeprefix('failed: ')}"
    done = "unchanged" if metadata.get("reused") else f"made in {seconds:.1f} s"
    if metadata.get("damaged"):
        how = "fetched" if metadata.get("reused") else "made"
        done = f"{metadata['damaged']} was damaged: {how} again in {seconds:.1f} s"
    said = metadata.get("release") or metadata.get("champion")
    return f"{said}, {done}" if said else done


@dg.logger(config_schema={}, description="Prints one line for each step on the command line.")
def progress_logger(context: dg.InitLoggerContext) -> logging.Logger:
    """Return the logger of `refinery optimize`, which prints a line for each step."""
    del context
    logger = logging.Logger("refinery.progress", logging.DEBUG)
    logger.addHandler(ProgressHandler(step_console()))
    return logger
