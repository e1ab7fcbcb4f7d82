"""A LLaDA2 that lost experts and half of its weights, stored sparse and served over HTTP."""

import concurrent.futures
import shutil

import httpx
import pytest
import torch
from command_line import run_here
from golden_data import RECIPES
from official_checkpoints import write_llada2
from sparse_models import prune_2_of_4
from vllm_engine import SINKPRUNE, serving

from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.sampling import denoise

TEXT = "The President of the United States has the power to fill up all vacancies that may happen"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("llada2-server")
    write_llada2(root / "dense", vocab_size=2048, num_hidden_layers=3, head_dim=32, block_length=16,
                 max_position_embeddings=512, torch_dtype="float32")  # fmt: skip
    for file in EMBEDDED_MODEL.glob("tokenizer*"):
        shutil.copy(file, root / "dense")
    done = run_here("prune", root / "dense", "--recipe", RECIPES / "aimer.yaml", "--output", root / "fewer")
    assert done.returncode == 0, done.stderr
    model = prune_2_of_4(load_model(root / "fewer", torch.float32))
    assert model.config.num_experts == 8
    model.save_pretrained(root / "pruned")
    for file in EMBEDDED_MODEL.glob("tokenizer*"):
        shutil.copy(file, root / "pruned")
    convert_checkpoint(root / "pruned", root / "sparse", "sparse-24-bitmask", progress=False)
    return root / "sparse"


@pytest.fixture(scope="module")
def server(folder):
    command = [SINKPRUNE, "serve", folder, "--served-model-name", "llada2", "--max-model-len", "256"]
    command += ["--dtype", "float32", "--diffusion-config", '{"canvas_length": 63}', "--max-num-batched-tokens", "64"]
    command += ["--enforce-eager"] if torch.cuda.is_available() else []
    with serving(command, folder.parent / "server.log") as (address, _):
        yield address


def test_text_is_that_of_the_plain_sampler(server, folder):
    """At once: prompts shorter than a block, of several blocks, and longer than a step."""
    tokenizer, model = load_tokenizer(EMBEDDED_MODEL), load_model(folder, torch.float32)
    prompts = [TEXT[:20], TEXT, " ".join([TEXT] * 5)]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert lengths[0] < 16 < lengths[1] < 64 < lengths[2]

    def ask(prompt):
        body = {"model": "llada2", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        return httpx.post(f"{server}/v1/completions", json={**body, "vllm_xargs": {"dlm_steps": 12}}, timeout=120)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.status_code == 200, answer.text
        tokens = denoise(model, torch.tensor(tokenizer(prompt)["input_ids"]), gen_length=24, steps=12).sequences[0]
        assert answer.json()["choices"][0]["text"] == tokenizer.decode(tokens)


def test_another_cache_is_refused_in_one_line(server):
    answer = httpx.post(
        f"{server}/v1/completions",
        json={"model": "llada2", "prompt": TEXT, "max_tokens": 8, "vllm_xargs": {"dlm_cache": "dual"}},
        timeout=120,
    )
    assert answer.status_code == 400
    assert "dlm_cache dual isn't what a llada2 model computes" in answer.json()["error"]["message"]
