"""vLLM as backend of `sinkprune verify` and of lm-evaluation-harness."""

import json
import subprocess

import pytest
import torch
from sparse_models import prune_2_of_4
from tiny_moe import write_tiny_moe
from vllm_engine import SINKPRUNE, clean_environment, skip_without_vllm

from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.vllm.cpu import is_cpu_build

# Without preparing it: that is what both do themselves.
skip_without_vllm()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """tiny-llada in float32 (vLLM's bfloat16 needs more than every CPU has), dense and pruned 2:4 on disk."""
    folder = tmp_path_factory.mktemp("backends")
    model, tokenizer = load_model(EMBEDDED_MODEL, torch.float32), load_tokenizer(EMBEDDED_MODEL)
    model.save_pretrained(folder / "dense")
    prune_2_of_4(model)
    model.save_pretrained(folder / "pruned")
    for name in ("dense", "pruned"):
        tokenizer.save_pretrained(folder / name)
    convert_checkpoint(folder / "pruned", folder / "sparse", "sparse-24-bitmask", progress=False)
    return folder


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """tiny-llada dealt to eight experts in each block, and the same with other numbers of them."""
    folder = tmp_path_factory.mktemp("mixtures")
    write_tiny_moe(folder / "dense")
    write_tiny_moe(folder / "pruned", experts=[8, 6, 5, 8, 3, 2])
    return folder


def verified(dense, pruned, report):
    """Report of two checkpoints that vLLM's engines timed, with what all of them have checked."""
    command = [SINKPRUNE, "verify", dense, pruned, "--output", report, "--dtype", "float32"]
    command += ["--backend", "vllm", "--quick", "--seq-len", 64]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, env=clean_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    if is_cpu_build():
        assert done.stderr.count("warning: no GPU here: vLLM's kernels run in Triton's interpreter, which is slow") == 1
    content = json.loads((report / "report.json").read_text())
    speed = content["speed"]
    assert speed["backend"] == "vllm"
    assert len(speed["rows"]) == 4
    assert speed["verdict"] in ("faster", "slower", "no measurable difference")
    assert speed["repetitions"] >= 15
    assert all(row["dense_tokens_per_s"] > 0 and row["forward_share"] is None for row in speed["rows"])
    return content


def test_verify_times_both_models_in_vllm(checkpoints, tmp_path):
    content = verified(checkpoints / "dense", checkpoints / "sparse", tmp_path / "report")
    assert bool(content["speed"]["why_not_faster"]) == is_cpu_build()


def test_verify_times_a_mixture_that_lost_experts_in_vllm(mixtures, tmp_path):
    content = verified(mixtures / "dense", mixtures / "pruned", tmp_path / "report")
    assert content["speed"]["why_not_faster"] is None
    # 16 of 48 experts of 3 × 192 × 128 weights and a row of the router are gone, in float32.
    assert content["size"]["dense"]["memory_bytes"] - content["size"]["pruned"]["memory_bytes"] == (
        4 * 16 * (3 * 192 * 128 + 192)
    )


def test_lm_eval_answers_are_the_same_from_both_backends(checkpoints):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness isn't installed (sinkprune-plugin[eval])")
    from lm_eval.api.instance import Instance

    from sinkprune_plugin.lm_eval.lm_eval_model import SinkpruneLM

    requests = [
        Instance("generate_until", {}, (text, {"until": ["."], "max_gen_toks": 24}), number)
        for number, text in enumerate(("The President of the United States", "Congress", "The treaty with Great"))
    ]
    answers = {}
    for backend in ("transformers", "vllm"):
        lm = SinkpruneLM(str(checkpoints / "sparse"), backend=backend, block_length=8, cache="dual", max_length=128)
        answers[backend] = lm.generate_until(requests, disable_tqdm=True)
        if backend == "vllm":
            # See vllm_engine: an engine that is garbage-collected destroys the process's parallel state.
            import vllm_engine

            vllm_engine._ENGINES.append(lm)
    assert answers["vllm"] == answers["transformers"]
    assert len(set(answers["vllm"])) == 3
