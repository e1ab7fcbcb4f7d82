"""Fitting the weights of one decoder block that survived pruning to the dense block's outputs; zeros stay zeros."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.fit_plan import FitPlan, PassId

__all__ = ["BlockFit", "FitExample", "FitOptions", "fit_weights", "relative_error", "state_bytes"]

# Losses are scaled for the backward pass: the gradient of an output is about a hundredth of 1/d, which in float16 would
# be rounded to nothing.
LOSS_SCALE = 2.0**12


@dataclass(frozen=True)
class FitOptions:
    """How a block is fitted.

    :param epochs: how often each pass is trained on, at most
    :param learning_rate: highest learning rate of AdamW, after a linear warm-up and before a linear decay to zero
    :param warmup: share of the steps for the warm-up
    :param step_windows: windows of a step, over all processes
    :param held_out: share of the windows that aren't trained on, but say which of the states on the way is kept and
        when to stop; 0 trains on all windows to the end
    :param evaluations: how often the held-out windows are looked at, at most
    :param patience: stop after so many looks without an improvement
    :param judged: without held-out windows, measure the error before and after on all of them, and keep the beginning
        where it isn't finite afterwards; False saves these passes and reports NaN
    :param train_norms: train the norms' weights too
    :param expert_state_gb: most gigabytes of weights and optimizer states of routed experts that are trained at once
    :param seed: seed of the order of the windows
    """

    epochs: int = 5
    learning_rate: float = 1e-3
    warmup: float = 0.05
    step_windows: int = 8
    held_out: float = 0.125
    evaluations: int = 10
    patience: int = 3
    judged: bool = True
    train_norms: bool = False
    expert_state_gb: float = 24.0
    seed: int = 0


@dataclass(frozen=True)
class BlockFit:
    """What became of a block.

    :param index: number of the block
    :param before: relative error before the first step, on the held-out passes, or without them on all
    :param after: the same for the weights that were kept
    :param kept_step: the step that these come from; 0 where none was better than the beginning
    :param steps: steps that were taken
    :param diverged: stopped at a loss that isn't finite
    """

    index: int
    before: float
    after: float
    kept_step: int
    steps: int
    diverged: bool = False


class FitExample(Protocol):
    """What the fit needs of one pass, whose number is the argument."""

    def predict(self, number: int, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Output of the pruned block with these weights, (B, T, d)."""
        ...

    def target(self, number: int) -> torch.Tensor:
        """Output of the dense block, (B, T, d)."""
        ...

    def token_weights(self, number: int) -> torch.Tensor:
        """Weight of each token, (B, T) float32."""
        ...


