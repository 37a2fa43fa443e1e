"""One choice for each of several items, the least total value within a budget of costs: multiple-choice knapsack.

The relaxation in which choices may be mixed is solved by walking down the lower convex hulls of all items, steepest
step first (Sinha and Zoltners 1979, "The Multiple-Choice Knapsack Problem", Operations Research 27). Where it stops in
the middle of a step is a bound, and a start. What is left is decided item by item: of all partial choices those are
kept that no other beats in cost and in value, and whose bound is below the best choice known (Pisinger 1995, "A minimal
algorithm for the multiple-choice knapsack problem", European Journal of Operational Research 83).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

__all__ = ["Option", "choose"]

# partial choices that are kept at most; beyond, those of the best bounds are
_MOST_PARTIAL = 5_000
# relative: what floating-point sums may differ by
_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Option:
    """A choice: what it costs of the budget, and the value that is to be small; both at least 0."""

    cost: float
    value: float


@dataclass(frozen=True)
class _Step:
    """From a corner of an item's hull to the next: what more it costs, and what it gains."""

    item: int
    cost: float
    gain: float
    option: int


@dataclass(frozen=True)
class _Partial:
    """Choices for the items so far, the last one and those before it; the bound is of their value with the rest's."""

    cost: float
    value: float
    bound: float
    choice: int = -1
    before: _Partial | None = None

    @property
    def choices(self) -> list[int]:
        """One for each item."""
        found, one = [], self
        while one.before is not None:
            found.append(one.choice)
            one = one.before
        return found[::-1]


def choose(items: Sequence[Sequence[Option]], budget: float) -> list[int] | None:
    """The number of the option to take of each item; None where not even the cheapest ones fit.

    The total value is the least there is, as long as no more than `_MOST_PARTIAL` partial choices are in question. Of
    equal totals the cheaper one is taken.
    """
    budget *= 1 + _TOLERANCE
    # large items first: small ones fill what is left
    order = sorted(range(len(items)), key=lambda i: -max(one.cost for one in items[i]))
    found = _choose([items[i] for i in order], budget)
    return None if found is None else [found[order.index(i)] for i in range(len(items))]


def _choose(items: Sequence[Sequence[Option]], budget: float) -> list[int] | None:
    """The same, with the items decided in their order."""
    hulls = [_hull(item, options) for item, options in enumerate(items)]
    first = [min(range(len(options)), key=lambda i: (options[i].cost, options[i].value)) for options in items]
    if _total(items, first)[0] > budget:
        return None
    best = _greedy(items, hulls, first, budget)
    cost, value = _total(items, best)
    # the relaxation of what is still to be decided, behind each item
    rests = [_Relaxation.of(items, hulls, first, start) for start in range(1, len(items) + 1)]
    partial = [_Partial(0.0, 0.0, 0.0)]
    for options, rest in zip(items, rests, strict=True):
        extended = []
        for one in partial:
            for number, option in enumerate(options):
                spent, so_far = one.cost + option.cost, one.value + option.value
                bound = so_far + rest.bound(budget - spent)
                if bound <= value * (1 + _TOLERANCE):
                    extended.append(_Partial(spent, so_far, bound, number, one))
        partial = _undominated(extended)
    for one in partial:
        if (one.value, one.cost) < (value, cost):
            best, cost, value = one.choices, one.cost, one.value
    return best


def _total(items: Sequence[Sequence[Option]], choices: Sequence[int]) -> tuple[float, float]:
    chosen = [options[number] for options, number in zip(items, choices, strict=True)]
    return sum(one.cost for one in chosen), sum(one.value for one in chosen)


def _hull(item: int, options: Sequence[Option]) -> list[_Step]:
    """The steps down the lower convex hull of an item's options, steepest first."""
    order = sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].value))
    corners: list[int] = []
    for number in order:
        one = options[number]
        if corners and one.value >= options[corners[-1]].value:
            continue
        while len(corners) > 1 and not _is_steeper(options[corners[-2]], options[corners[-1]], one):
            corners.pop()
        corners.append(number)
    return [_step(item, options, start, end) for start, end in pairwise(corners)]


def _step(item: int, options: Sequence[Option], start: int, end: int) -> _Step:
    return _Step(item, options[end].cost - options[start].cost, options[start].value - options[end].value, end)


def _is_steeper(first: Option, second: Option, third: Option) -> bool:
    """Whether value falls faster with cost from the first to the second than from there to the third."""
    gain, further = first.value - second.value, second.value - third.value
    return gain * (third.cost - second.cost) > further * (second.cost - first.cost)


def _in_order(hulls: Sequence[Sequence[_Step]]) -> list[_Step]:
    """The steps of several items, steepest first; those of one item in their order."""
    return sorted((step for hull in hulls for step in hull), key=lambda one: -one.gain / one.cost)


def _greedy(
    items: Sequence[Sequence[Option]], hulls: Sequence[Sequence[_Step]], first: Sequence[int], budget: float
) -> list[int]:
    """Steps that fit, steepest first; an item of which one does not fit takes no further."""
    chosen, (spent, _), stopped = list(first), _total(items, first), set()
    for step in _in_order(hulls):
        if step.item in stopped:
            continue
        if spent + step.cost > budget:
            stopped.add(step.item)
            continue
        chosen[step.item], spent = step.option, spent + step.cost
    return chosen


@dataclass(frozen=True)
class _Relaxation:
    """Of some items: the cheapest choices, and the steps from there, summed up.

    Attributes:
        cost, value: of the cheapest choices.
        costs, gains: of the first `n` steps, for `n` from 0 on.
    """

    cost: float
    value: float
    costs: list[float]
    gains: list[float]

    @classmethod
    def of(
        cls, items: Sequence[Sequence[Option]], hulls: Sequence[Sequence[_Step]], first: Sequence[int], start: int
    ) -> _Relaxation:
        """That of the items from `start` on."""
        cost, value = _total(items[start:], first[start:])
        costs, gains = [0.0], [0.0]
        for step in _in_order(hulls[start:]):
            costs.append(costs[-1] + step.cost)
            gains.append(gains[-1] + step.gain)
        return cls(cost, value, costs, gains)

    def bound(self, budget: float) -> float:
        """The least value within a budget where steps may be taken in part; infinite where nothing fits."""
        left = budget - self.cost
        if left < 0:
            return inf
        number = bisect_right(self.costs, left) - 1
        gain = self.gains[number]
        if number + 1 < len(self.costs):
            share = (left - self.costs[number]) / (self.costs[number + 1] - self.costs[number])
            gain += share * (self.gains[number + 1] - gain)
        return self.value - gain


def _undominated(partial: list[_Partial]) -> list[_Partial]:
    """Those that no other beats in cost and value; of too many those of the best bounds."""
    kept: list[_Partial] = []
    for one in sorted(partial, key=lambda one: (one.cost, one.value)):
        if not kept or one.value < kept[-1].value:
            kept.append(one)
    if len(kept) > _MOST_PARTIAL:
        kept = sorted(sorted(kept, key=lambda one: one.bound)[:_MOST_PARTIAL], key=lambda one: one.cost)
    return kept
