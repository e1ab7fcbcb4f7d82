"""Which positions a step unmasks, against a plain loop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.sampling.select import select_unmask

OFF = torch.inf


def plain_select(confidence, count, threshold, factor):
    chosen = [False] * len(confidence)
    eligible = [i for i, value in enumerate(confidence) if value != -torch.inf]
    # max and sorted keep the first of equals; sorting by the negative alone is stable.
    ranked = sorted(eligible, key=lambda i: -confidence[i])
    if factor:
        # Fast-dLLM's own loop: go down the sorted confidences until one is too low for that many at once.
        take = ranked[:1]
        for n in range(2, len(ranked) + 1):
            if (n + 1) * (1 - confidence[ranked[n - 1]]) >= factor:
                break
            take = ranked[:n]
    elif threshold == OFF:
        take = ranked[:count]
    else:
        take = [i for i in eligible if confidence[i] > threshold] or ranked[:1]
    for i in take:
        chosen[i] = True
    return chosen


# Few different values, so that ties are the rule.
CONFIDENCE = st.sampled_from([-torch.inf, -3.0, -0.5, 0.0, 0.25, 0.5, 0.9, 1.0]) | st.floats(-10, 1)


RULE = st.sampled_from([(OFF, 0.0), *[(t, 0.0) for t in (0.25, 0.5, 0.9, 1.0)], *[(OFF, f) for f in (0.4, 1.0, 3.0)]])


@st.composite
def batches(draw):
    width = draw(st.integers(1, 9))
    rows = draw(st.integers(1, 6))
    line = st.lists(CONFIDENCE, min_size=width, max_size=width)
    return [(draw(line), draw(st.integers(0, width + 1)), *draw(RULE)) for _ in range(rows)]


@given(batches())
@settings(deadline=None, max_examples=300)
def test_equals_a_plain_loop_row_by_row(rows):
    confidence = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    count = torch.tensor([row[1] for row in rows])
    threshold = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    factor = torch.tensor([row[3] for row in rows], dtype=torch.float64)
    before = confidence.clone()
    chosen = select_unmask(confidence, count, threshold, factor)
    assert chosen.dtype == torch.bool
    assert chosen.tolist() == [plain_select(*row) for row in rows]
    assert torch.equal(confidence, before)


def select(confidence, count=1, threshold=OFF, factor=0.0):
    return select_unmask(
        torch.tensor([confidence], dtype=torch.float64),
        torch.tensor([count]),
        torch.tensor([threshold], dtype=torch.float64),
        torch.tensor([factor], dtype=torch.float64),
    )[0].tolist()


def test_of_equals_the_first_are_taken():
    assert select([0.5, 0.5, 0.5, 0.5], 2) == [True, True, False, False]
    assert select([0.1] * 100, 30) == [True] * 30 + [False] * 70


def test_a_threshold_takes_what_is_above_it_but_at_least_one():
    assert select([0.5, 0.9, 0.91, 0.95], threshold=0.9) == [False, False, True, True]
    assert select([0.5, 0.6, 0.2, -torch.inf], threshold=0.9) == [False, True, False, False]
    assert select([-torch.inf] * 3, threshold=0.9) == [False] * 3


def test_a_factor_takes_more_where_all_are_sure():
    # (n + 1) (1 - c_n): 0.02, 0.09, 0.2, 2.5.
    assert select([0.99, 0.97, 0.5, 0.95], factor=0.1) == [True, True, False, False]
    assert select([0.99, 0.97, 0.5, 0.95], factor=0.3) == [True, True, False, True]
    assert select([0.2, 0.3, -torch.inf], factor=0.01) == [False, True, False]
    assert select([-torch.inf] * 2, factor=5.0) == [False, False]


def test_numbers_that_are_none_still_come_to_an_end():
    # A model whose logits are NaN must not leave a request waiting for ever.
    assert select([0.5, torch.nan, -torch.inf], 1) == [False, True, False]
    assert select([0.5, torch.nan, -torch.inf], threshold=0.9) == [False, True, False]
