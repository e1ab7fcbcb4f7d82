"""The fields that a recipe may give to a sink-aware modifier, and what is wrong with them."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from llmcompressor.modifiers import Modifier
from pydantic import Field, PrivateAttr, field_validator, model_validator

from sinkprune_plugin.diffusion import timestep_grid
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning.patterns import MaskStructure, parse_mask_structure, resolve_sparsity

__all__ = ["SinkAwareFields"]

# Fields of llm-compressor's own pruning modifiers that have no meaning here, each with what to use instead.
REFUSED_FIELDS = {
    "sparsity_profile": "OWL derives layer sparsities from clean activations, which the corrupted passes don't have; "
    "give `sparsity` a list with one value for each decoder block",
    "owl_m": "OWL is not supported; give `sparsity` a list with one value for each decoder block",
    "owl_lmbda": "OWL is not supported; give `sparsity` a list with one value for each decoder block",
    "sequential_update": "it is deprecated; `propagate_error` says whether later blocks see pruned outputs",
}


class SinkAwareFields(Modifier):
    """The recipe fields of all sink-aware modifiers.

    :param sparsity: share of zeros in (0, 1), one value or one for each decoder block; may be left out for N:M
    :param allocation: how one sparsity is spread over the decoder blocks: ``uniform``; ``early_sparser`` and
        ``late_sparser`` let it fall or rise linearly over the depth; ``error`` equalises the marginal error of the
        blocks; ``search`` searches for the least distance to the dense model's predictions; a list, one value for each
        block, is the same as a list in ``sparsity``, which may then be left out or say the total
    :param allocation_spread: sparsity of the first block minus the mean, for ``early_sparser`` and ``late_sparser``
    :param allocation_note: how a list came about; written into the saved recipe, without effect
    :param search_budget: forward tokens that ``allocation: search`` may spend on candidates
    :param search_recovery_steps: the candidates of a search's last stage are recovered for so many steps, block by
        block, before they are measured; that counts in ``search_budget``
    :param search_directory: directory where a search keeps its database and state, to go on after an interruption;
        left out: a directory for temporary files, removed at the end
    :param mask_structure: ``"0:0"`` for unstructured, ``"N:M"`` for N zeros in every M consecutive input columns
    :param targets: module class names, names or ``re:`` patterns; class names reach into decoder blocks only
    :param ignore: the same, for modules to leave alone
    :param diffusion_steps: S, steps of the denoising grid
    :param sample_interval: calibrate at every k-th step of the grid
    :param noise_eps: floor of the mask probability, p = (1 − eps) t + eps
    :param sink_std: standard deviations above the mean attention mass at which a sink begins
    :param sink_alpha: steepness of the soft sink mask, per unit of attention mass
    :param sink_scope: ``all`` suppresses every sink found at a timestep, ``transient`` spares persistent positions
    :param sink_persistence: mean mask over the timesteps from which a position counts as persistent
    :param timestep_weighting: weight of a timestep's rows in sums of squares: 1, 1/t or 1/t²
    :param preserve_sparsity_mask: weights that are zero already stay zero and count; Wanda keeps them in any case
    :param mask_token_id: mask token, where neither config nor family names it
    :param seed: seed of the corruption, and of the choice among the samples of a loader that shuffles
    :param hidden_states: where the passes' hidden states wait between decoder blocks: ``memory``, or ``disk`` for a
        file in the directory for temporary files (``TMPDIR``)
    :param save_format: what ``save_pretrained`` writes from now on: ``auto`` takes sparse-24-bitmask where every target
        is 2:4, else sparse-bitmask where that is smaller, else dense
    """

    hidden_fields: ClassVar[Mapping[str, str]] = {}
    """Fields of this base that a subclass hasn't → what to give instead."""

    # Left out of saved recipes: it tells the pipeline something, not the user.
    requires_calibration_data: bool = Field(default=False, exclude=True)

    sparsity: float | list[float] | None = None
    allocation: Literal["uniform", "early_sparser", "late_sparser", "error", "search"] | list[float] = "uniform"
    allocation_spread: float = Field(default=0.1, gt=0.0, lt=1.0)
    allocation_note: str | None = None
    search_budget: int = Field(default=4_000_000, gt=0)
    search_recovery_steps: int = Field(default=0, ge=0)
    search_directory: str | None = None
    mask_structure: str = "0:0"
    targets: str | list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=list)
    diffusion_steps: int = 50
    sample_interval: int = 5
    noise_eps: float = Field(default=1e-3, ge=0.0, lt=1.0, allow_inf_nan=False)
    sink_std: float = Field(default=2.0, ge=0.0, allow_inf_nan=False)
    sink_alpha: float = Field(default=5.0, gt=0.0, allow_inf_nan=False)
    sink_scope: Literal["all", "transient"] = "all"
    sink_persistence: float = Field(default=0.5, gt=0.0, le=1.0, allow_inf_nan=False)
    timestep_weighting: Literal["uniform", "inverse", "inverse_square"] = "uniform"
    preserve_sparsity_mask: bool = False
    mask_token_id: int | None = None
    seed: int = 0
    hidden_states: Literal["memory", "disk"] = "memory"
    save_format: Literal["auto", "dense", "sparse-bitmask", "sparse-24-bitmask"] = "auto"

    _structure: MaskStructure = PrivateAttr()
    _grid: tuple[float, ...] = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _refuse_foreign_fields(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, reason in REFUSED_FIELDS.items():
                if values.get(name) is not None:
                    raise UsageError(f"{cls.__name__} doesn't support `{name}`: {reason}")
            for name, reason in cls.hidden_fields.items():
                if name in values:
                    raise UsageError(f"{cls.__name__} has no field `{name}`: {reason}")
        return values

    @field_validator("targets", mode="after")
    @classmethod
    def _list_targets(cls, value: str | list[str]) -> list[str]:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        self._structure = parse_mask_structure(self.mask_structure)
        # Plain assignment would run validation again.
        if isinstance(self.allocation, list):
            resolve_sparsity(self.allocation, self._structure)
            if self.sparsity is None:
                self.__dict__.update(sparsity=self.allocation, allocation="uniform")
        self.__dict__["sparsity"] = resolve_sparsity(self.sparsity, self._structure)
        self._grid = timestep_grid(self.diffusion_steps, self.sample_interval)
        if self.allocation != "uniform" and (isinstance(self.sparsity, list) or not self._structure.unstructured):
            given = "a list of sparsities" if isinstance(self.sparsity, list) else f"mask_structure {self._structure}"
            name = "a list" if isinstance(self.allocation, list) else self.allocation
            raise UsageError(
                f"allocation {name} spreads one sparsity over the blocks, which {given} fixes; drop one of the two"
            )
        if self.save_format == "sparse-24-bitmask" and not self._structure.implies_2_of_4:
            raise UsageError(
                f"save_format sparse-24-bitmask needs mask_structure 2:4, not {self._structure}; use "
                "`save_format: auto` or sparse-bitmask"
            )
        return self
