"""What was seen of a machine while it built, as MLflow's system metrics: its page shows them in a tab of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from resources.machine.usage import Usage

if TYPE_CHECKING:
    from mlflow.entities import Metric

#: By which MLflow's page knows them.
_PREFIX = "system/"
#: MLflow takes that many metrics at once.
BATCH = 1000


def system_metrics(seen: Iterable[Usage | None], since_s: float = 0.0) -> list[Metric]:
    """One metric a figure and sample, in the order of time, of what was seen since then (seconds since the epoch).

    Of several machines each figure has the machine's name in it, as MLflow has it for nodes.
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
