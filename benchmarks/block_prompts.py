"""What reading a block-causal prompt costs in vLLM: in one forward pass, in chunks, and block by block.

A random LLaDA2 with 32 experts in each layer; one request for one token, whose single denoising step comes with the end
of its prompt. The engine is the same for all rows, only the tokens that it may run in a step differ; rows take turns.
The last row gives the whole query to the attention kernel as one sequence: another computation, with the cost of one
ordinary pass. Prints a table and ends in one JSON line.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from row_table import print_rows

from sinkprune_plugin.devices import wait_for_device
from sinkprune_plugin.vllm.cpu import prepare

BLOCK = 32
WHOLE = "one sequence"


def random_llada2(directory: Path) -> int:
    """A random LLaDA2, saved in the official layout.

    :return: its parameters
    """
    from sinkprune_plugin.models.llada2_moe import LLaDA2MoeConfig, LLaDA2MoeModelLM

    torch.manual_seed(0)
    config = LLaDA2MoeConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1280,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        block_length=BLOCK,
        mask_token_id=4095,
        max_position_embeddings=8192,
        architectures=["LLaDA2MoeModelLM"],
    )
    model = LLaDA2MoeModelLM(config)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def set_budget(llm: Any, budget: int, *, cut: bool) -> None:
    """Limit the tokens of a step, and say whether queries are cut into blocks."""
    from sinkprune_plugin.vllm import query_cuts, step_plan

    llm.llm_engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = budget
    step_plan.cut_queries = query_cuts.cut_queries if cut else lambda *_: None


def seconds(llm: Any, prompt: list[int]) -> tuple[float, float]:
    """Time that passes, and processor time of this process, until one token is there."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    wait_for_device()
    passed, used = time.perf_counter(), time.process_time()
    llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
    wait_for_device()
    return time.perf_counter() - passed, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", type=int, default=2040, help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    prepare()
    from vllm import LLM

    length = -(-(arguments.prompt + 1) // BLOCK) * BLOCK
    with tempfile.TemporaryDirectory() as directory:
        parameters = random_llada2(Path(directory))
        llm = LLM(
            directory,
            dtype=arguments.dtype,
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            enable_prefix_caching=False,
            max_model_len=length,
            max_num_seqs=1,
            max_num_batched_tokens=length,
            diffusion_config={"canvas_length": BLOCK - 1},
        )
    prompt = torch.randint(5, 4000, (arguments.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    budgets = [length, *(tokens for tokens in (512, 128, BLOCK) if tokens < length)]
    kinds = [(str(budget), budget, True) for budget in budgets] + [(WHOLE, length, False)]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in kinds}
    for repeat in range(arguments.repeats + 1):
        for name, budget, cut in kinds:
            set_budget(llm, budget, cut=cut)
            times = seconds(llm, prompt)
            # The first round warms up.
            if repeat:
                taken[name].append(times)
    rows = []
    whole = statistics.median(used for _, used in taken[kinds[0][0]])
    for name, budget, _ in kinds:
        passed, used = (statistics.median(each) for each in zip(*taken[name], strict=True))
        rows.append(
            {
                "tokens_a_step": name,
                "forward_passes": -(-length // budget),
                "seconds": round(passed, 3),
                "processor_seconds": round(used, 3),
                "ratio": round(used / whole, 2),
            }
        )
    print_rows(f"a prompt of {arguments.prompt} tokens, {parameters / 1e6:.0f} million parameters", rows)
    sys.stdout.write(json.dumps({"prompt": arguments.prompt, "parameters": parameters, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
