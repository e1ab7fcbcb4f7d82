"""Shared by the tests that drive the real tools: a fresh compression session each, and the golden numbers."""

import json
import random

import pytest
import torch
import torch.distributed as dist
from golden_data import GOLDEN
from safetensors.torch import load_file

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.text_windows import embedded_text, read_documents


@pytest.fixture(autouse=True)
def _fresh_session():
    from llmcompressor.core import reset_session

    reset_session()
    yield
    reset_session()


@pytest.fixture
def process_group(tmp_path):
    """A process group of one; an engine of vLLM in the same process has left one already."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def model():
    """tiny-llada in float32, fresh for each test."""
    return load_model(EMBEDDED_MODEL, torch.float32)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(EMBEDDED_MODEL)


@pytest.fixture(scope="session")
def golden_windows():
    """(16, 256) int64, the clean calibration samples of the golden runs."""
    return load_file(GOLDEN / "calibration.safetensors")["input_ids"].long()


@pytest.fixture(scope="session")
def golden_perplexity():
    return json.loads((GOLDEN / "perplexity.json").read_text())


@pytest.fixture(scope="session")
def evaluate():
    """Function model → ELBO perplexity on the recorded evaluation corruption."""
    from sinkprune_plugin.diffusion import perplexity_on

    recorded = load_file(GOLDEN / "evaluation.safetensors")

    def run(model):
        elbo, _ = perplexity_on(
            model, recorded["clean_ids"].long(), recorded["noisy_ids"].long(), recorded["p_mask"], batch_size=16
        )
        return elbo

    return run


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A multiple-choice and a cloze task from the embedded text, in lm-eval's own format."""
    folder = tmp_path_factory.mktemp("tasks")
    text = " ".join(read_documents(embedded_text("test")))
    sentences = [s.strip() for s in text.split(". ") if 60 < len(s) < 160][:60]
    rng = random.Random(0)
    choice, cloze = [], []
    for sentence in sentences[:6]:
        words = sentence.split()
        stem, right = " ".join(words[:-3]), " ".join(words[-3:])
        wrong = " ".join(rng.choice(sentences).split()[-3:])
        options = [right, wrong] if rng.random() < 0.5 else [wrong, right]
        choice.append({"stem": stem, "options": options, "gold": options.index(right)})
        cloze.append({"stem": stem, "right": right})
    for name, rows in {"choice": choice, "cloze": cloze}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        "task: own_choice\n" + data.format(file=folder / "choice.jsonl") + "output_type: multiple_choice\n"
        "doc_to_text: stem\ndoc_to_choice: options\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "cloze.yaml").write_text(
        "task: own_cloze\n" + data.format(file=folder / "cloze.jsonl") + "output_type: generate_until\n"
        'doc_to_text: stem\ndoc_to_target: right\ngeneration_kwargs:\n  until: [".", ";"]\n  max_gen_toks: 20\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    return folder, choice, cloze
