"""The usage of a machine during a build, as MLflow's system metrics, which its page shows in a tab of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from resources.machine.usage import Usage

if TYPE_CHECKING:
    from mlflow.entities import Metric

#: MLflow's page recognizes system metrics by this prefix.
_PREFIX = "system/"
#: MLflow takes at most this many metrics in one call.
BATCH = 1000


def system_metrics(seen: Iterable[Usage | None], since_s: float = 0.0) -> list[Metric]:
    """Return one metric for each figure of each sample, in the order of time.

    If the samples come from several machines, a metric's name contains the machine's name, as MLflow's names for nodes
    do.

    Args:
        seen: The usages that were recorded.
        since_s: Samples before this time, in seconds since the epoch, are left out.
    """
    from mlflow.entities import Metric

    usages = [usage for usage in seen if usage is not None]
    samples = sorted(
        ((sample.time_s, usage.node, sample.values) for usage in usages for sample in usage.samples),
        key=lambda item: item[:2],
    )
    recent = [item for item in samples if item[0] >= since_s]
    several = len({node for _, node, _ in recent}) > 1
    return [
        Metric(f"{_PREFIX}{f'{node}/' if several else ''}{name}", value, round(time_s * 1000), step)
        for step, (time_s, node, values) in enumerate(recent)
        for name, value in values.items()
    ]
