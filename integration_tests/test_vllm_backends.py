"""vLLM as backend of `sinkprune verify` and of lm-evaluation-harness."""

import json
import subprocess

import pytest
import torch
from sparse_models import prune_2_of_4
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


def test_verify_times_both_models_in_vllm(checkpoints, tmp_path):
    command = [SINKPRUNE, "verify", checkpoints / "dense", checkpoints / "sparse", "--output", tmp_path / "report"]
    command += ["--backend", "vllm", "--quick", "--seq-len", 64]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, env=clean_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    if is_cpu_build():
        assert done.stderr.count("warning: no GPU here: vLLM's kernels run in Triton's interpreter, which is slow") == 1
    speed = json.loads((tmp_path / "report" / "report.json").read_text())["speed"]
    assert speed["backend"] == "vllm"
    assert len(speed["rows"]) == 4
    assert speed["verdict"] in ("faster", "slower", "no measurable difference")
    assert speed["repetitions"] >= 15
    assert bool(speed["why_not_faster"]) == is_cpu_build()
    assert all(row["dense_tokens_per_s"] > 0 and row["forward_share"] is None for row in speed["rows"])


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
