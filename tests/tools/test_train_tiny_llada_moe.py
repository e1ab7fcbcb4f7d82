"""The tool that makes a tiny LLaDA-MoE out of the embedded model."""

import json

import pytest
import torch
import train_tiny_llada_moe as tool
from tiny_moe import write_tiny_moe

from sinkprune_plugin.diffusion import elbo_perplexity
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.text_windows import embedded_text, read_documents, token_windows


def test_it_trains_and_writes_a_model_with_its_provenance(text, tmp_path):
    output = tmp_path / "model"
    sizes = ["--steps", "3", "--batch-size", "2", "--seq-len", "32", "--warmup", "1"]
    assert tool.main([str(text), "--output", str(output), *sizes]) == 0
    written = json.loads((output / "provenance.json").read_text())
    model = load_model(output)
    assert written["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert written["settings"]["experts"] == model.config.num_experts == 8
    assert load_tokenizer(output).mask_token_id == model.config.mask_token_id
    write_tiny_moe(tmp_path / "untrained")
    before = load_model(tmp_path / "untrained")
    router = "model.layers.5.mlp.gate.weight"
    assert not torch.equal(model.state_dict()[router].float(), before.state_dict()[router].float())


def test_before_training_it_is_a_language_model_already(tmp_path):
    """Far from a uniform choice among 2048 tokens, and not as good as the model that it was made of."""
    write_tiny_moe(tmp_path)
    windows = token_windows(read_documents(embedded_text("test")), load_tokenizer(EMBEDDED_MODEL), 64, 8)
    dense, experts = (
        elbo_perplexity(load_model(folder, torch.float32), windows, num_samples=2).perplexity
        for folder in (EMBEDDED_MODEL, tmp_path)
    )
    assert dense < experts < 1024


@pytest.mark.parametrize("wrong", [["--experts", "7"], ["--experts", "6"], ["--chosen", "9"]])
def test_experts_that_the_channels_cannot_be_dealt_to(wrong, text, tmp_path, capsys):
    assert tool.main([str(text), "--output", str(tmp_path / "model"), "--seq-len", "32", *wrong]) == 2
    assert "error: 512 channels can't be dealt to" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
