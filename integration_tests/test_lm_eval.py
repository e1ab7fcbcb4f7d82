"""lm-evaluation-harness with our model class: found by name, likelihoods as computed directly, answers as denoised."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.sampling import denoise
from sinkprune_plugin.text_windows import embedded_text, read_documents

pytest.importorskip("lm_eval", reason="lm-evaluation-harness isn't installed (sinkprune-plugin[eval])")

TASKS = Path(__file__).parent.parent / "sinkprune_plugin" / "evaluation" / "tasks"


@pytest.fixture(scope="module")
def model():
    return load_model(EMBEDDED_MODEL, torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
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
        'doc_to_text: stem\ndoc_to_target: right\ngeneration_kwargs:\n  until: ["."]\n  max_gen_toks: 16\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    return folder, choice, cloze


@pytest.fixture(scope="module")
def results(tasks, tmp_path_factory):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model="sinkprune",
        model_args=f"pretrained={EMBEDDED_MODEL},mc_num=16,block_length=8,dtype=float32,seed=3",
        tasks=["own_choice", "own_cloze"],
        task_manager=TaskManager(include_path=str(tasks[0]), include_defaults=False),
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
        log_samples=True,
    )


def direct(model, context, answer, mc_num, seed):
    """The estimate written plainly: one sample at a time, every masked token by itself."""
    from sinkprune_plugin.diffusion import sample_generator

    spec = resolve_diffusion(model.config)
    tokens = torch.tensor(context + answer)
    generator = sample_generator(seed, mc_num, tokens)
    length = len(answer)
    start = torch.rand((), generator=generator, dtype=torch.float64).item() * length
    keys = torch.rand(mc_num, length, generator=generator)
    total = 0.0
    for sample in range(mc_num):
        count = int((start + sample * (length / mc_num)) % length) + 1
        hidden = sorted(range(length), key=lambda place: keys[sample, place].item())[:count]
        noisy = tokens.clone()
        for place in hidden:
            noisy[len(context) + place] = spec.mask_token_id
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=noisy[None]).logits[0].double(), dim=-1)
        total += sum(logs[len(context) + place, answer[place]].item() for place in hidden) * length / count
    return total / mc_num


def test_likelihoods_are_those_of_a_direct_computation(results, tasks, model, tokenizer):
    samples = sorted(results["samples"]["own_choice"], key=lambda sample: sample["doc_id"])
    assert len(samples) == 6
    correct = 0
    for sample, doc in zip(samples, tasks[1], strict=True):
        scores = []
        for option, (found, _) in zip(doc["options"], sample["filtered_resps"], strict=True):
            context = tokenizer.encode(doc["stem"], add_special_tokens=False)
            answer = tokenizer.encode(f"{doc['stem']} {option}", add_special_tokens=False)[len(context) :]
            expected = direct(model, context, answer, mc_num=16, seed=3)
            # Batched against single rows in float32.
            assert found == pytest.approx(expected, rel=1e-5)
            scores.append(expected)
        correct += scores.index(max(scores)) == doc["gold"]
    assert results["results"]["own_choice"]["acc,none"] == pytest.approx(correct / 6)


def test_answers_are_those_of_denoise_cut_at_the_stop(results, tasks, model, tokenizer):
    samples = sorted(results["samples"]["own_cloze"], key=lambda sample: sample["doc_id"])
    for sample, doc in zip(samples, tasks[2], strict=True):
        prompt = torch.tensor(tokenizer.encode(doc["stem"], add_special_tokens=False))
        tokens = denoise(
            model, prompt, gen_length=16, block_length=8, seed=3, eos_token_ids=[tokenizer.eos_token_id]
        ).sequences[0]
        text = tokenizer.decode(tokens, skip_special_tokens=True).split(".")[0]
        assert sample["resps"][0][0] == text


def test_an_answer_of_one_token_is_its_probability(model, tokenizer):
    """With one token there is one way to mask it: no Monte-Carlo error at all."""
    from sinkprune_plugin.evaluation.conditional_likelihood import answer_log_likelihood

    spec = resolve_diffusion(model.config)
    context, answer = tokenizer.encode("The President of the United", add_special_tokens=False), [516]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, spec.mask_token_id]])).logits[0, -1]
    expected = torch.log_softmax(logits.double(), dim=-1)[516].item()
    found = answer_log_likelihood(model, context, answer, spec, mc_num=4)
    assert found == pytest.approx(expected, rel=1e-5)


def test_masked_counts_are_spread_evenly():
    from sinkprune_plugin.evaluation.conditional_likelihood import masked_counts

    for length, samples in ((4, 16), (10, 20), (7, 7)):
        counts = masked_counts(length, samples, torch.Generator().manual_seed(0)).tolist()
        assert [counts.count(number) for number in range(1, length + 1)] == [samples // length] * length


def test_rolling_adds_pieces_up(tokenizer):
    from lm_eval.api.instance import Instance

    from sinkprune_plugin.evaluation.lm_eval_model import SinkpruneLM

    lm = SinkpruneLM(str(EMBEDDED_MODEL), mc_num=8, max_length=17, dtype="float32")
    text = "The President of the United States is to report to the Congress upon the state of the union. " * 2
    tokens = tokenizer.encode(text, add_special_tokens=False)
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (total,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
    expected, context = 0.0, [lm.eot_token_id]
    for begin in range(0, len(tokens), 16):
        expected += direct(lm.model, context, tokens[begin : begin + 16], 8, 0)
        context = [tokens[min(begin + 15, len(tokens) - 1)]]
    assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tpu"}, "backend 'tpu' is unknown"),
        ({"mc_num": 0}, "mc_num 0 is out of range"),
        ({"cache": "all"}, "dlm_cache 'all' is unknown"),
        ({"block_length": 0}, "dlm_block_length 0"),
        ({"blok_length": 8}, "'blok_length' is unknown"),
    ],
)
def test_wrong_arguments(arguments, message):
    from sinkprune_plugin.evaluation.lm_eval_model import SinkpruneLM

    with pytest.raises(UsageError, match=message):
        SinkpruneLM(str(EMBEDDED_MODEL), **arguments)


def test_mobile_mmlu_rotates_every_option_through_every_place():
    from datasets import Dataset

    sys.path.insert(0, str(TASKS / "mobile_mmlu"))
    try:
        import rotations
    finally:
        sys.path.pop(0)
    rows = {"question": ["What?"], "A": ["a"], "B": ["b"], "C": ["c"], "D": ["d"], "answer": ["C"]}
    docs = list(rotations.process_docs(Dataset.from_dict(rows)))
    assert len(docs) == 4
    assert all(doc["options"][doc["gold"]] == "c" for doc in docs)
    assert sorted(doc["gold"] for doc in docs) == [0, 1, 2, 3]
    assert rotations.doc_to_text(docs[1]) == "What?\nA. b\nB. c\nC. d\nD. a\nAnswer:"
    # A model that always says A is right once in four, however the options stood.
    always_a = [(0.0, False), (-1.0, False), (-2.0, False), (-3.0, False)]
    assert math.fsum(rotations.process_results(doc, always_a)["acc"] for doc in docs) == 1


def test_the_mobile_tasks_are_read_by_lm_eval():
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert {"sinkprune_mobile_mmlu", "sinkprune_mobile_mmlu_pro"} <= set(manager.all_tasks)


def test_found_by_name_from_the_command_line(tmp_path, tasks):
    command = [sys.executable, "-m", "lm_eval", "--model", "sinkprune", "--model_args",
               f"pretrained={EMBEDDED_MODEL},mc_num=2", "--tasks", "own_choice", "--include_path", str(tasks[0]),
               "--limit", "2", "--device", "cpu", "--output_path", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "own_choice" in done.stdout
