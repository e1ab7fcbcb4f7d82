"""How far a candidate's predictions are from the dense model's, along the denoising trajectory.

The value is the Kullback-Leibler divergence of a candidate's distribution from the dense model's at the masked
positions of corrupted windows, each position weighted with 1 / p_mask of its timestep:

    Σ_t Σ_i masked KL(dense_i ‖ candidate_i) / p_mask(t)   /   number of tokens of all passes

That is the weight which the negative ELBO gives a token's loss ("Large Language Diffusion Models", arXiv 2502.09992,
equation 3). Where the text follows the dense model's own distribution, the value is by how many nats per token the
candidate's negative ELBO is above the dense model's; and every timestep counts alike, however few tokens it masks.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sinkprune_plugin.diffusion import DiffusionSpec
from sinkprune_plugin.diffusion.corruption import mask_probability
from sinkprune_plugin.diffusion.training_loss import TopPredictions, divergence, predictions, top_predictions
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.calibration import CalibrationBatch
from sinkprune_plugin.modifiers.passes import CalibrationPass, OnloadedBlock, PassEngine
from sinkprune_plugin.modifiers.trajectory import CorruptionSource, corrupted_passes

__all__ = ["Fitting", "Install", "PredictionDistance", "ScoredPass", "kept_prediction_bytes", "scored_passes"]

# Entered around all runs of a decoder block, given by its index: inside it the block computes as the candidate's.
Install = Callable[[int], contextlib.AbstractContextManager[Any]]


class Fitting(Protocol):
    """Fits a candidate's blocks on passes of its own, on the way through the model."""

    passes: Sequence[CalibrationPass]

    def visit(self, block: OnloadedBlock, passes: Sequence[CalibrationPass]) -> None:
        """Do a block's work in a sweep of two streams.

        :param block: the block
        :param passes: all passes of the sweep, those to fit on at the end
        """
        ...


# The dense model's predictions are kept as the probabilities of its most likely tokens and what remains to all others.
TOP_K = 64


@dataclass(frozen=True)
class ScoredPass:
    """A corrupted pass, and how it counts.

    :param each: the pass
    :param masked: (B, T) bool, positions to predict
    :param weight: 1 / p_mask of its timestep
    """

    each: CalibrationPass
    masked: torch.Tensor
    weight: float

    @property
    def tokens(self) -> int:
        """Tokens of the pass, padding included: what its forward pass costs."""
        return self.masked.numel()

    @property
    def windows_tokens(self) -> int:
        """Real tokens of its windows, each once."""
        return int((self.each.row_weights[:, self.each.context :] > 0).sum())


def scored_passes(
    batches: Sequence[CalibrationBatch],
    grid: Sequence[float],
    corruption: CorruptionSource,
    spec: DiffusionSpec,
    noise_eps: float,
) -> list[ScoredPass]:
    """Noise every batch for every timestep, ordered so that any stretch of passes has windows and timesteps mixed.

    :param batches: clean samples
    :param grid: timesteps t in (0, 1]
    :param corruption: source of the noise
    :param spec: family and mask token
    :param noise_eps: floor of the mask probability
    :return: len(batches) · len(grid) passes; the k-th has batch k mod len(batches)
    :raises UsageError: if no token is masked in any pass
    """
    passes = corrupted_passes(batches, grid, corruption)
    scored = []
    for turn in range(len(grid)):
        for index in range(len(batches)):
            step = (turn + index) % len(grid)
            each = passes[index * len(grid) + step]
            noisy = each.inputs["input_ids"]
            assert noisy is not None
            masked = (noisy == spec.mask_token_id) & (each.row_weights > 0)
            scored.append(ScoredPass(each, masked, 1.0 / mask_probability(grid[step], noise_eps)))
    if not any(bool(one.masked.any()) for one in scored):
        raise UsageError("the noise masks no token of the calibration samples; pass longer samples")
    return scored


def kept_prediction_bytes(tokens: int, grid: Sequence[float], top_k: int = TOP_K) -> int:
    """Bytes of main memory that the dense model's predictions take.

    :param tokens: tokens of all clean samples
    :param grid: timesteps
    :param top_k: tokens kept for each position
    :return: expected number of masked positions × ``top_k`` × (an int32 index and a float32 log-probability)
    """
    return int(tokens * sum(grid)) * 8 * top_k


