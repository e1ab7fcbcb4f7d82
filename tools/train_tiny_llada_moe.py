"""Make a tiny LLaDA-MoE out of a dense LLaDA and train it further, in the official checkpoint layout.

    python tools/train_tiny_llada_moe.py TRAIN_TEXT --output DIR [--validation TEST_TEXT]

TRAIN_TEXT is a .txt or .jsonl file; the dense model is sinkprune_plugin/assets/tiny-llada unless --dense names another.
With the defaults (0.8 M tokens; 5.2 M parameters, of which each token passes 2.6 M) this takes some five minutes of one
core. Trained on the text that tiny-llada was trained on, its ELBO perplexity on the text kept for testing is 82.7 ± 3.3
(64 windows of 256 tokens; tiny-llada's on the same is 59.3 ± 5.9, with fewer noise samples).

Everything but the MLPs is taken as it is. The channels of each MLP are dealt to the experts at random, as in LLaMA-MoE
(arXiv 2406.16554): half of the experts partition them one way, half another way. The down projections are scaled by how
much a token's experts lack of the whole MLP at first. Training adds the load balancing loss of the Switch Transformer
(arXiv 2101.03961, equation 4) to the cross-entropy over corrupted tokens.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from continued_training import parse_further, run_tool, train_further, write_further

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.experts import Router, Routing
from sinkprune_plugin.models.llada import LLaDAModelLM
from sinkprune_plugin.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM


@dataclass(frozen=True)
class Settings:
    """Everything that determines the weights, besides the dense model and the text."""

    steps: int = 200
    batch_size: int = 16
    seq_len: int = 256
    experts: int = 8
    chosen: int = 2
    learning_rate: float = 1e-3
    warmup: int = 40
    balance: float = 0.01
    precision: str = "float32"
    seed: int = 0


HELP = {
    "steps": "optimiser steps",
    "batch_size": "sequences per step",
    "seq_len": "tokens in a sequence",
    "experts": "experts in each layer; half of them must divide the channels of the dense MLP",
    "chosen": "experts that each token goes to",
    "learning_rate": "peak of the cosine",
    "warmup": "steps of linear warm-up",
    "balance": "factor of the load balancing loss",
    "precision": "float32, or bfloat16 for autocast; weights stay float32 while training",
    "seed": "of the experts' channels, the router, the batches and the noise",
}


def upcycle(dense: LLaDAModelLM, windows: torch.Tensor, settings: Settings) -> LLaDAMoEModelLM:
    """A LLaDA-MoE that computes about what the dense model does.

    :param dense: a LLaDA without biases
    :param windows: (B, T) token ids, to set the norms of queries and keys by
    :param settings: numbers of experts
    :return: the model in float32
    :raises UsageError: if the channels can't be dealt to the experts
    """
    old = dense.config
    half, rest = divmod(settings.experts, 2)
    if rest or half < 1 or old.intermediate_size % half or not 1 <= settings.chosen <= settings.experts:
        raise UsageError(
            f"{old.intermediate_size} channels can't be dealt to --experts {settings.experts} with --chosen "
            f"{settings.chosen}; give an even number of experts, half of which divides the channels"
        )
    config = LLaDAMoEConfig(
        vocab_size=old.embedding_rows,
        hidden_size=old.d_model,
        dense_intermediate_size=old.intermediate_size,
        expert_intermediate_size=old.intermediate_size // half,
        num_hidden_layers=old.n_layers,
        num_attention_heads=old.n_heads,
        num_key_value_heads=old.num_key_value_heads,
        num_experts=settings.experts,
        num_experts_per_tok=settings.chosen,
        moe_layer_freq=[1] * old.n_layers,
        max_position_embeddings=old.max_sequence_length,
        rms_norm_eps=old.rms_norm_eps,
        rope_theta=old.rope_theta,
        tie_word_embeddings=old.weight_tying,
        mask_token_id=old.mask_token_id,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )
    model, generator = LLaDAMoEModelLM(config), torch.Generator().manual_seed(settings.seed)
    states = dense(windows, output_hidden_states=True).hidden_states
    source: Any = dense.model.transformer
    target: Any = model.model
    head: Any = model.lm_head
    with torch.no_grad():
        target.embed_tokens.weight.copy_(source.wte.weight)
        target.norm.weight.copy_(source.ln_f.weight)
        head.weight.copy_(source.ff_out.weight)
        for layer, block, state in zip(target.layers, source.blocks, states, strict=False):
            layer.input_layernorm.load_state_dict(block.attn_norm.state_dict())
            layer.post_attention_layernorm.load_state_dict(block.ff_norm.state_dict())
            attention, normed = layer.self_attn, block.attn_norm(state)
            for name, old_name in (("q_proj",) * 2, ("k_proj",) * 2, ("v_proj",) * 2, ("o_proj", "attn_out")):
                getattr(attention, name).load_state_dict(getattr(block, old_name).state_dict())
            for norm, projection in ((attention.q_norm, block.q_proj), (attention.k_norm, block.k_proj)):
                # Multiplies back what the norm divides by, on average.
                norm.weight.fill_(projection(normed).square().mean().sqrt())
            _deal(layer.mlp, block, settings, generator)
    return model


def _deal(mlp: Any, block: Any, settings: Settings, generator: torch.Generator) -> None:
    gate, up, down = (block.get_submodule(name).weight for name in ("ff_proj", "up_proj", "ff_out"))
    share = mlp.experts[0].gate_proj.out_features
    channels = torch.cat([torch.randperm(len(gate), generator=generator) for _ in range(2)]).split(share)
    # Each of the chosen experts has a weight of about 1 / experts, and together they hold this part of the channels.
    scale = settings.experts * len(gate) / (settings.chosen * share)
    for expert, part in zip(mlp.experts, channels, strict=True):
        expert.gate_proj.weight.copy_(gate[part])
        expert.up_proj.weight.copy_(up[part])
        expert.down_proj.weight.copy_(down[:, part] * scale)
    mlp.gate.weight.normal_(0, 0.1 * mlp.gate.weight.shape[1] ** -0.5, generator=generator)


@contextmanager
def balance_losses(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within it, a list that gets experts · Σ share of the choices · mean probability of each router's calls."""
    losses: list[torch.Tensor] = []

    def add(router: Router, arguments: tuple[torch.Tensor], routing: Routing) -> None:
        probability = torch.nn.functional.linear(arguments[0], router.weight).softmax(-1, dtype=torch.float32)
        chosen = routing.experts.flatten().bincount(minlength=router.experts) / routing.experts.numel()
        losses.append(router.experts * (chosen * probability.mean(0)).sum())

    hooks = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, Router)]
    try:
        yield losses
    finally:
        for hook in hooks:
            hook.remove()


def train(model: LLaDAMoEModelLM, stream: torch.Tensor, settings: Settings) -> list[float]:
    """Train in place with load balancing; see :func:`continued_training.train_further`."""

    def balanced(model: torch.nn.Module, entropy: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        with balance_losses(model) as balance:
            loss = entropy()
        return loss, loss + settings.balance * torch.stack(balance).mean()

    return train_further(model, stream, settings, balanced)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0 on success, 2 on wrong input."""
    args, settings = parse_further(__doc__, Settings, HELP, arguments)

    def make(dense: LLaDAModelLM, stream: torch.Tensor) -> LLaDAMoEModelLM:
        count = min(8, len(stream) // settings.seq_len)
        return upcycle(dense, stream[: count * settings.seq_len].view(count, -1), settings)

    return run_tool(lambda: write_further(args, settings, make, lambda model, stream: train(model, stream, settings)))


if __name__ == "__main__":
    sys.exit(main())
