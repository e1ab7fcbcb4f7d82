"""What lies next to the output while a run isn't finished."""

import pytest
import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.recovery.options import RecoveryOptions
from sinkprune_plugin.recovery.training_arguments import training_arguments
from sinkprune_plugin.recovery.unfinished_run import UnfinishedRun, fingerprint

SETTINGS = {"pruned": "a", "options": {"steps": 3}}


def state(run, number, complete=True):
    directory = run.states / f"checkpoint-{number}"
    directory.mkdir(parents=True)
    if complete:
        (directory / "trainer_state.json").write_text("{}")
    return directory


def test_the_latest_complete_state_is_resumed_from(tmp_path):
    run = UnfinishedRun(tmp_path / "out")
    assert run.begin(SETTINGS, resume=False, overwrite=False) is None
    assert run.begin(SETTINGS, resume=True, overwrite=False) is None
    wanted = [state(run, 9), state(run, 10)][1]
    cut_off = state(run, 11, complete=False)
    assert run.begin(SETTINGS, resume=True, overwrite=False) == wanted
    assert not cut_off.exists()
    run.remove()
    assert not (tmp_path / "out.unfinished").exists()


def test_other_settings_are_refused(tmp_path):
    run = UnfinishedRun(tmp_path / "out")
    run.begin(SETTINGS, resume=False, overwrite=False)
    with pytest.raises(UsageError, match=r"made with options \{'steps': 3\}, not \{'steps': 4\}; use the same"):
        run.begin(SETTINGS | {"options": {"steps": 4}}, resume=True, overwrite=False)
    with pytest.raises(UsageError, match="holds a recovery that was interrupted; pass --resume"):
        run.begin(SETTINGS, resume=False, overwrite=False)
    assert run.begin(SETTINGS | {"pruned": "b"}, resume=False, overwrite=True) is None


def test_fingerprints_tell_texts_apart():
    windows = torch.arange(12).reshape(3, 4)
    assert fingerprint(windows) == fingerprint(windows.clone())
    assert fingerprint(windows) != fingerprint(windows.flip(0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"train": "everything"}, "train"),
        ({"method": "elbo", "teacher_top_k": 4}, "teacher_top_k belongs to method distill, not elbo"),
        ({"method": "elbo", "temperature": 2.0}, "temperature belongs to method distill, not elbo"),
        ({"method": "blockwise", "elbo_share": 0.5}, "elbo_share belongs to method distill, not blockwise"),
        (
            {"method": "blockwise", "gradient_checkpointing": True},
            "gradient_checkpointing belongs to methods",
        ),
        ({"method": "blockwise", "micro_batch_size": 2}, "micro_batch_size belongs to methods distill and elbo"),
        ({"method": "blockwise", "train": "lora"}, "train lora saves memory where method blockwise needs little"),
        ({"temperature": 2.0, "teacher_top_k": 4}, "temperature 2 needs the teacher's whole distribution"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_wrong_options(values, message):
    with pytest.raises(ValueError, match=message):
        RecoveryOptions(**values)


def test_batches_are_split_into_micro_batches(tmp_path):
    arguments = training_arguments(
        tmp_path, RecoveryOptions(batch_size=8, micro_batch_size=2), use_cpu=True, fsdp=False
    )
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (2, 4)
    with pytest.raises(UsageError, match="gives 8 windows to each, which micro batches of 3 don't fill"):
        training_arguments(tmp_path, RecoveryOptions(batch_size=8, micro_batch_size=3), use_cpu=True, fsdp=False)
