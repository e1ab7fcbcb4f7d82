"""Train a tiny LLaDA from plain text, tokenizer included, and save it in the official checkpoint layout.

    python tools/train_tiny_llada.py TRAIN_TEXT --output DIR [--validation TEST_TEXT] [--block-length 32]

TRAIN_TEXT is a .txt or .jsonl file. With the defaults (25 M tokens, 3.4 M parameters) this takes some two hours
on one CPU core and gives a model like sinkprune_plugin/assets/tiny-llada. The state is saved every
--checkpoint-every steps, and the same command resumes from there, with the same weights in the end as if it had never
been interrupted; --stop-after deliberately does only a part of the work.

What makes training work at this size: fan-in initialisation of the projections (with LLaDA's constant 0.02 the loss
stays on the unigram plateau for thousands of steps), the unweighted cross-entropy over corrupted tokens instead of the
ELBO's 1 / p_mask, and a mask ratio that is at most 0.5 at first and reaches 1.0 halfway.

With --block-length the model is a Nemotron-Labs-Diffusion, which denoises blocks of so many tokens after a causal
context.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from sinkprune_plugin._version import __version__
from sinkprune_plugin.devices import choose_device, input_device
from sinkprune_plugin.diffusion import (
    DiffusionSpec,
    check_block_window,
    corrupt,
    elbo_perplexity,
    noisy_inputs,
    predict_noisy,
    resolve_diffusion,
    sample_generator,
)
from sinkprune_plugin.diffusion.training_loss import negative_log_likelihood, predictions
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.llada import LLaDAConfig, LLaDAModelLM
from sinkprune_plugin.models.nemotron_labs import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel
from sinkprune_plugin.outputs import new_directory
from sinkprune_plugin.text_windows import read_documents, token_stream, token_windows

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
NOISE_EPS = 1e-3
PRECISIONS = ("float32", "bfloat16")


TinyModel = LLaDAModelLM | NemotronLabsDiffusionModel


@dataclass(frozen=True)
class Settings:
    """Everything that determines the weights; a resumed run must agree on all of it."""

    steps: int = 3000
    batch_size: int = 32
    seq_len: int = 256
    width: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 0
    mlp_width: int = 512
    vocab_size: int = 2048
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    precision: str = "float32"
    first_ceiling: float = 0.5
    block_length: int = 0
    seed: int = 0


HELP = {
    "steps": "optimiser steps of the whole run",
    "batch_size": "sequences per step",
    "seq_len": "tokens in a sequence, also the model's maximum",
    "width": "d_model",
    "layers": "decoder blocks",
    "heads": "attention heads; must divide the width",
    "kv_heads": "heads of keys and values, for grouped-query attention; must divide the heads; 0: as many as heads",
    "mlp_width": "hidden units of the SwiGLU MLP",
    "vocab_size": "byte-level BPE vocabulary, special tokens included; at least 259",
    "learning_rate": "peak of the cosine",
    "warmup": "steps of linear warm-up",
    "weight_decay": "weight decay of AdamW, on matrices only",
    "precision": "float32, or bfloat16 for autocast, which took two thirds of the time on a CPU with AVX512-BF16; "
    "weights stay float32 while training",
    "first_ceiling": "largest t at the start, in (0, 1]; it rises to 1 over the first half",
    "block_length": "tokens in a block of a model that denoises block by block; must divide seq-len at least twice; 0: "
    "none, all tokens see all",
    "seed": "of the weights, the batches and the noise",
}


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with ids 0 for BOS, 1 for EOS and padding, and 2 for the mask token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UsageError(
            f"the text yields a vocabulary of {tokenizer.get_vocab_size()}, not {vocab_size}; "
            "use more text or another --vocab-size (at least 259)"
        )
    return tokenizer


def build_model(settings: Settings) -> TinyModel:
    """A model with fan-in initialisation, the same weights for the same settings."""
    if settings.width % settings.heads:
        raise UsageError(f"width {settings.width} is not divisible by {settings.heads} heads; change one of them")
    kv_heads = settings.kv_heads or settings.heads
    if settings.heads % kv_heads:
        raise UsageError(f"{settings.heads} heads are not divisible by {kv_heads} kv-heads; change one of them")
    model = _build_blocks(settings, kv_heads) if settings.block_length else _build_llada(settings, kv_heads)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5, generator=generator)
            elif isinstance(module, torch.nn.Embedding):
                module.weight.normal_(0, 0.02, generator=generator)
    return model


def _build_blocks(settings: Settings, kv_heads: int) -> NemotronLabsDiffusionModel:
    config = NemotronLabsDiffusionConfig(
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=kv_heads,
        head_dim=settings.width // settings.heads,
        intermediate_size=settings.mlp_width,
        vocab_size=settings.vocab_size,
        max_position_embeddings=settings.seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        block_size=settings.block_length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        mask_token_id=2,
    )
    return NemotronLabsDiffusionModel(config)


def _build_llada(settings: Settings, kv_heads: int) -> LLaDAModelLM:
    config = LLaDAConfig(
        d_model=settings.width,
        n_layers=settings.layers,
        n_heads=settings.heads,
        n_kv_heads=kv_heads,
        mlp_hidden_size=settings.mlp_width,
        vocab_size=settings.vocab_size,
        embedding_size=settings.vocab_size,
        max_sequence_length=settings.seq_len,
        rope_theta=500000.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        mask_token_id=2,
    )
    return LLaDAModelLM(config)


def build_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    warm = min(1.0, (step + 1) / max(settings.warmup, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return settings.learning_rate * warm * (0.01 + 0.99 * cosine)


def batch_loss(
    model: TinyModel, stream: torch.Tensor, step: int, settings: Settings, spec: DiffusionSpec
) -> torch.Tensor:
    """Mean cross-entropy over the corrupted tokens of the step's batch."""
    # All of a step's randomness follows from seed and step, so that resuming needs no generator state.
    generator = sample_generator(settings.seed, step, torch.empty(0, dtype=torch.int64))
    starts = torch.randint(len(stream) - settings.seq_len, (settings.batch_size,), generator=generator)
    clean = torch.stack([stream[start : start + settings.seq_len] for start in starts.tolist()])
    ceiling = min(1.0, settings.first_ceiling + 2 * (1 - settings.first_ceiling) * step / settings.steps)
    # One t in each of B equal strata of (0, ceiling]: uniform as a whole, and every batch has all noise levels.
    draws = torch.rand(settings.batch_size, generator=generator, dtype=torch.float64)
    timesteps = ceiling * (1 - (torch.arange(settings.batch_size) + draws) / settings.batch_size)
    noise = corrupt(clean, timesteps.tolist(), spec, noise_eps=NOISE_EPS, generators=[generator] * settings.batch_size)
    with torch.autocast(input_device(model).type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        logits = predict_noisy(model, noisy_inputs(noise.noisy_ids, clean, spec), input_device(model))
    losses = negative_log_likelihood(predictions(logits, noise.corrupted, spec), clean[noise.corrupted])
    return losses.sum() / noise.corrupted.sum().clamp(min=1).item()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the whole file or nothing: an interruption leaves the previous checkpoint as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path, settings: Settings, digest: str) -> dict[str, Any] | None:
    """The state to resume from, or None if there is none."""
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in asdict(settings).items():
        if state["settings"].get(name) != value:
            raise UsageError(
                f"{path} was made with {name} = {state['settings'].get(name)}, not {value}; "
                "use the same settings or another --checkpoint"
            )
    if state["text"] != digest:
        raise UsageError(f"{path} was made with another text; use the same one or another --checkpoint")
    return state


