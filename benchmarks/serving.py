"""Tokens per second of the vLLM adapter, compared with a plain torch loop of the published sampler.

Same weights, same prompts, same machine, one run, sides taking turns. Prints a table, ends in one JSON line. On a GPU
it also serves the model pruned 2:4, from a sparse checkpoint, against the same weights dense.

The plain loop is LLaDA's published sampler (arXiv 2502.09992, appendix B.4; greedy, low-confidence remasking) on the
native transformers class: each step runs the model on prompt and canvas and takes softmax and argmax of every position.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sinkprune_plugin.devices import choose_device, wait_for_device
from sinkprune_plugin.vllm.cpu import prepare

ROOT = Path(__file__).parent.parent
CACHES = ("none", "prefix", "dual", "commit")
BATCHES = (1, 8)
# Prompt length, generation length, block length, steps.
Work = tuple[int, int, int, int]


def random_llada(directory: Path) -> int:
    """A random LLaDA of about 100 million parameters, saved in the official layout."""
    from sinkprune_plugin.models.llada.configuration_llada import LLaDAConfig
    from sinkprune_plugin.models.llada.modeling_llada import LLaDAModelLM

    torch.manual_seed(0)
    config = LLaDAConfig(
        vocab_size=32_000,
        embedding_size=32_000,
        d_model=768,
        n_layers=8,
        n_heads=12,
        mlp_hidden_size=2048,
        max_sequence_length=512,
        mask_token_id=31_999,
        eos_token_id=31_998,
        pad_token_id=31_998,
        architectures=["LLaDAModelLM"],
    )
    model = LLaDAModelLM(config)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


@torch.inference_mode()
def plain_loop(
    model: Any, prompts: torch.Tensor, gen_length: int, block_length: int, steps: int, mask_token_id: int
) -> torch.Tensor:
    """The published sampler.

    :param prompts: (B, P) int64
    :return: (B, gen_length) int64
    """
    prompt_length = prompts.shape[1]
    canvas = torch.full((len(prompts), gen_length), mask_token_id, dtype=torch.long, device=prompts.device)
    x = torch.cat([prompts, canvas], dim=1)
    blocks = gen_length // block_length
    each = block_length * blocks // steps
    for block in range(blocks):
        end = prompt_length + (block + 1) * block_length
        for _ in range(steps // blocks):
            masked = x == mask_token_id
            logits = model(input_ids=x).logits
            # The adapter excludes the mask token; a random model sometimes predicts it.
            logits[..., mask_token_id] = -torch.inf
            proposed = logits.argmax(dim=-1)
            sure = torch.softmax(logits, dim=-1).gather(-1, proposed[..., None])[..., 0]
            sure[:, end:] = -torch.inf
            sure = torch.where(masked, sure, -torch.inf)
            chosen = sure.topk(each, dim=1).indices
            x.scatter_(1, chosen, proposed.gather(1, chosen))
    return x[:, prompt_length:]


class ForwardClock:
    """Sums the time in a model's forward and in its logits, to show the adapter's overhead.

    :param model: the engine's model
    :param now: the clock, in seconds
    """

    def __init__(self, model: Any, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.seconds = 0.0
        self.calls = 0
        # The sampler projects what it needs; before that it was the model that did.
        for name in ("forward", "project" if hasattr(model, "project") else "compute_logits"):
            setattr(model, name, self._timed(getattr(model, name), counts=name == "forward"))

    def _timed(self, function: Callable[..., Any], *, counts: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            wait_for_device()
            started = self._now()
            result = function(*args, **kwargs)
            wait_for_device()
            self.seconds += self._now() - started
            self.calls += counts
            return result

        return timed

    def reset(self) -> None:
        self.seconds, self.calls = 0.0, 0


def make_engine(directory: Path, dtype: str, length: int) -> Any:
    from vllm import LLM

    return LLM(
        model=str(directory),
        dtype=cast("Any", dtype),
        skip_tokenizer_init=True,
        enforce_eager=not torch.cuda.is_available(),
        max_model_len=length,
        max_num_seqs=max(BATCHES),
        diffusion_config={"canvas_length": length // 2},
        disable_log_stats=True,
    )


def engine_model(engine: Any) -> Any:
    core = engine.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.model


def serve(
    engine: Any, prompts: torch.Tensor, gen_length: int, block_length: int, steps: int, cache: str
) -> list[list[int]]:
    from vllm import SamplingParams

    extra = {"dlm_block_length": block_length, "dlm_steps": steps, "dlm_cache": cache}
    settings = SamplingParams(max_tokens=gen_length, ignore_eos=True, detokenize=False, extra_args=extra)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts.tolist()], settings, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    wait_for_device()
    started = time.perf_counter()
    result = function()
    wait_for_device()
    return time.perf_counter() - started, result


def measure(name: str, directory: Path, work: Work, rounds: int, dtype: str, bar: Any) -> list[dict[str, Any]]:
    """All cells of one model.

    :return: rows for the table
    """
    from transformers import AutoModelForCausalLM

    from sinkprune_plugin.diffusion import resolve_diffusion

    prompt_length, gen_length, block_length, steps = work
    device = choose_device()
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
    mask = resolve_diffusion(plain.config).mask_token_id
    engine = make_engine(directory, dtype, 2 * (prompt_length + gen_length))
    clock = ForwardClock(engine_model(engine))
    rows = []
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(5, 300, (batch, prompt_length), generator=generator)
        sides: dict[str, Callable[[], Any]] = {
            "plain loop": lambda: plain_loop(plain, prompts.to(device), gen_length, block_length, steps, mask).tolist()  # noqa: B023
        }
        for cache in CACHES:
            sides[cache] = functools.partial(serve, engine, prompts, gen_length, block_length, steps, cache)
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        inside: dict[str, list[tuple[float, int]]] = {cache: [] for cache in CACHES}
        results: dict[str, Any] = {}
        for round_number in range(rounds + 1):
            for side, run in sides.items():
                clock.reset()
                taken, results[side] = timed(run)
                # The first round warms up.
                if round_number:
                    seconds[side].append(taken)
                    if side in inside:
                        inside[side].append((clock.seconds, clock.calls))
                bar.update()
        same = sum(a == b for a, b in zip(results["plain loop"], results["none"], strict=True))
        base = statistics.median(seconds["plain loop"])
        for side in sides:
            median = statistics.median(seconds[side])
            row: dict[str, Any] = {
                "model": name,
                "batch": batch,
                "side": side,
                "tokens_per_s": round(batch * gen_length / median, 2),
            }
            row |= {"ratio": round(base / median, 3), "spread": round(max(seconds[side]) / min(seconds[side]), 3)}
            if side in inside:
                forward, calls = (statistics.median(column) for column in zip(*inside[side], strict=True))
                row |= {"overhead_ms_per_step": round(1000 * (median - forward) / calls, 3)}
                row |= {"overhead_share": round(1 - forward / median, 4)}
            if side == "none":
                row["equal_to_plain"] = f"{same}/{batch}"
            rows.append(row)
    del engine
    return rows


def sparse_against_dense(directory: Path, folder: Path, work: Work, rounds: int, dtype: str) -> list[dict[str, Any]]:
    """GPU only: the same 2:4 weights from a dense and from a sparse checkpoint, batch 8."""
    from transformers import AutoModelForCausalLM

    from sinkprune_plugin.formats import convert_checkpoint
    from sinkprune_plugin.models.decoder_blocks import block_linears

    prompt_length, gen_length, block_length, steps = work
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    for module in block_linears(model).values():
        weight = module.weight
        groups = weight.data.view(-1, 4)
        weight.data = groups.scatter(1, groups.float().abs().topk(2, largest=False).indices, 0).view(weight.shape)
    model.save_pretrained(folder / "dense")
    convert_checkpoint(folder / "dense", folder / "sparse", "sparse-24-bitmask", progress=False)
    prompts = torch.randint(5, 300, (8, prompt_length), generator=torch.Generator().manual_seed(0))
    rows = []
    for kind in ("dense", "sparse"):
        engine = make_engine(folder / kind, dtype, 2 * (prompt_length + gen_length))
        run = functools.partial(serve, engine, prompts, gen_length, block_length, steps, "none")
        run()
        median = statistics.median(timed(run)[0] for _ in range(rounds))
        rows.append({"weights": kind, "tokens_per_s": round(8 * gen_length / median, 2)})
        del engine
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["tiny", "100M"], help="one model instead of both")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    prepare()
    dtype = "bfloat16" if on_gpu else "float32"
    rows: list[dict[str, Any]] = []
    gpu_rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        large = Path(folder, "random")
        parameters = random_llada(large)
        models = {
            "tiny": (ROOT / "sinkprune_plugin" / "assets" / "tiny-llada", (32, 64, 16, 32)),
            "100M": (large, (64, 128, 32, 32)),
        }
        chosen = [arguments.only] if arguments.only else list(models)
        cells = len(chosen) * len(BATCHES) * (len(CACHES) + 1) * (arguments.rounds + 1)
        bar = stack.enter_context(tqdm(total=cells, desc="measuring", disable=None))
        for name in chosen:
            rows += measure(name, *models[name], arguments.rounds, dtype, bar)
        if on_gpu:
            gpu_rows = sparse_against_dense(
                *models["100M"][:1], Path(folder), models["100M"][1], arguments.rounds, dtype
            )
    print_table(rows)
    summary = {"rows": rows, "gpu_2of4": gpu_rows, "parameters_100M": parameters, "threads": torch.get_num_threads()}
    sys.stdout.write(json.dumps(summary | {"device": torch.cuda.get_device_name() if on_gpu else "cpu"}) + "\n")


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title="tokens per second; ratio to the plain loop", title_justify="left")
    for heading in ("model", "batch", "side", "tokens/s", "ratio", "spread", "overhead ms/step", "share"):
        table.add_column(heading, justify="left" if heading in ("model", "side") else "right")
    for row in rows:
        table.add_row(
            row["model"],
            str(row["batch"]),
            row["side"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['spread']:.2f}",
            f"{row['overhead_ms_per_step']:.2f}" if "overhead_ms_per_step" in row else "",
            f"{100 * row['overhead_share']:.0f} %" if "overhead_share" in row else "",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
