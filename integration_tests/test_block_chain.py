"""The whole chain on a model that denoises block by block: prune, info, convert, verify, sinks, lm-eval, refusals.

The model is random: what is checked is that each step computes what it says on this family. Its blocks have 8 tokens.
"""

import json

import pytest
import torch
from command_line import run_here
from nemotron_labs_checkpoints import write_nemotron_labs
from plain_nemotron_labs import plain_nemotron_labs

from sinkprune_plugin.commands.recover import recover_model
from sinkprune_plugin.diffusion import resolve_diffusion, sample_generator
from sinkprune_plugin.formats import load_sparse_checkpoint
from sinkprune_plugin.lm_eval.conditional_likelihood import answer_log_likelihoods, masked_counts
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.modifiers.calibration import collect_batches
from sinkprune_plugin.modifiers.passes import PassEngine
from sinkprune_plugin.modifiers.sink_sweep import sweep_attention
from sinkprune_plugin.modifiers.trajectory import TrajectoryCorruption, clean_pass, corrupted_passes
from sinkprune_plugin.recovery.options import RecoveryOptions

RECIPE = """prune_stage:
  prune_modifiers:
    {modifier}:
      sparsity: 0.5
      diffusion_steps: 4
      sample_interval: 2
"""
# Calibration inputs as the engine gives them against the plain forward, in float32.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """With tiny-llada's tokenizer, whose mask token is 2."""
    folder = tmp_path_factory.mktemp("chain") / "dense"
    config, tensors = write_nemotron_labs(
        folder, vocab_size=2048, mask_token_id=2, bos_token_id=0, eos_token_id=1, block_size=8, head_dim=8
    )
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(folder)
    return folder, config, tensors


def prune(dense, output, modifier, *more):
    recipe = output.with_suffix(".yaml")
    recipe.write_text(RECIPE.format(modifier=modifier))
    sizes = ("--num-samples", 2, "--seq-len", 32)
    return run_here("prune", dense, "--recipe", recipe, *sizes, "--device", "cpu", *more, "--output", output)


@pytest.fixture(scope="module")
def pruned(dense):
    output = dense[0].parent / "pruned"
    done = prune(dense[0], output, "SinkAwareWandaModifier")
    assert done.returncode == 0, done.stderr
    return output


def test_half_of_each_linear_of_the_blocks_goes_and_nothing_else(dense, pruned):
    _, _, tensors = dense
    found = load_sparse_checkpoint(pruned)
    for name, tensor in tensors.items():
        zeros = float((found[name] == 0).float().mean())
        assert zeros == (0.5 if "_proj" in name else 0.0), name
        kept = found[name] != 0
        assert torch.equal(found[name][kept], tensor[kept])


def test_admm_solves_for_it(dense):
    output = dense[0].parent / "admm"
    done = prune(dense[0], output, "SinkAwareADMMModifier")
    assert done.returncode == 0, done.stderr
    spec = resolve_diffusion(load_model(output).config)
    assert (spec.name, spec.block_length) == ("nemotron_labs", 8)


def test_info_and_convert(pruned):
    info = json.loads(run_here("info", pruned, "--json").stdout)
    assert (info["family"], info["format"]) == ("nemotron_labs", "sparse-bitmask")
    again = pruned.parent / "again"
    done = run_here("convert", pruned, "--to", "dense", "--output", again)
    assert done.returncode == 0, done.stderr
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(load_model(again)(ids).logits, load_model(pruned)(ids).logits)


def test_verify_measures_it_in_the_one_mode_that_the_model_has(dense, pruned):
    output = pruned.parent / "report"
    done = run_here("verify", dense[0], pruned, "--quick", "--seq-len", 64, "--device", "cpu", "--output", output)
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "report.json").read_text())
    assert report["family"] == "nemotron_labs"
    assert {row["cache"] for row in report["speed"]["rows"]} == {"commit"}
    assert report["quality"]["elbo_dense"] > 1
    assert report["sparsity"]["total"]["sparsity"] == pytest.approx(0.5)


@pytest.mark.parametrize("method", ["distill", "blockwise"])
def test_recovery_comes_closer_to_the_dense_model_and_keeps_the_zeros(dense, pruned, tmp_path, method):
    options = RecoveryOptions(method=method, batch_size=4, learning_rate=3e-3, held_out=0.25, seed=1)
    result = recover_model(dense[0], pruned, tmp_path / "out", options=options, steps=8, seq_len=32, device="cpu")
    assert result.held_out_after < result.held_out_before
    before, after = load_sparse_checkpoint(pruned), load_sparse_checkpoint(tmp_path / "out")
    assert all(not after[name][before[name] == 0].any() for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_sinks_of_an_open_block(dense, tmp_path):
    done = run_here("sinks", dense[0], "--seq-len", 32, "--num-samples", 2, "--device", "cpu", "--output",
                    tmp_path / "sinks")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "sinks" / "sinks.json").read_text())
    assert report["model"]["family"] == "nemotron_labs"


@pytest.mark.parametrize(
    ("command", "length", "words"),
    [
        ("prune", 36, "36 tokens isn't divisible by 8, the model's block length; use 32 or 40 (--seq-len)"),
        ("prune", 8, "8 tokens has less than two blocks of 8"),
        ("verify", 60, "60 tokens isn't divisible by 8"),
        ("sinks", 12, "12 tokens has less than two blocks of 8"),
    ],
)
def test_windows_that_do_not_fit_are_refused_before_anything_is_loaded(dense, pruned, tmp_path, command, length, words):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(modifier="SinkAwareWandaModifier"))
    arguments = {
        "prune": (dense[0], "--recipe", tmp_path / "recipe.yaml"),
        "verify": (dense[0], pruned),
        "sinks": (dense[0],),
    }
    done = run_here(command, *arguments[command], "--seq-len", length, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert words in done.stderr.strip().splitlines()[-1]
    assert "loading weights" not in done.stderr
    assert not (tmp_path / "out").exists()


def rows_of(lengths):
    rows = [torch.randint(3, 2048, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]
    longest = max(lengths)
    return {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(longest) < length).long() for length in lengths]),
    }


