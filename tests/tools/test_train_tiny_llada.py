import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sinkprune_plugin.diffusion import elbo_perplexity, resolve_diffusion
from sinkprune_plugin.loading import load_model, load_tokenizer
from sinkprune_plugin.text_windows import embedded_text, read_documents, token_windows

SCRIPT = Path(__file__).parent.parent.parent / "tools" / "train_tiny_llada.py"
STEPS = 24
TINY = "--steps 24 --batch-size 8 --seq-len 32 --width 32 --layers 2 --heads 2 --mlp-width 48 --vocab-size 300 "
TINY += "--warmup 4 --learning-rate 0.01 --device cpu --checkpoint-every 5"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_tiny_llada", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(text, output, *more):
    return [str(text), "--output", str(output), *TINY.split(), *more]


@pytest.fixture(scope="module")
def finished(tool, text, tmp_path_factory):
    """A model trained without interruption."""
    output = tmp_path_factory.mktemp("models") / "whole"
    validation = embedded_text("test")
    assert tool.main(command(text, output, "--validation", str(validation), "--validation-windows", "8")) == 0
    return output


def test_the_output_loads_and_was_trained(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sinkprune_plugin.models import register_configs, register_models

    register_configs()
    register_models()
    model, info = AutoModelForCausalLM.from_pretrained(finished, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "LLaDAModelLM"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(finished)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id)
    assert special == (0, 1, 1, 2)
    sentence = "Fellow citizens, naïve or not:\n42 treaties."
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence
    spec = resolve_diffusion(model.config, tokenizer)
    assert (spec.name, spec.mask_token_id, spec.vocab_size) == ("llada", 2, 300)

    provenance = json.loads((finished / "provenance.json").read_text())
    assert provenance["settings"]["steps"] == STEPS
    # An untrained model of 300 tokens is at ln 300 = 5.7 nats; both numbers are means over all 24 steps here.
    assert 0 < provenance["mean_loss_of_last_steps"] < math.log(300) + 0.5
    windows = token_windows(read_documents(embedded_text("test")), tokenizer, 32, 8)
    estimate = elbo_perplexity(model.float(), windows, num_samples=8)
    # The same rounded weights, windows and noise.
    assert math.isclose(estimate.perplexity, provenance["validation"]["perplexity"], rel_tol=1e-5)


def test_the_layout_is_that_of_the_embedded_model(finished):
    embedded = Path(embedded_text("test")).parent / "tiny-llada"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (finished, embedded))
    assert set(ours) == {name for name in theirs if not any(f"blocks.{i}." in name for i in range(2, 6))}
    fields = json.loads((finished / "config.json").read_text())
    expected = json.loads((embedded / "config.json").read_text())
    for name in ("model_type", "architectures", "mask_token_id", "eos_token_id", "pad_token_id", "rope_theta"):
        assert fields[name] == expected[name], name
    assert (fields["d_model"], fields["n_layers"], fields["n_heads"], fields["vocab_size"]) == (32, 2, 2, 300)


def test_training_lowers_the_loss(tool, text, tmp_path):
    checkpoint = tmp_path / "state"
    more = ("--checkpoint", str(checkpoint), "--steps", "60", "--stop-after", "60")
    assert tool.main(command(text, tmp_path / "model", *more)) == 0
    losses = torch.load(checkpoint, weights_only=True)["losses"]
    assert len(losses) == 60
    assert all(math.isfinite(loss) for loss in losses)
    # 5.9 → 5.1 nats measured; the mean of ten steps moves by about 0.05 between seeds.
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.4


