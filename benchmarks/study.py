"""The study behind docs/study.md: methods × sparsity patterns × seeds on tiny-llada, evaluated in pairs.

Each finished cell is one JSON line; a run that is started again skips finished cells. `--report` makes
docs/study-results.json, the figure and the tables in docs/study.md; without `--results` it takes the numbers from the
committed docs/study-results.json, so that the page can be regenerated without a run.

    python benchmarks/study.py --results study.jsonl
    python benchmarks/study.py --results study.jsonl --model tiny-gqa     # the second model, see docs/study.md
    python benchmarks/study.py --results study.jsonl --model tiny-long --name tiny-long     # the third
    python benchmarks/study.py --results study.jsonl --model tiny-wide --name tiny-wide     # the fourth
    python benchmarks/study.py --results study.jsonl --report
    python benchmarks/study.py --report
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from study_cache import dense_runs
from study_cells import ALL_MODELS, EMBEDDED, LONG, PATTERNS, SECOND, SWEEPS, SWEPT, Cell, cells, makers
from study_sinks import share_meters
from tqdm import tqdm

from sinkprune_plugin.diffusion import RowScores, resolve_diffusion, score_windows
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.text_windows import embedded_text, read_documents, token_windows

# Calibration and evaluation.
WINDOWS, SEQ_LEN = 16, 256
# As many tokens in longer windows.
LONG_WINDOWS, LONG_SEQ_LEN = 4, 1024
TEST_WINDOWS, CORRUPTIONS = 24, 8


class Bench:
    """Text, tokenizer and evaluation, made once.

    :param directory: the model
    :param name: which one of the study's it is
    """

    def __init__(self, directory: Path = EMBEDDED_MODEL, name: str = EMBEDDED) -> None:
        self.directory = directory
        self.windows, self.seq_len = (LONG_WINDOWS, LONG_SEQ_LEN) if name == LONG else (WINDOWS, SEQ_LEN)
        self.tokenizer = load_tokenizer(directory)
        self.calibration_text = read_documents(embedded_text("calibration"))
        test = read_documents(embedded_text("test"))
        self.test = token_windows(test, self.tokenizer, self.seq_len, TEST_WINDOWS, seed=0)

    def prune(self, cell: Cell) -> tuple[Any, float]:
        """Prune a fresh model.

        :param cell: what to do
        :return: the model, and seconds taken
        """
        model = load_model(self.directory, torch.float32)
        started = time.monotonic()
        if cell.method == "dense":
            return model, 0.0
        sparsity, structure = PATTERNS[cell.pattern]
        if cell.method == "magnitude":
            prune_by_magnitude(model, sparsity, structure)
            return model, time.monotonic() - started
        windows = self.windows
        maker = makers()[cell.method]
        if cell.group == "windows":
            windows = int(cell.value)
        elif cell.group in SWEEPS:
            number = SWEEPS[cell.group][0].__class__(float(cell.value))
            maker = SWEPT[cell.method](**{cell.group: number})
        assert maker is not None  # magnitude, the one method without, is done above
        # Cells with the same data share one run of the dense model.
        dense_runs.data = (cell.seed, windows)
        data = token_windows(self.calibration_text, self.tokenizer, self.seq_len, windows, seed=cell.seed)
        run_oneshot(model, self.tokenizer, maker(sparsity, structure, cell.seed), data)
        return model, time.monotonic() - started

    def sink_shares(self) -> dict[str, dict[str, float]]:
        """Share of positions, and of each kind of input's Σ x², that each mask takes out; first seed.

        :return: mask → ``positions`` or name of the Linear → share
        """
        dense_runs.data = (0, self.windows)
        data = token_windows(self.calibration_text, self.tokenizer, self.seq_len, self.windows, seed=0)
        found = {}
        for label, meter in share_meters().items():
            modifier = meter()
            run_oneshot(load_model(self.directory, torch.float32), self.tokenizer, modifier, data)
            found[label] = {name: round(share, 5) for name, share in modifier._shares.items()}
        return found

    def evaluate(self, model: Any) -> dict[str, Any]:
        """Losses of each test window, on noise that is the same for all models.

        :param model: pruned model
        :return: ``windows``: nats per token of each window's ELBO, ``zeros``: share of zeros in the blocks' Linears
        """
        spec = resolve_diffusion(model.config)
        scores = score_windows(model, self.test, spec, num_samples=CORRUPTIONS, seed=0, batch_size=16)
        weights = [module.weight for module in block_linears(model).values()]
        zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
        return {"windows": window_losses(scores), "zeros": round(zeros, 5)}


def window_losses(scores: RowScores) -> list[float]:
    """Monte-Carlo negative ELBO of each window, in nats per token.

    :param scores: losses
    """
    losses = (scores.nll / scores.p_mask).sum(dim=1) / (scores.tokens * scores.nll.shape[1])
    return [round(loss, 8) for loss in losses.tolist()]


def prune_by_magnitude(model: Any, sparsity: float, structure: str) -> None:
    """Remove the smallest weights of each row, or of each group.

    :param model: changed in place
    :param sparsity: share of zeros
    :param structure: ``0:0`` or N:M
    """
    zeros, width = (int(part) for part in structure.split(":"))
    for module in block_linears(model).values():
        weight = module.weight.data
        groups = weight.reshape(-1, width) if width else weight
        removed = zeros if width else int(weight.shape[1] * sparsity)
        smallest = groups.abs().topk(removed, dim=1, largest=False).indices
        module.weight.data = groups.scatter(1, smallest, 0).reshape(weight.shape)


def finished(results: Path) -> Iterator[dict[str, Any]]:
    """Lines of a results file; a line that was cut off is left out.

    :param results: JSON lines
    """
    if results.is_file():
        for line in results.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def run(
    results: Path, limit: int | None = None, *, model: Path | None = None, name: str = SECOND, shard: str = "0/1"
) -> None:
    """Run the cells of one model that aren't done yet.

    :param results: JSON lines, appended to
    :param limit: number of cells at most
    :param model: directory of another model; None for the embedded one
    :param name: which one of the study's it is
    :param shard: ``i/n``: every n-th cell, beginning with the i-th
    """
    logger.remove()
    done = {record["key"] for record in finished(results)}
    first, step = (int(part) for part in shard.split("/"))
    name = EMBEDDED if model is None else name
    todo = [cell for cell in cells() if cell.model == name and cell.key not in done][first::step][:limit]
    results.parent.mkdir(parents=True, exist_ok=True)
    if results.is_file() and not results.read_text(encoding="utf-8").endswith("\n"):
        # A run was killed in the middle of a line.
        with results.open("a", encoding="utf-8") as stream:
            stream.write("\n")
    bench = Bench() if model is None else Bench(model, name)
    shares = f"{name}/sink shares"
    if shares not in done and limit is None:
        _append(results, {"key": shares, "shares": bench.sink_shares()})
    for cell in tqdm(todo, desc="study", unit="cell", disable=None):
        pruned, seconds = bench.prune(cell)
        _append(results, {"key": cell.key, "seconds": round(seconds, 2), **bench.evaluate(pruned)})


def _append(results: Path, record: dict[str, Any]) -> None:
    with results.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def main() -> None:
    """Run, or make the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, help="JSON lines (default: study.jsonl; with --report the page's own)")
    parser.add_argument("--model", type=Path, help="directory of another model; without it the embedded one")
    parser.add_argument(
        "--name", choices=ALL_MODELS[1:], default=SECOND, help=f"which one --model is (default {SECOND})"
    )
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th of the open cells, beginning with the i-th")
    parser.add_argument("--limit", type=int, help="cells at most")
    parser.add_argument("--report", action="store_true", help="make tables, figure and docs/study-results.json")
    arguments = parser.parse_args()
    if arguments.report:
        from study_report import DOCS, committed_records, write_report

        records = finished(arguments.results) if arguments.results else committed_records(DOCS)
        try:
            write_report(list(records), DOCS)
        except UsageError as error:
            parser.exit(2, f"{error}\n")
    else:
        run(
            arguments.results or Path("study.jsonl"),
            arguments.limit,
            model=arguments.model,
            name=arguments.name,
            shard=arguments.shard,
        )


if __name__ == "__main__":
    main()
