"""Evolutionary search over integer levels per group under an additive budget. Pure functions, no tensors.

A candidate gives every group (a decoder block, a Linear) one of its levels. Levels have costs that add up over the
groups: weights kept, parameters, microseconds. The search looks for the candidate with the least fitness value whose
total cost fits the budget. Level switches, multi-step selection with growing token budgets and elitism are those of
EvoPress (arXiv 2410.14649, section 3 and algorithm 1); DarwinLM (arXiv 2502.07780) does the same for structures.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from itertools import pairwise
from typing import Any, Self

from sinkprune_plugin.errors import UsageError

__all__ = ["Candidate", "Fitness", "SearchOptions", "SearchSpace", "SearchState", "Stage", "search"]

# One level for each group.
Candidate = tuple[int, ...]

# Candidate, stage of the selection and number of the round → value to minimise. What is compared has the same round and
# the same stage, so other rounds may take other data.
Fitness = Callable[[Candidate, "Stage", int], float]

# Totals of fractional costs are sums in float64.
_RELATIVE_TOLERANCE = 1e-9
# A mutation that doesn't fit the budget, or was made before in its round, is made again, up to this many times for
# each offspring wanted: small spaces run out of new ones.
_TRIES = 50
# A mutation makes one to three level switches, few of them more often (EvoPress).
_MOST_SWITCHES = 3


@dataclass(frozen=True)
class SearchSpace:
    """Levels, their costs, and the budget.

    :param costs: for each group the cost of each of its levels, strictly ascending: level 0 is the cheapest
    :param budget: most that a candidate may cost
    :param slack: how far a candidate's cost may stay below the budget; 0 demands the budget exactly (costs should then
        be whole numbers), infinity allows any cost up to it
    :raises UsageError: if costs don't ascend, or the budget is out of reach
    """

    costs: tuple[tuple[float, ...], ...]
    budget: float
    slack: float = float("inf")

    def __post_init__(self) -> None:
        if not self.costs or not all(self.costs):
            raise UsageError("the search has no levels to choose from; give every group at least one")
        for group, levels in enumerate(self.costs):
            if any(b <= a for a, b in pairwise(levels)):
                raise UsageError(f"costs of group {group} are {list(levels)}; they must ascend from level to level")
        least, most = sum(levels[0] for levels in self.costs), sum(levels[-1] for levels in self.costs)
        if least > self.budget + self._tolerance or most < self.budget - self.slack - self._tolerance:
            raise UsageError(
                f"a budget of {self.budget:g} is out of reach: the levels' totals go from {least:g} to {most:g}"
            )

    def cost(self, candidate: Sequence[int]) -> float:
        """Total cost of a candidate.

        :param candidate: one level for each group
        """
        return sum(levels[level] for levels, level in zip(self.costs, candidate, strict=True))

    def admits(self, candidate: Sequence[int]) -> bool:
        """Whether a candidate has valid levels and fits the budget.

        :param candidate: one level for each group
        """
        valid = len(candidate) == len(self.costs) and all(
            0 <= level < len(levels) for levels, level in zip(self.costs, candidate, strict=True)
        )
        return valid and self._excess(candidate) == 0

    def fit(self, candidate: Sequence[int], generator: random.Random, *, spared: int | None = None) -> Candidate | None:
        """Lower groups at random, a level at a time, down to the budget, and spend what is then left of it on others.

        :param candidate: one valid level for each group, at any cost
        :param generator: source of the choices
        :param spared: a group that isn't lowered
        :return: an admitted candidate; None if there is none where this led
        """
        levels = list(candidate)
        lowered = set()
        while self._excess(levels) > 0:
            lower = [group for group, level in enumerate(levels) if level > 0 and group != spared]
            if not lower:
                return None
            chosen = generator.choice(lower)
            levels[chosen] -= 1
            lowered.add(chosen)
        while higher := [group for group in range(len(levels)) if self._can_rise(levels, group)]:
            # What was lowered rises again only after the others.
            levels[generator.choice([group for group in higher if group not in lowered] or higher)] += 1
        return tuple(levels) if self._excess(levels) == 0 else None

    def _excess(self, candidate: Sequence[int]) -> int:
        """1 above the budget, −1 too far below, 0 within it."""
        cost = self.cost(candidate)
        if cost > self.budget + self._tolerance:
            return 1
        return -1 if cost < self.budget - self.slack - self._tolerance else 0

    def _can_rise(self, levels: Sequence[int], group: int) -> bool:
        costs, level = self.costs[group], levels[group]
        if level + 1 == len(costs):
            return False
        return self.cost(levels) + costs[level + 1] - costs[level] <= self.budget + self._tolerance

    @property
    def _tolerance(self) -> float:
        return _RELATIVE_TOLERANCE * abs(self.budget)


@dataclass(frozen=True)
class Stage:
    """One step of a round's selection.

    :param tokens: tokens that each candidate is measured on
    :param survivors: candidates that are kept, those with the least values
    :param recovery: tokens that each candidate's recovery before its measurement counts; 0 measures it as it is
    """

    tokens: int
    survivors: int
    recovery: int = 0

    @property
    def cost(self) -> int:
        """Tokens that a candidate takes."""
        return self.tokens + self.recovery


@dataclass(frozen=True)
class SearchOptions:
    """How the search spends its tokens.

    :param budget: tokens of all measurements together, and of the recoveries before them
    :param offspring: candidates of a round
    :param stages: steps of a round's selection; the last one keeps one candidate, and in it the best so far takes part
        again, on the same data (elitism)
    :param seed: seed of the mutations
    :raises UsageError: if a number is out of range, or the budget isn't enough for one round
    """

    budget: int
    offspring: int
    stages: tuple[Stage, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        survivors = [stage.survivors for stage in self.stages]
        tokens = [stage.tokens for stage in self.stages]
        if self.offspring < 1 or not survivors or survivors[-1] != 1 or min(tokens) < 1:
            raise UsageError(
                f"a round of {self.offspring} offspring with survivors {survivors} on {tokens} tokens can't choose "
                "one candidate; the last stage must have 1 survivor, and all numbers must be positive"
            )
        if any(b > a for a, b in zip([self.offspring, *survivors], survivors, strict=False)):
            raise UsageError(f"survivors {survivors} of {self.offspring} offspring grow; give descending numbers")
        if self.budget < self.round_tokens:
            raise UsageError(
                f"a search budget of {self.budget} tokens isn't enough for one round, which takes {self.round_tokens}; "
                "raise it"
            )

    @property
    def round_tokens(self) -> int:
        """Tokens that one round takes at most."""
        return sum(count * stage.cost for count, stage in zip(self._entering, self.stages, strict=True))

    @property
    def round_recoveries(self) -> int:
        """Candidates of one round that are recovered before they are measured, at most."""
        return sum(count for count, stage in zip(self._entering, self.stages, strict=True) if stage.recovery)

    @property
    def round_candidates(self) -> int:
        """Measurements of a candidate in one round, at most."""
        return sum(self._entering)

    @property
    def rounds(self) -> int:
        """Rounds that the budget is enough for."""
        return self.budget // self.round_tokens

    @property
    def _entering(self) -> list[int]:
        """Candidates at each stage."""
        entering = [self.offspring, *(stage.survivors for stage in self.stages[:-1])]
        entering[-1] += 1
        return entering


@dataclass
class SearchState:
    """Where a search stands after a round; all that is needed to go on with it.

    :param problem: fingerprint of space, options and first candidates
    :param rounds: rounds that are complete
    :param best: the best candidate so far, empty before the first round
    :param value: its fitness value in the latest round
    :param tokens: tokens spent
    :param history: for each round the best candidate and its value; values of different rounds may come from different
        data
    """

    problem: str = ""
    rounds: int = 0
    best: Candidate = ()
    value: float = float("inf")
    tokens: int = 0
    history: list[tuple[Candidate, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As values that ``json`` can write."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_json`, also after a round trip through a file.

        :param values: what ``to_json`` gave
        :raises UsageError: if something is missing
        """
        try:
            history = [(tuple(candidate), float(value)) for candidate, value in values["history"]]
            return cls(
                problem=str(values["problem"]),
                rounds=int(values["rounds"]),
                best=tuple(values["best"]),
                value=float(values["value"]),
                tokens=int(values["tokens"]),
                history=history,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"the state of the search is damaged ({error}); remove it and start again") from error


