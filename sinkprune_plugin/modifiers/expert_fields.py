"""The recipe fields of expert pruning, and what is wrong with them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from sinkprune_plugin.diffusion import timestep_grid
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers.search_base import SearchBase
from sinkprune_plugin.pruning.experts import CALIBRATED_SCORES, ExpertScore
from sinkprune_plugin.pruning.patterns import parse_mask_structure

__all__ = ["ExpertFields"]


class ExpertFields(SearchBase):
    """Fields of :class:`ExpertPruningModifier`, which documents them."""

    makes_smaller = True
    hidden_fields = {  # noqa: RUF012 - the base declares it as a class's
        "sparsity": "whole experts are removed, not single weights; give `experts` a share or a number",
        "mask_structure": "whole experts are removed, not single weights; let a modifier for N:M follow in the recipe",
        "targets": "the experts are the family's; give `experts` a list with one value for each decoder block",
        "ignore": "give `experts` a list with one value for each decoder block, 0 to leave its experts alone",
        "search_recovery_steps": "candidates are measured as they are, as nothing is adapted to the experts that stay",
        "preserve_sparsity_mask": "weights of experts that stay aren't changed",
    }
    # Fields that expert pruning hasn't, at the values that the base expects.
    sparsity: float | list[float] | None = Field(default=None, exclude=True)
    mask_structure: str = Field(default="0:0", exclude=True)
    targets: str | list[str] = Field(default_factory=lambda: ["Linear"], exclude=True)
    ignore: list[str] = Field(default_factory=list, exclude=True)
    search_recovery_steps: int = Field(default=0, exclude=True)
    preserve_sparsity_mask: bool = Field(default=False, exclude=True)

    experts: int | float | list[int | float]
    score: ExpertScore = "aimer"
    allocation: Literal["uniform", "early_sparser", "late_sparser", "error", "search"] = "uniform"
    search_budget: int = Field(default=2**20, gt=0)
    calibrate_on: Literal["corrupted", "clean"] = "corrupted"

    @property
    def needs_data(self) -> bool:
        """Whether tokens are needed, for the score or for a search, or the weights alone say it all."""
        return self.score_needs_data or self.allocation == "search"

    @property
    def score_needs_data(self) -> bool:
        """Whether the score is taken from tokens."""
        return self.score in CALIBRATED_SCORES

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        # In place of the base's check of sparsity and mask.
        self._structure = parse_mask_structure(self.mask_structure)
        self._grid = timestep_grid(self.diffusion_steps, self.sample_interval)
        amounts = self.experts if isinstance(self.experts, list) else [self.experts]
        for amount in amounts:
            if isinstance(amount, bool) or not (amount >= 0 if isinstance(amount, int) else 0.0 <= amount < 1.0):
                raise UsageError(
                    f"experts {amount:g} is neither a share to remove in [0, 1) nor a whole number of them; give for "
                    "instance 0.25 for a quarter of them"
                )
        if not any(amounts):
            raise UsageError(
                f"{type(self).__name__} has nothing to remove; give `experts` a share such as 0.25, or a number"
            )
        if self.allocation != "uniform" and isinstance(self.experts, list):
            raise UsageError(
                f"allocation {self.allocation} chooses how many experts each block loses, which a list fixes; drop one "
                "of the two"
            )
        if self.calibrate_on == "clean" and self.timestep_weighting != "uniform":
            raise UsageError(
                f"timestep_weighting {self.timestep_weighting} needs `calibrate_on: corrupted`: clean samples have no "
                "timestep"
            )
        return self
