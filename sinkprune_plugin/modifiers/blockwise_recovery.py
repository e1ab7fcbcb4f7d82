"""Blockwise recovery as an llm-compressor modifier, behind a pruning modifier in the same recipe."""

import math
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from compressed_tensors.offload import disable_onloading
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator

from sinkprune_plugin.diffusion import resolve_diffusion, timestep_grid, timestep_weight
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.bare_modules import bare_copy
from sinkprune_plugin.modifiers.base import SinkAwareModifierBase
from sinkprune_plugin.modifiers.block_fit import BlockFit, FitOptions
from sinkprune_plugin.modifiers.block_origins import find_origins
from sinkprune_plugin.modifiers.block_recovery import fit_blocks
from sinkprune_plugin.modifiers.block_sparsities import targets_by_block
from sinkprune_plugin.modifiers.calibration import collect_batches, deal_out
from sinkprune_plugin.modifiers.dense_weights import KeptWeights, open_dense_model
from sinkprune_plugin.modifiers.fit_groups import TrainedWeight, fit_groups
from sinkprune_plugin.modifiers.hidden_states import check_room
from sinkprune_plugin.modifiers.kept_zeros import KeptZeros
from sinkprune_plugin.modifiers.passes import CalibrationPass
from sinkprune_plugin.modifiers.recipe_order import earlier_modifiers, later_modifiers
from sinkprune_plugin.modifiers.run_estimate import RunEstimate, SweepPlan, brought_in_bytes, hidden_state_bytes
from sinkprune_plugin.modifiers.saving import choose_save_format
from sinkprune_plugin.modifiers.targets import PruningTarget, resolve_targets
from sinkprune_plugin.modifiers.trajectory import (
    CorruptionSource,
    TrajectoryCorruption,
    corrupted_passes,
    spec_of,
    window_copies,
)

__all__ = ["BlockwiseRecoveryModifier"]

TRAINABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class BlockwiseRecoveryModifier(Modifier):
    """Fit what pruning left of each decoder block to the dense block's outputs, zeros fixed.

    It follows a pruning modifier of this package or of llm-compressor in the recipe, takes the dense weights before
    that one prunes, and trains one block at a time on passes along the denoising trajectory, without a backward pass
    through the model. Sources: fitting block by block is that of BRECQ (arXiv 2102.05426), here on the inputs that the
    pruned model gives and toward the outputs that the dense model gives; the trajectory is that of arXiv 2602.17664.

    Sample yaml:

    ```yaml
    prune_stage:
      prune_modifiers:
        SinkAwareADMMModifier:
          sparsity: 0.75
        BlockwiseRecoveryModifier:
          seed: 0
    ```

    Lifecycle:

    - on_initialize: validate; copy the decoder blocks to disk, unless ``dense_model`` names a checkpoint
    - on_calibration_start
        - corrupt every sample at every timestep
        - one sweep over the blocks: run the dense block, fit the pruned one, pass both outputs on
    - on_finalize: free the copy, settle the format

    :param targets: module class names, names or ``re:`` patterns of the Linears to train
    :param ignore: the same, for modules to leave alone
    :param dense_model: directory of the dense checkpoint; left out: the weights are copied to the directory for
        temporary files (``TMPDIR``) before they are pruned
    :param epochs: how often each pass is trained on, at most
    :param learning_rate: highest learning rate of AdamW
    :param warmup: share of the steps in which the learning rate rises; it falls linearly in the others
    :param step_windows: windows of one step, over all processes
    :param held_out: share of the samples that aren't trained on and decide when a block is done; 0 trains on all
    :param train_norms: train the norms' weights too
    :param expert_state_gb: most gigabytes of weights and optimizer states of routed experts that are trained at once;
        more experts are fitted group by group, each on all passes
    :param diffusion_steps: S, steps of the denoising grid
    :param sample_interval: train on every k-th step of the grid
    :param noise_eps: floor of the mask probability, p = (1 − eps) t + eps
    :param timestep_weighting: weight of a timestep's tokens in the loss: 1, 1/t or 1/t²
    :param mask_token_id: mask token, where neither config nor family names it
    :param seed: seed of the corruption, of the order of training, and of the choice among the samples of a loader that
        shuffles
    :param hidden_states: where the passes' hidden states, dense and pruned, wait between decoder blocks: ``memory`` or
        ``disk``
    :param save_format: what ``save_pretrained`` writes from now on; left out: as it was
    """

    # Left out of saved recipes: it tells the pipeline something, not the user.
    requires_calibration_data: bool = Field(default=False, exclude=True)

    targets: str | list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=list)
    dense_model: str | None = None
    epochs: int = Field(default=5, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0.0, allow_inf_nan=False)
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    step_windows: int = Field(default=8, ge=1)
    held_out: float = Field(default=0.125, ge=0.0, lt=1.0)
    train_norms: bool = False
    expert_state_gb: float = Field(default=24.0, gt=0.0, allow_inf_nan=False)
    diffusion_steps: int = 50
    sample_interval: int = 5
    noise_eps: float = Field(default=1e-3, ge=0.0, lt=1.0, allow_inf_nan=False)
    timestep_weighting: Literal["uniform", "inverse", "inverse_square"] = "uniform"
    mask_token_id: int | None = None
    seed: int = 0
    hidden_states: Literal["memory", "disk"] = "memory"
    save_format: Literal["auto", "dense", "sparse-bitmask", "sparse-24-bitmask"] | None = None

    _grid: tuple[float, ...] = PrivateAttr()
    _corruption: CorruptionSource | None = PrivateAttr(default=None)
    _dense: Mapping[str, torch.Tensor] | None = PrivateAttr(default=None)
    _dense_blocks: list[torch.nn.Module] = PrivateAttr(default_factory=list)
    # The blocks as they were before other modifiers, which may remove some, and their numbers among the dense ones.
    _before: list[tuple[weakref.ref[torch.nn.Module], int]] = PrivateAttr(default_factory=list)
    _kept_zeros: KeptZeros | None = PrivateAttr(default=None)
    _followed: bool = PrivateAttr(default=False)
    _done: bool = PrivateAttr(default=False)

    @field_validator("targets", mode="after")
    @classmethod
    def _list_targets(cls, value: str | list[str]) -> list[str]:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        self._grid = timestep_grid(self.diffusion_steps, self.sample_interval)
        return self

    # ---- lifecycle

    def on_initialize(self, state: State, **_kwargs: Any) -> bool:
        """Check what can be checked, and keep the dense weights.

        :param state: session state with the model and, in ``data.calib``, the calibration loader
        :return: True
        :raises UsageError: if the recipe, the model, the dense model or the disk don't fit
        """
        model = state.model
        distributed.use_own_device()
        later = later_modifiers(self)
        self._check_earlier(earlier_modifiers(self))
        self._kept_zeros, self._followed = KeptZeros(type(self).__name__, later), bool(later)
        if state.data.calib is None:
            collect_batches(None)
        if self._corruption is None:
            spec = resolve_diffusion(model.config, mask_token_id=self.mask_token_id)
            self._corruption = TrajectoryCorruption(spec, self.seed, self.noise_eps)
        for target in self._resolve(model):
            with disable_onloading():
                weight = getattr(target.module, "weight", None)
            if weight is None or weight.dtype not in TRAINABLE_DTYPES or _is_quantized(target.module):
                raise UsageError(f"{target.name} is quantized; recover before quantizing, or add it to `ignore`")
        name, blocks = find_decoder_blocks(model)
        if self.dense_model is None:
            self._dense_blocks = [bare_copy(block) for block in blocks]
            self._dense = KeptWeights(name, blocks)
        else:
            self._dense, self._dense_blocks = open_dense_model(self.dense_model, model)
        origins = find_origins(name, blocks, self._dense, len(self._dense_blocks))
        self._before = [(weakref.ref(block), origin) for block, origin in zip(blocks, origins, strict=True)]
        return True

    def on_calibration_start(self, state: State, event: Event, **_kwargs: Any) -> None:  # noqa: ARG002
        """Fit all blocks.

        :param state: session state
        :param event: the event that started calibration
        :raises UsageError: if the data is unusable, or the hidden states don't fit
        """
        if self._done:
            return
        assert self._dense is not None  # set in on_initialize
        started = time.monotonic()
        model = state.model
        targets = self._resolve(model)
        self._warn_without_zeros(model, targets)
        passes = self._passes(state)
        estimate = self.estimate(model, len(passes) // len(self._grid), _tokens(passes) // len(self._grid))
        logger.info(f"{type(self).__name__}: {estimate}")
        check_room(estimate.hidden_bytes, self.hidden_states)
        results = fit_blocks(
            model,
            self._dense,
            passes,
            len(self._grid),
            self._options(),
            dense_blocks=self._dense_blocks,
            origins=self._origins(model),
            linears=[target.name for target in targets],
            hidden_states=self.hidden_states,
            title=f"{type(self).__name__}: recovering blocks",
            progress=distributed.rank() == 0,
        )
        self._forget_dense()
        assert self._kept_zeros is not None  # set in on_initialize
        # They are onloaded for it, so not without need.
        for target in targets if self._followed else ():
            self._kept_zeros.remember(target.name, target.module, target.module.weight.detach())
        self._done = True
        self._log_summary(results, time.monotonic() - started)

    def on_finalize(self, state: State, **_kwargs: Any) -> bool:
        """Free the dense weights, and settle what saving the model will write.

        :param state: session state
        :return: True
        :raises UsageError: if calibration never started, so that nothing was recovered
        """
        self._forget_dense()
        if self._kept_zeros is not None:
            self._kept_zeros.finish()
        if not self._done:
            raise UsageError(
                f"{type(self).__name__} recovered nothing because the pipeline never started calibration; run it "
                "through oneshot() with the default pipeline"
            )
        if self.save_format is not None:
            choose_save_format(state.model, self.save_format)
        return True

    def estimate(self, model: torch.nn.Module, num_batches: int, tokens: int) -> RunEstimate:
        """What a recovery will take; nothing is run, so the model may be on the meta device.

        :param model: model to recover
        :param num_batches: batches of samples
        :param tokens: tokens of all samples, padding included
        :return: the estimate
        :raises UsageError: if the targets don't fit the model
        """
        targets = self._resolve(model)
        _, blocks = find_decoder_blocks(model)
        options = self._options()
        judging = options.held_out * (1 + options.evaluations) if options.held_out else 2
        # Only the sizes of weights are read, which must not onload them.
        with disable_onloading():
            groups = [self._groups(of_block) for of_block in targets_by_block(targets).values()]
            sweep = SweepPlan(
                num_batches * len(self._grid),
                tokens * len(self._grid) * window_copies(self._corruption),
                runs_per_block=2
                + math.ceil(options.epochs * (1 - options.held_out) + judging) * max(len(each) for each in groups),
                streams=2,
            )
            return RunEstimate(
                (sweep,),
                len(blocks),
                hidden_bytes=hidden_state_bytes(model, 2 * sweep.tokens),
                statistics_bytes=0,
                brought_in_bytes=brought_in_bytes(model, blocks, 1),
                training_bytes=max(sum(each.state_bytes for each in group) for part in groups for group in part),
            )

    # ---- pieces

    def _options(self) -> FitOptions:
        return FitOptions(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            step_windows=self.step_windows,
            held_out=self.held_out,
            train_norms=self.train_norms,
            expert_state_gb=self.expert_state_gb,
            seed=self.seed,
        )

    def _groups(self, targets: Sequence[PruningTarget]) -> list[list[TrainedWeight]]:
        """What is trained of a block, in groups that are fitted one after the other."""
        weights = []
        for target in targets:
            expert = None if target.expert is None else target.expert.key
            for tensor in (target.module.weight, target.module.bias):
                if tensor is not None:
                    weights.append(TrainedWeight(target.name, tensor.numel(), tensor.dtype, expert))
        return fit_groups(weights, self.expert_state_gb * 1e9)

    def _origins(self, model: torch.nn.Module) -> list[int]:
        """Number of each block among the dense ones."""
        numbers = {id(reference()): number for reference, number in self._before}
        return [numbers.get(id(block), len(self._dense_blocks)) for block in find_decoder_blocks(model)[1]]

    def _resolve(self, model: torch.nn.Module) -> list[PruningTarget]:
        targets, _ = resolve_targets(model, list(self.targets), self.ignore, routed=True)
        within = [target for target in targets if target.block is not None]
        if not within:
            raise UsageError(f"targets {self.targets} select no Linear in the decoder blocks, which is what is fitted")
        return within

    def _passes(self, state: State) -> list[CalibrationPass]:
        assert self._corruption is not None  # set in on_initialize
        batches = deal_out(collect_batches(state.data.calib, self.seed, spec_of(self._corruption)))
        passes = corrupted_passes(batches, self._grid, self._corruption)
        scales = [timestep_weight(timestep, self.timestep_weighting) for timestep in self._grid]
        return [replace(each, square_scale=scales[number % len(scales)]) for number, each in enumerate(passes)]

    def _check_earlier(self, earlier: Sequence[Modifier]) -> None:
        name = type(self).__name__
        for modifier in earlier:
            if isinstance(modifier, QuantizationMixin):
                raise UsageError(
                    f"{type(modifier).__name__} comes before {name} in the recipe, which can't train quantized "
                    "weights; put it after"
                )
        if self.dense_model is None and not any(_prunes(modifier) for modifier in earlier):
            raise UsageError(
                f"{name} needs a pruning modifier before it in the recipe, whose dense weights it can keep; for a "
                "model that is pruned already, name the dense checkpoint as `dense_model`"
            )

    def _warn_without_zeros(self, model: torch.nn.Module, targets: Sequence[PruningTarget]) -> None:
        _, blocks = find_decoder_blocks(model)
        with disable_onloading():
            shapes = [[each.shape for each in block.parameters()] for block in blocks]
        if shapes != [[each.shape for each in block.parameters()] for block in self._dense_blocks]:
            # Structured pruning leaves smaller weights.
            return
        if not any(bool((target.module.weight == 0).any()) for target in targets):
            logger.warning(
                f"{type(self).__name__}: the weights to train have no zeros, so nothing was pruned that they could "
                "make up for"
            )

    def _forget_dense(self) -> None:
        self._dense, self._dense_blocks = None, []

    def _log_summary(self, results: Sequence[BlockFit], seconds: float) -> None:
        kept = sum(result.kept_step == 0 for result in results)
        text = (
            f"{type(self).__name__}: {len(results)} blocks, error of the last one "
            f"{100 * results[-1].before:.2f} % of the dense output before its fit and {100 * results[-1].after:.2f} % "
            f"after"
        )
        if kept:
            text += f"; {kept} blocks stay as they were, since no step made them better on held-out samples"
        logger.info(f"{text}, {seconds:.1f} s")
        diverged = [str(result.index) for result in results if result.diverged]
        if diverged:
            logger.warning(
                f"{type(self).__name__}: training diverged in block {', '.join(diverged)}, which keeps its best state; "
                f"lower `learning_rate` ({self.learning_rate:g})"
            )


def _prunes(modifier: Modifier) -> bool:
    # Those of others have no common base.
    named = any("sparsity" in field for field in type(modifier).model_fields) or "Prun" in type(modifier).__name__
    return isinstance(modifier, SinkAwareModifierBase) or named


def _is_quantized(module: torch.nn.Module) -> bool:
    return getattr(module, "quantization_scheme", None) is not None


def _tokens(passes: Sequence[CalibrationPass]) -> int:
    return sum(each.row_weights[:, each.context :].numel() for each in passes)
