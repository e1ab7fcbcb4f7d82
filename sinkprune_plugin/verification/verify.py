"""`sinkprune verify`: measure a dense and a pruned model side by side, and write a report of it."""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from sinkprune_plugin.devices import choose_device
from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats.files.shard_reader import read_json
from sinkprune_plugin.inputs import Inputs, check_checkpoint, load_inputs
from sinkprune_plugin.inspection.info import inspect_checkpoint
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.outputs import check_output, new_directory
from sinkprune_plugin.provenance import write_provenance
from sinkprune_plugin.recipe_files import RECIPE_FILE, read_recipe
from sinkprune_plugin.sampling.family_options import block_within, default_caches
from sinkprune_plugin.sinks import sink_report
from sinkprune_plugin.sinks.observe import SinkSettings
from sinkprune_plugin.verification.bars import Bars, check_bars
from sinkprune_plugin.verification.compatibility import (
    check_pair,
    memory_bytes,
    natural_zeros,
)
from sinkprune_plugin.verification.peak_memory import PeakMemory, peak_memory
from sinkprune_plugin.verification.perplexity import compare_perplexity
from sinkprune_plugin.verification.recovered import recovered_section
from sinkprune_plugin.verification.report import JSON_FILE, SCHEMA_VERSION, write_report
from sinkprune_plugin.verification.same_kernels import why_not_faster
from sinkprune_plugin.verification.samples import compare_samples
from sinkprune_plugin.verification.speed import Workload, compare_speed, transformers_sampler, vllm_sampler
from sinkprune_plugin.vllm.cpu import prepare

__all__ = ["VerifyOptions", "verify"]

# Perplexity of longer windows adds nothing and takes longer.
LONGEST_WINDOW = 512
LONGEST_ANSWER = 64
# Tokens of a timed answer and seconds of timing.
LONGEST_TIMED, QUICK_TIMED = 32, 16
TIMING, QUICK_TIMING = 30.0, 10.0
# The quick variant answers in seconds, with intervals that are twice as wide.
WINDOWS, QUICK_WINDOWS = 24, 8
SAMPLES, QUICK_SAMPLES = 8, 4


@dataclass(frozen=True)
class VerifyOptions:
    """What to measure.

    :param backend: what times the generation: ``transformers`` or ``vllm``
    :param dataset: text file, JSON-lines file or saved dataset; None takes the embedded test text
    :param seq_len: tokens in a window; None takes the model's maximum, at most 512
    :param seed: seed of noise and of the choice of text
    :param quick: fewer windows and noise samples, smaller batches and shorter answers
    :param ar_model: an autoregressive model whose sinks are shown for comparison; None for none
    :param recovered: checkpoint directory of a model recovered from the pruned one, shown beside both
    :param bars: limits that the pruned model must meet
    :param dtype: precision both models are run in; None takes each checkpoint's own
    :param device: where transformers' models run: ``auto`` (the accelerator if there is one), ``cpu``, ``cuda:1``, …
    :param batch_size: windows in a forward pass, for perplexity and sinks; the speed has batch sizes of its own
    :param peak_memory: load each model once more, in a process of its own, to see the most memory that it takes
    """

    backend: Literal["transformers", "vllm"] = "transformers"
    dataset: str | None = None
    seq_len: int | None = None
    seed: int = 0
    quick: bool = False
    ar_model: str | None = None
    recovered: Path | None = None
    bars: Bars = field(default_factory=Bars)
    dtype: str | None = None
    device: str = "auto"
    batch_size: int = 8
    peak_memory: bool = False


