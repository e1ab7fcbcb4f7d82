"""The forward process: clean tokens become mask tokens, reproducibly and without touching the global random state."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sinkprune_plugin.diffusion.families import DiffusionSpec
from sinkprune_plugin.errors import UsageError

__all__ = ["Corruption", "corrupt", "corruptible_positions", "mask_probability", "sample_generator"]


@dataclass
class Corruption:
    """Outcome of one pass of the forward process.

    :param noisy_ids: (B, T) int64, the corrupted sequences
    :param corrupted: (B, T) bool, True where a token was replaced
    :param p_mask: (B,) float32, the probability with which each corruptible token of the row was replaced
    """

    noisy_ids: torch.Tensor
    corrupted: torch.Tensor
    p_mask: torch.Tensor


def mask_probability(timestep: float, noise_eps: float) -> float:
    """Probability that a token is replaced at timestep t: (1 - eps) t + eps.

    Source: "Large Language Diffusion Models" (arXiv 2502.09992), section 2.1; eps as in its published code.

    :param timestep: t in (0, 1]
    :param noise_eps: eps in [0, 1), keeps the probability away from zero
    :return: probability in (0, 1]
    :raises UsageError: if an argument is out of range
    """
    if not 0 < timestep <= 1:
        raise UsageError(f"timestep is {timestep}; it must be in (0, 1]")
    if not 0 <= noise_eps < 1:
        raise UsageError(f"noise_eps is {noise_eps}; it must be in [0, 1)")
    return (1 - noise_eps) * timestep + noise_eps


def sample_generator(seed: int, timestep_index: int, token_ids: torch.Tensor) -> torch.Generator:
    """A random generator that belongs to one sample at one timestep.

    The noise of a sample is derived from the sample itself, so that it doesn't depend on the batch size, on the order
    of the samples or on how they are split over processes. Two equal samples get equal noise.

    :param seed: seed of the run
    :param timestep_index: index of the timestep on its grid
    :param token_ids: (T,) integer ids of the sample, without padding
    :return: generator on CPU
    """
    digest = hashlib.blake2b(digest_size=8, person=b"sinkprune")
    digest.update(f"{seed}:{timestep_index}:".encode())
    # A fixed width and byte order: the same ids give the same noise, whatever their dtype and the machine.
    digest.update(token_ids.detach().cpu().to(torch.int64).numpy().astype("<i8").tobytes())
    generator = torch.Generator(device="cpu")
    # manual_seed takes 64 bits signed or unsigned; 63 bits avoid the sign.
    generator.manual_seed(int.from_bytes(digest.digest(), "little") >> 1)
    return generator


def corruptible_positions(
    input_ids: torch.Tensor, spec: DiffusionSpec, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Positions that the forward process may replace: real tokens, minus the ones that the family keeps.

    :param input_ids: (B, T) token ids
    :param spec: the model's diffusion spec
    :param attention_mask: (B, T), nonzero on real tokens; None means that all are real
    :return: (B, T) bool on the device of ``input_ids``
    :raises UsageError: if the shapes don't agree
    """
    real = _real_tokens(input_ids, attention_mask)
    positions = real.clone()
    # The n-th real token of a row, counted from the left and from the right, whichever side the padding is on.
    if spec.keep_first:
        positions &= real.cumsum(dim=1) != 1
    if spec.keep_last:
        positions &= real.flip(1).cumsum(dim=1).flip(1) != 1
    return positions


def corrupt(
    input_ids: torch.Tensor,
    timestep: float | Sequence[float],
    spec: DiffusionSpec,
    *,
    noise_eps: float,
    generators: Sequence[torch.Generator],
    attention_mask: torch.Tensor | None = None,
) -> Corruption:
    """Replace each corruptible token by the mask token, independently, with probability :func:`mask_probability`.

    Padding is never corrupted, nor are the tokens that the family keeps. A row draws one number for each of its
    real tokens, so padding doesn't change its noise.

    :param input_ids: (B, T) integer token ids
    :param timestep: t in (0, 1], one for all rows or one per row
    :param spec: the model's diffusion spec
    :param noise_eps: floor of the mask probability
    :param generators: one CPU generator per row, see :func:`sample_generator`
    :param attention_mask: (B, T), nonzero on real tokens; None means that all are real
    :return: corrupted sequences, on the device of ``input_ids``
    :raises UsageError: if shapes or numbers don't fit
    """
    if input_ids.dim() != 2:
        raise UsageError(f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, tokens)")
    batch_size, length = input_ids.shape
    if len(generators) != batch_size:
        raise UsageError(f"{len(generators)} generators for a batch of {batch_size}; pass one for each row")
    timesteps = [timestep] * batch_size if isinstance(timestep, int | float) else [float(t) for t in timestep]
    if len(timesteps) != batch_size:
        raise UsageError(f"{len(timesteps)} timesteps for a batch of {batch_size}; pass one, or one for each row")
    allowed = corruptible_positions(input_ids, spec, attention_mask)
    real = _real_tokens(input_ids, attention_mask).cpu()
    # Not a probability: 1 is never below p, so padding stays.
    draws = torch.ones(batch_size, length)
    for row, generator in enumerate(generators):
        # On CPU for every device, so that the noise is the same everywhere.
        draws[row, real[row]] = torch.rand(int(real[row].sum()), generator=generator)
    p_mask = torch.tensor([mask_probability(t, noise_eps) for t in timesteps], dtype=torch.float32)
    corrupted = (draws < p_mask[:, None]).to(input_ids.device) & allowed
    noisy_ids = input_ids.to(torch.int64).masked_fill(corrupted, spec.mask_token_id)
    return Corruption(noisy_ids, corrupted, p_mask.to(input_ids.device))


def _real_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise UsageError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}; "
            "they must be equal"
        )
    return attention_mask.to(input_ids.device).bool()
