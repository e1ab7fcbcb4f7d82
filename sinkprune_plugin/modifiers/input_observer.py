"""Hooks on the inputs of Linears; an input that several of them share (q/k/v, gate/up) is observed once."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers.passes import AllSeenError, CalibrationPass
from sinkprune_plugin.modifiers.routing import ExpertKey, ExpertPlace, RoutedLayer
from sinkprune_plugin.modifiers.targets import PruningTarget

__all__ = ["InputObserver", "RoutedPass", "require_reached"]

Observe = Callable[[str, torch.Tensor, CalibrationPass], None]


@dataclass(frozen=True)
class RoutedPass(CalibrationPass):
    """A pass as one expert sees it: ``row_weights`` (1, n) are those of its tokens, times the router's weights.

    What an expert adds to the hidden states is its output times the router's weight, and so is its error.

    :param rows: (n,) int64, which of the pass's B · T tokens they are, in the order of the input's rows
    :param tokens: T of the whole pass
    """

    rows: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    tokens: int = 1

    def by_sample(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Split an input by the samples of the pass, of which each has a norm of its own.

        :param x: (1, n, C)
        :return: (1, m, C) and its (1, m) weights, for each sample that has tokens; once with none if none has
        """
        if not len(self.rows):
            yield x, self.row_weights
        samples = self.rows // self.tokens
        for sample in samples.unique().tolist():
            own = samples == sample
            yield x[:, own], self.row_weights[:, own]


