"""Samplers written out plainly, using nothing of the package except its noise: the tests' references.

One prompt, one loop over blocks and one over steps, as in LLaDA's published sampler. Attention caches are emulated by
full forward passes whose keys and values are overwritten with recorded ones at the positions that count as cached:
nothing is left out of a pass, so no position can be mistaken for another.
"""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sinkprune_plugin.sampling.noise import uniform_noise

__all__ = ["plain_cached_logits", "plain_denoise", "plain_logits"]


class Replay(TorchFunctionMode):
    """Records keys and values of each attention call, after putting ``kept`` ones (by call) at ``positions``."""

    def __init__(self, kept=None, positions=()):
        super().__init__()
        self.kept, self.positions, self.seen = kept, list(positions), []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        k, v = k.clone(), v.clone()
        if self.positions:
            old_k, old_v = self.kept[len(self.seen)]
            k[:, :, self.positions] = old_k[:, :, self.positions]
            v[:, :, self.positions] = old_v[:, :, self.positions]
        self.seen.append((k, v))
        return func(q, k, v, **(kwargs or {}))


def shifted(logits, shift):
    """Row i predicts position i; as in Dream's published sampler."""
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if shift else logits


def plain_logits(model, cfg_scale=0.0, mask=None, shift=0):
    """The published method: everything in each step. Called as ``logits(x, begin, end, step)``, gives (1, T, V)."""

    def logits(x, begin, end, step):
        result = shifted(model(x).logits, shift)
        if cfg_scale:
            without = x.clone()
            without[:, : logits.prompt_length] = mask
            unconditional = shifted(model(without).logits, shift)
            result = unconditional + (cfg_scale + 1) * (result - unconditional)
        return result

    return logits


def plain_cached_logits(model, cache, prompt_length, shift=0):
    """The same with stale keys and values, see the module."""
    state = {"kept": None, "before": None}

    def run(x, positions):
        with Replay(state["kept"], positions) as replay:
            result = model(x).logits
        return result, replay.seen

    def logits(x, begin, end, step):
        length = x.shape[1]
        if cache == "commit":
            if step == 0:
                # What lies before the block is final: computed from its tokens and what was kept before them.
                edge = logits.committed
                result, state["kept"] = run(x[:, :begin], range(edge))
                state["before"], logits.committed = result[:, -1:], begin
            result, _ = run(x[:, :end], range(begin))
            # Nothing after the block exists in this mode, so it isn't read.
            result = F.pad(result, (0, 0, 0, length - end))
        elif step == 0:
            state["kept"] = None
            result, state["kept"] = run(x, ())
            state["before"] = result[:, begin - 1 : begin].clone()
        else:
            behind = range(end, length) if cache == "dual" else ()
            result, _ = run(x, [*range(begin), *behind])
        # Logits of cached positions are those of the pass that cached them; only the one before the block matters.
        result = result.clone()
        result[:, begin - 1 : begin] = state["before"]
        return shifted(result, shift)

    logits.committed = 0
    return logits


@torch.no_grad()
def plain_denoise(
    logits_of,
    prompt,
    mask,
    *,
    blocks,
    steps,
    temperature=0.0,
    remasking="low_confidence",
    threshold=None,
    factor=None,
    seed=0,
):
    """LLaDA's sampler for one prompt (P,), in ``blocks`` of [begin, end) with ``steps`` each; the canvas (G,).

    Two departures from the published one: the mask token is never predicted, and noise comes from a counter.
    """
    length = prompt.shape[0]
    x = torch.cat([prompt, torch.full((blocks[-1][1],), mask)])[None].clone()
    logits_of.prompt_length = length
    every = torch.arange(x.shape[1])
    for (first, last), block_steps in zip(blocks, steps, strict=True):
        begin, end = length + first, length + last
        masks = last - first
        # Published: as many in each step, one more in the first ones if there is a remainder.
        transfers = [masks // block_steps + (i < masks % block_steps) for i in range(block_steps)]
        for step in range(block_steps if threshold is None and factor is None else masks):
            masked = x == mask
            if not masked[:, begin:end].any():
                break
            logits = logits_of(x, begin, end, step).clone()
            logits[..., mask] = -torch.inf
            where = torch.full_like(every, seed), torch.full_like(every, first + step)
            if temperature > 0:
                u = uniform_noise(*where, every, logits.shape[-1])
                noisy = logits.double().exp() / (-u.log()) ** temperature
            else:
                noisy = logits
            proposed = noisy.argmax(-1)
            p = logits.double().softmax(-1)
            if remasking == "low_confidence":
                sure = p.gather(-1, proposed[..., None])[..., 0]
            elif remasking == "random":
                sure = uniform_noise(*where, -every - 1, 1).T
            elif remasking == "margin":
                best = p.sort(-1, descending=True).values
                sure = best[..., 0] - best[..., 1]
            else:
                sure = torch.where(p > 0, p * p.log(), 0).sum(-1)
            sure[:, end:] = -torch.inf
            sure[~masked] = -torch.inf
            if factor is not None:
                # The largest n with (n + 1) (1 - c_n) < f, at least 1.
                c = sure[0].sort(descending=True)
                take = [n for n in range(1, masks + 1) if (n + 1) * (1 - c.values[n - 1]) < factor]
                chosen = c.indices[: max(take, default=1)]
            elif threshold is None:
                chosen = sure[0].topk(transfers[step]).indices
            else:
                chosen = (sure[0] > threshold).nonzero()[:, 0]
                if len(chosen) == 0:
                    chosen = sure[0].argmax()[None]
            x[0, chosen] = proposed[0, chosen]
    return x[0, length:]
