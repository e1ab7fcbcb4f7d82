"""Candidates of the search for numbers of experts: routers that choose among those that would stay."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sinkprune_plugin.models.catalogue import Experts
from sinkprune_plugin.models.experts import Router, Routing
from sinkprune_plugin.modifiers.bare_modules import bare_copy, compute_with
from sinkprune_plugin.modifiers.replaced_forward import forward_replaced
from sinkprune_plugin.pruning.evolution import Candidate

__all__ = ["ExpertCandidates"]


class ExpertCandidates:
    """See :class:`CandidateBlocks`.

    :param blocks: the dense model's decoder blocks
    :param names: where their experts are
    :param indices: numbers of the blocks that have experts, in the order of a candidate's levels
    :param kept: place in ``indices`` and level → numbers of the experts that stay, ascending
    """

    def __init__(
        self,
        blocks: torch.nn.ModuleList,
        names: Experts,
        indices: Sequence[int],
        kept: Callable[[int, int], Sequence[int]],
    ) -> None:
        self._blocks = blocks
        self._names = names
        self._places = {block: place for place, block in enumerate(indices)}
        self._kept = kept

    def installed(self, block: int, candidate: Candidate) -> contextlib.AbstractContextManager[Any]:
        """See :class:`CandidateBlocks`."""
        if block not in self._places:
            return contextlib.nullcontext()
        router = self._blocks[block].get_submodule(self._names.router)
        assert isinstance(router, Router)  # as the catalogue says
        place = self._places[block]
        kept = self._kept(place, candidate[place])
        if len(kept) == router.experts:
            return contextlib.nullcontext()
        prefix = f"{self._names.router}."
        rows = {name.removeprefix(prefix) for name in self._names.rows}
        return forward_replaced([(router, _choosing_among(kept, router, rows))])


def _choosing_among(kept: Sequence[int], router: Router, rows: set[str]) -> Callable[[torch.Tensor], Routing]:
    """The forward of a router that has the rows of some experts only, and calls them by the numbers they have now."""
    bare = bare_copy(router)
    tensors: Mapping[str, torch.Tensor] = dict([*router.named_parameters(), *router.named_buffers()])
    numbers = torch.tensor(kept, device=next(iter(tensors.values())).device)
    left = {name: tensor.detach()[numbers] if name in rows else tensor for name, tensor in tensors.items()}

    def forward(hidden_states: torch.Tensor) -> Routing:
        routing: Routing = compute_with(bare, left, hidden_states)
        return routing._replace(experts=numbers[routing.experts])

    return forward
