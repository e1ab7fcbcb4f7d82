"""Commands, calls and other blocks that the documentation prints, taken out of its fenced blocks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from golden_data import REPOSITORY

__all__ = ["Example", "documented_examples", "inline_commands"]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A block without a language is a list of commands if its beginning looks like one, else data or output.
_PROGRAMS = ("sinkprune", "lm_eval", "python", "make", "git", "vllm", "curl", "pip", "torchrun", ".venv/")


@dataclass(frozen=True)
class Example:
    """One thing to run, or one block that isn't run.

    :param page: file, relative to the repository
    :param kind: ``command``, ``python``, ``yaml``, ``json`` or ``text``
    :param text: a shell command with its continuation lines and comment, or a whole block
    :param variables: assignments of earlier lines of the page that the command uses
    """

    page: str
    kind: str
    text: str
    variables: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Short and unique enough for a test's name."""
        return f"{self.page}: {' '.join(self.text.split())[:90]}"


def documented_examples() -> list[Example]:
    """All examples of all pages, in order."""
    pages = [page for page in sorted(REPOSITORY.rglob("*.md")) if _is_ours(page)]
    return [example for page in pages for example in _of_page(page)]


def inline_commands() -> list[tuple[str, str]]:
    """Page and text of each inline code span, outside of blocks, of ``sinkprune`` with arguments."""
    return [
        (str(page.relative_to(REPOSITORY)), span)
        for page in sorted(REPOSITORY.rglob("*.md"))
        if _is_ours(page)
        for span in re.findall(r"`(sinkprune [^`]+)`", _FENCE.sub("", page.read_text(encoding="utf-8")))
    ]


def _is_ours(page) -> bool:
    # The change log describes past releases; .venv and results of the demo may lie in the repository.
    folder = page.relative_to(REPOSITORY).parts[0]
    return folder in {"README.md", "CONTRIBUTING.md", "docs", "benchmarks", "recipes", "sinkprune_plugin", "tests"}


def _of_page(page) -> Iterator[Example]:
    name = str(page.relative_to(REPOSITORY))
    variables: dict[str, str] = {}
    for language, block in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language:
            yield Example(name, language, block)
        elif block.removeprefix("$ ").startswith(_PROGRAMS) or re.match(r"[A-Z]+=", block):
            for command in _commands(block):
                assigned = re.match(r"([A-Z]+)=", command)
                if assigned:
                    variables[assigned[1]] = command
                else:
                    used = tuple(text for key, text in variables.items() if f"${key}" in command)
                    yield Example(name, "command", command, used)
        else:
            yield Example(name, "text", block)


def _commands(block: str) -> Iterator[str]:
    """Commands of a block: lines joined where one is continued, or goes on with an indentation or an open quote."""
    lines = block.splitlines()
    if any(line.startswith("$ ") for line in lines):
        # A session: what doesn't follow a prompt is output, or continues a command's open quote.
        lines = _behind_prompts(lines)
    command = ""
    for line in lines:
        continued = command and (line.startswith(" ") or command.endswith("\\") or _quote_is_open(command))
        if command and not continued:
            yield command
            command = ""
        command = f"{command}\n{line}" if command else line
    if command:
        yield command


def _behind_prompts(lines: list[str]) -> list[str]:
    kept: list[str] = []
    for line in lines:
        if line.startswith("$ "):
            kept.append(line.removeprefix("$ "))
        elif kept and _quote_is_open("\n".join(kept)):
            kept.append(line)
    return kept


def _quote_is_open(command: str) -> bool:
    return re.sub(r"(^|\s)#.*", "", command).count("'") % 2 == 1
