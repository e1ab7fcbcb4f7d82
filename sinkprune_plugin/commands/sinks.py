"""`sinkprune sinks`: load a model and text, measure, write the report and print its table."""

from pathlib import Path

from rich.console import Console

from sinkprune_plugin.devices import choose_device
from sinkprune_plugin.inputs import load_inputs
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.outputs import check_output
from sinkprune_plugin.sinks.observe import find_spec
from sinkprune_plugin.sinks.report import print_sink_report, sink_report
from sinkprune_plugin.steps import quiet_steps

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
    with quiet_steps(verbose=verbose) as steps:
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
            spec = find_spec(inputs.config, inputs.tokenizer)
            model = load_model(model_name, device=place)
        count, length = inputs.windows.shape
        with steps.step(f"looking for sinks ({count} × {length} tokens, {place})"):
            report = sink_report(
                model, spec, inputs.windows, output, seed=seed, batch_size=batch_size, overwrite=overwrite
            )
    print_sink_report(report, Console())