def relative_error(output: torch.Tensor, target: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
    """Squared error of each token's output relative to the power of its dense output, weighted and summed.

    Relative for each token, since the norm that the next block begins with divides by the same power, and since a few
    tokens with outputs a hundred times larger would otherwise be all that counts.

    :param output: (B, T, d)
    :param target: (B, T, d), the dense model's
    :param token_weights: (B, T) float32
    :return: float32 scalar
    """
    target = target.float()
    power = target.square().mean(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    error = (output.float() - target).square().mean(dim=-1)
    return (token_weights.to(error.device) * error / power).sum()


def state_bytes(sizes: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a block's weights while it is fitted: as the model has them, and all that training adds.

    Float32 masters, gradients and two moments; and in the model's dtype the weights as loaded, the best ones so far
    and, unless that is float32, those computed with.

    :param sizes: numbers of elements of the trained weights
    :param dtype: the model's
    :return: bytes on the block's device
    """
    copies = 2 if dtype == torch.float32 else 3
    return sum(sizes) * (4 * 4 + copies * dtype.itemsize)


class _Training:
    """Masters of a block's trained weights, with the optimizer's state."""

    def __init__(self, weights: Mapping[str, torch.Tensor], zeros_fixed: frozenset[str], options: FitOptions) -> None:
        self._weights = weights
        self._zeros_fixed = zeros_fixed
        self.masters = {
            name: weight.detach().to(torch.float32, copy=True).requires_grad_() for name, weight in weights.items()
        }
        parameters = list(self.masters.values())
        # No weight decay: the dense outputs say how large the weights have to be. Fused, as the other implementations
        # take temporary memory as large as the weights.
        self.optimizer = torch.optim.AdamW(
            parameters, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights in the model's dtype, differentiable."""
        return {name: master.to(self._weights[name].dtype) for name, master in self.masters.items()}

    def values(self) -> dict[str, torch.Tensor]:
        """The weights in the model's dtype, with each fixed zero as it was, bit for bit."""
        with torch.no_grad():
            return {
                name: torch.where(self._kept(name), master.to(weight.dtype), weight)
                for (name, weight), master in zip(self._weights.items(), self.masters.values(), strict=True)
            }

    def step(self, scale: float) -> None:
        """One step on the sums of the processes' gradients; those of zeros are left out, so that they have no moments.

        :param scale: factor on the gradients
        """
        for name, master in self.masters.items():
            assert master.grad is not None
            distributed.sum_everywhere(master.grad)
            master.grad.mul_(self._kept(name)).mul_(scale)
        torch.nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _kept(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        return weight != 0 if name in self._zeros_fixed else torch.ones((), dtype=torch.bool, device=weight.device)


def fit_weights(
    index: int,
    example: FitExample,
    weights: Mapping[str, torch.Tensor],
    zeros_fixed: frozenset[str],
    plan: FitPlan,
    pass_weights: Mapping[PassId, float],
    options: FitOptions,
    progress: Callable[[], None],
) -> tuple[BlockFit, dict[str, torch.Tensor]]:
    """Fit the weights of a block.

    :param index: number of the block
    :param example: this process's passes
    :param weights: name in the block → weight to train, on the block's device
    :param zeros_fixed: names of those whose zeros stay
    :param plan: steps of all processes
    :param pass_weights: sum of the token weights of each pass of all processes
    :param options: how
    :param progress: called after each run of a pass
    :return: what became of it, and the weights in their own dtype, the same ones in every process
    """
    training = _Training(weights, zeros_fixed, options)
    steps = len(plan.steps)
    warm = max(1, round(options.warmup * steps))
    decay = max(1, steps - warm)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        training.optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / decay))
    )
    device = next(iter(weights.values())).device

    def mean_error(passes: Sequence[PassId], *, learn: bool) -> float:
        """Mean relative error of passes of all processes; ``learn`` adds the gradient of this one's scaled sum."""
        total = torch.zeros((), dtype=torch.float32, device=device)
        with distributed.failing_together(), torch.set_grad_enabled(learn):
            for number in (number for rank, number in passes if rank == distributed.rank()):
                output = example.predict(number, training.tensors())
                error = relative_error(output, example.target(number), example.token_weights(number))
                # It doesn't depend on the weights where these are experts that no token of the pass goes to.
                if learn and error.requires_grad:
                    (error * LOSS_SCALE).backward()
                total += error.detach()
                progress()
        distributed.sum_everywhere(total)
        return float(total) / token_weight(passes)

    def token_weight(passes: Sequence[PassId]) -> float:
        return sum(pass_weights[each] for each in passes)

    judged = plan.held_out or tuple(dict.fromkeys(each for step in plan.steps for each in step))
    measured = bool(plan.held_out) or options.judged
    before = best = mean_error(judged, learn=False) if measured else math.nan
    kept, kept_step, done, missed = training.values(), 0, 0, 0
    for passes in plan.steps:
        for master in training.masters.values():
            # A process may have no pass in this step.
            master.grad = torch.zeros_like(master)
        if not math.isfinite(mean_error(passes, learn=True)):
            return BlockFit(index, before, best, kept_step, done, diverged=True), kept
        training.step(1.0 / (LOSS_SCALE * token_weight(passes)))
        schedule.step()
        done += 1
        if plan.held_out and (done % max(1, steps // options.evaluations) == 0 or done == steps):
            error = mean_error(plan.held_out, learn=False)
            if error < best:
                kept.clear()
                kept |= training.values()
                best, kept_step, missed = error, done, 0
            else:
                missed += 1
            if missed == options.patience:
                break
    if not measured:
        return BlockFit(index, before, best, done, done), training.values()
    if not plan.held_out:
        error = mean_error(judged, learn=False)
        if not math.isfinite(error):
            return BlockFit(index, before, best, 0, done, diverged=True), kept
        best, kept, kept_step = error, training.values(), done
    return BlockFit(index, before, best, kept_step, done), kept
