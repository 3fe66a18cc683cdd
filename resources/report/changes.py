"""The differences between two optimizations of a model for one target, in inputs and in results."""

from __future__ import annotations

from collections.abc import Mapping

from resources.artifacts.records import BenchmarkReport
from resources.benchmark.ranking import margin
from resources.report.optimization import Changes, OptimizationReport

_NONE = "–"
#: Differences of a metric below this are not shown, because tables have four digits.
_SEEN = 5e-5


def changes(before: OptimizationReport, now: OptimizationReport) -> Changes:
    """Return the differences between an earlier optimization and the current one.

    The result's inputs are those that differ, with their values before and now. Its candidates are all engines that
    were measured in either optimization: the name, the score before and now, the meaning of the score's change, and the
    change in accuracy.
    """
    names = [report.engine for report in now.reports] + [report.engine for report in before.reports]
    rows = (_candidate(name, before, now) for name in dict.fromkeys(names))
    return Changes(inputs=_inputs(before, now), candidates=tuple(row for row in rows if row is not None))


def _inputs(before: OptimizationReport, now: OptimizationReport) -> tuple[tuple[str, str, str], ...]:
    found = []
    for name in ("revision", "source", "task", "device", "evaluation_items"):
        found.append((name.replace("_", " "), str(getattr(before, name)), str(getattr(now, name))))
    # With another revision, PyTorch's answers differ, and they are part of the evaluation set's digest.
    if before.revision == now.revision:
        first, second = before.champion.evaluation_digest, now.champion.evaluation_digest
        found.append(("evaluation set", first[:12], second[:12]))
    found += _pairs("", before.libraries, now.libraries)
    found += _pairs("", before.configuration, now.configuration)
    gates = [{gate.name: str(gate) for gate in report.gates} for report in (before, now)]
    found += _pairs("gate ", *gates)
    found.append(("champion", before.champion.engine, now.champion.engine))
    return tuple(row for row in found if row[1] != row[2])


def _pairs(prefix: str, before: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str, str]]:
    names = dict.fromkeys([*before, *now])
    return [(prefix + name, before.get(name, _NONE), now.get(name, _NONE)) for name in names]


def _candidate(name: str, before: OptimizationReport, now: OptimizationReport) -> tuple[str, str, str, str, str] | None:
    old, new = _measured(before, name), _measured(now, name)
    if old is None and new is None:
        return None
    first, second = _score(before, name) if old else _NONE, _score(now, name) if new else _NONE
    if old is None or new is None:
        return name, first, second, "new" if old is None else "not measured this time", _NONE
    return name, first, second, _meaning(name, old, new, before, now), _accuracy(old, new)


def _measured(report: OptimizationReport, name: str) -> BenchmarkReport | None:
    return next((one for one in report.reports if one.engine == name and one.status == "measured"), None)


def _score(report: OptimizationReport, name: str) -> str:
    score = report.scores.get(name)
    return f"{score:.2f}" if score is not None else _NONE


def _meaning(
    name: str, old: BenchmarkReport, new: BenchmarkReport, before: OptimizationReport, now: OptimizationReport
) -> str:
    """Say whether the score's change is more than noise, or why the two scores cannot be compared."""
    if old.digest == new.digest:
        return "not measured again"
    first, second = before.scores.get(name), now.scores.get(name)
    if first is None or second is None:
        return _NONE
    if before.objective != now.objective:
        return "by another objective"
    if [timing.shape for timing in old.timings] != [timing.shape for timing in new.timings]:
        return "at other shapes"
    noise = margin(old, new, now.objective)
    ratio = second / first
    if max(ratio, 1 / ratio) < noise:
        return f"within the noise, a factor of {noise:.2f}"
    return f"{ratio:.2f} times, more than the noise, a factor of {noise:.2f}"


def _accuracy(old: BenchmarkReport, new: BenchmarkReport) -> str:
    if old.accuracy is None or new.accuracy is None:
        return _NONE
    if old.accuracy.broken or new.accuracy.broken:
        return f"{old.accuracy.broken or 'sound'}, now {new.accuracy.broken or 'sound'}"
    first, second = old.accuracy.metrics, new.accuracy.metrics
    told = [
        f"{name} {first[name]:.4f} → {value:.4f}"
        for name, value in second.items()
        if name in first and not abs(value - first[name]) < _SEEN
    ]
    return ", ".join(told) or "the same"
