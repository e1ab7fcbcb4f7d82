"""Which experts of a mixture go: scores of experts, and how many a layer can lose. Torch only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sinkprune_plugin.errors import UsageError

__all__ = [
    "CALIBRATED_SCORES",
    "ExpertLayer",
    "ExpertScore",
    "RoutedSums",
    "WeightSums",
    "experts_that_stay",
    "weight_importance",
]

ExpertScore = Literal["aimer", "magnitude", "reap", "frequency"]

CALIBRATED_SCORES: tuple[ExpertScore, ...] = ("reap", "frequency")
"""Scores that need tokens; the others need the weights alone."""

# A piece whose float32 copies stay in a processor's cache; also what bounds the memory of a 16-bit weight.
_PIECE = 1 << 20


@dataclass(frozen=True)
class ExpertLayer:
    """The router of one layer and how many experts it chooses among.

    :param experts: routed experts
    :param chosen: experts of a token (top-k)
    :param groups: the router first chooses among groups of experts, in their order; 1: it doesn't
    :param chosen_groups: groups of a token
    """

    experts: int
    chosen: int
    groups: int = 1
    chosen_groups: int = 1

    @property
    def fewest(self) -> int:
        """Experts that must stay, so that a token still finds as many as it chooses in the groups that it chooses.

        Routers rank groups by their best two experts.
        """
        each = math.ceil(self.chosen / self.chosen_groups)
        return self.groups * (each if self.groups == 1 else max(each, 2))

    def removed(self, amount: int | float, where: str) -> int:
        """How many go, as many from each group.

        :param amount: a number, exactly; or a share, of which the nearest possible number is taken, halfway the smaller
        :param where: name of the layer, for messages
        :return: the number
        :raises UsageError: if it is negative, all, no multiple of the groups, or leaves too few for the router
        """
        if isinstance(amount, bool) or not (amount >= 0 if isinstance(amount, int) else 0.0 <= amount < 1.0):
            raise UsageError(
                f"experts {amount:g} is neither a share to remove in [0, 1) nor a whole number of them; give for "
                "instance 0.25 for a quarter of them"
            )
        number = amount
        if isinstance(amount, float):
            number = math.ceil(amount * self.experts / self.groups - 0.5) * self.groups
        if number % self.groups:
            raise UsageError(
                f"experts {amount} isn't a multiple of the {self.groups} groups that the router of {where} chooses "
                f"among; as many must go from each: give {number - number % self.groups} or "
                f"{number - number % self.groups + self.groups}"
            )
        if self.experts - number < self.fewest:
            most = self.experts - self.fewest
            groups = f" in {self.chosen_groups} of {self.groups} groups" if self.groups > 1 else ""
            raise UsageError(
                f"experts {amount:g} leaves {max(int(self.experts - number), 0)} of the {self.experts} experts of "
                f"{where}, whose router chooses {self.chosen}{groups}; remove at most {most}"
            )
        return int(number)


class WeightSums:
    """What the scores without calibration need of all weights of one expert, in float64."""

    def __init__(self) -> None:
        self.absolute = 0.0
        self.square = 0.0
        self.count = 0

    def add(self, values: torch.Tensor) -> None:
        """Add weights.

        :param values: any shape, a floating dtype
        """
        for piece in values.detach().reshape(-1).split(_PIECE):
            # float32 sums of 2²⁰ terms that torch adds pairwise are right to some 10⁻⁶; scores differ by 10⁻³.
            piece = piece.to(torch.float32)
            self.absolute += float(piece.abs().sum())
            self.square += float(torch.dot(piece, piece))
            self.count += piece.numel()

    @property
    def aimer(self) -> float:
        """Mean of |w| over root mean square of w, in [0, 1]; 0 where all weights are zero."""
        if not self.square:
            return 0.0
        return (self.absolute / self.count) / math.sqrt(self.square / self.count)

    @property
    def norm(self) -> float:
        """Root of the sum of squares."""
        return math.sqrt(self.square)


def weight_importance(sums: Sequence[WeightSums], score: ExpertScore, where: str) -> torch.Tensor:
    """Importance of a layer's experts by their weights alone.

    ``aimer``: AIMER (arXiv 2603.18492) takes mean |w| over the root mean square of all weights of an expert together
    and removes those with the highest value, whose weights are the most alike in size. Importance is the negative.
    ``magnitude``: the norm of all weights together.

    :param sums: one for each expert
    :param score: ``aimer`` or ``magnitude``
    :param where: name of the layer, for messages
    :return: (E,) float64, the higher the more important
    :raises UsageError: if weights aren't finite
    """
    values = [-each.aimer if score == "aimer" else each.norm for each in sums]
    for number, value in enumerate(values):
        if not math.isfinite(value):
            raise UsageError(
                f"weights of expert {number} of {where} aren't finite, so it has no score; repair the checkpoint"
            )
    return torch.tensor(values, dtype=torch.float64)


class RoutedSums:
    """What the scores with calibration need of a layer: sums over the tokens routed to each expert.

    :param experts: E
    """

    def __init__(self, experts: int) -> None:
        # (E,) float64 each. A token counts with its weight w, in [0, 1] without sinks: Σ w g ‖f(x)‖, Σ w.
        self.outputs = torch.zeros(experts, dtype=torch.float64)
        self.tokens = torch.zeros(experts, dtype=torch.float64)

    def add(self, expert: int, outputs: torch.Tensor, router_weights: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens that were routed to one expert.

        :param expert: its number
        :param outputs: (n, d) its outputs f(x), any floating dtype
        :param router_weights: (n,) factors g of these outputs
        :param weights: (n,) float32 token weights w
        """
        norms = outputs.to(torch.float32).norm(dim=-1)
        weights = weights.to(norms.device, torch.float32)
        self.outputs[expert] += float((weights * router_weights.to(torch.float32) * norms).sum())
        self.tokens[expert] += float(weights.sum())

    def importance(self, score: ExpertScore) -> torch.Tensor:
        """Importance of the experts.

        ``reap``: REAP (arXiv 2510.13999, equation 9), mean of g ‖f(x)‖ over the tokens routed to the expert;
        ``frequency``: tokens routed to it over all tokens. An expert that no token chose has 0.

        :param score: ``reap`` or ``frequency``
        :return: (E,) float64
        """
        if score == "reap":
            return torch.where(self.tokens > 0, self.outputs / self.tokens.clamp_min(1e-30), 0.0)
        return self.tokens / self.tokens.sum().clamp_min(1e-30)


def experts_that_stay(importance: torch.Tensor, removed: int, groups: int = 1) -> list[int]:
    """Remove the least important experts, as many of each group.

    :param importance: (E,) the higher the more important; of equals the first stay
    :param removed: how many go in all, a multiple of ``groups``
    :param groups: groups of E / ``groups`` consecutive experts
    :return: numbers of those that stay, ascending
    """
    order = importance.view(groups, -1).argsort(dim=1, descending=True, stable=True)
    each = order.shape[1]
    kept = order[:, : each - removed // groups] + torch.arange(groups).unsqueeze(1) * each
    return sorted(kept.flatten().tolist())
