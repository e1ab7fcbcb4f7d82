import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_cases import make_layer

from sinkprune_plugin.pruning.selection import mark_smallest


def reference(scores, count):
    order = scores.flatten().argsort(stable=True)[:count]
    return torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, order, True).view_as(scores)


@given(st.data())
def test_equals_a_stable_sort_with_any_chunks(data):
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    # Few distinct values make ties, among them 0, the smallest subnormal and the ends of the range of float32.
    value = st.sampled_from([0.0, 1e-45, 0.5, 0.5000001, 1.0, 3.4e38]) | st.floats(0, 1e6, width=32)
    scores = torch.tensor(data.draw(st.lists(value, min_size=rows * columns, max_size=rows * columns)))
    scores = scores.view(rows, columns)
    count = data.draw(st.integers(0, scores.numel()))
    step = data.draw(st.integers(1, rows))
    chunks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    mask = torch.ones(rows, columns, dtype=torch.bool)
    mark_smallest(lambda part: scores[part], chunks, count, mask)
    assert torch.equal(mask, reference(scores, count))


def test_infinite_scores_are_never_taken():
    scores = make_layer(0, 16, 16)[0].abs()
    scores[:, ::2] = torch.inf
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mark_smallest(lambda part: scores[part], [slice(0, 16)], 128, mask)
    assert torch.equal(mask, scores.isfinite())
