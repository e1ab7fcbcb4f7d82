"""Which experts should go: ELBO perplexity of a mixture after expert pruning, with every score.

For comparison also with fewer channels of every expert.

    python benchmarks/study_experts.py MODEL [--calibration TEXT] [--test TEXT] [--shares 0.25 0.5] [--seeds 3]
                                       [--methods NAME ...] [--against NAME]

Each method prunes the same model on the same calibration windows; a seed chooses these and the noise on them. `random`
removes experts at random, with as many seeds as asked for. All are measured on the same windows of the test text with
the same noise, so that differences are paired: the table gives the change of the perplexity against REAP on clean text
(or another method), the mean over the seeds with a 95 % interval over the windows, and its range over the seeds.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from study_statistics import Difference, in_percent, in_words, paired_difference, perplexity

from sinkprune_plugin.diffusion import score_windows
from sinkprune_plugin.loading import load_model, load_tokenizer
from sinkprune_plugin.models.expert_lists import expert_counts, keep_experts, set_expert_counts
from sinkprune_plugin.modifiers import load_oneshot_flow
from sinkprune_plugin.text_windows import embedded_text, read_documents, token_windows

REFERENCE, RANDOM = "reap, clean", "random"
SEARCH = "frequency, trajectory, allocation search"
# All experts stay: this share of the channels of each goes, with what stays adapted.
CHANNELS = "channels of every expert"
METHODS: dict[str, dict[str, Any]] = {
    "aimer": {"score": "aimer"},
    "magnitude": {"score": "magnitude"},
    "frequency, clean": {"score": "frequency", "calibrate_on": "clean"},
    "frequency, trajectory": {"score": "frequency"},
    REFERENCE: {"score": "reap", "calibrate_on": "clean"},
    # Sinks begin where no attention mass reaches.
    "reap, trajectory, sinks kept": {"score": "reap", "sink_std": 1e6},
    "reap, trajectory": {"score": "reap"},
    "reap, trajectory, allocation error": {"score": "reap", "allocation": "error"},
    **{
        f"frequency, trajectory, allocation {allocation}": {"score": "frequency", "allocation": allocation}
        for allocation in ("early_sparser", "late_sparser", "error")
    },
    # A quarter of the default budget: 6 blocks of 8 experts have few candidates.
    SEARCH: {"score": "frequency", "allocation": "search", "search_budget": 2**18},
    CHANNELS: {"score": "obs"},
}


def losses(model: torch.nn.Module, windows: torch.Tensor, noises: int) -> list[float]:
    """Nats per token of each window."""
    scores = score_windows(model, windows, num_samples=noises, batch_size=8)
    return ((scores.nll / scores.p_mask).mean(dim=1) / scores.tokens).tolist()


def prune_at_random(model: Any, share: float, seed: int) -> None:
    """Remove this share of the experts of each block."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for index, count in expert_counts(model.config).items():
        order = torch.randperm(count, generator=generator).tolist()
        kept[index] = sorted(order[round(share * count) :])
        keep_experts(model, index, kept[index])
    set_expert_counts(model.config, {index: len(numbers) for index, numbers in kept.items()})


class Study:
    """A model, its texts, and what has been measured on them.

    :param options: the command line's
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._flow, self._tokenizer = load_oneshot_flow(), load_tokenizer(options.model)
        self._documents = list(read_documents(options.calibration))
        self._test = token_windows(read_documents(options.test), self._tokenizer, options.seq_len, options.windows)
        self.dense = losses(load_model(options.model, torch.float32), self._test, options.noises)
        self.seconds: dict[str, float] = {}
        self.experts: dict[str, list[Any]] = {}

    def runs(self, method: str, share: float) -> list[list[float]]:
        """Losses of a method, for each seed.

        :param method: its name
        :param share: experts to remove
        """
        if method == RANDOM:
            return [self._measure_random(share, seed) for seed in range(self._options.random)]
        fields = METHODS[method]
        # The weights alone are the same for every seed.
        seeds = 1 if fields["score"] in ("aimer", "magnitude") else self._options.seeds
        self.experts[method], started = [], time.monotonic()
        found = [self._measure(method, share, seed) for seed in range(seeds)]
        self.seconds[method] = (time.monotonic() - started) / seeds
        return found if seeds > 1 else found * self._options.seeds

    def _measure(self, method: str, share: float, seed: int) -> list[float]:
        from sinkprune_plugin.modifiers.experts import ExpertPruningModifier
        from sinkprune_plugin.modifiers.structured import SinkAwareStructuredModifier

        options = self._options
        windows = token_windows(self._documents, self._tokenizer, options.seq_len, options.samples, seed=seed)
        model = load_model(options.model, torch.float32)
        modifier: Any
        if method == CHANNELS:
            modifier = SinkAwareStructuredModifier(expert_channels=share, seed=seed, **METHODS[method])
        else:
            modifier = ExpertPruningModifier(experts=share, seed=seed, **METHODS[method])
        self._flow.run_oneshot(model, self._tokenizer, modifier, windows)
        self.experts[method].append(list(expert_counts(model.config).values()))
        return losses(model, self._test, options.noises)

    def _measure_random(self, share: float, seed: int) -> list[float]:
        model = load_model(self._options.model, torch.float32)
        prune_at_random(model, share, seed)
        return losses(model, self._test, self._options.noises)


def compared(reference: list[list[float]], runs: list[list[float]]) -> Difference:
    """Difference of two methods; where they haven't as many seeds, of the first one's mean over the windows."""
    if len(reference) != len(runs):
        mean = [sum(window) / len(reference) for window in zip(*reference, strict=True)]
        reference = [mean] * len(runs)
    return paired_difference(reference, runs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, default=embedded_text("calibration"))
    parser.add_argument("--test", type=Path, default=embedded_text("test"))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, RANDOM], default=[*METHODS, RANDOM])
    parser.add_argument("--against", choices=[*METHODS], default=REFERENCE)
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--windows", type=int, default=32, help="test windows")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--noises", type=int, default=8, help="noise samples of each test window")
    parser.add_argument("--seeds", type=int, default=1, help="of calibration windows and their noise")
    parser.add_argument("--random", type=int, default=3, help="seeds of random choice")
    options = parser.parse_args(arguments)
    study = Study(options)
    print(f"dense: {perplexity([study.dense]):.2f}", flush=True)
    rows = []
    for share in options.shares:
        reference = study.runs(options.against, share)
        for name in options.methods:
            runs = reference if name == options.against else study.runs(name, share)
            against = compared(reference, runs)
            rows.append(
                {
                    "removed": share,
                    "method": name,
                    "perplexity": round(perplexity(runs), 2),
                    "of_seeds": [round(perplexity([run]), 2) for run in runs],
                    **in_percent(against),
                    "seconds": round(study.seconds.get(name, 0.0), 1),
                    "experts": study.experts.get(name, []),
                }
            )
            print(f"| {share:.0%} | {name} | {rows[-1]['perplexity']} | {in_words(against)} |", flush=True)
    print(json.dumps({"dense": round(perplexity([study.dense]), 2), "model": options.model.name, "rows": rows}))


if __name__ == "__main__":
    main()
