"""`sinkprune recover` from end to end, on a small random LLaDA: format, zeros, resuming, processes, bad input."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from recovery_cases import make_pair, prune, save, small_model, text_file
from transformers import TrainerState

from sinkprune_plugin.commands.recover import recover_model, steps_of
from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import load_sparse_checkpoint
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.models.llada import LLaDALlamaBlock
from sinkprune_plugin.recovery.fixed_zeros import FixedZeros
from sinkprune_plugin.recovery.options import RecoveryOptions
from sinkprune_plugin.recovery.recover import recover
from sinkprune_plugin.recovery.trainer import KeepZeros, RecoveryTrainer

QUICK = {"batch_size": 4, "evaluations": 2, "learning_rate": 3e-3, "seed": 1}
SHORT = {"steps": 6, "seq_len": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(text_file(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def recovered(pair, text, tmp_path_factory):
    """A run of six steps, and where it is."""
    output = tmp_path_factory.mktemp("recovered") / "out"
    result = recover_model(*pair, output, options=RecoveryOptions(**QUICK), dataset=text, **SHORT)
    return result, output


def tensors(directory):
    reader = load_sparse_checkpoint(directory)
    return {name: reader[name] for name in reader}


def assert_zeros_kept(pruned, output):
    before, after = tensors(pruned), tensors(output)
    assert list(before) == list(after)
    moved = 0
    for name, weight in before.items():
        zero = weight == 0
        assert not after[name][zero].view(torch.uint8).any(), name
        moved += int(not torch.equal(weight, after[name]))
    assert moved == 14, "all Linears of both blocks, and nothing else"


def test_it_learns_and_keeps_the_zeros(pair, recovered):
    result, output = recovered
    assert result.directory == output
    assert result.held_out_after < result.held_out_before
    assert_zeros_kept(pair[1], output)
    assert not output.with_name("out.unfinished").exists()


def test_what_is_next_to_the_weights(pair, recovered):
    _, output = recovered
    assert (output / "recipe.yaml").read_text() == (pair[1] / "recipe.yaml").read_text()
    record = json.loads((output / "sinkprune_provenance.json").read_text())
    assert record["settings"]["recovery"]["options"]["steps"] == 6
    curve = json.loads((output / "recovery" / "recovery.json").read_text())
    assert [step for step, _ in curve["training_loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in curve["held_out_loss"]] == [0, 3, 6]
    assert (output / "recovery" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (output / "recovery" / "recovery.html").read_text()


@pytest.mark.parametrize(
    ("pattern", "save_format", "dtype"),
    [("2:4", "sparse-24-bitmask", torch.bfloat16), ("unstructured", "sparse-bitmask", torch.float32)],
)
def test_the_format_of_the_pruned_checkpoint_stays(pattern, save_format, dtype, text, tmp_path):
    dense, pruned = make_pair(tmp_path, pattern, save_format, dtype)
    recover_model(dense, pruned, tmp_path / "out", options=RecoveryOptions(**QUICK), dataset=text, **SHORT)
    assert_zeros_kept(pruned, tmp_path / "out")
    before, after = load_sparse_checkpoint(pruned), load_sparse_checkpoint(tmp_path / "out")
    assert after.format == before.format == save_format
    assert after.sparse_names == before.sparse_names
    assert {after[name].dtype for name in after} == {dtype}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "elbo"},
        {"teacher_top_k": 64},
        {"train": "lora", "lora_rank": 4, "learning_rate": 3e-2},
        {"train": "weights-and-norms", "elbo_share": 0.5, "temperature": 2.0, "micro_batch_size": 2},
    ],
    ids=["elbo", "predictions on disk", "lora", "norms"],
)
def test_variants_learn_and_keep_the_zeros(options, pair, text, tmp_path):
    result = recover_model(*pair, tmp_path / "out", options=RecoveryOptions(**(QUICK | options)), dataset=text, **SHORT)
    assert result.held_out_after < result.held_out_before
    before, after = tensors(pair[1]), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name for name in before if "norm" in name and "blocks" in name}
    assert changed & norms == (norms if options.get("train") == "weights-and-norms" else set())
    assert all(not after[name][before[name] == 0].any() for name in before)


def test_each_look_at_the_held_out_windows_is_handed_over(pair, tmp_path):
    looks = []

    def look(step, loss, model):
        looks.append((step, loss, {name: value.clone() for name, value in model.state_dict().items()}))

    windows = torch.randint(3, 2048, (9, 32), generator=torch.Generator().manual_seed(0))
    spec = resolve_diffusion(load_model(pair[0]).config)
    options = RecoveryOptions(**QUICK, steps=2)
    result = recover(*pair, tmp_path / "out", windows, spec, options, use_cpu=True, after_evaluation=look)
    assert [step for step, _, _ in looks] == [0, 1, 2]
    assert looks[0][1] == result.held_out_before
    assert min(loss for _, loss, _ in looks) == result.held_out_after
    before, chosen = tensors(pair[1]), tensors(tmp_path / "out")
    assert all(torch.equal(before[name], looks[0][2][name]) for name in before)
    assert all(torch.equal(chosen[name], looks[result.best_step][2][name]) for name in chosen)


def test_blockwise_lowers_the_blocks_errors(pair, text, tmp_path):
    options = RecoveryOptions(method="blockwise", batch_size=4, learning_rate=3e-3, held_out=0.25)
    result = recover_model(*pair, tmp_path / "out", options=options, dataset=text, **(SHORT | {"steps": 20}))
    assert result.held_out_after < 0.9 * result.held_out_before
    assert_zeros_kept(pair[1], tmp_path / "out")
    blocks = json.loads((tmp_path / "out" / "recovery" / "recovery.json").read_text())["blocks"]
    assert [block["block"] for block in blocks] == [0, 1]


def test_stored_predictions_come_close_to_the_live_teacher(pair, text, recovered, tmp_path):
    options = RecoveryOptions(**QUICK, teacher_top_k=1024)
    stored = recover_model(*pair, tmp_path / "out", options=options, dataset=text, **SHORT)
    # Half of the vocabulary's tokens are one outcome here, and probabilities have three digits.
    assert stored.held_out_after == pytest.approx(recovered[0].held_out_after, rel=0.05)


def test_interrupted_and_resumed_equals_uninterrupted(pair, text, recovered, tmp_path, monkeypatch):
    original = RecoveryTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    call = {"options": RecoveryOptions(**QUICK), "dataset": text, **SHORT}
    monkeypatch.setattr(RecoveryTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recover_model(*pair, tmp_path / "out", **call)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="holds a recovery that was interrupted; pass --resume to go on"):
        recover_model(*pair, tmp_path / "out", **call)
    with pytest.raises(UsageError, match="was made with options"):
        recover_model(*pair, tmp_path / "out", **(call | {"steps": 7}), resume=True)
    resumed = recover_model(*pair, tmp_path / "out", **call, resume=True)
    assert resumed.held_out_after == recovered[0].held_out_after
    wanted = tensors(recovered[1])
    assert all(torch.equal(weight, wanted[name]) for name, weight in tensors(tmp_path / "out").items())


def test_micro_batches_change_nothing_but_rounding(pair, text, recovered, tmp_path):
    options = RecoveryOptions(**QUICK, micro_batch_size=1)
    result = recover_model(*pair, tmp_path / "out", options=options, dataset=text, **SHORT)
    # Sums in another order; AdamW's first steps turn them into differences of the learning rate's size times 1e-3.
    assert result.held_out_after == pytest.approx(recovered[0].held_out_after, rel=1e-3)


def test_gradient_checkpointing_computes_activations_twice_and_changes_nothing(
    pair, text, recovered, tmp_path, monkeypatch
):
    forwards = []
    original = LLaDALlamaBlock.forward

    def counting(self, *args, **kwargs):
        forwards.append(self.training)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LLaDALlamaBlock, "forward", counting)
    options = RecoveryOptions(**QUICK, gradient_checkpointing=True)
    result = recover_model(*pair, tmp_path / "out", options=options, dataset=text, **SHORT)
    assert result.held_out_after == recovered[0].held_out_after
    # Six steps, two blocks, forward and again in the backward pass.
    assert sum(forwards) == 6 * 2 * 2


def test_weights_split_by_fsdp_keep_their_zeros(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = prune(small_model(vocab_size=40)).train()
    zeros = FixedZeros(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.model.transformer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    weights = {name: p for name, p in model.named_parameters() if name in zeros}
    assert {type(weight).__name__ for weight in weights.values()} == {"DTensor"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    restore = zeros.attach(model)
    for _ in range(2):
        model(input_ids=torch.randint(3, 40, (2, 8))).logits.square().mean().backward()
        optimizer.step()
        restore()
        optimizer.zero_grad()
    zeros.require({name: weight.full_tensor() for name, weight in weights.items()}, "the model")


def test_a_filled_zero_in_a_saved_state_of_several_files_is_found(tmp_path):
    model = prune(small_model())
    zeros = FixedZeros(model)
    name, module = list(block_linears(model).items())[-1]
    with torch.no_grad():
        module.weight[zeros.of(f"{name}.weight")] = 1e-3
    # transformers splits states beyond 50 GB; here beyond 20 kB.
    model.save_pretrained(tmp_path / "checkpoint-7", max_shard_size="20KB")
    assert len(list((tmp_path / "checkpoint-7").glob("*.safetensors"))) > 2
    state = TrainerState(global_step=7, is_world_process_zero=True)
    with pytest.raises(UsageError, match=rf"checkpoint-7: {name}.weight has bits set at \d+ places"):
        KeepZeros(zeros, trained=True).on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)


def test_two_processes_equal_one(pair, text, recovered, tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"),
        "sinkprune_plugin",
        *("recover", str(pair[0]), str(pair[1]), "--output", str(tmp_path / "out"), "--dataset", text),
        *("--steps", "6", "--seq-len", "32", "--device", "cpu", "--batch-size", "4", "--evaluations", "2"),
        *("--learning-rate", "3e-3", "--seed", "1"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("recovered model written to") == 1
    wanted = tensors(recovered[1])
    for name, weight in tensors(tmp_path / "out").items():
        # As above: the mean of two halves, rounded otherwise.
        assert torch.allclose(weight, wanted[name], atol=2e-3), name
    curve = json.loads((tmp_path / "out" / "recovery" / "recovery.json").read_text())
    assert curve["held_out_loss_after"] == pytest.approx(recovered[0].held_out_after, rel=1e-3)


# ---- what goes wrong


@pytest.mark.parametrize(
    ("training", "factor", "message"),
    [
        (True, float("nan"), "the loss is nan at step 5"),
        (False, 10.0, r"the held-out loss is \S+ at step 6, \S+ times that before training"),
        (False, float("inf"), "the held-out loss is inf at step 6"),
    ],
)
def test_a_diverging_loss_stops_and_keeps_the_best_state(training, factor, message, pair, text, tmp_path, monkeypatch):
    original = RecoveryTrainer.compute_loss

    def diverging(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        return loss * factor if model.training == training and self.state.global_step >= 4 else loss

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", diverging)
    result = recover_model(*pair, tmp_path / "out", options=RecoveryOptions(**QUICK), dataset=text, **SHORT)
    assert re.fullmatch(message, result.stopped_because)
    assert (result.best_step, result.directory) == (3, tmp_path / "out")
    assert_zeros_kept(pair[1], tmp_path / "out")


def test_nothing_is_written_where_nothing_got_better(pair, text, tmp_path):
    # Updates below the last bit of every weight.
    options = RecoveryOptions(**(QUICK | {"learning_rate": 1e-20}))
    result = recover_model(*pair, tmp_path / "out", options=options, dataset=text, **SHORT)
    assert result.directory is None
    assert result.stopped_because is not None
    assert "no state was better on the held-out windows than the pruned model" in result.stopped_because
    assert not (tmp_path / "out").exists()


def test_a_full_disk_loses_nothing(pair, text, tmp_path, monkeypatch):
    original = RecoveryTrainer._save_optimizer_and_scheduler

    def full(self, directory):
        if self.state.global_step == 6:
            raise OSError(28, "No space left on device")
        return original(self, directory)

    call = {"options": RecoveryOptions(**QUICK), "dataset": text, **SHORT}
    monkeypatch.setattr(RecoveryTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(UsageError, match=r"a state couldn't be saved .*No space left.*go on with --resume"):
        recover_model(*pair, tmp_path / "out", **call)
    monkeypatch.undo()
    result = recover_model(*pair, tmp_path / "out", **call, resume=True)
    assert result.directory is not None


def test_models_that_do_not_belong_together(pair, text, tmp_path):
    other = small_model(vocab_size=2050)
    wrong = save(prune(other), tmp_path / "wrong")
    with pytest.raises(UsageError, match=r"transformer.ff_out.weight is \[2048, 32\] in .* and \[2050, 32\]"):
        recover_model(pair[0], wrong, tmp_path / "out", options=RecoveryOptions(), dataset=text, **SHORT)


def test_a_quantized_checkpoint(pair, text, tmp_path):
    quantized = tmp_path / "quantized"
    shutil.copytree(pair[1], quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="is quantized; recover the pruned model first"):
        recover_model(pair[0], quantized, tmp_path / "out", options=RecoveryOptions(), dataset=text, **SHORT)


def test_no_zeros_is_a_warning(pair, text, tmp_path):
    with pytest.warns(UserWarning, match="has no zeros in its decoder blocks"):
        recover_model(
            pair[0],
            save(small_model(seed=1), tmp_path / "dense2"),
            tmp_path / "out",
            options=RecoveryOptions(**QUICK),
            dataset=text,
            verbose=True,
            **(SHORT | {"steps": 1}),
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seq_len": 65}, "--seq-len 65 is longer than the model's 64"),
        ({"seq_len": 4}, "seq_len is 4; windows need at least 8"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        ({"tokens": 100}, "--steps 6 and --tokens 100 say the same thing"),
        ({"fsdp": True}, "fsdp splits a model over GPUs and there is none"),
        ({"dataset": "nowhere.txt"}, "nowhere.txt does not exist"),
        (
            {"options": RecoveryOptions(method="blockwise"), "resume": True},
            "--resume belongs to methods distill and elbo",
        ),
    ],
)
def test_wrong_calls(changed, message, pair, text, tmp_path):
    call = {"options": RecoveryOptions(), "dataset": text} | SHORT | changed
    with pytest.raises(UsageError, match=message):
        recover_model(*pair, tmp_path / "out", **call)
    assert not list(tmp_path.iterdir())


def test_models_are_two_and_neither_is_written_over(pair, text, tmp_path):
    dense, pruned = pair
    call = {"options": RecoveryOptions(), "dataset": text, "overwrite": True} | SHORT
    with pytest.raises(UsageError, match="is given as the dense and as the pruned model"):
        recover_model(dense, dense / ".", tmp_path / "out", **call)
    for output in pair:
        with pytest.raises(UsageError, match="is one of the two models that are read"):
            recover_model(dense, pruned, output, **call)


def test_text_too_short(pair, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("of the people " * 8)
    with pytest.raises(UsageError, match="0 windows of 32; training needs at least 2"):
        recover_model(*pair, tmp_path / "out", options=RecoveryOptions(), dataset=str(short), **SHORT)


def test_an_existing_output(pair, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(UsageError, match="pass --overwrite"):
        recover_model(*pair, tmp_path / "out", options=RecoveryOptions(), dataset=text, **SHORT)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_steps_of():
    assert steps_of(None, None, 8, 256, 300) == 300
    assert steps_of(7, None, 8, 256, 300) == 7
    assert steps_of(None, 8 * 256 * 3 + 1, 8, 256, 300) == 4


def test_the_result_loads(recovered):
    model = load_model(recovered[1])
    assert model(input_ids=torch.tensor([[5, 2, 7]])).logits.isfinite().all()