def search(
    space: SearchSpace,
    fitness: Fitness,
    options: SearchOptions,
    *,
    start: Sequence[Candidate],
    state: SearchState | None = None,
    after_round: Callable[[SearchState], None] | None = None,
) -> SearchState:
    """Search until the budget is spent, or no new candidate can be made.

    The candidates of a round depend on the seed, its number and the best candidate before it alone, so a search that is
    resumed from the state after any round ends as if it had never stopped.

    :param space: levels and budget
    :param fitness: value of a candidate, to be minimised
    :param options: how to spend the tokens
    :param start: admitted candidates that take part in the first round, the first of them as the best so far
    :param state: state of the same search, to go on from; None begins
    :param after_round: called with the state after each round, to save it
    :return: the final state
    :raises UsageError: if a first candidate isn't admitted, or the state belongs to another search
    """
    for candidate in start:
        if not space.admits(candidate):
            raise UsageError(f"candidate {list(candidate)} is no start for this search: it doesn't fit the budget")
    if not start:
        raise UsageError("the search has no candidate to start from; give at least one")
    problem = _fingerprint(space, options, start)
    if state is None:
        state = SearchState(problem, best=tuple(start[0]))
    elif state.problem != problem:
        raise UsageError("the saved search is another one (other levels, budget or seed); remove it and start again")
    while state.rounds < options.rounds:
        generator = random.Random(f"{options.seed}:{state.rounds}")
        first = list(dict.fromkeys(start[1:])) if state.rounds == 0 else []
        offspring = _offspring(space, state.best, options.offspring, first, generator)
        if not offspring:
            break
        best, value, tokens = _select(fitness, offspring, state, options.stages)
        state = SearchState(
            problem, state.rounds + 1, best, value, state.tokens + tokens, [*state.history, (best, value)]
        )
        if after_round is not None:
            after_round(state)
    return state


