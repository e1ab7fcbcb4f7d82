"""A batch of prompts of one length in the plain sampler."""

from typing import Any

import torch

from sinkprune_plugin.diffusion import DiffusionSpec
from sinkprune_plugin.diffusion.noisy_inputs import keeps_logits
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.block_attention import context_mask
from sinkprune_plugin.sampling.guidance import guided_logits
from sinkprune_plugin.sampling.kv_cache import KeyValueCache
from sinkprune_plugin.sampling.options import REMASKINGS, SamplingOptions
from sinkprune_plugin.sampling.select import select_unmask
from sinkprune_plugin.sampling.tokens import Needs, propose

__all__ = ["DenoisingBatch"]


class DenoisingBatch:
    """Prompts, their canvases, and what is kept between forward passes.

    :param model: a diffusion LM
    :param prompts: (B, P) int64
    :param seeds: (B,) int64
    :param options: of all prompts; its seed is ignored
    :param spec: the model's diffusion spec
    :param eos: end-of-sequence tokens, which end a row after the block they are in
    :param keep_trajectory: whether to fill :attr:`trajectories`
    """

    def __init__(
        self,
        model: Any,
        prompts: torch.Tensor,
        seeds: torch.Tensor,
        options: SamplingOptions,
        spec: DiffusionSpec,
        eos: frozenset[int],
        *,
        keep_trajectory: bool = False,
    ) -> None:
        self._model, self._options, self._spec = model, options, spec
        self._keeps_logits = keeps_logits(model)
        self._eos = torch.tensor(sorted(eos), dtype=torch.int64, device=prompts.device)
        self._prompt_length = prompts.shape[1]
        canvas = prompts.new_full((len(prompts), options.gen_length), spec.mask_token_id)
        self._tokens = torch.cat([prompts, canvas], dim=1)
        self._seeds = seeds
        # Rows that continue; the others have had their end-of-sequence token.
        self._active = torch.arange(len(prompts), device=prompts.device)
        self._cache = KeyValueCache(self._tokens.shape[1])
        self._keep_trajectory = keep_trajectory
        self.forwards = 0
        self.trajectories: list[list[torch.Tensor]] = [[] for _ in prompts]
        # With shifted logits: those that predict the first position of the open block, where a query doesn't hold them.
        self._before: torch.Tensor | None = None
        if options.cache == "commit" and self._prompt_length > options.offset:
            # The rest of the prompt is in the first block, which isn't final.
            self._commit(0, self._prompt_length - options.offset)

    def denoise_block(self, number: int) -> None:
        """Denoise one block of all rows that continue; blocks must come in order.

        :param number: of the block
        :raises UsageError: if the model's logits aren't finite
        """
        options = self._options
        first, last = options.blocks[number]
        begin, end = self._prompt_length + first, self._prompt_length + last
        counts = options.tokens_per_step(number)
        # Each step unmasks at least one token of each row that has masks.
        for step in range(end - begin):
            if options.early_stop:
                self._stop_early(begin, end)
            block = self._tokens[self._active, begin:end]
            masked = block == self._spec.mask_token_id
            if not bool(masked.any()):
                break
            logits = self._logits(begin, end, refresh=step == 0)
            count = counts[min(step, len(counts) - 1)]
            # The noise's step must not depend on how many steps earlier blocks took.
            chosen, proposed = self._choose(logits, masked, count, first + step, begin)
            self._tokens[self._active, begin:end] = torch.where(chosen, proposed, block)
            if self._keep_trajectory:
                for row in self._active[masked.any(dim=1)].tolist():
                    self.trajectories[row].append(self._tokens[row, self._prompt_length :].clone())
        # Before the commit, which rebuilds what is kept of the rows that continue.
        self._retire(begin, end)
        if options.cache == "commit" and last < options.gen_length and len(self._active):
            self._commit(begin - (options.offset if first == 0 else 0), end)

    def sequence(self, row: int) -> torch.Tensor:
        """What was generated.

        :param row: of the batch
        :return: (n,) int64, cut after the first end-of-sequence token
        """
        tokens = self._tokens[row, self._prompt_length :]
        ends = torch.isin(tokens, self._eos).nonzero()
        return tokens[: int(ends[0]) + 1 if len(ends) else None].clone()

    def _choose(
        self, logits: torch.Tensor, masked: torch.Tensor, count: int, step: int, begin: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which positions are unmasked, and what each would become, both (rows, width)."""
        options, (rows, width), device = self._options, masked.shape, logits.device
        remasking = REMASKINGS.index(options.remasking)

        def each(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((rows * width,), value, dtype=dtype, device=device)

        proposed, confidence = propose(
            logits.flatten(0, 1),
            temperature=each(options.temperature, torch.float64),
            top_k=each(options.top_k, torch.int64),
            top_p=each(options.top_p, torch.float64),
            remasking=each(remasking, torch.int64),
            seed=self._seeds[self._active].repeat_interleave(width),
            step=each(step, torch.int64),
            position=torch.arange(begin, begin + width, device=device).repeat(rows),
            mask_token_id=self._spec.mask_token_id,
            needs=Needs(options.temperature > 0, options.top_k > 0 or options.top_p < 1, (remasking,)),
        )
        # The largest is NaN where any is; -inf alone is how a model excludes a token.
        if not bool(logits.amax(dim=-1).isfinite().all()):
            raise UsageError(
                f"the logits of {type(self._model).__name__} hold NaN or Inf; check the weights, or run in float32"
            )
        threshold = torch.inf if options.threshold is None else options.threshold
        chosen = select_unmask(
            confidence.view(rows, width).masked_fill(~masked, -torch.inf),
            torch.full((rows,), count, device=device),
            torch.full((rows,), threshold, dtype=torch.float64, device=device),
            torch.full((rows,), options.factor or 0.0, dtype=torch.float64, device=device),
        )
        return chosen, proposed.view(rows, width)

    def _logits(self, begin: int, end: int, *, refresh: bool) -> torch.Tensor:
        """Logits that predict the block's positions, (rows, width, V)."""
        shift, cache, length = self._spec.logit_shift, self._options.cache, self._tokens.shape[1]
        if cache == "none" or (cache != "commit" and refresh):
            # The first of them is the one before the block's first position, where logits are shifted.
            logits = self._kept(0, length, begin - shift, end - shift)
            self._keep_before(logits[:, :1])
            return logits
        if cache == "prefix":
            logits = self._kept(begin, length, begin, end)
        else:
            # The first block may begin within the prompt.
            known = self._options.offset if begin == self._prompt_length else 0
            logits = self._forward(begin - known, end, visible=length if cache == "dual" else end)[:, known:]
        if self._before is None:
            return logits
        return torch.cat([self._before, logits[:, :-1]], dim=1)

    def _kept(self, begin: int, end: int, first: int, last: int) -> torch.Tensor:
        """Logits of some positions of a forward pass, ``first`` to ``last``; those of all are the largest tensor."""
        if self._keeps_logits and not self._options.cfg_scale:
            positions = torch.arange(first - begin, last - begin, device=self._tokens.device)
            return self._forward(begin, end, logits_to_keep=positions)
        return self._guided(self._forward(begin, end))[:, first - begin : last - begin]

    def _commit(self, begin: int, end: int) -> None:
        """Keep keys and values of final tokens, which see each other as the model's context does."""
        spec = self._spec
        if spec.block_length is None:
            self._keep_before(self._forward(begin, end)[:, -1:])
            return
        mask = context_mask(end - begin, self._options.block_length, spec.context, first=begin)[None, None]
        # Those of a long prompt would be the largest tensor of all.
        last = {"logits_to_keep": 1} if self._keeps_logits else {}
        logits = self._forward(begin, end, attention_mask=mask.to(self._tokens.device), **last)
        self._keep_before(logits[:, -1:])

    def _keep_before(self, logits: torch.Tensor) -> None:
        if self._spec.logit_shift:
            # A view would hold the logits of all positions.
            self._before = logits.clone()

    def _forward(self, begin: int, end: int, visible: int | None = None, **arguments: Any) -> torch.Tensor:
        self.forwards += 1
        tokens = self._tokens[self._active, begin:end]
        if self._options.cache == "none":
            return torch.as_tensor(self._model(input_ids=tokens, **arguments).logits)
        positions = torch.arange(begin, end, device=tokens.device)[None]
        with self._cache.computing(begin, end, visible=visible):
            return torch.as_tensor(self._model(input_ids=tokens, position_ids=positions, **arguments).logits)

    def _guided(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._options.cfg_scale:
            return logits
        self.forwards += 1
        tokens, mask = self._tokens[self._active], self._spec.mask_token_id
        return guided_logits(self._model, tokens, logits, self._prompt_length, mask, self._options.cfg_scale)

    def _stop_early(self, begin: int, end: int) -> None:
        """Retire rows whose text has ended: what comes after their first end-of-sequence token is cut off."""
        block = self._tokens[self._active, begin:end]
        place = torch.arange(end - begin, device=block.device)
        first_end = torch.where(torch.isin(block, self._eos), place, end - begin).amin(dim=1)
        first_mask = torch.where(block == self._spec.mask_token_id, place, end - begin).amin(dim=1)
        self._keep(first_mask <= first_end)

    def _retire(self, begin: int, end: int) -> None:
        """Skip the remaining blocks of rows whose block holds an end-of-sequence token."""
        self._keep(~torch.isin(self._tokens[self._active, begin:end], self._eos).any(dim=1))

    def _keep(self, going: torch.Tensor) -> None:
        if bool(going.all()):
            return
        rows = going.nonzero()[:, 0]
        self._active = self._active[rows]
        self._cache.keep_rows(rows)
        if self._before is not None:
            self._before = self._before[rows]
