"""What only a GPU can show (`make test-gpu`): exactness there, bfloat16, CUDA graphs, sparse tensor cores, speed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sparse_models import prune_2_of_4
from unequal_blocks import make_unequal
from vllm_engine import make_engine

from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.sampling import denoise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parent.parent
CACHES = ("none", "prefix", "dual", "commit")


def requests(count):
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 400) for _ in range(rng.randrange(1, 60))] for _ in range(count)]
    options = [{"cache": CACHES[number % 4], "block_length": 16, "steps": 16} for number in range(count)]
    return prompts, options


def generate(engine, prompts, options, max_tokens=32):
    from vllm import SamplingParams

    settings = [
        SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args={f"dlm_{k}": v for k, v in each.items()})
        for each in options
    ]
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def agreement(first, second):
    pairs = [(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("unequal", [False, True], ids=["equal blocks", "blocks of different sizes"])
def test_float32_equals_the_plain_sampler(unequal, tmp_path):
    prompts, options = requests(16)
    folder, model = EMBEDDED_MODEL, load_model(EMBEDDED_MODEL, torch.float32)
    if unequal:
        folder = tmp_path
        make_unequal(model).save_pretrained(folder)
        load_tokenizer(EMBEDDED_MODEL).save_pretrained(folder)
    found = generate(make_engine(folder), prompts, options)
    model = model.cuda()
    expected = [
        denoise(model, torch.tensor(prompt), gen_length=32, **option).sequences[0].tolist()
        for prompt, option in zip(prompts, options, strict=True)
    ]
    # TF32 is off by default; other kernels' orders of sums may still let a near-tie fall differently in one request.
    assert agreement(found, expected) >= 0.97


def test_bfloat16_with_cuda_graphs_equals_bfloat16_without():
    """Piecewise graphs replay the same kernels on the same shapes, padded; FULL is replaced by them."""
    prompts, options = requests(16)
    eager = generate(make_engine(EMBEDDED_MODEL, dtype="bfloat16"), prompts, options)
    graphs = make_engine(
        EMBEDDED_MODEL,
        dtype="bfloat16",
        enforce_eager=False,
        compilation_config={"cudagraph_mode": "FULL_AND_PIECEWISE"},
    )
    mode = graphs.llm_engine.vllm_config.compilation_config.cudagraph_mode
    assert not mode.has_full_cudagraphs()
    # torch.compile fuses norms and rotary embedding, which rounds bfloat16 elsewhere: a random pair agrees in 2 %.
    assert agreement(eager, generate(graphs, prompts, options)) >= 0.5


def test_sparse_tensor_cores_against_dense(tmp_path):
    model = load_model(EMBEDDED_MODEL, torch.bfloat16)
    prune_2_of_4(model)
    model.save_pretrained(tmp_path / "dense")
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", "sparse-24-bitmask", progress=False)
    prompts, options = requests(8)
    tokens = [
        generate(make_engine(tmp_path / name, dtype="bfloat16"), prompts, options) for name in ("dense", "sparse")
    ]
    # Equal where no shape was found faster sparse; otherwise another order of bfloat16 sums.
    assert agreement(*tokens) >= 0.5


def test_throughput_script():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "serving.py"), "--rounds", "1", "--only", "tiny"],
        capture_output=True,
        text=True,
        timeout=580,
        env=os.environ | {"VLLM_NO_USAGE_STATS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert {row["side"] for row in summary["rows"]} == {"plain loop", *CACHES}
    assert [row["weights"] for row in summary["gpu_2of4"]] == ["dense", "sparse"]
