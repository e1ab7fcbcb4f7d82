"""`sinkprune prune` where a recipe only removes experts by their weights: on the files, no model in memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkprune_plugin.inputs import check_checkpoint
from sinkprune_plugin.modifiers import load_oneshot_flow
from sinkprune_plugin.outputs import check_output, new_directory
from sinkprune_plugin.provenance import write_provenance
from sinkprune_plugin.recipe_files import RECIPE_FILE, read_recipe
from sinkprune_plugin.steps import Steps

if TYPE_CHECKING:
    from sinkprune_plugin.modifiers.experts import ExpertPruningModifier

__all__ = ["modifier_without_data", "prune_experts_in_files"]


def modifier_without_data(recipe: Path, text: str, content: dict[str, Any]) -> "ExpertPruningModifier | None":
    """The only modifier of a recipe, if it removes experts and needs no data.

    :param recipe: the recipe's file, for messages
    :param text: its text
    :param content: what it holds
    :return: the modifier; None for any other recipe
    :raises UsageError: if llm-compressor can't read the recipe
    """
    # Importing llm-compressor takes seconds, and other recipes have checks that come before.
    if "ExpertPruningModifier" not in text:
        return None
    modifiers = load_oneshot_flow().check_recipe(recipe, content).modifiers
    from sinkprune_plugin.modifiers.experts import ExpertPruningModifier

    only = modifiers[0] if len(modifiers) == 1 else None
    return only if isinstance(only, ExpertPruningModifier) and not only.needs_data else None


def prune_experts_in_files(
    model_name: str,
    source: Path,
    modifier: "ExpertPruningModifier",
    recipe: Path,
    text: str,
    content: dict[str, Any],
    output: Path,
    *,
    overwrite: bool,
    steps: Steps,
) -> None:
    """Score the experts of a checkpoint and write it without the least important ones.

    :param model_name: what the user calls the checkpoint
    :param source: its directory
    :param modifier: what is to be done
    :param recipe: the recipe's file
    :param text: its text, for the record
    :param content: what it holds
    :param output: directory to write
    :param overwrite: replace an existing output
    :param steps: the command's display
    :raises UsageError: on wrong input; nothing is written then
    """
    from sinkprune_plugin.modifiers.expert_files import ExpertFiles

    with new_directory(output, overwrite=overwrite) as directory:
        with steps.step(f"reading {model_name}"):
            check_checkpoint(source)
            earlier = source / RECIPE_FILE
            if earlier.is_file():
                read_recipe(earlier)
            files = ExpertFiles(source, modifier)
            check_output(output, overwrite=overwrite, needed_bytes=files.written_bytes)
        with steps.step(f"scoring experts with {recipe.name} (no data, weights read from the files)"):
            kept = files.choose(files.scores())
        with steps.step(f"writing {output}"):
            saved = load_oneshot_flow().check_recipe(recipe, content)
            line = saved.modifiers[0].settle(files.removed(kept), files.blocks)
            if line is not None:
                steps.note(line)
            steps.note(f"{type(modifier).__name__}: {files.write(kept, directory)}")
            # As llm-compressor does where it saves: the recipe after those that made the source.
            saved.yaml(
                file_path=str(directory / RECIPE_FILE),
                existing_recipe_path=str(earlier) if earlier.is_file() else None,
            )
            write_provenance(directory, model=str(model_name), recipe=text)
