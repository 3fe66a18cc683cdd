"""Compare an engine's answers with PyTorch's, and apply the accuracy gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resources.accuracy.evaluation_set import Evaluation
from resources.artifacts.records import Accuracy, Disagreement
from resources.tasks import Gates, Task
from resources.tasks.base import broken_answers

if TYPE_CHECKING:
    from resources.accuracy.inference import Answered

WORST_SHOWN = 5


def measure_accuracy(task: Task, settings: dict[str, Any], known: Evaluation, ways: Sequence[Answered]) -> Accuracy:
    """Compare answers with PyTorch's, one an item, by the task's own measure, and with the right ones where those are
    known, by its usual metric. ways: answers to the same items in different company; the worst of each metric counts.
    """
    import numpy as np

    items, baseline = known.items, known.baseline
    for answered in ways:
        broken = answered.broken or broken_answers(baseline, answered.answers)
        if broken:
            return Accuracy(metrics={}, broken=broken, texts=len(items))
    scores = np.minimum.reduce([task.scores(settings, baseline, answered.answers) for answered in ways])
    worst = np.argsort(scores, kind="stable")[:WORST_SHOWN]
    found = [
        {
            **task.compare(settings, items, baseline, answered.answers),
            **task.grade(settings, items, known.right, answered.answers),
        }
        for answered in ways
    ]
    return Accuracy(
        metrics={name: task.worse(name, [metrics[name] for metrics in found]) for name in found[0]},
        gated=task.gate_names(settings),
        texts=len(items),
        worst=tuple(
            Disagreement(text=" | ".join(items[index].values())[:200], score=float(scores[index])) for index in worst
        ),
    )


def missed_gates(task: Task, accuracy: Accuracy, gates: Gates) -> list[str]:
    """Why the engine may not be served, each as a sentence; none: it is accurate."""
    return [accuracy.broken] if accuracy.broken else task.misses(accuracy.gated, accuracy.metrics, gates)
