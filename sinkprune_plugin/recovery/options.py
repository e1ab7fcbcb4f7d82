"""What a recovery can be asked for."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sinkprune_plugin.errors import UsageError

__all__ = ["RecoveryOptions"]

_DISTILLATION = ("teacher_top_k", "temperature", "elbo_share")
# Of a training from end to end, which goes through the whole model in each step.
_END_TO_END = ("micro_batch_size", "gradient_checkpointing", "precision", "weight_bound", "weight_decay")


class RecoveryOptions(BaseModel):
    """Settings of a recovery; everything that determines its result is here.

    :param method: ``distill`` trains toward the dense model's predictions, ``elbo`` on the text alone; ``blockwise``
        fits each block to the dense block's outputs, with the memory of one block
    :param steps: optimiser steps; of each block with ``blockwise``
    :param batch_size: windows of a step, over all processes
    :param micro_batch_size: windows in a forward pass of one process; None: all of its share
    :param learning_rate: peak of the schedule, which warms up and decays linearly
    :param warmup: share of the steps over which the rate rises
    :param weight_decay: of AdamW
    :param temperature: τ of the distillation
    :param elbo_share: share of the text's own loss in that of ``distill``
    :param weight_bound: bound of the ELBO's weight 1/t of a token
    :param train: ``weights`` (all Linears of the decoder blocks), ``weights-and-norms``, or ``lora``: low-rank
        adapters, merged under the mask at the end
    :param lora_rank: rank of the adapters
    :param held_out: share of the windows that are kept out of training, to stop early and choose the best state
    :param evaluations: how often these are looked at, and a state is saved
    :param patience: stop after so many evaluations without a new best; 0 never stops
    :param teacher_top_k: keep that many predictions of the dense model for each token on disk, made once before the
        training; 0 keeps the dense model in memory instead
    :param gradient_checkpointing: compute activations again in the backward pass instead of keeping them
    :param precision: ``bfloat16`` runs the matrix products in it; ``auto`` does so on an accelerator that can. The
        weights that are trained are float32 in any case
    :param seed: seed of the order of windows and of the noise
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["distill", "elbo", "blockwise"] = "distill"
    steps: int = Field(default=300, ge=1)
    batch_size: int = Field(default=8, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=6e-4, gt=0.0, allow_inf_nan=False)
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    temperature: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    elbo_share: float = Field(default=0.0, ge=0.0, le=1.0)
    weight_bound: float = Field(default=5.0, ge=1.0, allow_inf_nan=False)
    train: Literal["weights", "weights-and-norms", "lora"] = "weights"
    lora_rank: int = Field(default=16, ge=1)
    held_out: float = Field(default=0.05, gt=0.0, lt=1.0)
    evaluations: int = Field(default=10, ge=1)
    patience: int = Field(default=3, ge=0)
    teacher_top_k: int = Field(default=0, ge=0)
    gradient_checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        given = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        foreign = [name for name in _DISTILLATION if name in given]
        if self.method != "distill" and foreign:
            raise UsageError(f"{foreign[0]} belongs to method distill, not {self.method}; leave it out")
        whole = [name for name in _END_TO_END if name in given]
        if self.method == "blockwise" and whole:
            raise UsageError(f"{whole[0]} belongs to methods distill and elbo, not blockwise; leave it out")
        if self.method == "blockwise" and self.train == "lora":
            raise UsageError("train lora saves memory where method blockwise needs little; drop one of the two")
        if self.teacher_top_k and self.temperature != 1.0:
            raise UsageError(
                f"temperature {self.temperature:g} needs the teacher's whole distribution, and teacher_top_k "
                f"{self.teacher_top_k} keeps a part; drop one of the two"
            )
        return self

    @property
    def effective_elbo_share(self) -> float:
        """Share of the text's own loss, whatever the method."""
        return 1.0 if self.method == "elbo" else self.elbo_share
