"""The recipe fields of structured pruning, and what is wrong with them."""

import re
from typing import Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from sinkprune_plugin.diffusion import timestep_grid
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers.hessian_base import HessianModifierBase
from sinkprune_plugin.pruning.patterns import parse_mask_structure
from sinkprune_plugin.pruning.units import Amount, UnitKind, check_amount

__all__ = ["Amounts", "StructuredFields"]

# One amount for all blocks, or one for each.
Amounts = Amount | list[Amount]

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*x")


class StructuredFields(HessianModifierBase):
    """Fields of :class:`SinkAwareStructuredModifier`, which documents them."""

    makes_smaller = True
    hidden_fields = {  # noqa: RUF012 - the base declares it as a class's
        "sparsity": "units are removed, not single weights; give `mlp_channels`, `attention_heads` or `blocks`",
        "mask_structure": "units are removed, not single weights; let a modifier for N:M follow in the recipe",
        "targets": "the Linears that share units are the family's; `ignore` leaves blocks or kinds of units alone",
        "search_directory": "a search over widths keeps its levels in main memory",
        "allocation_note": "it belongs to a list of sparsities",
        "allocation_spread": "give `mlp_channels` a list with one value for each decoder block",
    }
    # Fields that structured pruning hasn't, at the values that the base expects.
    sparsity: float | list[float] | None = Field(default=None, exclude=True)
    mask_structure: str = Field(default="0:0", exclude=True)
    targets: str | list[str] = Field(default_factory=lambda: ["Linear"], exclude=True)
    allocation_spread: float = Field(default=0.1, exclude=True)
    search_directory: str | None = Field(default=None, exclude=True)
    allocation_note: str | None = Field(default=None, exclude=True)

    mlp_channels: Amounts = 0
    expert_channels: Amounts = 0
    attention_heads: Amounts = 0
    blocks: Amount = 0
    granularity: dict[UnitKind, int] = Field(default_factory=dict)
    score: Literal["obs", "magnitude", "wanda"] = "obs"
    compensate: bool = True
    allocation: Literal["uniform", "error", "search"] = "uniform"
    target: Literal["dense", "current"] = "dense"
    within_block: Literal["sequential", "parallel"] = "sequential"
    preserve_sparsity_mask: bool = True
    budget: str | None = None
    budget_of: Literal["latency", "parameters", "flops"] = "latency"
    latency_batch_size: int = Field(default=1, gt=0)
    levels: int = Field(default=9, ge=2)
    search_budget: int = Field(default=2**20, gt=0)

    _ratio: float | None = PrivateAttr(default=None)

    @property
    def measures_allocation(self) -> bool:
        """False: widths are chosen by :class:`StructuredAllocation`, not sparsities of blocks."""
        return False

    @field_validator("granularity", mode="after")
    @classmethod
    def _positive(cls, value: dict[UnitKind, int]) -> dict[UnitKind, int]:
        for kind, number in value.items():
            if number < 1:
                raise UsageError(f"granularity of {kind} is {number}; it must be a whole number of at least 1")
        return value

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        # In place of the base's check of sparsity and mask.
        self._structure = parse_mask_structure(self.mask_structure)
        self._grid = timestep_grid(self.diffusion_steps, self.sample_interval)
        amounts = {
            "mlp_channels": self.mlp_channels,
            "expert_channels": self.expert_channels,
            "attention_heads": self.attention_heads,
            "blocks": self.blocks,
        }
        for name, amount in amounts.items():
            for each in amount if isinstance(amount, list) else [amount]:
                check_amount(name, each)
        units = [self.mlp_channels, self.attention_heads]
        if self.budget is not None:
            self._ratio = self._check_budget(units)
        elif not any(any(each) if isinstance(each, list) else each for each in amounts.values()):
            raise UsageError(
                f"{type(self).__name__} has nothing to remove; give `mlp_channels`, `attention_heads` or `blocks` a "
                "share such as 0.5 or a number, or give a `budget`"
            )
        if not self.compensate:
            # Nothing is adapted to the dense model's outputs.
            self.__dict__["target"] = "current"
        if self.score == "obs" and not self.compensate:
            raise UsageError(
                "score obs prices the removal of a unit with what stays adapted to it, which `compensate: false` would "
                "leave out; use score wanda or magnitude without compensation"
            )
        if self.allocation != "uniform":
            if any(self.expert_channels) if isinstance(self.expert_channels, list) else self.expert_channels:
                raise UsageError(
                    f"allocation {self.allocation} doesn't choose widths for experts, which have one in a block; give "
                    "`expert_channels` to a SinkAwareStructuredModifier of its own, with `allocation: uniform`"
                )
            self._check_allocation(units)
        return self

    def _check_budget(self, units: list[Amounts]) -> float:
        assert self.budget is not None
        match = _BUDGET.fullmatch(self.budget.strip())
        if match is None or not float(match[1]) > 1.0:
            raise UsageError(
                f'budget "{self.budget}" isn\'t a ratio of dense to pruned above 1 followed by x; give for instance '
                '"1.5x"'
            )
        if self.allocation == "uniform":
            raise UsageError("a budget is met by choosing widths; set `allocation: search`, or `error`")
        if any(isinstance(each, list) or each for each in units):
            raise UsageError(
                "a budget and `mlp_channels` or `attention_heads` both say how much is removed; drop one of the two"
            )
        return float(match[1])

    def _check_allocation(self, units: list[Amounts]) -> None:
        if any(isinstance(each, list) for each in units):
            raise UsageError(
                f"allocation {self.allocation} chooses widths for the blocks, which a list fixes; drop one of the two"
            )
        if self.budget is None and not any(units):
            raise UsageError(
                f"allocation {self.allocation} spreads removed units over the blocks and none are removed; give "
                "`mlp_channels`, `attention_heads` or a `budget`"
            )