def verify(
    dense: Path, pruned: Path, output: Path, options: VerifyOptions | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Compare two checkpoints and write report.json, report.html, plots and provenance.

    :param dense: checkpoint directory
    :param pruned: checkpoint directory, dense or sparse, that was pruned from the first
    :param output: directory to write; it appears whole or not at all
    :param options: what to measure
    :param overwrite: replace an existing output
    :return: the content of report.json; ``passed`` tells whether all limits are met
    :raises UsageError: if the two don't belong together, or on other wrong input; nothing is written then
    """
    options = options or VerifyOptions()
    if options.backend not in ("transformers", "vllm"):
        raise UsageError(f"backend {options.backend!r} is unknown; use transformers or vllm")
    if options.backend == "vllm" and options.peak_memory:
        raise UsageError(
            "vLLM takes as much memory for its cache as gpu_memory_utilization gives it, so its peak says nothing of a "
            "model; drop one of --peak-memory and --backend vllm"
        )
    options.bars.check()
    device = choose_device(options.device)
    if options.backend == "vllm":
        prepare()
    check_output(output, overwrite=overwrite)
    # What can be checked comes first: inspecting reads all weights, and loading and measuring take longest.
    inputs = _inputs(dense, options, options.seq_len, QUICK_WINDOWS if options.quick else WINDOWS)
    tokenizer, windows = inputs.tokenizer, inputs.windows
    check_checkpoint(pruned)
    spec = check_pair(dense, pruned, inputs.config, tokenizer)
    if options.recovered is not None:
        check_checkpoint(options.recovered)
        check_pair(dense, options.recovered, inputs.config, tokenizer)
    ar_inputs = None
    if options.ar_model is not None:
        ar_inputs = _inputs(options.ar_model, options, windows.shape[1], 2)
    recipe = _recipe(pruned)
    infos = [inspect_checkpoint(path) for path in (dense, pruned)]
    # A quarter of the window is the prompt, and an answer at most as long, so that both have room.
    prompts = windows[:, : max(1, windows.shape[1] // 4)]
    workload = _workload(spec, prompts, options)
    peaks = None
    if options.peak_memory:
        # Before the models are in this process: all may not fit at once.
        with tqdm(total=2, desc="peak memory", unit="model", disable=None) as bar:
            peaks = []
            for path in (dense, pruned):
                peaks.append(peak_memory(path, workload, options.dtype, device))
                bar.update()
    dtype: Any = "auto" if options.dtype is None else getattr(torch, options.dtype)
    models = [load_model(path, dtype, device) for path in (dense, pruned)]

    with new_directory(output, overwrite=overwrite) as directory:
        settings = SinkSettings(seed=options.seed)
        # In a function: the pruned model must not be held by a variable once it isn't needed.
        sinks = _sinks((dense, pruned), models, spec, windows, directory, settings, options)
        if options.ar_model is not None and ar_inputs is not None:
            sinks["autoregressive"] = sink_report(
                load_model(options.ar_model, device=device),
                ar_inputs.tokenizer,
                ar_inputs.windows,
                directory / "sinks-ar",
                settings=settings,
                batch_size=options.batch_size,
            )
        compare_quality = functools.partial(
            compare_perplexity,
            models[0],
            windows=windows,
            spec=spec,
            num_samples=QUICK_SAMPLES if options.quick else SAMPLES,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=True,
        )
        quality = compare_quality(models[1])
        answer = min(LONGEST_ANSWER, prompts.shape[1])
        compare_answers = functools.partial(
            compare_samples,
            models[0],
            tokenizer=tokenizer,
            prompts=prompts[: 2 if options.quick else 4],
            spec=spec,
            gen_length=answer,
            block_length=block_within(spec, min(16, answer)),
            progress=True,
        )
        samples = compare_answers(models[1])
        speed = _speed(dense, pruned, models, spec, workload, options)
        why = why_not_faster(infos[0], infos[1], options.backend, on_gpu=torch.cuda.is_available())
        content: dict[str, Any] = {
            "schema": "sinkprune.verify",
            "schema_version": SCHEMA_VERSION,
            "dense": _name(dense),
            "pruned": _name(pruned),
            "family": spec.name,
            "quality": asdict(quality) | {"increase_percent": quality.increase},
            "samples": asdict(samples),
            "sparsity": _sparsity(infos, natural_zeros(dense, pruned, infos[1].layers)),
            "size": _sizes(infos, models, peaks),
            "speed": {"backend": options.backend, "why_not_faster": why} | asdict(speed),
            "sinks": {name: _sink_summary(report) for name, report in sinks.items()},
        }
        if options.recovered is not None:
            # One of the three at a time beside the dense one: a model may have 16 GB.
            models.pop()
            models.append(load_model(options.recovered, dtype, device))
            content["recovered"] = recovered_section(
                options.recovered,
                _name(options.recovered),
                functools.partial(compare_quality, models[1]),
                functools.partial(compare_answers, models[1]),
            )
        results = check_bars(options.bars, content)
        content["bars"] = [asdict(result) for result in results]
        content["passed"] = all(result.passed for result in results)
        content["provenance"] = write_provenance(
            directory,
            backend=options.backend,
            dataset=Path(options.dataset).name if options.dataset else "embedded test text",
            windows=len(windows),
            seq_len=windows.shape[1],
            seed=options.seed,
            quick=options.quick,
            dtype=options.dtype or "each checkpoint's own",
            device=str(device),
            recipe=recipe,
        )
        write_report(directory, content, options.recovered)
    return read_json(output / JSON_FILE)


def _sinks(
    paths: Sequence[Path],
    models: Sequence[Any],
    spec: Any,
    windows: torch.Tensor,
    directory: Path,
    settings: SinkSettings,
    options: VerifyOptions,
) -> dict[str, Any]:
    return {
        name: sink_report(
            model,
            spec,
            windows[: 2 if options.quick else 4],
            directory / f"sinks-{name}",
            settings=settings,
            model_name=f"{_name(path)} ({name})",
            batch_size=options.batch_size,
        )
        for name, path, model in zip(("dense", "pruned"), paths, models, strict=True)
    }


def _inputs(model_name: str | Path, options: VerifyOptions, seq_len: int | None, count: int) -> Inputs:
    return load_inputs(
        model_name,
        dataset=options.dataset,
        default="test",
        seq_len=seq_len,
        longest=LONGEST_WINDOW,
        count=count,
        seed=options.seed,
    )


def _workload(spec: Any, prompts: torch.Tensor, options: VerifyOptions) -> Workload:
    length = min(QUICK_TIMED if options.quick else LONGEST_TIMED, prompts.shape[1])
    block = block_within(spec, 16 if length % 16 == 0 else length)
    return Workload(
        prompts=prompts,
        gen_length=length,
        block_length=block,
        caches=default_caches(spec),
        # One at least for each block.
        steps=max(1, length // 4) if block >= 4 else length,
        batch_sizes=(1, 4) if options.quick else (1, 8),
        seconds=QUICK_TIMING if options.quick else TIMING,
        seed=options.seed,
    )


def _speed(
    dense: Path, pruned: Path, models: Sequence[Any], spec: Any, workload: Workload, options: VerifyOptions
) -> Any:
    if options.backend == "vllm":
        paths = (dense, pruned)
        samplers = [vllm_sampler(path, workload, model.dtype) for path, model in zip(paths, models, strict=True)]
    else:
        samplers = [transformers_sampler(model, spec) for model in models]
    return compare_speed(samplers[0], samplers[1], workload, progress=True)


def _sparsity(infos: Sequence[Any], natural: dict[str, int]) -> dict[str, Any]:
    dense, pruned = (info.to_json() for info in infos)
    return {
        "dense_total": dense["total"],
        "total": pruned["total"],
        "by_type": pruned["by_type"],
        "by_block": pruned["by_block"],
        # Zeros that were there before.
        "natural_zeros_by_type": natural,
    }


def _sizes(infos: Sequence[Any], models: Sequence[Any], peaks: Sequence[PeakMemory] | None) -> dict[str, Any]:
    names = ("dense", "pruned")
    sizes: dict[str, Any] = {}
    for name, info, model in zip(names, infos, models, strict=True):
        found = info.to_json()
        sizes[name] = {
            "format": found["format"],
            "file_bytes": found["file_bytes"],
            "memory_bytes": memory_bytes(model),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
    for key in ("file", "memory"):
        sizes[f"{key}_ratio"] = sizes["pruned"][f"{key}_bytes"] / sizes["dense"][f"{key}_bytes"]
    if peaks is not None:
        for name, peak in zip(names, peaks, strict=True):
            sizes[name]["peak"] = asdict(peak)
    return sizes


def _sink_summary(report: Any) -> dict[str, Any]:
    dynamics = report.dynamics
    return {
        "plot": f"{report.directory.name}/sinks.png",
        "steps": list(report.observation.steps),
        "sinks_per_step": list(dynamics.sinks_per_timestep),
        "dominant_variance": dynamics.dominant_variance,
        "dominant_moves": dynamics.dominant_moves,
        "sinks_ever": dynamics.sinks_ever,
        "transient_share": dynamics.transient_share,
    }


def _name(path: Path) -> str:
    return short(path.resolve().name)


def _recipe(pruned: Path) -> str | None:
    """The recipe that made the pruned model: recorded if there is one, and never needed."""
    file = pruned / RECIPE_FILE
    if not file.is_file():
        return None
    try:
        return read_recipe(file)[0]
    except UsageError as error:
        warnings.warn(f"{error}; it is left out of the report", stacklevel=2)
        return None
