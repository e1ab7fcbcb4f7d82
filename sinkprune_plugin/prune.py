"""`sinkprune prune`: one recipe through llm-compressor's own oneshot(), the result written whole or not at all."""

from pathlib import Path

from sinkprune_plugin.devices import choose_device
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import checkpoint_bytes, default_sequence_length, load_model, load_tokenizer
from sinkprune_plugin.modifiers import load_oneshot_flow
from sinkprune_plugin.outputs import check_output, new_directory
from sinkprune_plugin.provenance import write_provenance
from sinkprune_plugin.steps import quiet_steps
from sinkprune_plugin.text_windows import embedded_text, read_documents, token_windows

__all__ = ["prune"]

# The published runs calibrate on the model's maximum, 4096 for LLaDA; Dream's 131072 would be of no use.
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
    if not recipe.is_file():
        raise UsageError(f"recipe {recipe} doesn't exist; the recipes folder has one for every method")
    place = choose_device(device)
    check_output(output, overwrite=overwrite, needed_bytes=checkpoint_bytes(model_name))
    source = dataset if dataset is not None else embedded_text("calibration")
    with quiet_steps(verbose=verbose) as steps:
        with steps.step(f"loading {model_name}"):
            tokenizer = load_tokenizer(model_name)
            model = load_model(model_name)
            length = seq_len if seq_len is not None else default_sequence_length(model.config, LONGEST_DEFAULT)
            windows = token_windows(read_documents(source), tokenizer, length, num_samples, seed=seed)
            flow = load_oneshot_flow()
        with flow.log_to(steps):
            with steps.step(f"pruning with {recipe.name} ({len(windows)} × {length} tokens, {place})"):
                # "auto" is what llm-compressor does by itself, and it knows its rank among several processes.
                onload = None if device == "auto" else place
                flow.run_oneshot(model, tokenizer, recipe, windows, device=onload, batch_size=batch_size)
            with steps.step(f"writing {output}"), new_directory(output, overwrite=overwrite) as directory:
                model.save_pretrained(str(directory))
                tokenizer.save_pretrained(str(directory))
                write_provenance(
                    directory,
                    model=str(model_name),
                    recipe=recipe.read_text(encoding="utf-8"),
                    dataset=Path(source).name,
                    num_samples=len(windows),
                    seq_len=length,
                    seed=seed,
                )
    return output
