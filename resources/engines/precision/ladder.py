"""The precision ladder: finds the operators that must stay in higher precision so that the accuracy gates pass.

The first trial runs everything in low precision. If that misses a gate, the search measures the harm of the operators.
If the budget allows, each operator runs in low precision alone. Otherwise sets of operators do, and the set that harms
the answers most is cut in two, again and again, until the harm is located. The search then keeps as few of the worst
sets in higher precision as suffice for the gates. Errors of independent operators add up in squares, so the harm of a
set alone tells how much it helps to keep that set.

The search does not know graphs. It gets the trials as functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from resources.errors import EngineError

#: The share of the seconds for measuring harm. The rest is for finding the fewest operators that suffice.
_SHARE_FOR_HARM = 0.5
#: Sets whose squared harm is below this share of the sum of all squared harms are not cut further.
_NEGLIGIBLE = 0.05


@dataclass(frozen=True)
class Operator:
    """The unit that the ladder decides on: the products of all nodes that use one weight `[rows, columns]`."""

    name: str
    rows: int
    columns: int
    nodes: tuple[str, ...]

    @property
    def cost(self) -> int:
        """The multiplications for each token, which are the price of keeping the operator in higher precision."""
        return self.rows * self.columns * len(self.nodes)


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        kept: The operators that stay in higher precision. Empty if no trial passed the gates.
        passed: Whether the gates pass with these operators kept.
        steps: The trials, one sentence each.
    """

    kept: tuple[str, ...]
    passed: bool
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Reduced:
    """The result of reducing a graph's precision.

    The fields are those of `resources.engines.interface.Built`.
    """

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
        """The share of the seconds that has passed."""
        return (time.monotonic() - self.started) / self.seconds if self.seconds else float("inf")

    def take(self) -> bool:
        """Take one trial from the budget, and return whether there was room for it.

        If there was none, `spent` names the limit that was reached.
        """
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
        """Return the relative error of the answers with only the group in low precision.

        The result is None if the budget is spent.
        """
        if self.budget.elapsed > _SHARE_FOR_HARM or not self.budget.take():
            return None
        value = self.damage([operator.name for operator in group])
        self.steps.append(f"only {_named(group)} in low precision: relative error {value:.4f}")
        return value

    def passes(self, kept: Sequence[Operator]) -> bool | None:
        """Return whether the gates pass with those operators in higher precision.

        The result is None if the budget is spent.
        """
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
    """Find the operators to keep in higher precision.

    Args:
        operators: All operators, in the order of the graph.
        damage: Returns the relative error of the answers with only the operators of those names in low precision.
        misses: Returns the gates that are missed, one sentence each, with all operators except those in low precision.
        trials: How many trials may follow the first.
        seconds: How long the search may take.
    """
    budget = _Budget(trials + 1, time.monotonic(), seconds)
    running = _Search(damage, misses, budget)
    if running.passes([]):
        return SearchResult((), True, tuple(running.steps))
    order = _worst_first(running, operators)
    kept = _fewest(running, order)
    if kept is None:
        why = (
            f"{budget.spent} is spent"
            if budget.spent
            else "no trial with operators left in low precision passed the gates"
        )
        running.steps.append(f"not rescued: {why}")
        return SearchResult((), False, tuple(running.steps))
    return SearchResult(tuple(operator.name for operator in kept), True, tuple(running.steps))


def known(operators: Sequence[Operator], kept_nodes: Collection[str]) -> SearchResult:
    """Return the result of an earlier search, given by the nodes that it kept.

    Raises:
        EngineError: One of the nodes does not exist.
    """
    require_nodes(kept_nodes, [node for operator in operators for node in operator.nodes])
    kept = tuple(operator.name for operator in operators if set(operator.nodes) <= set(kept_nodes))
    return SearchResult(
        kept, True, (f"no search was needed: {len(kept)} operators are known to need higher precision",)
    )


def nodes_of(operators: Sequence[Operator], names: Collection[str]) -> tuple[str, ...]:
    """Return the nodes of the operators of those names."""
    return tuple(node for operator in operators if operator.name in names for node in operator.nodes)


def require_nodes(wanted: Collection[str], there: Collection[str]) -> None:
    """Check that all nodes that are to be kept exist.

    Raises:
        EngineError: One of them does not exist.
    """
    missing = sorted(set(wanted) - set(there))
    if missing:
        raise EngineError(
            f"The graph has no operator {missing[0]!r} to keep in higher precision, because other versions of "
            "the software made it. Use the versions that the engine was built with, or let the search run again."
        )


def _worst_first(running: _Search, operators: Sequence[Operator]) -> list[list[Operator]]:
    """Return sets of operators, ordered by their squared harm for each unit of cost, the worst first.

    If the budget is large enough, each operator is a set of its own. Otherwise the operators are first grouped by
    shape, which tells the parts of a block apart. The worst set is then cut in two by depth, again and again.
    """
    budget, count = running.budget, len(operators)
    # The only trial so far was one of the gates, which takes longer than a trial of harm.
    alone = count + _trials_for_fewest(count) <= budget.trials and budget.elapsed * count <= _SHARE_FOR_HARM
    sets: dict[str | tuple[int, int], list[Operator]] = {}
    for operator in operators:
        sets.setdefault(operator.name if alone else (operator.rows, operator.columns), []).append(operator)
    groups: list[tuple[float, list[Operator]]] = []
    for group in sets.values():
        harm = running.harm(group)
        groups.append((0.0 if harm is None else harm, group))
    while budget.trials > _trials_for_fewest(len(groups)):
        # An infinite harm (NaN) is never negligible, and it must not make the others look negligible.
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
    """Return about how many trials `_fewest` needs for so many sets."""
    return groups.bit_length() + 3


def _fewest(running: _Search, order: Sequence[Sequence[Operator]]) -> list[Operator] | None:
    """Return the shortest beginning of the order that passes the gates, with its last set cut down.

    The result is None if none was found.
    """

    def beginning(count: int) -> list[Operator]:
        return [operator for group in order[:count] for operator in group]

    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        passed = running.passes(beginning(middle))
        if passed is None:
            break
        low, high = (low, middle) if passed else (middle, high)
    if high == len(order):  # keeping all sets would leave no engine of low precision
        # If a part of the last set is enough, the rest of it is still in low precision.
        return _part(running, beginning(high - 1), order[-1], whole_is_known=False)
    return _part(running, beginning(high - 1), order[high - 1], whole_is_known=True)


def _part(
    running: _Search, before: list[Operator], last: Sequence[Operator], *, whole_is_known: bool
) -> list[Operator] | None:
    """Return `before` and as little of `last` as passes the gates.

    All of `last` is returned only if it is known to pass. If nothing passes, the result is None.
    """
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
