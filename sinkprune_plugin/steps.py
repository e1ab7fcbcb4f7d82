"""One line for each step of a command, in place of the bars and messages of the libraries underneath.

On a terminal the line of the running step is live and shows the progress of any tqdm bar.
Elsewhere a line is printed where a step begins. Warnings come through as one line each, except those that are known to
be irrelevant to a user; once the context ends, everything is as before.
"""

import contextlib
import io
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import tqdm
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

__all__ = ["Steps", "is_noise", "quiet_steps"]

# Messages of the libraries in every run, whatever the user does.
_NOISE = re.compile(
    "|".join(
        (
            "Attempting to save a model with offloaded modules",  # transformers, after any oneshot()
            "is_fx_tracing will return true",  # torch, about llm-compressor's tracing
            "No accelerator available! Compressing model on CPU",
            "Disabling tokenizer parallelism",
        )
    )
)
_NOISY_LOGGERS = ("torch.fx._symbolic_trace",)


def is_noise(message: str) -> bool:
    """Whether a library's message is one that every run has.

    :param message: its text
    """
    return _NOISE.search(message) is not None


class Steps:
    """What a command shows while it works; made by :func:`quiet_steps`.

    :param console: where to show it
    :param live: the display of a terminal; None elsewhere
    :param verbose: whether the libraries' own messages and bars are shown
    """

    def __init__(self, console: Console, live: Progress | None, *, verbose: bool) -> None:
        self.verbose = verbose
        self._console, self._live = console, live
        self._task: TaskID | None = None

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show a running step.

        :param what: one line
        """
        if self._live is None:
            self.note(what)
            yield
            return
        started = time.monotonic()
        self._task = self._live.add_task(what, total=None, detail="")
        try:
            yield
            self.note(f"{what}, {time.monotonic() - started:.1f} s")
        finally:
            self._live.remove_task(self._task)
            self._task = None

    def note(self, line: str) -> None:
        """Print a line that stays, above the live one.

        :param line: plain text
        """
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def follow(self, bar: Any) -> None:
        """Show the progress of a tqdm bar in the line of the running step.

        :param bar: the bar
        """
        # Of nested bars the outermost is the most informative.
        if self._live is not None and self._task is not None and not bar.pos:
            detail = bar.desc.rstrip(": ")
            self._live.update(self._task, total=bar.total, completed=bar.n, detail=f" · {detail}" if detail else "")


@contextlib.contextmanager
def quiet_steps(*, verbose: bool = False, console: Console | None = None) -> Iterator[Steps]:
    """Show the steps of a command on stderr, and keep the libraries quiet meanwhile.

    :param verbose: leave bars, warnings and messages of the libraries as they are
    :param console: where to show the steps; default: stderr
    :return: context manager that yields the steps
    """
    console = console or Console(stderr=True)
    if verbose:
        yield Steps(console, None, verbose=True)
        return
    with contextlib.ExitStack() as stack:
        live = None
        if console.is_terminal:
            columns = (
                SpinnerColumn(),
                TimeElapsedColumn(),
                BarColumn(bar_width=12),
                TextColumn(
                    "{task.description}{task.fields[detail]}",
                    markup=False,
                    # What doesn't fit is cut off: a line that wraps can't be redrawn in its place.
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
            )
            live = stack.enter_context(Progress(*columns, console=console, transient=True, expand=True))
        steps = Steps(console, live, verbose=False)
        stack.enter_context(_bars_shown_by(steps.follow if live else None))
        stack.enter_context(_warnings_as_lines(steps.note))
        stack.enter_context(_without_noise_in_logs())
        yield steps


@contextlib.contextmanager
def _bars_shown_by(follow: Callable[[Any], None] | None) -> Iterator[None]:
    """Hand every tqdm bar that is made meanwhile to a function; None hides them.

    All bars of any library have one base class, and tqdm has no other switch for bars made elsewhere.
    """
    bars: Any = tqdm.std.tqdm
    make, display = bars.__init__, bars.display
    nowhere = _Nowhere(terminal=follow is not None)

    def make_silent(bar: Any, *args: Any, **options: Any) -> None:
        # `file` is the fifth argument.
        make(bar, *args, **(options if len(args) > 4 else options | {"file": nowhere}))

    def hand_over(bar: Any, msg: str | None = None, pos: int | None = None) -> bool:  # noqa: ARG001
        if follow is not None:
            follow(bar)
        return True

    bars.__init__, bars.display = make_silent, hand_over
    try:
        yield
    finally:
        bars.__init__, bars.display = make, display


class _Nowhere(io.StringIO):
    """A file that discards everything."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def write(self, text: str) -> int:
        return len(text)

    # Bars made with disable=None ask whether this is a terminal.
    def isatty(self) -> bool:
        return self._terminal


@contextlib.contextmanager
def _warnings_as_lines(note: Callable[[str], None]) -> Iterator[None]:
    with warnings.catch_warnings():
        # Meant for developers who use these libraries.
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            if not is_noise(str(message)):
                note(f"warning: {' '.join(str(message).split())}")

        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _without_noise_in_logs() -> Iterator[None]:
    def keep(record: logging.LogRecord) -> bool:
        return not is_noise(record.getMessage())

    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    # vLLM reads it where it is imported, also in the processes that it starts.
    level = os.environ.get("VLLM_LOGGING_LEVEL")
    if level is None:
        os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
        if level is None:
            os.environ.pop("VLLM_LOGGING_LEVEL", None)
