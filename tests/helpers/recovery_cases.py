"""A small random LLaDA and a pruned one, in memory and on disk, for the tests of recovery."""

import json
import shutil
from pathlib import Path

import torch

from sinkprune_plugin.formats import save_sparse_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.models.llada import LLaDAConfig, LLaDAModelLM

VOCABULARY = 2048  # of the embedded tokenizer


def small_model(vocab_size=VOCABULARY, seed=0):
    config = LLaDAConfig(
        d_model=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        mlp_hidden_size=48,
        vocab_size=vocab_size,
        embedding_size=vocab_size,
        max_sequence_length=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        mask_token_id=2,
    )
    torch.manual_seed(seed)
    model = LLaDAModelLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


def prune(model, pattern="unstructured"):
    """Magnitude pruning at 50 %: unstructured, or 2:4."""
    with torch.no_grad():
        for module in block_linears(model).values():
            weight = module.weight
            if pattern == "2:4":
                groups = weight.view(len(weight), -1, 4).abs()
                zero = torch.zeros_like(groups, dtype=torch.bool)
                zero = zero.scatter(2, groups.topk(2, dim=2, largest=False).indices, value=True)
                weight.masked_fill_(zero.view_as(weight), 0.0)
            else:
                weight.masked_fill_(weight.abs() < weight.abs().median(), 0.0)
    return model


def save(model, directory, save_format="dense", dtype=torch.float32):
    """A checkpoint with the embedded model's tokenizer."""
    model.to(dtype)
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    config.pop("_name_or_path", None)
    save_sparse_checkpoint(model.state_dict(), directory, format=save_format, config=config, progress=False)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_MODEL / file, directory / file)
    (directory / "recipe.yaml").write_text("prune_stage: {}\n")
    return directory


def make_pair(folder, pattern="unstructured", save_format="dense", dtype=torch.float32):
    """Directories of a dense and a pruned model."""
    dense = save(small_model(), folder / "dense", dtype=dtype)
    return dense, save(prune(small_model(), pattern), folder / "pruned", save_format, dtype)


def text_file(folder: Path, sentences=400):
    """A .jsonl with enough text for some twenty windows of 32 tokens."""
    words = ["of", "the", "people", "and", "union", "shall", "be", "for", "government", "by", "law", "in", "our"]
    lines = []
    for number in range(0, sentences, 20):
        text = " ".join(words[(number * 7 + i * (number + 3)) % len(words)] for i in range(120))
        lines.append(json.dumps({"text": text}))
    file = folder / "text.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file
