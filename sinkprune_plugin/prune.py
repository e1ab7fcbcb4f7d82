"""`sinkprune prune`: one recipe through llm-compressor's own oneshot(), the result written whole or not at all."""

from pathlib import Path

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import checkpoint_bytes, default_sequence_length, load_model, load_tokenizer
from sinkprune_plugin.outputs import check_output, new_directory
from sinkprune_plugin.provenance import write_provenance
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
    overwrite: bool = False,
) -> Path:
    """Prune a model with a recipe and save it.

    :param model_name: directory or hub name
    :param recipe: YAML recipe
    :param output: directory to write
    :param dataset: text file, JSON-lines file or saved dataset; None takes the embedded calibration text
    :param num_samples: calibration windows
    :param seq_len: tokens in a window; None takes the model's maximum, at most 4096
    :param seed: seed of the choice of windows
    :param overwrite: replace an existing output
    :return: the output directory
    :raises UsageError: on wrong input; nothing is written then
    """
    from sinkprune_plugin.modifiers.oneshot_flow import log_to_stderr, run_oneshot

    log_to_stderr("INFO")
    if not recipe.is_file():
        raise UsageError(f"recipe {recipe} doesn't exist; the recipes folder has one for every method")
    check_output(output, overwrite=overwrite, needed_bytes=checkpoint_bytes(model_name))
    tokenizer = load_tokenizer(model_name)
    model = load_model(model_name)
    if seq_len is None:
        seq_len = default_sequence_length(model.config, LONGEST_DEFAULT)
    source = dataset if dataset is not None else embedded_text("calibration")
    windows = token_windows(read_documents(source), tokenizer, seq_len, num_samples, seed=seed)
    run_oneshot(model, tokenizer, recipe, windows)
    with new_directory(output, overwrite=overwrite) as directory:
        model.save_pretrained(str(directory))
        tokenizer.save_pretrained(str(directory))
        write_provenance(
            directory,
            model=str(model_name),
            recipe=recipe.read_text(encoding="utf-8"),
            dataset=Path(source).name,
            num_samples=len(windows),
            seq_len=seq_len,
            seed=seed,
        )
    return output
