"""What a command shows while it works: one line for each step, warnings that matter, and no other library's bars."""

import io
import logging
import os
import re
import warnings

import pytest
from rich.console import Console
from tqdm import tqdm
from tqdm.auto import tqdm as auto_tqdm

from sinkprune_plugin.steps import quiet_steps

NOISE = "Attempting to save a model with offloaded modules. Ensure that unallocated cpu memory exceeds …"


@pytest.fixture
def pipe():
    """A console that isn't a terminal, and what was written to it."""
    file = io.StringIO()
    return Console(file=file, width=80), file


@pytest.fixture
def terminal():
    file = io.StringIO()
    return Console(file=file, width=120, force_terminal=True), file


def run_bars():
    for bar in (tqdm, auto_tqdm):
        for _ in bar(range(3), desc="shards"):
            pass
    for _ in tqdm(range(3), "positional", 3, True, None):
        pass


def test_a_pipe_gets_one_line_where_a_step_begins(pipe, capfd):
    console, file = pipe
    with quiet_steps(console=console) as steps:
        with steps.step("loading a/[b]/model"):
            run_bars()
            assert file.getvalue() == "loading a/[b]/model\n"
        steps.note("done: " + 50 * "long ")
    assert file.getvalue().splitlines() == ["loading a/[b]/model", "done: " + 50 * "long "]
    captured = capfd.readouterr()
    assert "shards" not in captured.err
    assert "positional" not in captured.err
    assert captured.out == ""


def test_a_terminal_shows_the_progress_of_anybodys_bar_in_the_line_of_the_step(terminal, capfd):
    console, file = terminal
    with quiet_steps(console=console) as steps, steps.step("pruning [x]"):
        with auto_tqdm(total=4, desc="blocks", mininterval=0) as bar:
            bar.update(3)
            live = steps._live
            task = live.tasks[0]
            assert (task.completed, task.total, task.fields["detail"]) == (3, 4, " · blocks")
            with tqdm(total=9, desc="inner", mininterval=0) as inner:
                inner.update(9)
                assert task.fields["detail"] == " · blocks"
            live.refresh()
            assert "pruning [x] · blocks" in file.getvalue()
        with tqdm(total=2, disable=None, desc="only on a terminal", mininterval=0):
            assert task.fields["detail"] == " · only on a terminal"
    assert not live.tasks
    assert re.search(r"pruning \[x\], \d\.\d s\n", file.getvalue())
    assert "blocks" not in capfd.readouterr().err


def test_warnings_come_through_as_lines_and_noise_does_not(pipe, recwarn):
    console, file = pipe
    with quiet_steps(console=console):
        warnings.warn("the disk\nis nearly full", stacklevel=1)
        warnings.warn(NOISE, stacklevel=1)
        warnings.warn("an argument will go away", FutureWarning, stacklevel=1)
        warnings.warn("an argument will go away", DeprecationWarning, stacklevel=1)
        logging.getLogger("torch.fx._symbolic_trace").warning("is_fx_tracing will return true for both")
    assert file.getvalue() == "warning: the disk is nearly full\n"
    assert not recwarn.list


def test_only_noise_is_taken_out_of_a_library_s_log(pipe, caplog):
    with quiet_steps(console=pipe[0]):
        logger = logging.getLogger("torch.fx._symbolic_trace")
        logger.warning("is_fx_tracing will return true for both")
        logger.warning("something else")
        logging.getLogger("transformers.modeling_utils").warning("weights are newly initialized")
    assert [record.message for record in caplog.records] == ["something else", "weights are newly initialized"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_everything_is_as_before_after_the_context(error, terminal, capfd, monkeypatch):
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    before = (tqdm.__init__, tqdm.display, warnings.showwarning, list(warnings.filters))
    try:
        with quiet_steps(console=terminal[0]) as steps, steps.step("x"):
            assert os.environ["VLLM_LOGGING_LEVEL"] == "WARNING"
            assert tqdm.__init__ is not before[0]
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert (tqdm.__init__, tqdm.display, warnings.showwarning, list(warnings.filters)) == before
    assert not logging.getLogger("torch.fx._symbolic_trace").filters
    assert "VLLM_LOGGING_LEVEL" not in os.environ
    run_bars()
    assert "shards" in capfd.readouterr().err


def test_the_users_own_level_for_vllm_stays(pipe, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    with quiet_steps(console=pipe[0]):
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_verbose_leaves_all_to_the_libraries(terminal, capfd):
    console, file = terminal
    with quiet_steps(verbose=True, console=console) as steps, steps.step("loading"):
        run_bars()
        with pytest.warns(UserWarning, match="offloaded"):
            warnings.warn(NOISE, stacklevel=1)
    assert file.getvalue().strip() == "loading"
    assert "shards" in capfd.readouterr().err
