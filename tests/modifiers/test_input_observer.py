import pytest
import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers.input_observer import InputObserver
from sinkprune_plugin.modifiers.passes import AllSeenError, CalibrationPass
from sinkprune_plugin.modifiers.targets import PruningTarget


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(4, 4)
        self.k = torch.nn.Linear(4, 4)
        self.o = torch.nn.Linear(4, 4)
        self.unused = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.o(self.q(x) + self.k(input=x))


def observe(model, names, x, seen):
    targets = [PruningTarget(name, model.get_submodule(name), 0) for name in names]
    each = CalibrationPass({}, torch.ones(x.shape[:2]))
    observer = InputObserver(targets, lambda leader, value, _pass: seen.append((leader, value)))
    handles = observer.attach(lambda module, hook, kind, **kw: getattr(module, f"register_{kind}_hook")(hook, **kw))
    # Outside of a pass nothing is observed.
    model(x)
    assert not seen
    try:
        with observer.watching(0, each):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return observer


def test_linears_that_share_an_input_are_looked_at_once():
    model, seen, x = Attention(), [], torch.randn(2, 3, 4)
    observer = observe(model, ["q", "k", "o"], x, seen)
    assert [leader for leader, _ in seen] == ["q", "o"]
    assert observer.leaders == {"q": "q", "k": "q", "o": "o"}
    torch.testing.assert_close(seen[0][1], x, rtol=0, atol=0)


def test_a_tensor_changed_in_place_between_calls_is_another_input():
    class InPlace(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            x.add_(1.0)
            return y + self.b(x)

    with torch.no_grad():
        seen = []
        observer = observe(InPlace(), ["a", "b"], torch.randn(1, 2, 4), seen)
    assert observer.leaders == {"a": "a", "b": "b"}


def test_a_pass_ends_at_its_last_input_once_the_calls_are_known():
    model, seen, x = Attention(), [], torch.randn(2, 3, 4)
    each = CalibrationPass({}, torch.ones(2, 3))
    targets = [PruningTarget(name, model.get_submodule(name), 0) for name in ("q", "k")]
    observer = InputObserver(targets, lambda leader, *_: seen.append(leader), stop=True)
    observer.attach(lambda module, hook, kind, **kw: getattr(module, f"register_{kind}_hook")(hook, **kw))
    reached = []
    model.o.register_forward_pre_hook(lambda *_: reached.append(True))
    with observer.watching(0, each):
        model(x)
    assert reached == [True]
    with pytest.raises(AllSeenError), observer.watching(1, each):
        model(x)
    assert (seen, reached) == (["q", "q"], [True])
    # Outside of a pass nothing is ended.
    model(x)
    assert reached == [True, True]


def test_a_pass_is_not_ended_while_a_target_is_missing():
    """One that a later pass reaches might be called after the others."""
    model, x = Attention(), torch.randn(2, 3, 4)
    each = CalibrationPass({}, torch.ones(2, 3))
    targets = [PruningTarget(name, model.get_submodule(name), 0) for name in ("q", "unused")]
    observer = InputObserver(targets, lambda *_: None, stop=True)
    observer.attach(lambda module, hook, kind, **kw: getattr(module, f"register_{kind}_hook")(hook, **kw))
    for number in range(3):
        with observer.watching(number, each):
            model(x)


def test_unreached_targets_are_named():
    observer = observe(Attention(), ["q", "unused"], torch.randn(1, 2, 4), [])
    with pytest.raises(UsageError, match=r"never reached 1 target\(s\): unused; add them to `ignore`"):
        observer.require_reached()


def test_flattened_inputs_are_read_as_sequences():
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.proj(x.reshape(-1, 4))

    seen, x = [], torch.randn(2, 3, 4)
    observe(Flat(), ["proj"], x, seen)
    torch.testing.assert_close(seen[0][1], x, rtol=0, atol=0)


def test_routed_inputs_are_refused():
    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.expert = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.expert(x[0, :2])

    with pytest.raises(UsageError, match=r"input of expert has shape \(2, 4\).*2 × 3 token positions"):
        observe(Routed(), ["expert"], torch.randn(2, 3, 4), [])
