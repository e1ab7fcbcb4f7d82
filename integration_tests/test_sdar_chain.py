"""A random SDAR through the commands: pruned, without some of its channels and heads, verified and recovered."""

import json

import pytest
import torch
from command_line import run_here
from plain_llada2 import block_visible
from plain_sdar import plain_sdar
from recovered_experts import check_recovery_keeps_the_zeros
from sdar_checkpoints import write_sdar

from sinkprune_plugin.diffusion import resolve_diffusion, sample_generator
from sinkprune_plugin.formats import load_sparse_checkpoint
from sinkprune_plugin.lm_eval.conditional_likelihood import answer_log_likelihoods, masked_counts
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer

ADMM = """prune_stage:
  prune_modifiers:
    SinkAwareADMMModifier:
      sparsity: 0.5
      diffusion_steps: 4
      sample_interval: 2
"""
STRUCTURED = """prune_stage:
  prune_modifiers:
    SinkAwareStructuredModifier:
      mlp_channels: 0.5
      attention_heads: 0.5
      diffusion_steps: 4
      sample_interval: 2
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """With tiny-llada's tokenizer, whose mask token is 2."""
    folder = tmp_path_factory.mktemp("sdar") / "dense"
    write_sdar(folder, vocab_size=2048, mask_token_id=2, bos_token_id=0, head_dim=8, block_size=8)
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(folder)
    return folder


def prune(dense, output, text):
    recipe = output.with_suffix(".yaml")
    recipe.write_text(text)
    sizes = ("--num-samples", 2, "--seq-len", 32)
    return run_here("prune", dense, "--recipe", recipe, *sizes, "--device", "cpu", "--output", output)


@pytest.fixture(scope="module")
def pruned(dense):
    output = dense.parent / "pruned"
    done = prune(dense, output, ADMM)
    assert done.returncode == 0, done.stderr
    return output


def test_half_of_each_linear_goes_and_info_says_so(pruned):
    found = load_sparse_checkpoint(pruned)
    shares = {name: float((tensor == 0).float().mean()) for name, tensor in found.items()}
    assert {share for name, share in shares.items() if "_proj" in name} == {0.5}
    assert {share for name, share in shares.items() if "_proj" not in name} == {0.0}
    info = json.loads(run_here("info", pruned, "--json").stdout)
    assert (info["family"], info["format"]) == ("sdar", "sparse-bitmask")


def test_verify_measures_it_in_the_one_mode_that_the_model_has(dense, pruned):
    output = pruned.parent / "report"
    done = run_here("verify", dense, pruned, "--quick", "--seq-len", 64, "--device", "cpu", "--output", output)
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "report.json").read_text())
    assert report["family"] == "sdar"
    assert {row["cache"] for row in report["speed"]["rows"]} == {"commit"}
    # A random network predicts as badly before as after, whatever it was pruned by.
    assert 0.5 < report["quality"]["ratio"] < 2


def test_channels_and_heads_leave_a_smaller_model(dense):
    output = dense.parent / "smaller"
    done = prune(dense, output, STRUCTURED)
    assert done.returncode == 0, done.stderr
    model = load_model(output, torch.float32)
    layer = model.model.layers[0]
    # Half of 72, in whole multiples of 8.
    assert layer.mlp.gate_proj.weight.shape == (40, 32)
    assert layer.self_attn.q_proj.weight.shape == (16, 32)
    with torch.no_grad():
        assert model(torch.arange(3, 35)[None]).logits.isfinite().all()


def test_recovery_keeps_the_zeros(dense, pruned, tmp_path):
    check_recovery_keeps_the_zeros(
        dense, pruned, tmp_path / "recovered", structure="unstructured", changing=".mlp.up_proj"
    )


def test_windows_that_do_not_fit_are_refused_before_anything_is_loaded(dense, tmp_path):
    (tmp_path / "recipe.yaml").write_text(ADMM)
    done = run_here("prune", dense, "--recipe", tmp_path / "recipe.yaml", "--seq-len", 36, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "36 tokens isn't divisible by 8" in done.stderr.strip().splitlines()[-1]


def test_its_mixture_is_refused_with_what_to_use(dense, tmp_path):
    write_sdar(tmp_path, model_type="sdar_moe", architectures=["SDARMoeForCausalLM"])
    done = run_here("verify", tmp_path, dense, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "SDAR-MoE's experts have no class here" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("length", [5, 16, 19])
def test_the_likelihood_of_an_answer_is_the_sum_over_the_blocks_of_the_grid(dense, length):
    """Against one sample and one block at a time with the plain forward; the first may have a part of the context."""
    config, tensors = json.loads((dense / "config.json").read_text()), dict(load_sparse_checkpoint(dense).items())
    model = load_model(dense, torch.float32)
    context, answer = list(range(30, 30 + length)), list(range(70, 82))
    tokens = torch.tensor([*context, *answer])
    (found,) = answer_log_likelihoods(model, context, [answer], resolve_diffusion(model.config), mc_num=3, seed=4)
    generator = sample_generator(4, 3, tokens)
    counts = masked_counts(12, 3, generator)
    ranks = torch.rand(3, 12, generator=generator).argsort(dim=1).argsort(dim=1)
    total = 0.0
    for count, rank in zip(counts.tolist(), ranks, strict=True):
        noisy = tokens.clone()
        noisy[length:][rank < count] = 2
        for first in range(length // 8 * 8, len(tokens), 8):
            end = min(first + 8, len(tokens))
            ids = torch.cat([tokens[:first], noisy[first:end]])
            log_p = plain_sdar(tensors, config, ids, block_visible(end, 8)).log_softmax(-1)
            masked = [place for place in range(first, end) if noisy[place] == 2]
            total += sum(log_p[place, tokens[place]].item() for place in masked) * 12 / count / 3
    assert found == pytest.approx(total, rel=1e-4)


def test_lm_eval_answers_as_denoise_does(dense, tasks):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness isn't installed (sinkprune-plugin[eval])")
    from test_lm_eval import evaluate, samples_of

    from sinkprune_plugin.sampling import denoise

    results = evaluate(["own_choice", "own_cloze"], tasks[0], pretrained=dense, mc_num=2, dtype="float32")
    model, tokenizer = load_model(dense, torch.float32), load_tokenizer(dense)
    sample = samples_of(results, "own_cloze")[0]
    prompt = tokenizer.encode(sample["doc"]["stem"], add_special_tokens=False)
    (tokens,) = denoise(model, torch.tensor(prompt), gen_length=20, eos_token_ids={1}).sequences
    text = tokenizer.decode([token for token in tokens.tolist() if token != 1], skip_special_tokens=True)
    for stop in (".", ";"):
        text = text.split(stop)[0]
    assert sample["resps"][0][0] == text
