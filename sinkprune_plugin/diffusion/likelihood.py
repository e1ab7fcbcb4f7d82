"""How well a diffusion LM predicts text: Monte-Carlo ELBO perplexity and masked-token perplexity.

The negative ELBO of a window x of T tokens ("Large Language Diffusion Models", arXiv 2502.09992, equations 3 and 4) is

    E_t E_{x_t | x, t} [ Σ_{i corrupted} -log p(x_i | x_t) / p_mask(t) ],    t uniform in (0, 1]

and the perplexity is the exponential of its mean over tokens. t is stratified within each window, so that few samples
cover all noise levels; the estimate stays unbiased.

Of a model that denoises block by block it is the sum over blocks of the same expression, each given the clean blocks
before it ("Block Diffusion", arXiv 2503.09573, equation 8). All blocks of a window share t: by linearity the
expectation is the same as with one for each.
"""

from typing import TypedDict, Unpack

import torch
from tqdm import tqdm

from sinkprune_plugin.devices import input_device
from sinkprune_plugin.diffusion.corruption import corrupt, corruptible_positions, sample_generator
from sinkprune_plugin.diffusion.estimates import Likelihood, PerplexityEstimate, RowScores, estimate_likelihood
from sinkprune_plugin.diffusion.evaluation_mode import evaluation_mode
from sinkprune_plugin.diffusion.families import DiffusionSpec, resolve_diffusion
from sinkprune_plugin.diffusion.noisy_inputs import check_block_window, noisy_inputs, predict_noisy
from sinkprune_plugin.diffusion.training_loss import negative_log_likelihood, predictions
from sinkprune_plugin.errors import UsageError

__all__ = [
    "LikelihoodOptions",
    "elbo_perplexity",
    "masked_token_perplexity",
    "measure_likelihood",
    "perplexity_on",
    "score_windows",
]


class LikelihoodOptions(TypedDict, total=False):
    """Options of :func:`measure_likelihood`, which documents them and has the same defaults."""

    num_samples: int
    seed: int
    noise_eps: float
    batch_size: int
    attention_mask: torch.Tensor | None
    control_variate: bool
    progress: bool


def measure_likelihood(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    spec: DiffusionSpec | None = None,
    *,
    num_samples: int = 8,
    seed: int = 0,
    noise_eps: float = 1e-3,
    batch_size: int = 8,
    attention_mask: torch.Tensor | None = None,
    control_variate: bool = True,
    progress: bool = False,
) -> Likelihood:
    """Estimate ELBO and masked-token perplexity with fresh noise.

    Tokens that the family never corrupts (Dream's first and last) are conditioned on and not counted.

    :param model: called as ``model(input_ids=…)``, with an ``attention_mask`` where there is padding; returns an object
        with ``logits`` (B, T, V). One that denoises block by block: see :func:`predict_noisy`
    :param input_ids: (N, T) clean windows
    :param spec: the model's diffusion spec; None resolves it from ``model.config``
    :param num_samples: noise samples for each window, t stratified over them
    :param seed: seed of the noise, which depends on seed and window alone
    :param noise_eps: floor of the mask probability
    :param batch_size: corrupted windows in a forward pass
    :param attention_mask: (N, T), nonzero on real tokens; None means that all are real
    :param control_variate: reduce the variance of the ELBO estimate, see :func:`estimate_likelihood`; False gives the
        plain sum of losses over mask probabilities
    :param progress: show a progress bar
    :return: both estimates
    :raises UsageError: if there is nothing to predict or the model's logits aren't finite
    """
    scores = score_windows(
        model,
        input_ids,
        spec,
        num_samples=num_samples,
        seed=seed,
        noise_eps=noise_eps,
        batch_size=batch_size,
        attention_mask=attention_mask,
        progress=progress,
    )
    return estimate_likelihood(scores, control_variate=control_variate)


def score_windows(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    spec: DiffusionSpec | None = None,
    *,
    num_samples: int = 8,
    seed: int = 0,
    noise_eps: float = 1e-3,
    batch_size: int = 8,
    attention_mask: torch.Tensor | None = None,
    progress: bool = False,
) -> RowScores:
    """Losses window by window, for comparisons in pairs: the noise depends on seed and window, not on the model.

    :param model: this and the other parameters: see :func:`measure_likelihood`
    :param input_ids: (N, T) clean windows
    :param spec: the model's diffusion spec
    :param num_samples: noise samples for each window, t stratified over them
    :param seed: seed of the noise
    :param noise_eps: floor of the mask probability
    :param batch_size: corrupted windows in a forward pass
    :param attention_mask: (N, T), nonzero on real tokens
    :param progress: show a progress bar
    :return: losses of N windows with ``num_samples`` noise samples each
    :raises UsageError: if there is nothing to predict or the model's logits aren't finite
    """
    spec = spec if spec is not None else resolve_diffusion(getattr(model, "config", None))
    if input_ids.dim() != 2 or input_ids.shape[0] == 0:
        raise UsageError(f"input_ids has shape {tuple(input_ids.shape)}; it must be (windows, tokens), not empty")
    check_block_window(input_ids.shape[1], spec)
    if num_samples < 1:
        raise UsageError(f"num_samples is {num_samples}; it must be at least 1")
    clean = input_ids.to(device="cpu", dtype=torch.int64)
    valid = None if attention_mask is None else attention_mask.to("cpu").bool()
    windows = clean.repeat_interleave(num_samples, dim=0)
    window_valid = None if valid is None else valid.repeat_interleave(num_samples, dim=0)
    timesteps: list[float] = []
    generators: list[torch.Generator] = []
    for index, window in enumerate(clean):
        tokens = window if valid is None else window[valid[index]]
        timesteps += _stratified_timesteps(num_samples, sample_generator(seed, num_samples, tokens))
        generators += [sample_generator(seed, sample, tokens) for sample in range(num_samples)]
    noise = corrupt(windows, timesteps, spec, noise_eps=noise_eps, generators=generators, attention_mask=window_valid)
    nll = _corrupted_nll(
        model, windows, noise.noisy_ids, noise.corrupted, spec, batch_size, window_valid, progress=progress
    )
    return RowScores(
        nll=nll.reshape(-1, num_samples),
        corrupted=noise.corrupted.sum(dim=1).double().reshape(-1, num_samples),
        p_mask=noise.p_mask.double().reshape(-1, num_samples),
        tokens=corruptible_positions(clean, spec, valid).sum(dim=1).double(),
    )


