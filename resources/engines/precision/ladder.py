"""The precision ladder: which operators to leave in higher precision so that the accuracy gates are kept.

Everything in low precision is tried first. Where that misses a gate, operators run in low precision alone, each by
itself where the budget allows. Else they are bisected: sets of them run in low precision alone, the set that harms the
answers most is cut in two, and so on until the harm has a place. Then the fewest of the worst sets are left as they
were that keep the gates. Errors of independent operators add up in squares, which is why the harm of a set alone says
how much leaving it out will mend.

The search knows nothing of graphs: it is given the trials as functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from resources.errors import EngineError

#: Share of the seconds for measuring harm. The rest is for finding the fewest that suffice.
_SHARE_FOR_HARM = 0.5
#: Sets whose harm is below this share of all harm (in squares) are not cut further.
_NEGLIGIBLE = 0.05


@dataclass(frozen=True)
class Operator:
    """What is decided on as one: a product with a weight `[rows, columns]`, by every node that uses that weight."""

    name: str
    rows: int
    columns: int
    nodes: tuple[str, ...]

    @property
    def cost(self) -> int:
        """Multiplications a token, and so what leaving it out of low precision costs."""
        return self.rows * self.columns * len(self.nodes)


@dataclass(frozen=True)
class SearchResult:
    """What the search found. kept: operators left in higher precision; steps: what was tried, a sentence each.

    passed: the gates are kept with these. Else nothing that was tried keeps them, and `kept` is empty.
    """

    kept: tuple[str, ...]
    passed: bool
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Reduced:
    """What came of reducing a graph's precision; the fields are those of resources.engines.interface.Built."""

    parameters: dict[str, str]
    kept: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    kept_nodes: tuple[str, ...] = ()


@dataclass
class _Budget:
    trials: int
    started: float
    seconds: float
    spent: str = ""

    @property
    def elapsed(self) -> float:
        """Share of the seconds."""
        return (time.monotonic() - self.started) / self.seconds if self.seconds else float("inf")

    def take(self) -> bool:
        """Whether there is room for one more trial; takes it. `spent` says what has come to its end."""
        if self.trials <= 0 or self.elapsed > 1:
            self.spent = "the budget of trials" if self.trials <= 0 else "the time (`ladder.seconds`)"
            return False
        self.trials -= 1
        return True


@dataclass
class _Search:
    damage: Callable[[Collection[str]], float]
    misses: Callable[[Collection[str]], Sequence[str]]
    budget: _Budget
    steps: list[str] = field(default_factory=list)

    def harm(self, group: Sequence[Operator]) -> float | None:
        """Relative error of the answers where only the group runs in low precision; None: the budget is spent."""
        if self.budget.elapsed > _SHARE_FOR_HARM or not self.budget.take():
            return None
        value = self.damage([operator.name for operator in group])
        self.steps.append(f"only {_named(group)} in low precision: relative error {value:.4f}")
        return value

    def passes(self, kept: Sequence[Operator]) -> bool | None:
        """Whether the gates are kept with those operators in higher precision; None: the budget is spent."""
        if not self.budget.take():
            return None
        missed = self.misses([operator.name for operator in kept])
        what = f"{_named(kept)} in higher precision" if kept else "everything in low precision"
        self.steps.append(f"{what}: {'; '.join(missed) or 'every gate is kept'}")
        return not missed


def search(
    operators: Sequence[Operator],
    damage: Callable[[Collection[str]], float],
    misses: Callable[[Collection[str]], Sequence[str]],
    *,
    trials: int,
    seconds: float,
) -> SearchResult:
    """Find the operators to keep in higher precision, in so many trials and seconds beyond the first.

    damage: relative error of the answers where only the operators of those names run in low precision.
    misses: the gates that are missed, each as a sentence, where all run in low precision but those.
    """
    budget = _Budget(trials + 1, time.monotonic(), seconds)
    running = _Search(damage, misses, budget)
    if running.passes([]):
        return SearchResult((), True, tuple(running.steps))
    order = _worst_first(running, operators)
    kept = _fewest(running, order)
    if kept is None:
        why = f"{budget.spent} is spent" if budget.spent else "nothing that leaves some in low precision is enough"
        running.steps.append(f"not rescued: {why}")
        return SearchResult((), False, tuple(running.steps))
    return SearchResult(tuple(operator.name for operator in kept), True, tuple(running.steps))


