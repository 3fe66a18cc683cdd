"""Metadata, owners and failure handling that the assets share."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import dagster as dg

from resources.artifacts.records import Record, StoredFile
from resources.artifacts.store import Made
from resources.errors import TrackingError
from resources.tracking import RunLink

#: The owners of every asset, unless REFINERY_OWNERS names others.
OWNERS = ["team:refinery"]

#: The value of a cell of a table.
Cell = str | int | float | bool | None


def closing_tracking(step: Callable[..., dg.MaterializeResult]) -> Callable[..., dg.MaterializeResult]:
    """Wrap a step so that its MLflow run is closed if the step fails.

    It is for assets of a target, whose keys are `<kind>/<target>/...`. It is no Dagster hook, because a hook writes an
    event for every step of every run, which would be a fifth of all events.
    """

    @wraps(step)
    def closing(context: dg.AssetExecutionContext, **resources: Any) -> dg.MaterializeResult:
        try:
            return step(context, **resources)
        except Exception as error:
            why = f"{context.asset_key.to_user_string()} failed: {error}"
            target = context.asset_key.path[1]
            try:
                resources["tracker"].abandon(context.run.run_id, context.partition_key, why, target)
            except TrackingError as untold:  # people have to read the step's own failure, so that is raised
                dg.get_dagster_logger().warning(f"its MLflow run stays open: {untold}")
            raise

    return closing


def materialized(made: Made[Any], folder: Path, metadata: Mapping[str, Any]) -> dg.MaterializeResult:
    """Return the result of a step: its own metadata, then the metadata that all steps have.

    Its data version is the digest of the content, and does not depend on the time.
    """
    record: Record = made.record
    common: dict[str, Any] = {
        "reused": dg.MetadataValue.bool(made.reused),
        "digest": record.digest,
        "build_seconds": dg.MetadataValue.float(round(record.build_seconds, 2)),
    }
    if made.damaged:
        common["damaged"] = ", ".join(made.damaged)
    if record.peak_memory_bytes:
        common["peak_memory_bytes"] = dg.MetadataValue.int(record.peak_memory_bytes)
    if record.files:
        common["size_bytes"] = dg.MetadataValue.int(record.size_bytes)
        common["files"] = dg.MetadataValue.path(folder)
    return dg.MaterializeResult(metadata={**metadata, **common}, data_version=dg.DataVersion(record.content_digest))


def table(columns: Mapping[str, str], rows: Sequence[Sequence[Cell]]) -> dg.TableMetadataValue:
    """Return a table for Dagster's pages.

    A column's type is that of its first cell that is not None.

    Args:
        columns: The columns' names, which include their units, and their meanings. An empty meaning says nothing more
            than the name.
        rows: The cells of each row, in the order of the columns.
    """
    names = list(columns)
    schema = [
        dg.TableColumn(
            name,
            dg.TableMetadataValue.infer_column_type(next((row[place] for row in rows if row[place] is not None), "")),
            columns[name] or None,
        )
        for place, name in enumerate(names)
    ]
    records = [dg.TableRecord(dict(zip(names, row, strict=True))) for row in rows]
    return dg.TableMetadataValue(records, dg.TableSchema(schema))


def file_table(files: Mapping[str, StoredFile]) -> dg.TableMetadataValue:
    """Return the table of the files of an artifact or of a release, the largest first."""
    largest_first = sorted(files.items(), key=lambda item: (-item[1].size_bytes, item[0]))
    return table(
        {"file": "", "size_bytes": "", "sha256": ""},
        [[name, file.size_bytes, file.sha256] for name, file in largest_first],
    )


def linked(**links: RunLink | None) -> dict[str, dg.UrlMetadataValue]:
    """Return the links to MLflow's pages as metadata, without those that are None."""
    return {name: dg.MetadataValue.url(link.url) for name, link in links.items() if link is not None}


def began_s(context: dg.AssetExecutionContext) -> float:
    """Return when the step's run began, in seconds since the epoch, or 0 if Dagster does not know."""
    record = context.instance.get_run_record_by_id(context.run.run_id)
    return (record.start_time if record is not None else None) or 0.0
