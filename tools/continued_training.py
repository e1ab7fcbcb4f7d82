"""What the tools that train an existing model further have in common: the loop, and writing the result."""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from train_tiny_llada import NOISE_EPS, PRECISIONS, batch_loss, build_optimizer, learning_rate
from train_tiny_llada import Settings as TrainingSettings

from sinkprune_plugin._version import __version__
from sinkprune_plugin.diffusion import elbo_perplexity, resolve_diffusion
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.models.llada import LLaDAModelLM
from sinkprune_plugin.outputs import new_directory
from sinkprune_plugin.text_windows import read_documents, token_stream, token_windows

__all__ = ["Loss", "parse_further", "run_tool", "train_further", "write_further"]

Loss = Callable[[torch.nn.Module, Callable[[], torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
"""Takes the model and what computes the cross-entropy; returns this, and what is to be minimised."""


def _plainly(_: torch.nn.Module, entropy: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    loss = entropy()
    return loss, loss


def train_further(model: Any, stream: torch.Tensor, settings: Any, loss_of: Loss = _plainly) -> list[float]:
    """Train in place.

    :param model: a diffusion LM
    :param stream: (N,) token ids of the text
    :param settings: a tool's settings, with fields of ``train_tiny_llada.Settings``
    :param loss_of: see :data:`Loss`
    :return: cross-entropy of each step, in nats
    """
    shared = {name: value for name, value in asdict(settings).items() if hasattr(TrainingSettings, name)}
    recipe = TrainingSettings(**shared, first_ceiling=1.0)
    spec, optimizer, losses = resolve_diffusion(model.config), build_optimizer(model, recipe), []
    progress = tqdm(range(settings.steps), desc="training", unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        entropy, loss = loss_of(model, functools.partial(batch_loss, model, stream, step, recipe, spec))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(entropy.item())
        progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
    return losses


def write_further(
    args: argparse.Namespace,
    settings: Any,
    make: Callable[[LLaDAModelLM, torch.Tensor], Any],
    train: Callable[[Any, torch.Tensor], list[float]],
) -> None:
    """Load the dense model, make, train, measure and save the new one.

    :param args: what :func:`parse_further` gives
    :param settings: a tool's settings
    :param make: the dense model and the text's token ids (N,) → the model to train
    :param train: trains it on the token ids, and returns the cross-entropy of each step
    :raises UsageError: if dense model or text don't fit
    """
    started = time.monotonic()
    dense, tokenizer = load_model(args.dense, torch.float32), load_tokenizer(args.dense)
    if not isinstance(dense, LLaDAModelLM):
        raise UsageError(f"{args.dense} is a {type(dense).__name__}; --dense takes a LLaDA")
    stream = torch.tensor(token_stream(read_documents(args.text), tokenizer), dtype=torch.int64)
    if len(stream) <= settings.seq_len:
        raise UsageError(f"the text has {len(stream)} tokens; --seq-len {settings.seq_len} needs more")
    with new_directory(args.output, overwrite=False) as directory:
        model = make(dense, stream).train()
        losses = train(model, stream)
        model.eval().to(torch.bfloat16)
        provenance: dict[str, Any] = {
            "made_by": f"tools/{Path(sys.modules[make.__module__].__file__ or '').name}",
            "versions": {"sinkprune_plugin": __version__, "torch": torch.__version__},
            "text": args.text.name,
            "settings": asdict(settings),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "mean_loss_of_last_steps": sum(losses[-50:]) / len(losses[-50:]),
            "seconds": round(time.monotonic() - started, 1),
        }
        if args.validation is not None:
            # The rounded weights in float32, as the checkpoint will be loaded for evaluation.
            windows = token_windows(read_documents(args.validation), tokenizer, settings.seq_len, 64)
            estimate = elbo_perplexity(model.float(), windows, num_samples=8, noise_eps=NOISE_EPS, progress=True)
            model.to(torch.bfloat16)
            provenance["validation"] = {"text": args.validation.name, "windows": len(windows), **asdict(estimate)}
            print(
                f"ELBO perplexity on {args.validation.name}: {estimate.perplexity:.1f} ± {estimate.standard_error:.1f}"
            )
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    print(f"saved {args.output}")


def parse_further(
    description: str | None, settings: type, texts: dict[str, str], arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, Any]:
    """Command line → where things are, and what determines the weights.

    :param description: the tool's own documentation
    :param settings: dataclass of the tool's settings, all with defaults
    :param texts: field → what it means
    :param arguments: the command line; None for this process's
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="training text, .txt or .jsonl")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to write; must not exist yet")
    parser.add_argument("--dense", default=EMBEDDED_MODEL, help="LLaDA to start from (default: tiny-llada)")
    parser.add_argument("--validation", type=Path, help="text to measure the ELBO perplexity on at the end")
    for field in fields(settings):
        flag, kind = "--" + field.name.replace("_", "-"), type(field.default)
        parser.add_argument(
            flag, type=kind, default=field.default, help=f"{texts[field.name]} (default {field.default})"
        )
    args = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "seq_len"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.precision not in PRECISIONS:
        parser.error(f"--precision is {args.precision}; it must be one of {', '.join(PRECISIONS)}")
    return args, settings(**{field.name: getattr(args, field.name) for field in fields(settings)})


def run_tool(run: Callable[[], None]) -> int:
    """Run a tool; returns 0 on success, 2 on wrong input.

    :param run: the tool
    """
    try:
        run()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