def known(operators: Sequence[Operator], kept_nodes: Collection[str]) -> SearchResult:
    """The outcome of an earlier search, by the nodes that it kept. Raises EngineError where they are not all there."""
    require_nodes(kept_nodes, [node for operator in operators for node in operator.nodes])
    kept = tuple(operator.name for operator in operators if set(operator.nodes) <= set(kept_nodes))
    return SearchResult(
        kept, True, (f"nothing was searched: {len(kept)} operators are known to need higher precision",)
    )


def nodes_of(operators: Sequence[Operator], names: Collection[str]) -> tuple[str, ...]:
    """The nodes of the operators of those names."""
    return tuple(node for operator in operators if operator.name in names for node in operator.nodes)


def require_nodes(wanted: Collection[str], there: Collection[str]) -> None:
    """Raise EngineError where a node that is to be kept is not among those that there are."""
    missing = sorted(set(wanted) - set(there))
    if missing:
        raise EngineError(
            f"The graph has no operator {missing[0]!r} to keep in higher precision: it was made by other rules. "
            "Use the versions that the engine was built with, or let the search run again."
        )


def _worst_first(running: _Search, operators: Sequence[Operator]) -> list[list[Operator]]:
    """Sets of operators by harm for their cost: each alone, where the budget is enough for that. Else first by shape,
    which is what tells the parts of a block apart; then the worst is cut in two by depth, again and again."""
    budget, count = running.budget, len(operators)
    # So far there was one trial, of the gates, which takes longer than one of harm.
    alone = count + _trials_for_fewest(count) <= budget.trials and budget.elapsed * count <= _SHARE_FOR_HARM
    sets: dict[str | tuple[int, int], list[Operator]] = {}
    for operator in operators:
        sets.setdefault(operator.name if alone else (operator.rows, operator.columns), []).append(operator)
    groups: list[tuple[float, list[Operator]]] = []
    for group in sets.values():
        harm = running.harm(group)
        groups.append((0.0 if harm is None else harm, group))
    while budget.trials > _trials_for_fewest(len(groups)):
        # A harm without bounds (NaN) is never negligible, and says nothing about the others.
        total = sum(harm**2 for harm, _ in groups if harm < float("inf"))
        divisible = [item for item in groups if len(item[1]) > 1 and item[0] ** 2 > _NEGLIGIBLE * total]
        if not divisible:
            break
        worst = max(divisible, key=lambda item: item[0])
        half = len(worst[1]) // 2
        halves = [worst[1][:half], worst[1][half:]]
        harms = [running.harm(part) for part in halves]
        if None in harms:
            break
        groups.remove(worst)
        groups += [(harm, part) for harm, part in zip(harms, halves, strict=True) if harm is not None]
    groups.sort(key=lambda item: item[0] ** 2 / sum(operator.cost for operator in item[1]), reverse=True)
    return [group for _, group in groups]


def _trials_for_fewest(groups: int) -> int:
    """How many trials `_fewest` may take for so many sets, about."""
    return groups.bit_length() + 3


def _fewest(running: _Search, order: Sequence[Sequence[Operator]]) -> list[Operator] | None:
    """The shortest beginning of the order that keeps the gates, its last set cut down; None where there is none."""

    def beginning(count: int) -> list[Operator]:
        return [operator for group in order[:count] for operator in group]

    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        passed = running.passes(beginning(middle))
        if passed is None:
            break
        low, high = (low, middle) if passed else (middle, high)
    if high == len(order):  # all of them: that is no engine in low precision any more
        # The last set need not be kept whole, and then it still is one.
        return _part(running, beginning(high - 1), order[-1], whole_is_known=False)
    return _part(running, beginning(high - 1), order[high - 1], whole_is_known=True)


def _part(
    running: _Search, before: list[Operator], last: Sequence[Operator], *, whole_is_known: bool
) -> list[Operator] | None:
    """`before` and as little of `last` as keeps the gates; all of it only where that is known to."""
    best = [*before, *last] if whole_is_known else None
    while len(last) > 1:
        half = len(last) // 2
        for part in (last[:half], last[half:]):
            if running.passes([*before, *part]):
                best, last = [*before, *part], part
                break
        else:
            break
    return best


def _named(group: Sequence[Operator]) -> str:
    first = group[0].name
    return first if len(group) == 1 else f"{first} and {len(group) - 1} more"
