"""Running a model to see its sinks: a diffusion LM over denoising timesteps, any other over growing prefixes."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
from tqdm import tqdm

from sinkprune_plugin.devices import input_device
from sinkprune_plugin.diffusion import (
    DiffusionSpec,
    check_block_window,
    corrupt,
    find_family,
    resolve_diffusion,
    sample_generator,
    timestep_grid,
)
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sinks.attention_interface import intercept_attention_interface
from sinkprune_plugin.sinks.attention_mass import capture_attention_mass
from sinkprune_plugin.sinks.detection import soft_sink_mask
from sinkprune_plugin.text_windows import MINIMUM_TOKENS

__all__ = ["SinkObservation", "SinkSettings", "find_spec", "observe_sinks"]


# Tokens in one forward pass: enough to keep a processor busy, little enough for a large model's activations.
_TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class SinkSettings:
    """What a measurement of sinks depends on, in addition to model and text.

    :param diffusion_steps: S, steps of the grid
    :param sample_interval: every k-th step is visited
    :param noise_eps: floor of the mask probability
    :param sink_std: standard deviations above the mean at which a position is a sink
    :param sink_alpha: steepness of the soft mask, per unit of attention mass
    :param sink_persistence: a sink at this share of the steps or more counts as stable
    :param seed: seed of the corruption
    """

    diffusion_steps: int = 50
    sample_interval: int = 5
    noise_eps: float = 1e-3
    sink_std: float = 2.0
    sink_alpha: float = 5.0
    sink_persistence: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class SinkObservation:
    """Attention mass and sinks of N text windows at S steps.

    :param axis: what a step is: ``timestep``, a corruption level of a diffusion LM, or ``prefix``, a share of the
        window for a model that isn't a known diffusion LM
    :param steps: (S,) timesteps, or shares of the window, ascending in (0, 1]
    :param lengths: (S,) tokens that the model saw: T for timesteps, the prefix's length otherwise
    :param mass: (N, S, T) float32 on CPU, 0 beyond a prefix
    :param masks: (N, S, T) float32 on CPU, soft sink masks, 0 beyond a prefix
    """

    axis: Literal["timestep", "prefix"]
    steps: tuple[float, ...]
    lengths: tuple[int, ...]
    mass: torch.Tensor
    masks: torch.Tensor

    @property
    def present(self) -> torch.Tensor:
        """(S, T) bool: steps at which a position exists."""
        return torch.arange(self.mass.shape[2]) < torch.tensor(self.lengths)[:, None]


def find_spec(config: Any, tokenizer: Any = None) -> DiffusionSpec | None:
    """Tell a diffusion LM from any other model.

    :param config: the model's configuration
    :param tokenizer: its tokenizer, for the mask token
    :return: the diffusion spec; None if the ``model_type`` belongs to no known family
    :raises UsageError: if it is a diffusion LM but its mask token is missing
    """
    return None if find_family(config) is None else resolve_diffusion(config, tokenizer)


def observe_sinks(
    model: Any,
    windows: torch.Tensor,
    spec: DiffusionSpec | None,
    settings: SinkSettings | None = None,
    *,
    batch_size: int | None = None,
) -> SinkObservation:
    """Run a model on text windows at every step and gather where attention goes.

    A diffusion LM sees each window corrupted to the timesteps of its grid; one that denoises block by block sees its
    last block corrupted, after the clean rest, and its mass is relative to that of uniform attention. An autoregressive
    model knows no timesteps: what grows there step by step is the context, so it sees the first t · T tokens of each
    window. In all cases the question is whether the sinks stay where they are while generation goes on. Note that in a
    causal model more queries see an early position, which alone gives it more mass.

    :param model: transformers model
    :param windows: (N, T) int64 token ids without padding
    :param spec: family and mask token of a diffusion LM; None for growing prefixes
    :param settings: grid, detection and seed
    :param batch_size: windows in a forward pass; None takes as many as have 2048 tokens
    :return: masses and masks
    :raises UsageError: if windows don't fit, the attention can't be intercepted, or the mass isn't finite
    """
    settings = settings or SinkSettings()
    _check_windows(model, windows)
    if spec is not None:
        check_block_window(windows.shape[1], spec)
    count, tokens = windows.shape
    steps = timestep_grid(settings.diffusion_steps, settings.sample_interval)
    lengths = [tokens] * len(steps) if spec else [min(max(ceil(t * tokens), MINIMUM_TOKENS), tokens) for t in steps]
    mass = torch.zeros(count, len(steps), tokens)
    masks = torch.zeros_like(mass)
    rows = batch_size or max(_TOKENS_PER_PASS // tokens, 1)
    passes = [(start, index) for start in range(0, count, rows) for index in range(len(steps))]
    # Interception of transformers' other implementations costs nothing where the model uses SDPA.
    with _observing(model) as forward, intercept_attention_interface():
        for start, index in tqdm(passes, desc="looking for sinks", unit="pass", delay=2, disable=None):
            batch = windows[start : start + rows, : lengths[index]]
            if spec is not None:
                generators = [sample_generator(settings.seed, index, row) for row in batch]
                corruption = corrupt(batch, steps[index], spec, noise_eps=settings.noise_eps, generators=generators)
                clean = 0 if spec.block_length is None else tokens - spec.block_length
                batch = torch.cat([batch[:, :clean], corruption.noisy_ids[:, clean:]], dim=1)
            with capture_attention_mass(relative=spec is not None) as capture:
                forward(batch)
            if not bool(torch.isfinite(capture.mass).all()):
                raise UsageError(
                    f"the attention mass of windows {start} to {start + len(batch) - 1} at step {steps[index]:g} is "
                    "not finite; check the checkpoint, or load it with dtype float32"
                )
            found = soft_sink_mask(capture.mass, settings.sink_std, settings.sink_alpha)
            mass[start : start + rows, index, : lengths[index]] = capture.mass.cpu()
            masks[start : start + rows, index, : lengths[index]] = found.cpu()
    return SinkObservation("timestep" if spec else "prefix", steps, tuple(lengths), mass, masks)


@contextmanager
def _observing(model: Any) -> Iterator[Any]:
    """A forward function without gradients, dropout, cache and, where it can be left out, vocabulary projection."""
    # The decoder alone: the logits of a large vocabulary would take more memory than everything else.
    decoder = getattr(model, "base_model", model)
    options = {"use_cache": False} if "use_cache" in inspect.signature(decoder.forward).parameters else {}
    device = input_device(model)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield lambda batch: decoder(input_ids=batch.to(device), **options)
    finally:
        model.train(training)


def _check_windows(model: Any, windows: torch.Tensor) -> None:
    if windows.dim() != 2 or windows.shape[0] == 0:
        raise UsageError(f"windows have shape {tuple(windows.shape)}; they must be (windows, tokens), at least one")
    if windows.shape[1] < MINIMUM_TOKENS:
        raise UsageError(f"windows have {windows.shape[1]} tokens; at least {MINIMUM_TOKENS} are needed")
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embeddings, "num_embeddings", None)
    if rows is not None and not (int(windows.min()) >= 0 and int(windows.max()) < rows):
        raise UsageError(
            f"windows have token ids from {int(windows.min())} to {int(windows.max())} and the model {rows} "
            "embeddings; use the model's own tokenizer"
        )
