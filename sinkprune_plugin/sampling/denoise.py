"""The plain sampler: LLaDA's semi-autoregressive denoising (arXiv 2502.09992, section 2.4 and appendix B.4) in torch.

It needs nothing but a model, and is the reference for engines. ``none`` is the published algorithm; ``prefix`` and
``dual`` are Fast-dLLM's approximations (arXiv 2505.22618, section 3.2). ``commit`` is for models trained block by
block, where it is exact: "Block Diffusion" (arXiv 2503.09573), algorithm 2.
"""

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from sinkprune_plugin.devices import input_device
from sinkprune_plugin.diffusion import DiffusionSpec, resolve_diffusion
from sinkprune_plugin.diffusion.evaluation_mode import evaluation_mode
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sampling.denoising_batch import DenoisingBatch
from sinkprune_plugin.sampling.edit_options import EDIT_OPTIONS, refuse_edits
from sinkprune_plugin.sampling.family_options import family_options
from sinkprune_plugin.sampling.options import SamplingOptions
from sinkprune_plugin.sampling.prompts import as_prompts, as_seeds, check_prompts

__all__ = ["DenoiseOutput", "denoise"]


@dataclass
class DenoiseOutput:
    """What was generated.

    :param sequences: for each prompt the generated tokens, (n,) int64, up to the end-of-sequence token if one came
    :param forwards: forward passes of the model
    :param trajectory: for each prompt the canvas after each of its steps, (steps, G) int64; empty unless asked for
    """

    sequences: list[torch.Tensor]
    forwards: int = 0
    trajectory: list[torch.Tensor] = field(default_factory=list)


def denoise(
    model: Any,
    input_ids: torch.Tensor | Sequence[torch.Tensor],
    *,
    gen_length: int,
    block_length: int | None = None,
    steps: int | None = None,
    cache: str | None = None,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    threshold: float | None = None,
    factor: float | None = None,
    early_stop: bool = False,
    cfg_scale: float = 0.0,
    seed: int | Sequence[int] = 0,
    top_k: int = 0,
    top_p: float = 1.0,
    spec: DiffusionSpec | None = None,
    eos_token_ids: Collection[int] | None = None,
    progress: bool = False,
    return_trajectory: bool = False,
    **edits: Any,
) -> DenoiseOutput:
    """Generate by denoising a canvas of masks after each prompt, block by block.

    Prompts of one length share forward passes; the result of each is that of a separate call, up to the rounding of
    batched matrix products. Noise depends on the prompt's seed, the step and the position only.

    :param model: a diffusion LM as transformers class; it is run in evaluation mode
    :param input_ids: one prompt (P,), prompts of one length (B, P), or a list of prompts; int64
    :param gen_length: tokens of the canvas, G
    :param block_length: tokens in a block; default 32, or the model's own; the last block may be shorter
    :param steps: denoising steps of the whole generation; default one for each token
    :param cache: ``none``, ``prefix``, ``dual`` or ``commit``; default ``none``. A model that denoises block by block
        has ``commit`` only
    :param temperature: of the Gumbel noise; 0 is greedy
    :param remasking: ``low_confidence``, ``random``, ``margin`` or ``entropy``
    :param threshold: unmask all positions with higher confidence than this instead of a fixed number; ``steps`` then
        has no effect
    :param factor: unmask as many as Fast-dLLM's factor strategy allows instead of a fixed number, see
        :func:`~sinkprune_plugin.sampling.select.select_unmask`; ``steps`` then has no effect
    :param early_stop: end a block as soon as an end-of-sequence token and all before it are unmasked, which saves steps
        and doesn't change the result; needs ``eos_token_ids``
    :param cfg_scale: of classifier-free guidance; logits are u + (scale + 1) (c - u), u those without the prompt
    :param seed: one for all prompts, or one for each
    :param top_k: sample among the most likely only; 0 for all
    :param top_p: sample within this probability only; 1 for all
    :param spec: family and mask token; default what the model's configuration says
    :param eos_token_ids: a prompt is done after the block with one of these; default none
    :param progress: show a progress bar on a terminal
    :param return_trajectory: keep the canvas after each step
    :param edits: options of other samplers that edit unmasked tokens (LLaDA2.1), which must be None: see
        :mod:`~sinkprune_plugin.sampling.edit_options`
    :return: the generated tokens, on the model's device
    :raises UsageError: on wrong options, on a prompt that is empty, too long or holds the mask token, and if the model
        is of no known family, can't be run with the cache asked for, or gives logits that aren't finite
    """
    refuse_edits(edits)
    if unknown := set(edits).difference(EDIT_OPTIONS):
        raise TypeError(f"denoise() got an unexpected keyword argument {min(unknown)!r}")
    spec = resolve_diffusion(model.config) if spec is None else spec
    prompts = as_prompts(input_ids)
    ruled = family_options(spec, {"block_length": block_length, "cache": cache, "cfg_scale": cfg_scale}, gen_length)
    options = SamplingOptions.resolve(
        gen_length=gen_length,
        **ruled,
        steps=steps,
        temperature=temperature,
        remasking=remasking,
        threshold=threshold,
        factor=factor,
        early_stop=early_stop,
        top_k=top_k,
        top_p=top_p,
    )
    seeds = as_seeds(seed, len(prompts))
    for one in seeds:
        SamplingOptions.resolve(gen_length=gen_length, seed=one)
    check_prompts(prompts, gen_length, spec, model.config)
    if options.cache != "none" and "position_ids" not in inspect.signature(model.forward).parameters:
        raise UsageError(
            f"{type(model).__name__} takes no position_ids, which cache {options.cache} needs; use cache none"
        )

    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(number)
    output = DenoiseOutput([torch.empty(0)] * len(prompts))
    if return_trajectory:
        output.trajectory = [torch.empty(0)] * len(prompts)
    device = input_device(model)
    total = sum(len(options.after_prompt(length, spec).blocks) for length in groups)
    with (
        evaluation_mode(model),
        tqdm(total=total, desc="denoising", unit="block", disable=None if progress else True) as bar,
    ):
        for length, numbers in groups.items():
            own = options.after_prompt(length, spec)
            batch = DenoisingBatch(
                model,
                torch.stack([prompts[number].to(device) for number in numbers]),
                torch.tensor([seeds[number] for number in numbers], dtype=torch.int64, device=device),
                own,
                spec,
                frozenset(eos_token_ids or ()),
                keep_trajectory=return_trajectory,
            )
            for block in range(len(own.blocks)):
                batch.denoise_block(block)
                bar.update()
            output.forwards += batch.forwards
            for row, number in enumerate(numbers):
                output.sequences[number] = batch.sequence(row)
                if return_trajectory:
                    output.trajectory[number] = torch.stack(batch.trajectories[row])
    return output
