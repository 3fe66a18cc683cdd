"""Comparison of an engine's answers with PyTorch's answers, and the accuracy gates on it."""

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
    """Measure how accurate an engine's answers are.

    The answers are compared with PyTorch's answers by the task's own measure. Where the right answers are known, the
    answers are also graded against those by the task's usual metrics.

    Args:
        task: The checkpoint's task.
        settings: The checkpoint's settings for its task.
        known: The evaluation set.
        ways: The engine's answers to the same items, once for each way of batching. The worst value of each metric
            counts.
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
    """Return the reasons why the engine may not be served, each as a sentence; empty if the engine is accurate."""
    return [accuracy.broken] if accuracy.broken else task.misses(accuracy.gated, accuracy.metrics, gates)
