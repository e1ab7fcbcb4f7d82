"""`sinkprune sinks`: load a model and text, measure, write the report and print its table."""

from pathlib import Path

from rich.console import Console

from sinkprune_plugin.devices import choose_device
from sinkprune_plugin.loading import default_sequence_length, load_model, load_tokenizer
from sinkprune_plugin.outputs import check_output
from sinkprune_plugin.sinks.report import print_sink_report, sink_report
from sinkprune_plugin.steps import quiet_steps
from sinkprune_plugin.text_windows import embedded_text, read_documents, token_windows

__all__ = ["measure_sinks"]

# Long enough for sinks to move, short enough to read in a plot.
LONGEST_DEFAULT = 512


def measure_sinks(
    model_name: str,
    output: Path,
    *,
    dataset: str | None = None,
    num_samples: int = 8,
    seq_len: int | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int | None = None,
    overwrite: bool = False,
    verbose: bool = False,
) -> None:
    """Measure the sinks of a model on text.

    :param model_name: directory or hub name; a diffusion LM, or any other for comparison
    :param output: directory to write
    :param dataset: text file, JSON-lines file or saved dataset; None takes the embedded calibration text
    :param num_samples: text windows
    :param seq_len: tokens in a window; None takes the model's maximum, at most 512
    :param seed: seed of corruption and of the choice of windows
    :param device: where the model runs: ``auto`` (the accelerator if there is one), ``cpu``, ``cuda:1``, …
    :param batch_size: windows in a forward pass; None takes as many as have 2048 tokens
    :param overwrite: replace an existing output
    :param verbose: show what transformers says and its progress bars
    :raises UsageError: on wrong input; nothing is written then
    """
    place = choose_device(device)
    check_output(output, overwrite=overwrite)
    source = dataset if dataset is not None else embedded_text("calibration")
    with quiet_steps(verbose=verbose) as steps:
        with steps.step(f"loading {model_name}"):
            tokenizer = load_tokenizer(model_name)
            model = load_model(model_name, device=place)
            length = seq_len if seq_len is not None else default_sequence_length(model.config, LONGEST_DEFAULT)
            windows = token_windows(read_documents(source), tokenizer, length, num_samples, seed=seed)
        with steps.step(f"looking for sinks ({len(windows)} × {length} tokens, {place})"):
            report = sink_report(
                model, tokenizer, windows, output, seed=seed, batch_size=batch_size, overwrite=overwrite
            )
    print_sink_report(report, Console())
