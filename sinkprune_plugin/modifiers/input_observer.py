"""Hooks on the inputs of Linears; an input that several of them share (q/k/v, gate/up) is observed once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers.passes import AllSeenError, CalibrationPass
from sinkprune_plugin.modifiers.targets import PruningTarget

__all__ = ["InputObserver"]

Observe = Callable[[str, torch.Tensor, CalibrationPass], None]


class InputObserver:
    """Call ``observe(leader, x, each)`` once for every distinct input in a calibration pass.

    Linears called one after the other with the same tensor share a leader, the first of them; ``leaders`` says whose
    statistics are whose. Only the latest input is held, so no activation outlives the call that follows it.

    :param targets: Linears to watch
    :param observe: receives the leader's name, its input (B, T, C) and the pass
    :param stop: end a pass's call once its last input has been seen, where the outputs aren't needed; the first pass
        runs to its end, to learn how many calls there are
    """

    def __init__(self, targets: Sequence[PruningTarget], observe: Observe, *, stop: bool = False) -> None:
        self.leaders: dict[str, str] = {}
        self._observe = observe
        self._pass: CalibrationPass | None = None
        self._latest: tuple[torch.Tensor, int, str] | None = None
        self._targets = targets
        self._stop = stop
        self._calls = 0
        self._last_call: int | None = None

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

    def attach(self, register_hook: Callable[..., Any]) -> set[Any]:
        """Register the hooks.

        :param register_hook: ``Modifier.register_hook``, which knows how to disable and remove them
        :return: handles
        """
        # With keyword arguments: a Linear may be called as linear(input=x).
        return {
            register_hook(target.module, self._hook(target.name), "forward_pre", with_kwargs=True)
            for target in self._targets
        }

    def require_reached(self) -> None:
        """Check that every target has had an input.

        :raises UsageError: if one was never called in any pass
        """
        missing = [target.name for target in self._targets if target.name not in self.leaders]
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise UsageError(
                f"calibration never reached {len(missing)} target(s): {shown}; add them to `ignore` or calibrate on "
                "data that uses them"
            )

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._pass is None:
                return
            self._note(name, args[0] if args else kwargs["input"], self._pass)
            self._calls += 1
            if self._calls == self._last_call:
                raise AllSeenError

        return hook

    def _note(self, name: str, x: torch.Tensor, each: CalibrationPass) -> None:
        if self._latest is not None:
            latest, version, leader = self._latest
            if x is latest and x._version == version:
                self.leaders[name] = leader
                return
        self._latest = (x, x._version, name)
        self.leaders[name] = name
        self._observe(name, self._as_sequences(name, x, *each.shape), each)

    @staticmethod
    def _as_sequences(name: str, x: torch.Tensor, batch_size: int, tokens: int) -> torch.Tensor:
        if x.numel() != batch_size * tokens * x.shape[-1]:
            raise UsageError(
                f"the input of {name} has shape {tuple(x.shape)}, which can't be matched to {batch_size} × {tokens} "
                "token positions (a routed expert?); add the module to `ignore`"
            )
        return x.detach().reshape(batch_size, tokens, x.shape[-1])
