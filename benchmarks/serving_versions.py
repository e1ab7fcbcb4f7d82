"""The vLLM adapter of this checkout against an older one's: tokens per second and its own time in each step.

    git worktree add ../older COMMIT
    python benchmarks/serving_versions.py ../older

Each version has an engine in a process of its own, which stays up. They take turns on the same batch, in an order that
is drawn for each pair, so that a busy machine is equally busy for both; what counts is the ratio within a pair. Times
are those of the process on its processor, with one thread: they leave out what other processes take. ``--wall`` takes
wall time with all cores instead, for a quiet machine. A third side is a plain torch loop, as in benchmarks/serving.py.
Prints a table and ends in one JSON line.
"""

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from row_table import print_rows
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
# Prompt length, generation length, block length, steps; as in benchmarks/serving.py.
WORK = {"tiny": (32, 64, 16, 32), "100M": (64, 128, 32, 32)}


class Side:
    """One version in a process of its own.

    :param root: its checkout
    :param model: directory of the checkpoint
    :param work: lengths and steps
    :param wall: measure wall time with all cores
    """

    def __init__(self, root: Path, model: Path, work: tuple[int, ...], wall: bool) -> None:
        threads = len(os.sched_getaffinity(0)) if wall else 1
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(model), "wall" if wall else "processor", *map(str, work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(root) | {"OMP_NUM_THREADS": str(threads)},
        )
        self.ask({})

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the engine's process has ended")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def _environment(root: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(root), "VLLM_LOGGING_LEVEL": "ERROR"}


def worker(model: Path, now: Callable[[], float], work: tuple[int, ...]) -> None:
    """Answer commands: {batch, cache} runs a batch, cache "plain" the plain loop.

    :param model: directory of the checkpoint
    :param now: the clock, in seconds
    :param work: lengths and steps
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import serving
    import torch
    from transformers import AutoModelForCausalLM

    from sinkprune_plugin.diffusion import resolve_diffusion
    from sinkprune_plugin.vllm.cpu import prepare

    prepare()
    prompt_length, gen_length, block_length, steps = work
    engine = serving.make_engine(model, "float32", 2 * (prompt_length + gen_length))
    clock = serving.ForwardClock(serving.engine_model(engine), now)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    mask = resolve_diffusion(plain.config).mask_token_id
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        if command:
            generator = torch.Generator().manual_seed(command["batch"])
            prompts = torch.randint(5, 300, (command["batch"], prompt_length), generator=generator)
            clock.reset()
            run: Callable[[], Any] = functools.partial(
                serving.serve, engine, prompts, gen_length, block_length, steps, command["cache"]
            )
            if command["cache"] == "plain":
                run = functools.partial(serving.plain_loop, plain, prompts, gen_length, block_length, steps, mask)
            started = now()
            tokens = run()
            seconds = now() - started
            tokens = tokens.tolist() if isinstance(tokens, torch.Tensor) else tokens
            own = (seconds - clock.seconds) / max(clock.calls, 1)
            answer = {"seconds": seconds, "steps": clock.calls, "own_ms": 1000 * own, "tokens": tokens}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def measure(older: Path, name: str, model: Path, options: argparse.Namespace, bar: Any) -> list[dict[str, Any]]:
    """Pairs of one model.

    :param older: checkout of the older version
    :param name: of the model, a key of :data:`WORK`
    :param model: directory of the checkpoint
    :param options: batch, caches, pairs, wall, no_plain
    :return: rows for the table
    """
    batch, caches, pairs, plain_loop = options.batch, options.caches, options.pairs, not options.no_plain
    sides = {side: Side(root, model, WORK[name], options.wall) for side, root in (("older", older), ("this", ROOT))}
    rng, rows = random.Random(0), []
    try:
        for cache in caches:
            ratios: list[float] = []
            plain: list[float] = []
            own: dict[str, list[float]] = {side: [] for side in sides}
            steps: dict[str, list[float]] = {side: [] for side in sides}
            same = True
            for number in range(pairs + 1):
                order = [*sides, "plain"] if plain_loop else list(sides)
                rng.shuffle(order)
                found = {
                    side: sides["this" if side == "plain" else side].ask(
                        {"batch": batch, "cache": "plain" if side == "plain" else cache}
                    )
                    for side in order
                }
                bar.update()
                if not number:
                    # Warms up, and tells whether both say the same.
                    same = found["older"]["tokens"] == found["this"]["tokens"]
                    continue
                ratios.append(found["older"]["seconds"] / found["this"]["seconds"])
                if plain_loop:
                    plain.append(found["plain"]["seconds"] / found["this"]["seconds"])
                for side in sides:
                    own[side].append(found[side]["own_ms"])
                    steps[side].append(1000 * found[side]["seconds"] / found[side]["steps"])
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "cache": cache,
                    "times_older": round(statistics.median(ratios), 3),
                    "lowest": round(min(ratios), 3),
                    "highest": round(max(ratios), 3),
                    "times_plain": round(statistics.median(plain), 3) if plain else None,
                    "own_ms_older": round(statistics.median(own["older"]), 2),
                    "own_ms": round(statistics.median(own["this"]), 2),
                    "own_ms_fastest": round(min(own["this"]), 2),
                    "step_ms_older": round(statistics.median(steps["older"]), 1),
                    "same_tokens": same,
                }
            )
    finally:
        for process in sides.values():
            process.close()
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        now = time.perf_counter if sys.argv[3] == "wall" else time.process_time
        worker(Path(sys.argv[2]), now, tuple(map(int, sys.argv[4:])))
        return
    if sys.argv[1:2] == ["--write"]:
        import serving

        serving.random_llada(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("older", type=Path, help="checkout of the older version")
    parser.add_argument("--only", choices=list(WORK), help="one model instead of both")
    parser.add_argument("--caches", nargs="+", default=["none", "dual"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain loop, which takes longest")
    parser.add_argument("--wall", action="store_true", help="wall time with all cores; the machine must be quiet")
    arguments = parser.parse_args()
    older = arguments.older.resolve()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # By the older version, which may not know all that this one writes into a config.
        command = [sys.executable, __file__, "--write", str(Path(folder, "random"))]
        subprocess.run(command, check=True, env=_environment(older))
        models = {"tiny": ROOT / "sinkprune_plugin" / "assets" / "tiny-llada", "100M": Path(folder, "random")}
        chosen = [arguments.only] if arguments.only else list(models)
        total = len(chosen) * len(arguments.caches) * (arguments.pairs + 1)
        with tqdm(total=total, desc="pairs", disable=None) as bar:
            for name in chosen:
                rows += measure(older, name, models[name], arguments, bar)
    print_rows("this version in times of the older one, and its own time per step", rows)
    sys.stdout.write(json.dumps({"rows": rows}) + "\n")


if __name__ == "__main__":
    main()