class InputObserver:
    """Call ``observe(leader, x, each)`` once for every distinct input in a calibration pass.

    Linears called one after the other with the same tensor share a leader, the first of them; ``leaders`` says whose
    statistics are whose. Only the latest input is held, so no activation outlives the call that follows it.

    Of an expert's Linears only the tokens count that its router sent there, whether or not the expert is called with
    all of them. Inside :meth:`all_tokens` some experts are called with all tokens instead.

    :param targets: Linears to watch
    :param observe: receives the leader's name, its input (B, T, C), of an expert (1, n, C), and the pass, of an expert
        a :class:`RoutedPass`
    :param stop: end a pass's call once its last input has been seen, where the outputs aren't needed; the first pass
        runs to its end, to learn how many calls there are; not where there are experts, whose calls vary
    """

    def __init__(self, targets: Sequence[PruningTarget], observe: Observe, *, stop: bool = False) -> None:
        self.leaders: dict[str, str] = {}
        self._observe = observe
        self._pass: CalibrationPass | None = None
        self._latest: tuple[torch.Tensor, int, str, ExpertPlace | None] | None = None
        self._targets = targets
        self._layers = {target.expert.layer.name: target.expert.layer for target in targets if target.expert}
        self._stop = stop and not self._layers
        self._calls = 0
        self._last_call: int | None = None
        # By layer and number: tokens that its router sent to the expert.
        self._tokens: dict[ExpertKey, int] = {target.expert.key: 0 for target in targets if target.expert}
        # The one of an expert's inputs at which its tokens are counted.
        self._counted_at: dict[ExpertKey, str] = {}
        # Experts that get all tokens in this run; None in a run where experts get theirs.
        self._fed: Collection[ExpertKey] | None = None
        self._feeding = False

    @property
    def tokens_of_experts(self) -> dict[ExpertKey, int]:
        """Tokens that each expert got so far."""
        return dict(self._tokens)

    @contextlib.contextmanager
    def watching(self, _number: int, each: CalibrationPass) -> Iterator[None]:
        """While the context is open, report inputs as those of this pass; outside of it the hooks do nothing."""
        self._pass = each
        self._calls = 0
        try:
            yield
        finally:
            self._pass = self._latest = None
        # A target that the first pass doesn't reach may be called after the others in a later one.
        if self._stop and self._last_call is None and len(self.leaders) == len(self._targets):
            self._last_call = self._calls

    @contextlib.contextmanager
    def all_tokens(self, experts: Collection[ExpertKey]) -> Iterator[None]:
        """While the context is open, call these experts with all tokens of a pass, and observe nothing else.

        :param experts: which
        """
        self._fed = experts
        try:
            yield
        finally:
            self._fed = None

    def leads(self, name: str) -> bool:
        """Whether statistics have been gathered under the name of a target.

        :param name: the target's name
        """
        return self.leaders.get(name) == name

    def note_unreached(self, leaders: Mapping[str, str]) -> None:
        """Observe no tokens, once, for Linears of experts that got none here but some in other processes.

        :param leaders: those of all processes
        """
        for target in self._targets:
            if target.expert is None or target.name in self.leaders or target.name not in leaders:
                continue
            self.leaders[target.name] = leaders[target.name]
            if self.leads(target.name):
                device = torch.device(get_execution_device(target.module))
                nothing = torch.zeros(1, 0, target.module.in_features, device=device)
                each = RoutedPass({}, torch.zeros(1, 0, device=device), 1.0, "no sample")
                self._observe(target.name, nothing, each)

    def attach(self, register_hook: Callable[..., Any]) -> set[Any]:
        """Register the hooks.

        :param register_hook: ``Modifier.register_hook``, which knows how to disable and remove them
        :return: handles
        """
        # With keyword arguments: a Linear may be called as linear(input=x).
        return {layer.attach(register_hook, self._feed) for layer in self._layers.values()} | {
            register_hook(target.module, self._hook(target), "forward_pre", with_kwargs=True)
            for target in self._targets
        }

    def require_reached(self) -> None:
        """Check that every target has had an input.

        :raises UsageError: if one was never called in any pass
        """
        require_reached(self._targets, self.leaders)

    def _hook(self, target: PruningTarget) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._pass is None or (self._fed is not None and not self._feeding):
                return
            self._note(target, args[0] if args else kwargs["input"], self._pass)
            self._calls += 1
            if self._calls == self._last_call:
                raise AllSeenError

        return hook

    def _feed(self, layer: RoutedLayer, hidden: torch.Tensor) -> None:
        if self._pass is None or self._fed is None:
            return
        self._feeding = True
        try:
            for name, number in self._fed:
                if name == layer.name:
                    layer.experts[number](hidden)
        finally:
            self._feeding = False

    def _note(self, target: PruningTarget, x: torch.Tensor, each: CalibrationPass) -> None:
        name, place = target.name, target.expert
        if self._latest is not None:
            latest, version, leader, owner = self._latest
            # All experts may get the same tensor, of which other rows are theirs.
            same_owner = (owner and owner.key) == (place and place.key)
            if x is latest and x._version == version and same_owner:
                self.leaders[name] = leader
                return
        self._latest = (x, x._version, name, place)
        self.leaders[name] = name
        if place is None:
            self._observe(name, self._as_sequences(name, x, *each.shape), each)
        else:
            self._observe_expert(name, place, x, each)

    def _observe_expert(self, name: str, place: ExpertPlace, x: torch.Tensor, each: CalibrationPass) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        weights = each.row_weights.to(x.device).flatten()
        if self._feeding:
            rows = torch.arange(len(x), device=x.device)
        else:
            rows, router_weights = place.layer.rows_of(place.number)
            x = place.layer.routed(place.number, x)
            weights = weights[rows] * router_weights.to(torch.float32)
            if self._counted_at.setdefault(place.key, name) == name:
                self._tokens[place.key] += len(rows)
        own = RoutedPass(
            each.inputs, weights.unsqueeze(0), each.square_scale, each.source, rows=rows, tokens=each.shape[1]
        )
        self._observe(name, x.unsqueeze(0), own)

    @staticmethod
    def _as_sequences(name: str, x: torch.Tensor, batch_size: int, tokens: int) -> torch.Tensor:
        if x.numel() != batch_size * tokens * x.shape[-1]:
            raise UsageError(
                f"the input of {name} has shape {tuple(x.shape)}, which can't be matched to {batch_size} × {tokens} "
                "token positions (a routed expert?); add the module to `ignore`"
            )
        return x.detach().reshape(batch_size, tokens, x.shape[-1])


def require_reached(targets: Sequence[PruningTarget], reached: Collection[str]) -> None:
    """Check that every target has had an input.

    :param targets: the targets
    :param reached: names of those that have
    :raises UsageError: if one was never called in any pass
    """
    missing = [target.name for target in targets if target.name not in reached]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UsageError(
            f"calibration never reached {len(missing)} target(s): {shown}; add them to `ignore` or calibrate on data "
            "that uses them"
        )
