import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning.evolution import SearchOptions, SearchSpace, SearchState, Stage, search

STAGES = (Stage(10, 4), Stage(40, 1))


def distance(goal):
    return lambda candidate, _stage, _round: float(sum((a - b) ** 2 for a, b in zip(candidate, goal, strict=True)))


def levels(groups, count=9):
    return tuple(tuple(range(count)) for _ in range(groups))


def options(rounds, seed=0, offspring=8, stages=STAGES):
    one = SearchOptions(10**9, offspring, stages, seed)
    return SearchOptions(one.round_tokens * rounds, offspring, stages, seed)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 100), st.data())
def test_every_candidate_measured_fits_the_budget(seed, data):
    groups = data.draw(st.integers(2, 6))
    steps = st.lists(st.floats(0.1, 5), min_size=2, max_size=5)
    costs = tuple(tuple(itertools.accumulate(data.draw(steps))) for _ in range(groups))
    slack = max(b - a for each in costs for a, b in itertools.pairwise(each))
    least, most = sum(each[0] for each in costs), sum(each[-1] for each in costs)
    space = SearchSpace(costs, data.draw(st.floats(least + slack, max(most, least + slack))), slack)
    start = space.fit([0] * groups, random.Random(seed))
    # With a slack of the largest step there is always a way up to the budget.
    assert start is not None
    measured = []

    def fitness(candidate, _stage, _round):
        measured.append(candidate)
        return random.Random(str(candidate)).random()

    search(space, fitness, options(3, seed), start=[start])
    assert all(space.budget - slack - 1e-6 <= space.cost(each) <= space.budget + 1e-6 for each in measured)


@pytest.mark.parametrize("seed", range(3))
def test_finds_the_best_of_all_candidates_with_the_exact_total(seed):
    costs = levels(4, 7)
    value = distance((6, 4, 1, 0))
    state = search(SearchSpace(costs, 12, 0), value, options(25, seed), start=[(3, 3, 3, 3)])
    everything = [each for each in itertools.product(range(7), repeat=4) if sum(each) == 12]
    assert value(state.best, 0, 0) == min(value(each, 0, 0) for each in everything)


def test_a_cheaper_candidate_is_found_where_costs_differ_between_groups():
    # One group's levels cost ten times the other's, and its level 2 brings less than those.
    space = SearchSpace(((0, 10, 20), tuple(range(11))), 20)
    value = lambda candidate, _stage, _round: -candidate[1] - 5.0 * (candidate[0] == 2)  # noqa: E731
    state = search(space, value, options(3), start=[(2, 0)])
    assert state.best == (1, 10)


def test_what_is_left_of_the_budget_is_spent():
    space = SearchSpace(((0, 7), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)), 9)
    fitted = [space.fit((1, 5, 0), random.Random(seed)) for seed in range(20)]
    assert {space.cost(each) for each in fitted} == {9}


def test_the_best_never_gets_worse_and_takes_part_in_every_last_stage():
    calls = []
    value = distance((8, 0, 8, 0, 4))

    def fitness(candidate, stage, number):
        calls.append((candidate, stage.tokens, number))
        return value(candidate, stage, number)

    state = search(SearchSpace(levels(5), 20, 0), fitness, options(6), start=[(4, 4, 4, 4, 4)])
    values = [each for _, each in state.history]
    assert values == sorted(values, reverse=True)
    best = [(4, 4, 4, 4, 4), *(candidate for candidate, _ in state.history)]
    for number in range(6):
        tokens = [each[1] for each in calls if each[2] == number]
        assert tokens == [10] * 8 + [40] * 5
        assert best[number] in [each[0] for each in calls if each[1:] == (40, number)]
    assert state.tokens == sum(each[1] for each in calls) == 6 * options(6).round_tokens