def test_resuming_gives_the_same_bits(tool, text, finished, tmp_path, capsys):
    output = tmp_path / "parts"
    assert tool.main(command(text, output, "--stop-after", "7")) == 0
    assert not output.exists()
    assert "stopped at step 7 of 24" in capsys.readouterr().out
    assert tool.main(command(text, output, "--stop-after", "1")) == 0
    assert tool.main(command(text, output)) == 0
    assert "at step 8 of 24" in capsys.readouterr().out
    assert (output / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert (output / "tokenizer.json").read_bytes() == (finished / "tokenizer.json").read_bytes()


def test_a_crash_loses_no_more_than_the_steps_since_the_last_save(tool, text, finished, tmp_path, monkeypatch):
    output = tmp_path / "crashed"
    whole = tool.batch_loss

    def crash(model, stream, step, settings, spec):
        if step == 13:
            raise KeyboardInterrupt
        return whole(model, stream, step, settings, spec)

    monkeypatch.setattr(tool, "batch_loss", crash)
    with pytest.raises(KeyboardInterrupt):
        tool.main(command(text, output))
    checkpoint = tmp_path / "crashed.ckpt"
    assert torch.load(checkpoint, weights_only=True)["step"] == 10
    monkeypatch.setattr(tool, "batch_loss", whole)
    # The global generator has no part in it.
    torch.manual_seed(123)
    assert tool.main(command(text, output)) == 0
    assert (output / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_an_interrupted_save_leaves_the_last_checkpoint(tool, text, tmp_path, monkeypatch):
    checkpoint = tmp_path / "state"
    arguments = command(text, tmp_path / "model", "--checkpoint", str(checkpoint))
    assert tool.main([*arguments, "--stop-after", "3"]) == 0
    before = checkpoint.read_bytes()

    def half(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(tool.torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        tool.main([*arguments, "--stop-after", "3"])
    assert checkpoint.read_bytes() == before


def test_other_settings_or_text_are_refused_on_resuming(tool, text, tmp_path, capsys):
    output = tmp_path / "model"
    assert tool.main(command(text, output, "--stop-after", "1")) == 0
    assert tool.main(command(text, output, "--seed", "5")) == 2
    assert "was made with seed = 0, not 5" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8") + " More.", encoding="utf-8")
    assert tool.main(command(other, output)) == 2
    assert "was made with another text" in capsys.readouterr().err


def test_grouped_query_attention_in_bfloat16(tool, text, tmp_path, finished):
    more = ("--kv-heads", "1", "--precision", "bfloat16", "--steps", "2")
    assert tool.main(command(text, tmp_path / "model", *more)) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["n_kv_heads"] == 1
    weights = load_file(tmp_path / "model" / "model.safetensors")
    shapes = {name.rsplit(".", 2)[-2]: tuple(weight.shape) for name, weight in weights.items() if "blocks.0" in name}
    assert (shapes["q_proj"], shapes["k_proj"], shapes["v_proj"]) == ((32, 32), (16, 32), (16, 32))
    assert json.loads((finished / "config.json").read_text())["n_kv_heads"] == 2


def test_half_precision_is_used_and_stays_close(tool, text):
    settings = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 48, "vocab_size": 300, "batch_size": 4}
    stream = torch.randint(3, 300, (2000,), generator=torch.Generator().manual_seed(0))
    losses = []
    for precision in tool.PRECISIONS:
        chosen = tool.Settings(**settings, seq_len=32, precision=precision)
        model = tool.build_model(chosen)
        losses.append(tool.batch_loss(model, stream, 0, chosen, resolve_diffusion(model.config)).item())
    # bfloat16 has 8 bits: each logit is off by some 0.4 %, the mean over 60 tokens by less.
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=4e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--vocab-size", "100"), "yields a vocabulary of 259, not 100"),
        (("--heads", "3"), "width 32 is not divisible by 3 heads"),
        (("--kv-heads", "3"), "2 heads are not divisible by 3 kv-heads"),
        (("--seq-len", "100000"), "--seq-len 100000 needs more"),
    ],
)
def test_wrong_options_exit_with_2_and_write_nothing(tool, text, tmp_path, capsys, more, message):
    assert tool.main(command(text, tmp_path / "model", *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_an_existing_model_is_not_overwritten(tool, text, finished, capsys):
    before = (finished / "model.safetensors").read_bytes()
    assert tool.main(command(text, finished)) == 2
    assert "is not an empty directory" in capsys.readouterr().err
    assert (finished / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("first", [0.5, 0.2])
def test_the_mask_ratio_rises_over_the_first_half(tool, first):
    sizes = {"batch_size": 64, "seq_len": 64, "width": 32, "layers": 1, "heads": 2, "vocab_size": 300}
    settings = tool.Settings(steps=100, first_ceiling=first, **sizes)
    model = tool.build_model(settings)
    spec = resolve_diffusion(model.config)
    stream = torch.randint(3, 300, (5000,), generator=torch.Generator().manual_seed(0))
    ratios = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: ratios.append((kwargs["input_ids"] == 2).float().mean(dim=1)), with_kwargs=True
    )
    for step in (0, 50, 99):
        tool.batch_loss(model, stream, step, settings, spec)
    handle.remove()
    # Half the ceiling on average; one t in each of 64 strata and 4096 coins leave a standard error below 0.01.
    for ratio, expected in zip(ratios, (first / 2, 0.5, 0.5), strict=True):
        assert abs(ratio.mean().item() - expected) < 0.04
    # Four standard deviations of 64 coins above the ceiling.
    assert ratios[0].max() < first + 0.25
    assert ratios[1].max() > 0.85
    assert ratios[2].max() > 0.85


def test_learning_rate_warms_up_and_falls(tool):
    settings = tool.Settings(steps=1000, warmup=100, learning_rate=1.0)
    rates = [tool.learning_rate(step, settings) for step in range(1000)]
    assert rates[0] < 0.02
    assert 0.95 < max(rates) <= 1.0
    assert rates.index(max(rates)) in range(90, 110)
    assert 0 < rates[-1] < 0.02


def test_a_model_that_denoises_block_by_block(tool, text, tmp_path):
    output = tmp_path / "blocks"
    assert tool.main(command(text, output, "--block-length", "8", "--kv-heads", "1")) == 0
    model = load_model(output, torch.float32)
    spec = resolve_diffusion(model.config)
    assert (spec.name, spec.block_length, spec.mask_token_id) == ("nemotron_labs", 8, 2)
    provenance = json.loads((output / "provenance.json").read_text())
    # Far below 5.7 nats, those of guessing, the model would have seen the tokens that it predicts.
    assert 4 < provenance["mean_loss_of_last_steps"] < math.log(300) + 0.5
    windows = token_windows(read_documents(embedded_text("test")), load_tokenizer(output), 32, 4)
    assert elbo_perplexity(model, windows, num_samples=2).perplexity < 1000


def test_windows_that_the_blocks_do_not_divide(tool, text, tmp_path, capsys):
    assert tool.main(command(text, tmp_path / "blocks", "--block-length", "20")) == 2
    assert "32 tokens has less than two blocks of 20" in capsys.readouterr().err
