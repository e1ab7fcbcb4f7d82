"""The tool that trains the embedded model on longer windows."""

import json

import lengthen_tiny_llada as tool
import torch

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer


def test_the_model_takes_longer_windows_and_its_weights_were_trained(text, tmp_path):
    output = tmp_path / "model"
    sizes = ["--steps", "2", "--batch-size", "1", "--seq-len", "320", "--warmup", "1"]
    assert tool.main([str(text), "--output", str(output), *sizes]) == 0
    written = json.loads((output / "provenance.json").read_text())
    assert written["made_by"] == "tools/lengthen_tiny_llada.py"
    model, before = load_model(output), load_model(EMBEDDED_MODEL)
    assert model.config.max_sequence_length == 320
    assert load_tokenizer(output).mask_token_id == model.config.mask_token_id
    changed = {
        name for name, weight in before.state_dict().items() if not torch.equal(weight, model.state_dict()[name])
    }
    # Two steps at bfloat16's precision change all matrices.
    assert changed >= {name for name, weight in before.state_dict().items() if weight.dim() > 1}


def test_a_length_that_the_model_has_already_is_refused(text, tmp_path, capsys):
    assert tool.main([str(text), "--output", str(tmp_path / "model"), "--seq-len", "256"]) == 2
    assert "error: the model takes 256 tokens already; --seq-len 256 must be more" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
