"""Hooks on the inputs of Linears, with one look at an input that several of them share (q/k/v, gate/up)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers.targets import PruningTarget

__all__ = ["InputObserver"]

Observe = Callable[[str, torch.Tensor], None]


class InputObserver:
    """Call ``observe(leader, x)`` once for every distinct input of a forward pass.

    Linears called one after the other with the same tensor share a leader, the first of them; ``leaders`` says whose
    statistics are whose. Only the latest input is held, so no activation outlives the call that follows it.

    :param targets: Linears to watch
    :param observe: receives the leader's name and its input (B, T, C)
    """

    def __init__(self, targets: Sequence[PruningTarget], observe: Observe) -> None:
        self.leaders: dict[str, str] = {}
        self._observe = observe
        self._shape: tuple[int, int] = (0, 0)
        self._latest: tuple[torch.Tensor, int, str] | None = None
        self._targets = targets

    def begin(self, batch_size: int, tokens: int) -> None:
        """Announce a forward pass over (batch_size, tokens) ids."""
        self._shape = (batch_size, tokens)
        self._latest = None

    def end(self) -> None:
        """Let go of the last input."""
        self._latest = None

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

    def unreached(self) -> list[str]:
        """Names of the targets that no forward pass has come through."""
        return [target.name for target in self._targets if target.name not in self.leaders]

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if self._latest is not None:
                latest, version, leader = self._latest
                if x is latest and x._version == version:
                    self.leaders[name] = leader
                    return
            self._latest = (x, x._version, name)
            self.leaders[name] = name
            self._observe(name, self._as_sequences(name, x))

        return hook

    def _as_sequences(self, name: str, x: torch.Tensor) -> torch.Tensor:
        batch_size, tokens = self._shape
        if x.numel() != batch_size * tokens * x.shape[-1]:
            raise UsageError(
                f"the input of {name} has shape {tuple(x.shape)}, which can't be matched to {batch_size} × {tokens} "
                "token positions (a routed expert?); add the module to `ignore`"
            )
        return x.detach().reshape(batch_size, tokens, x.shape[-1])
