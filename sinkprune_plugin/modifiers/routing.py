"""Layers with routed experts whose routing can be observed: which tokens each expert gets, and with what weight."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from llmcompressor.modeling.moe.context import get_calibrate_all_experts_flag
from llmcompressor.modeling.moe.linear_experts import ExpertMLP, LinearExperts2D

from sinkprune_plugin.models.experts import MoELayer, Router, Routing

__all__ = ["ExpertKey", "ExpertPlace", "RoutedLayer", "expert_places", "find_routed_layers"]

# Name of a list of experts, and a number in it.
ExpertKey = tuple[str, int]

# ``Modifier.register_hook``, which knows how to disable and remove hooks.
RegisterHook = Callable[..., Any]
# Gets the layer and the (N, d) hidden states that its router has just routed, before the experts are called.
OnCall = Callable[["RoutedLayer", torch.Tensor], None]


class RoutedLayer(ABC):
    """The experts of one decoder block while they are observed.

    :param name: full module name of the list of experts
    :param container: the list
    :param experts: the experts, in their order
    """

    def __init__(self, name: str, container: torch.nn.Module, experts: list[torch.nn.Module]) -> None:
        self.name = name
        self.container = container
        self.experts = experts

    @abstractmethod
    def attach(self, register_hook: RegisterHook, on_call: OnCall | None = None) -> Any:
        """Follow the routing of each call from now on.

        :param register_hook: registers a hook
        :param on_call: called when the routing of a call is known
        :return: its handle
        """

    @abstractmethod
    def rows_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of one expert in the current call.

        :param expert: its number
        :return: (n,) int64 positions among the call's tokens, and (n,) weights of the router, in any one order
        """

    @abstractmethod
    def routed(self, expert: int, values: torch.Tensor) -> torch.Tensor:
        """The rows of the routed tokens only, whether an expert is called with these or with all tokens.

        :param expert: its number
        :param values: (n, C) or (N, C), what the expert or a Linear in it gets or gives
        :return: (n, C), in the order of :meth:`rows_of`
        """


class _NativeLayer(RoutedLayer):
    """A layer of this package's models: its router returns the routing, and experts get routed tokens only."""

    def __init__(self, name: str, layer: MoELayer) -> None:
        super().__init__(name, layer.experts, list(layer.experts))
        self._router: Router = layer.gate
        self._routing: Routing | None = None

    def attach(self, register_hook: RegisterHook, on_call: OnCall | None = None) -> Any:
        def note(_module: torch.nn.Module, args: tuple[Any, ...], output: Routing) -> None:
            self._routing = output
            if on_call is not None:
                on_call(self, args[0])

        return register_hook(self._router, note, "forward")

    def rows_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._routing is not None  # the router comes before its experts
        return self._routing.rows_of(expert)

    def routed(self, expert: int, values: torch.Tensor) -> torch.Tensor:
        del expert
        return values


class _LinearizedLayer(RoutedLayer):
    """llm-compressor's list of experts, which gets the routing as arguments, and all tokens if it was told so."""

    def __init__(self, name: str, experts: LinearExperts2D) -> None:
        # Its activation function is among its children.
        super().__init__(name, experts, [child for child in experts.children() if isinstance(child, ExpertMLP)])
        self._module = experts
        self._routing: tuple[torch.Tensor, torch.Tensor] | None = None

    def attach(self, register_hook: RegisterHook, on_call: OnCall | None = None) -> Any:
        names = ("hidden_states", "top_k_index", "top_k_weights")

        def note(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, indices, weights = (*args, *(kwargs[name] for name in names[len(args) :]))
            self._routing = indices, weights
            if on_call is not None:
                on_call(self, hidden)

        return register_hook(self._module, note, "forward_pre", with_kwargs=True)

    def rows_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._routing is not None  # the list is called before its experts
        indices, weights = self._routing
        # Slot by slot, as it gathers the tokens.
        slots, rows = torch.where((indices == expert).T)
        return rows, weights[rows, slots]

    def routed(self, expert: int, values: torch.Tensor) -> torch.Tensor:
        return values[self.rows_of(expert)[0]] if get_calibrate_all_experts_flag() else values


def find_routed_layers(name: str, module: torch.nn.Module) -> Iterator[RoutedLayer]:
    """Find the layers in a module whose routing is known.

    :param name: full module name
    :param module: a decoder block, for instance
    :return: the layers, in the module's order
    """
    for child_name, child in module.named_modules(prefix=name):
        if isinstance(child, MoELayer):
            yield _NativeLayer(f"{child_name}.experts", child)
        elif isinstance(child, LinearExperts2D) and type(child).forward is LinearExperts2D.forward:
            yield _LinearizedLayer(child_name, child)


@dataclass(frozen=True)
class ExpertPlace:
    """Which expert a module belongs to.

    :param layer: its layer
    :param number: its number there
    :param path: name of the module within the expert
    """

    layer: RoutedLayer
    number: int
    path: str

    @property
    def key(self) -> ExpertKey:
        """What tells the expert from others of the model."""
        return self.layer.name, self.number


def expert_places(name: str, module: torch.nn.Module) -> dict[int, ExpertPlace]:
    """The Linears of all experts whose routing is known.

    :param name: full module name
    :param module: the list of decoder blocks, for instance
    :return: ``id`` of the Linear → its expert
    """
    return {
        id(child): ExpertPlace(layer, number, path)
        for layer in find_routed_layers(name, module)
        for number, expert in enumerate(layer.experts)
        for path, child in expert.named_modules()
        if isinstance(child, torch.nn.Linear)
    }