def elbo_perplexity(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    spec: DiffusionSpec | None = None,
    **options: Unpack[LikelihoodOptions],
) -> PerplexityEstimate:
    """Estimate the ELBO perplexity.

    :param model: see :func:`measure_likelihood`, also for the others
    :param input_ids: (N, T) clean windows
    :param spec: the model's diffusion spec; None resolves it from ``model.config``
    :param options: see :class:`LikelihoodOptions`
    :return: the estimate
    """
    return measure_likelihood(model, input_ids, spec, **options).elbo


def masked_token_perplexity(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    spec: DiffusionSpec | None = None,
    **options: Unpack[LikelihoodOptions],
) -> PerplexityEstimate:
    """Estimate the perplexity of corrupted tokens given the others, over all noise levels alike.

    :param model: see :func:`measure_likelihood`, also for the others
    :param input_ids: (N, T) clean windows
    :param spec: the model's diffusion spec; None resolves it from ``model.config``
    :param options: see :class:`LikelihoodOptions`
    :return: the estimate; its tokens are the corrupted ones
    """
    return measure_likelihood(model, input_ids, spec, **options).masked_token


def perplexity_on(
    model: torch.nn.Module,
    clean_ids: torch.Tensor,
    noisy_ids: torch.Tensor,
    p_mask: torch.Tensor,
    spec: DiffusionSpec | None = None,
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> tuple[float, float]:
    """Both perplexities on recorded corruption, for comparisons without sampling noise.

    :param model: see :func:`measure_likelihood`
    :param clean_ids: (N, T) clean windows
    :param noisy_ids: (N, R, T) R corrupted versions of each window
    :param p_mask: (N, R) mask probability of each version
    :param spec: the model's diffusion spec; None resolves it from ``model.config``
    :param batch_size: corrupted windows in a forward pass
    :param progress: show a progress bar
    :return: ELBO perplexity, masked-token perplexity
    :raises UsageError: if the shapes don't agree or the model's logits aren't finite
    """
    spec = spec if spec is not None else resolve_diffusion(getattr(model, "config", None))
    if noisy_ids.dim() != 3 or clean_ids.shape != noisy_ids[:, 0].shape or p_mask.shape != noisy_ids.shape[:2]:
        raise UsageError(
            f"clean_ids {tuple(clean_ids.shape)}, noisy_ids {tuple(noisy_ids.shape)} and p_mask {tuple(p_mask.shape)} "
            "don't fit together; they must be (N, T), (N, R, T) and (N, R)"
        )
    repeats = noisy_ids.shape[1]
    clean = clean_ids.to(device="cpu", dtype=torch.int64)
    windows = clean.repeat_interleave(repeats, dim=0)
    noisy = noisy_ids.to(device="cpu", dtype=torch.int64).flatten(0, 1)
    corrupted = noisy != windows
    nll = _corrupted_nll(model, windows, noisy, corrupted, spec, batch_size, None, progress=progress)
    scores = RowScores(
        nll=nll.reshape(-1, repeats),
        corrupted=corrupted.sum(dim=1).double().reshape(-1, repeats),
        p_mask=p_mask.to("cpu").double(),
        tokens=corruptible_positions(clean, spec).sum(dim=1).double(),
    )
    result = estimate_likelihood(scores, control_variate=False)
    return result.elbo.perplexity, result.masked_token.perplexity


def _stratified_timesteps(num_samples: int, generator: torch.Generator) -> list[float]:
    # One uniform offset u per window: t_k = 1 - (k + u) / K has one point in each of K equal strata of (0, 1].
    offset = torch.rand((), generator=generator, dtype=torch.float64).item()
    return [1 - (k + offset) / num_samples for k in range(num_samples)]


def _corrupted_nll(
    model: torch.nn.Module,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    corrupted: torch.Tensor,
    spec: DiffusionSpec,
    batch_size: int,
    valid: torch.Tensor | None,
    *,
    progress: bool,
) -> torch.Tensor:
    """Sum of -log p over the corrupted tokens of each row, (rows,) float64 on CPU."""
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1")
    device = input_device(model)
    sums = torch.zeros(clean.shape[0], dtype=torch.float64)
    starts = range(0, clean.shape[0], batch_size)
    with evaluation_mode(model):
        for start in tqdm(starts, desc="perplexity", unit="batch", disable=None if progress else True):
            rows = slice(start, start + batch_size)
            inputs = noisy_inputs(noisy[rows], clean[rows], spec, None if valid is None else valid[rows])
            chosen = predictions(predict_noisy(model, inputs, device), corrupted[rows], spec)
            nll = negative_log_likelihood(chosen, clean[rows][corrupted[rows]]).cpu().double()
            if not bool(nll.isfinite().all()):
                raise UsageError(
                    f"the logits of {type(model).__name__} hold NaN or Inf in batch {start // batch_size}; "
                    "check the weights, or evaluate in float32"
                )
            sums.index_add_(0, corrupted[rows].nonzero()[:, 0] + start, nll)
    return sums