class PredictionDistance:
    """Measures candidates, block by block and on all passes, so that a block of an offloaded model comes in once.

    The dense model's predictions are computed at the first measurement and kept in main memory. Tokens beyond the most
    likely ``top_k`` count as one, so the value is a lower bound of the divergence (data processing inequality).

    :param model: the dense model; a measurement leaves it as it is
    :param blocks: its decoder blocks
    :param passes: passes of this process, see :func:`scored_passes`
    :param spec: family of the model
    :param top_k: tokens kept for each position
    :param hidden_states: where hidden states wait between blocks, ``memory`` or ``disk``
    """

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: torch.nn.ModuleList,
        passes: Sequence[ScoredPass],
        spec: DiffusionSpec,
        *,
        top_k: int = TOP_K,
        hidden_states: Any = "memory",
    ) -> None:
        self._model = model
        self._passes = passes
        self._spec = spec
        self._top_k = top_k
        # No bar of its own: a search has thousands of sweeps.
        self._engine = PassEngine(model, blocks, hidden_states=hidden_states, progress=False)
        self._dense: dict[int, TopPredictions] = {}

    @property
    def tokens(self) -> int:
        """Tokens of all passes of all processes; what :meth:`measure` can spend on a candidate at most."""
        return sum(distributed.gather_objects(sum(one.tokens for one in self._passes)))

    def measure(self, install: Install, tokens: int | None = None, number: int = 0) -> float:
        """Divergence of a candidate, the same value in every process.

        :param install: block index → context in which the block computes as the candidate's
        :param tokens: forward tokens of all processes to spend, rounded up to whole passes; None takes all passes
        :param number: other numbers take other passes, where not all of them are taken
        :return: nats per token, 0 for the dense model
        :raises UsageError: if logits aren't finite
        """
        chosen = self._choose(tokens, number)
        with distributed.failing_together(), torch.no_grad():
            self._remember(chosen)
            self._sweep(chosen, install)
            parts = self._compare(chosen)
        return _mean(parts)

    def measure_fitted(self, fitting: Fitting, tokens: int | None = None, number: int = 0) -> float:
        """Divergence of a candidate whose blocks are fitted first, the same value in every process.

        :param fitting: fits the blocks, and says on which passes
        :param tokens: see :meth:`measure`
        :param number: the same
        :return: nats per token
        :raises UsageError: if logits aren't finite
        """
        chosen = self._choose(tokens, number)
        with distributed.failing_together(), torch.no_grad():
            self._remember(chosen)
        passes = [*(self._passes[index].each for index in chosen), *fitting.passes]
        with torch.no_grad():
            # Gradients are summed over the processes on the way.
            visit = lambda block: fitting.visit(block, passes)  # noqa: E731
            self._engine.sweep(passes, visit, title="", block_runs=0, two_streams=True)
        with distributed.failing_together(), torch.no_grad():
            parts = self._compare(chosen)
        return _mean(parts)

    def _choose(self, tokens: int | None, number: int) -> list[int]:
        """Indices of a stretch of passes, beginning where that of the number before ended."""
        if tokens is None:
            return list(range(len(self._passes)))
        # Every process takes its share.
        wanted = -(-tokens // distributed.world_size())
        count, found = 0, 0
        while count < len(self._passes) and found < wanted:
            found += self._passes[count].tokens
            count += 1
        begin = number * count
        return sorted((begin + offset) % len(self._passes) for offset in range(count))

    def _remember(self, indices: Sequence[int]) -> None:
        """Compute the dense model's predictions of some passes and keep them, unless they are there."""
        missing = [index for index in indices if index not in self._dense]

        def keep(index: int, logits: torch.Tensor) -> None:
            top = top_predictions(logits, self._top_k)
            # No vocabulary needs 64 bits.
            self._dense[index] = TopPredictions(top.ids.to("cpu", torch.int32), top.log_probabilities.cpu())

        if missing:
            self._sweep(missing, lambda _block: contextlib.nullcontext())
            self._predict(missing, keep)

    def _sweep(self, indices: Sequence[int], install: Install) -> None:
        def visit(block: OnloadedBlock) -> None:
            with install(block.index):
                block.run(advance=True)

        self._engine.sweep([self._passes[index].each for index in indices], visit, title="", block_runs=0)

    def _compare(self, indices: Sequence[int]) -> tuple[float, int]:
        """Weighted sum of the divergences of passes that a sweep began with, and the number of their tokens."""
        losses: list[float] = []

        def compare(index: int, logits: torch.Tensor) -> None:
            dense = self._dense[index]
            kept = TopPredictions(dense.ids.long(), dense.log_probabilities)
            lost = divergence(logits, kept).sum(dtype=torch.float64)
            losses.append(self._passes[index].weight * float(lost))

        self._predict(indices, compare)
        return sum(losses), sum(self._passes[index].windows_tokens for index in indices)

    def _predict(self, indices: Sequence[int], receive: Callable[[int, torch.Tensor], None]) -> None:
        """Hand over the logits (K, V) that predict the masked tokens of each pass that a sweep began with."""
        outputs: list[Any] = []

        @contextlib.contextmanager
        def catch(number: int, _each: CalibrationPass) -> Iterator[None]:
            handle = self._model.register_forward_hook(lambda _module, _args, output: outputs.append(output))
            try:
                yield
            finally:
                handle.remove()
            # One pass's logits at a time: they are the largest activation of the model.
            one = self._passes[indices[number]]
            logits = predictions(outputs.pop().logits, one.masked, self._spec)
            if not bool(logits.isfinite().all()):
                raise UsageError(
                    f"the logits for {one.each.source} hold NaN or Inf; check the checkpoint, or load it with dtype "
                    "float32"
                )
            receive(indices[number], logits)

        self._engine.run_head(catch, title="", count=len(indices))


def _mean(part: tuple[float, int]) -> float:
    parts = distributed.gather_objects(part)
    return sum(lost for lost, _ in parts) / sum(tokens for _, tokens in parts)
