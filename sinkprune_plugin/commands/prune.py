"""`sinkprune prune`: one recipe through llm-compressor's own oneshot(), the result written whole or not at all."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sinkprune_plugin.commands.prune_experts import modifier_without_data, prune_experts_in_files
from sinkprune_plugin.devices import choose_device
from sinkprune_plugin.errors import UsageError, reason_of, short
from sinkprune_plugin.inputs import check_checkpoint, load_inputs
from sinkprune_plugin.loading import fetch_files, load_config, load_model
from sinkprune_plugin.modifiers import check_llmcompressor, load_oneshot_flow
from sinkprune_plugin.outputs import check_output, new_directory
from sinkprune_plugin.provenance import write_provenance
from sinkprune_plugin.recipe_files import RECIPE_FILE, read_recipe
from sinkprune_plugin.steps import Steps, quiet_steps
from sinkprune_plugin.text_windows import embedded_text

__all__ = ["prune"]

# The published runs calibrate at the model's maximum length, 4096 for LLaDA; Dream's 131072 would be useless.
LONGEST_DEFAULT = 4096


def prune(
    model_name: str,
    recipe: Path,
    output: Path,
    *,
    dataset: str | None = None,
    num_samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int = 1,
    overwrite: bool = False,
    verbose: bool = False,
) -> Path:
    """Prune a model with a recipe and save it.

    :param model_name: directory or hub name
    :param recipe: YAML recipe
    :param output: directory to write
    :param dataset: text file, JSON-lines file or saved dataset; None takes the embedded calibration text
    :param num_samples: calibration windows
    :param seq_len: tokens in a window; None takes the model's maximum, at most 4096
    :param seed: seed of the choice of windows
    :param device: where weights are brought for the forward passes: ``auto`` (the accelerator if there is one),
        ``cpu``, ``cuda:1``, …; the model itself waits in main memory, one module at a time is on the device
    :param batch_size: windows in a forward pass
    :param overwrite: replace an existing output
    :param verbose: show what llm-compressor and transformers say and their progress bars
    :return: the output directory
    :raises UsageError: on wrong input; nothing is written then
    """
    check_llmcompressor()
    text, content = read_recipe(recipe)
    place = choose_device(device)
    with quiet_steps(verbose=verbose) as steps:
        modifier = modifier_without_data(recipe, text, content)
        source = None if modifier is None else _directory_of_experts(model_name, steps)
        if modifier is not None and source is not None:
            prune_experts_in_files(
                model_name, source, modifier, recipe, text, content, output, overwrite=overwrite, steps=steps
            )
            return output
    # Around all of the work: a result whose place was taken meanwhile is kept next to it.
    with quiet_steps(verbose=verbose) as steps, new_directory(output, overwrite=overwrite) as directory:
        with steps.step(f"loading {model_name}"):
            inputs = load_inputs(
                model_name,
                dataset=dataset,
                default="calibration",
                seq_len=seq_len,
                longest=LONGEST_DEFAULT,
                count=num_samples,
                seed=seed,
            )
            earlier = Path(model_name) / RECIPE_FILE
            if earlier.is_file():
                # llm-compressor adds to it where it saves.
                read_recipe(earlier)
            # A sparse checkpoint is written from a dense one next to it.
            check_output(output, overwrite=overwrite, needed_bytes=2 * inputs.weight_bytes)
            flow = load_oneshot_flow()
            with flow.log_to(steps):
                flow.check_recipe(recipe, content)
            tokenizer, windows = inputs.tokenizer, inputs.windows
            model = load_model(model_name)
            _check_saving(model, tokenizer, directory)
        with flow.log_to(steps):
            count, length = windows.shape
            with steps.step(f"pruning with {recipe.name} ({count} × {length} tokens, {place})"):
                # "auto" is what llm-compressor does on its own, and it knows its rank among several processes.
                onload = None if device == "auto" else place
                try:
                    flow.run_oneshot(model, tokenizer, recipe, windows, device=onload, batch_size=batch_size)
                except (UsageError, ValidationError):
                    raise
                except ValueError as error:
                    # How llm-compressor refuses models and recipes.
                    raise UsageError(
                        f"llm-compressor can't prune {model_name}: {short(reason_of(error), 400)}"
                    ) from error
            with steps.step(f"writing {output}"):
                model.save_pretrained(str(directory))
                tokenizer.save_pretrained(str(directory))
                write_provenance(
                    directory,
                    model=str(model_name),
                    recipe=text,
                    dataset=Path(dataset if dataset is not None else embedded_text("calibration")).name,
                    num_samples=len(windows),
                    seq_len=windows.shape[1],
                    seed=seed,
                )
    return output


def _directory_of_experts(model_name: str, steps: Steps) -> Path | None:
    """Where the files of a mixture are, those of a hub in its cache; None for files that can't be pruned by themselves.

    :param model_name: directory or hub name
    :param steps: the command's display
    :raises UsageError: if files are damaged or can't be fetched, or the family has no experts
    """
    from sinkprune_plugin.models.expert_lists import experts_of
    from sinkprune_plugin.modifiers.expert_files import has_expert_files

    check_checkpoint(model_name)
    directory = Path(model_name)
    if not directory.is_dir():
        # Before gigabytes are fetched.
        experts_of(load_config(model_name))
        with steps.step(f"fetching {model_name}"):
            directory = fetch_files(model_name)
    return directory if has_expert_files(directory) else None


def _check_saving(model: Any, tokenizer: Any, directory: Path) -> None:
    """Save everything but the weights: transformers may refuse to save what it loads, and then all work is lost."""
    dtype = model.config.dtype
    try:
        model.save_pretrained(directory, state_dict={})
        # Which saving turned into its name.
        model.config.dtype = dtype
        tokenizer.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:
        # Of any type: values of a wrong type fail wherever they are used.
        reason = short(reason_of(error), 300)
        raise UsageError(f"a model pruned from this one couldn't be saved: {reason}; correct its files") from error