def _offspring(
    space: SearchSpace, parent: Candidate, count: int, first: Sequence[Candidate], generator: random.Random
) -> list[Candidate]:
    found = [candidate for candidate in first if candidate != parent][:count]
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        child = _mutated(space, parent, generator)
        if child is not None and child != parent and child not in found:
            found.append(child)
    return found


def _mutated(space: SearchSpace, parent: Candidate, generator: random.Random) -> Candidate | None:
    """A few level switches: one group rises, and others fall until the budget is met again."""
    child = parent
    switches = min(generator.randint(1, _MOST_SWITCHES), generator.randint(1, _MOST_SWITCHES))
    for _ in range(switches):
        rising = [group for group, levels in enumerate(space.costs) if child[group] + 1 < len(levels)]
        if not rising:
            return None
        group = generator.choice(rising)
        raised = (*child[:group], child[group] + 1, *child[group + 1 :])
        fitted = space.fit(raised, generator, spared=group)
        if fitted is None:
            return None
        child = fitted
    return child


def _select(
    fitness: Fitness, offspring: Sequence[Candidate], state: SearchState, stages: Sequence[Stage]
) -> tuple[Candidate, float, int]:
    remaining = list(offspring)
    tokens = 0
    values: list[float] = []
    for stage in stages:
        if stage is stages[-1]:
            # First, so that it stays where nothing is better.
            remaining.insert(0, state.best)
        values = [fitness(candidate, stage, state.rounds) for candidate in remaining]
        tokens += len(remaining) * stage.cost
        order = sorted(range(len(remaining)), key=lambda index: values[index])[: stage.survivors]
        remaining, values = [remaining[index] for index in order], [values[index] for index in order]
    return remaining[0], values[0], tokens


def _fingerprint(space: SearchSpace, options: SearchOptions, start: Sequence[Candidate]) -> str:
    # Without the token budget: a finished search may be continued with a larger one.
    parts = [space.costs, space.budget, str(space.slack), options.offspring, options.seed, list(start)]
    parts.append([astuple(stage) for stage in options.stages])
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
