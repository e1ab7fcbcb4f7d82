"""Which positions a step unmasks, against a plain loop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.sampling.select import select_unmask

OFF = torch.inf


def plain_select(confidence, count, threshold):
    chosen = [False] * len(confidence)
    eligible = [i for i, value in enumerate(confidence) if value != -torch.inf]
    # max and sorted keep the first of equals; sorting by the negative alone is stable.
    ranked = sorted(eligible, key=lambda i: -confidence[i])
    if threshold == OFF:
        take = ranked[:count]
    else:
        take = [i for i in eligible if confidence[i] > threshold] or ranked[:1]
    for i in take:
        chosen[i] = True
    return chosen


# Few different values, so that ties are the rule.
CONFIDENCE = st.sampled_from([-torch.inf, -3.0, -0.5, 0.0, 0.25, 0.5, 0.9, 1.0]) | st.floats(-10, 1)


@st.composite
def batches(draw):
    width = draw(st.integers(1, 9))
    rows = draw(st.integers(1, 6))
    line = st.lists(CONFIDENCE, min_size=width, max_size=width)
    return [
        (draw(line), draw(st.integers(0, width + 1)), draw(st.sampled_from([OFF, 0.25, 0.5, 0.9, 1.0])))
        for _ in range(rows)
    ]


@given(batches())
@settings(deadline=None, max_examples=300)
def test_equals_a_plain_loop_row_by_row(rows):
    confidence = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    count = torch.tensor([row[1] for row in rows])
    threshold = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    before = confidence.clone()
    chosen = select_unmask(confidence, count, threshold)
    assert chosen.dtype == torch.bool
    assert chosen.tolist() == [plain_select(*row) for row in rows]
    assert torch.equal(confidence, before)


def select(confidence, count=1, threshold=OFF):
    return select_unmask(
        torch.tensor([confidence], dtype=torch.float64),
        torch.tensor([count]),
        torch.tensor([threshold], dtype=torch.float64),
    )[0].tolist()


def test_of_equals_the_first_are_taken():
    assert select([0.5, 0.5, 0.5, 0.5], 2) == [True, True, False, False]
    assert select([0.1] * 100, 30) == [True] * 30 + [False] * 70


def test_a_threshold_takes_what_is_above_it_but_at_least_one():
    assert select([0.5, 0.9, 0.91, 0.95], threshold=0.9) == [False, False, True, True]
    assert select([0.5, 0.6, 0.2, -torch.inf], threshold=0.9) == [False, True, False, False]
    assert select([-torch.inf] * 3, threshold=0.9) == [False] * 3


def test_numbers_that_are_none_still_come_to_an_end():
    # A model whose logits are NaN must not leave a request waiting for ever.
    assert select([0.5, torch.nan, -torch.inf], 1) == [False, True, False]
    assert select([0.5, torch.nan, -torch.inf], threshold=0.9) == [False, True, False]