def save_model(output: Path, model: TinyModel, tokenizer: PreTrainedTokenizerFast, provenance: dict[str, Any]) -> None:
    """Write the checkpoint directory, whole or not at all."""
    with new_directory(output, overwrite=False) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Train from the start or from the checkpoint, and write the model if the last step was reached."""
    started = time.monotonic()
    device = choose_device(args.device)
    output: Path = args.output
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} exists and is not an empty directory; choose another --output")
    checkpoint: Path = args.checkpoint or output.with_name(output.name + ".ckpt")
    documents = read_documents(args.text)
    digest = hashlib.blake2b("\0".join(documents).encode(), digest_size=16).hexdigest()
    state = load_checkpoint(checkpoint, settings, digest)

    if state is None:
        bpe = train_tokenizer(documents, settings.vocab_size)
    else:
        bpe = Tokenizer.from_str(state["tokenizer"])
        print(f"resuming {checkpoint} at step {state['step']} of {settings.steps}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=EOS, mask_token=MASK
    )
    stream = torch.tensor(token_stream(documents, tokenizer), dtype=torch.int64)
    if len(stream) <= settings.seq_len:
        raise UsageError(f"the text has {len(stream)} tokens; --seq-len {settings.seq_len} needs more")

    model = build_model(settings).to(device).train()
    spec = resolve_diffusion(model.config)
    check_block_window(settings.seq_len, spec)
    optimizer = build_optimizer(model, settings)
    losses: list[float] = []
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]

    last = settings.steps if args.stop_after is None else min(settings.steps, len(losses) + args.stop_after)
    progress = tqdm(range(len(losses), last), initial=len(losses), total=settings.steps, desc="training", unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        loss = batch_loss(model, stream, step, settings, spec)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise UsageError(f"the loss is {losses[-1]} at step {step}; lower --learning-rate")
        progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == last:
            save_checkpoint(
                checkpoint,
                {
                    "settings": asdict(settings),
                    "text": digest,
                    "tokenizer": bpe.to_str(),
                    "step": step + 1,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "losses": losses,
                },
            )
    if len(losses) < settings.steps:
        print(f"stopped at step {len(losses)} of {settings.steps}; run the same command to go on")
        return
    finish(args, settings, model, tokenizer, losses, time.monotonic() - started)


def finish(
    args: argparse.Namespace,
    settings: Settings,
    model: TinyModel,
    tokenizer: PreTrainedTokenizerFast,
    losses: list[float],
    seconds: float,
) -> None:
    """Round to bfloat16, measure on the validation text, save."""
    model.to(torch.bfloat16)
    window = min(50, len(losses))
    provenance: dict[str, Any] = {
        "made_by": "tools/train_tiny_llada.py",
        "versions": {"sinkprune_plugin": __version__, "torch": torch.__version__},
        "text": args.text.name,
        "settings": asdict(settings),
        "tokens_seen": settings.steps * settings.batch_size * settings.seq_len,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "mean_loss_of_first_steps": sum(losses[:window]) / window,
        "mean_loss_of_last_steps": sum(losses[-window:]) / window,
        "seconds_since_start_or_resume": round(seconds, 1),
    }
    if args.validation is not None:
        stream = token_stream(read_documents(args.validation), tokenizer)
        count = min(args.validation_windows, len(stream) // settings.seq_len)
        windows = token_windows(read_documents(args.validation), tokenizer, settings.seq_len, max(count, 1))
        # The rounded weights in float32, as the checkpoint will be loaded for evaluation.
        estimate = elbo_perplexity(model.float(), windows, num_samples=8, noise_eps=NOISE_EPS, progress=True)
        model.to(torch.bfloat16)
        provenance["validation"] = {"text": args.validation.name, "windows": len(windows), **asdict(estimate)}
        print(f"ELBO perplexity on {args.validation.name}: {estimate.perplexity:.1f} ± {estimate.standard_error:.1f}")
    save_model(args.output, model, tokenizer, provenance)
    print(f"saved {args.output}")


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Command line → where things are, and what determines the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="training text, .txt or .jsonl")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to write; must not exist yet")
    parser.add_argument("--validation", type=Path, help="text to measure the ELBO perplexity on at the end")
    parser.add_argument("--validation-windows", type=int, default=64, help="windows of it, at most (default 64)")
    parser.add_argument("--checkpoint", type=Path, help="state to resume from (default: OUTPUT.ckpt)")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between saves (default 100)")
    parser.add_argument("--stop-after", type=int, help="do this many steps now, the rest another time")
    parser.add_argument("--device", default="auto", help="auto (an accelerator if there is one), cpu, cuda, …")
    for field in fields(Settings):
        kind = type(field.default)
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(
            flag, type=kind, default=field.default, help=f"{HELP[field.name]} (default {field.default})"
        )
    args = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "seq_len", "layers", "heads", "checkpoint_every", "validation_windows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if not 0 < args.first_ceiling <= 1:
        parser.error(f"--first-ceiling is {args.first_ceiling:g}; it must be above 0 and at most 1")
    if args.precision not in PRECISIONS:
        parser.error(f"--precision is {args.precision}; it must be one of {', '.join(PRECISIONS)}")
    return args, Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0 on success, 2 on wrong input."""
    args, settings = parse(arguments)
    try:
        run(args, settings)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