def test_samples_of_different_lengths_are_cut_to_whole_blocks_and_short_ones_skipped(dense):
    spec = resolve_diffusion(load_model(dense[0]).config)
    (batch,) = collect_batches([rows_of([37, 24, 15])], 0, spec)
    assert batch.input_ids.shape == (2, 32)
    assert batch.valid.sum(dim=1).tolist() == [32, 24]


def test_passes_hold_every_block_after_its_clean_context(dense):
    """Inputs of a Linear in a calibration pass are those of generation: block by block with the plain forward."""
    folder, config, tensors = dense
    model = load_model(folder, torch.float32)
    spec = resolve_diffusion(model.config)
    corruption = TrajectoryCorruption(spec, 0, 1e-3)
    (batch,) = collect_batches([rows_of([24])], 0, spec)
    (each,) = corrupted_passes([batch], [0.5], corruption)
    assert (each.context, each.shape) == (16, (1, 40))
    with torch.no_grad():
        logits = model(**each.inputs).logits[0, 16:]
        clean, noisy = batch.input_ids[0], each.inputs["input_ids"][0, 16:]
        for begin in (0, 8, 16):
            ids = torch.cat([clean[:begin], noisy[begin : begin + 8]])
            visible = [list(range(q + 1)) if q < begin else list(range(len(ids))) for q in range(len(ids))]
            expected = plain_nemotron_labs(tensors, config, ids, visible)[begin:]
            torch.testing.assert_close(logits[begin : begin + 8], expected, **CLOSE)
    # Without noise it is how a prompt is read, and all tokens count.
    clean_one = clean_pass(batch, spec)
    assert (clean_one.context, clean_one.shape) == (0, (1, 24))


def test_no_position_is_a_sink_by_construction(dense):
    """Queries of zero attend uniformly, and then no key has more mass than another."""
    model = load_model(dense[0], torch.float32)
    spec = resolve_diffusion(model.config)
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.self_attn.q_proj.weight.zero_()
    batches = collect_batches([rows_of([32, 24])], 0, spec)
    passes = corrupted_passes(batches, [0.5], TrajectoryCorruption(spec, 0, 1e-3))
    with torch.no_grad():
        engine = PassEngine(model, find_decoder_blocks(model)[1], progress=False)
        (mass,) = sweep_attention(engine, passes, 2, title="")
    # Two layers of eight heads.
    valid = passes[0].valid
    torch.testing.assert_close(mass[valid], torch.full_like(mass[valid], 16.0), rtol=1e-5, atol=0)


def test_the_likelihood_of_an_answer_is_the_sum_over_its_blocks(dense):
    """Against one sample and one block at a time with the plain forward; an answer of more than one block."""
    folder, config, tensors = dense
    model = load_model(folder, torch.float32)
    spec = resolve_diffusion(model.config)
    context, answer = list(range(30, 35)), list(range(50, 62))
    tokens = torch.tensor([*context, *answer])
    (found,) = answer_log_likelihoods(model, context, [answer], spec, mc_num=3, seed=4)
    generator = sample_generator(4, 3, tokens)
    counts = masked_counts(12, 3, generator)
    ranks = torch.rand(3, 12, generator=generator).argsort(dim=1).argsort(dim=1)
    total = 0.0
    for count, rank in zip(counts.tolist(), ranks, strict=True):
        masked = rank < count
        noisy = tokens.clone()
        noisy[5:][masked] = 2
        for first in (0, 8):
            last = min(first + 8, 12)
            begin, end = 5 + first, 5 + last
            ids = torch.cat([tokens[:begin], noisy[begin:end]])
            visible = [list(range(q + 1)) if q < begin else list(range(end)) for q in range(end)]
            log_p = plain_nemotron_labs(tensors, config, ids, visible)[begin:].log_softmax(-1)
            chosen = masked[first:last]
            picked = log_p[chosen].gather(1, tokens[begin:end][chosen][:, None])
            total += picked.double().sum().item() * 12 / count / 3
    assert found == pytest.approx(total, rel=1e-4)


def test_lm_eval_answers_as_denoise_does(dense, tasks):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness isn't installed (sinkprune-plugin[eval])")
    from test_lm_eval import evaluate, samples_of

    from sinkprune_plugin.sampling import denoise

    results = evaluate(["own_choice", "own_cloze"], tasks[0], pretrained=dense[0], mc_num=2, dtype="float32")
    model, tokenizer = load_model(dense[0], torch.float32), load_tokenizer(dense[0])
    sample = samples_of(results, "own_cloze")[0]
    prompt = tokenizer.encode(sample["doc"]["stem"], add_special_tokens=False)
    (tokens,) = denoise(model, torch.tensor(prompt), gen_length=20, eos_token_ids={1}).sequences
    # Cut at the end-of-sequence token, and at the task's first stop string.
    text = tokenizer.decode([token for token in tokens.tolist() if token != 1], skip_special_tokens=True)
    for stop in (".", ";"):
        text = text.split(stop)[0]
    assert sample["resps"][0][0] == text