def test_recoveries_of_the_last_stage_count_and_make_another_search():
    space, recovering = SearchSpace(levels(3), 12, 0), (Stage(10, 4), Stage(40, 1, recovery=500))
    one = SearchOptions(10**9, 8, recovering)
    assert one.round_tokens == 8 * 10 + 5 * (40 + 500)
    assert (one.round_candidates, one.round_recoveries, one.rounds) == (13, 5, 10**9 // one.round_tokens)
    stages = []

    def fitness(candidate, stage, number):
        stages.append(stage)
        return distance((8, 4, 0))(candidate, stage, number)

    state = search(space, fitness, options(2, stages=recovering), start=[(4, 4, 4)])
    assert state.tokens == sum(stage.cost for stage in stages)
    with pytest.raises(UsageError, match="another one"):
        search(space, fitness, options(3), start=[(4, 4, 4)], state=state)


def test_resumed_equals_uninterrupted():
    space, value, whole = SearchSpace(levels(6), 24, 0), distance((8, 8, 5, 3, 0, 0)), options(9)
    saved = []
    expected = search(space, value, whole, start=[(4,) * 6], after_round=saved.append)
    assert [state.rounds for state in saved] == list(range(1, 10))
    for state in saved:
        again = SearchState.from_json(json.loads(json.dumps(state.to_json())))
        assert search(space, value, whole, start=[(4,) * 6], state=again) == expected


def test_an_interruption_within_a_round_repeats_it():
    space, value, whole = SearchSpace(levels(6), 24, 0), distance((8, 8, 5, 3, 0, 0)), options(5)
    expected = search(space, value, whole, start=[(4,) * 6])
    saved, left = [], [40]

    def breaking(candidate, stage, number):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return value(candidate, stage, number)

    with pytest.raises(KeyboardInterrupt):
        search(space, breaking, whole, start=[(4,) * 6], after_round=saved.append)
    assert 0 < saved[-1].rounds < 5
    assert search(space, value, whole, start=[(4,) * 6], state=saved[-1]) == expected


def test_another_seed_takes_another_way():
    space, value = SearchSpace(levels(6), 24, 0), distance((8, 8, 5, 3, 0, 0))
    histories = [search(space, value, options(4, seed), start=[(4,) * 6]).history for seed in (0, 0, 1)]
    assert histories[0] == histories[1] != histories[2]


def test_further_candidates_of_the_start_are_offspring_of_the_first_round():
    goal = (8, 7, 5, 3, 1, 0)
    state = search(SearchSpace(levels(6), 24, 0), distance(goal), options(1), start=[(4,) * 6, goal])
    assert state.best == goal


def test_a_space_of_one_candidate_ends_at_once():
    state = search(SearchSpace(levels(2, 2), 2, 0), distance((1, 1)), options(5), start=[(1, 1)])
    assert (state.best, state.rounds, state.tokens) == ((1, 1), 0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SearchSpace((), 1), "no levels"),
        (lambda: SearchSpace(((1, 1),), 1), r"costs of group 0 are \[1, 1\]"),
        (lambda: SearchSpace(((1, 2), (3, 4)), 3), "totals go from 4 to 6"),
        (lambda: SearchSpace(((1, 2), (3, 4)), 9, 1), "budget of 9 is out of reach"),
        (lambda: SearchOptions(100, 4, (Stage(10, 2),)), "must have 1 survivor"),
        (lambda: SearchOptions(100, 2, (Stage(10, 4), Stage(10, 1))), "grow"),
        (lambda: SearchOptions(40, 4, (Stage(10, 1),)), "one round, which takes 50"),
        (lambda: search(SearchSpace(levels(2), 5, 0), distance((0, 0)), options(1), start=[(1, 1)]), "no start"),
        (lambda: search(SearchSpace(levels(2), 5, 0), distance((0, 0)), options(1), start=[]), "at least one"),
        (
            lambda: search(
                SearchSpace(levels(2), 2, 0), distance((0, 0)), options(1), start=[(1, 1)], state=SearchState("other")
            ),
            "another one",
        ),
        (lambda: SearchState.from_json({"problem": ""}), "damaged"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
