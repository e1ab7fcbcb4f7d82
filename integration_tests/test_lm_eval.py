"""lm-evaluation-harness with our model class: found by name, likelihoods as computed directly, answers as denoised."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sparse_models import prune_2_of_4
from unequal_blocks import make_unequal

from sinkprune_plugin.diffusion import resolve_diffusion, sample_generator
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.sampling import denoise

pytest.importorskip("lm_eval", reason="lm-evaluation-harness isn't installed (sinkprune-plugin[eval])")

TASKS = Path(__file__).parent.parent / "sinkprune_plugin" / "lm_eval" / "tasks"


def evaluate(tasks, folder, **arguments):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    metadata = arguments.pop("metadata", None)
    return simple_evaluate(
        model="sinkprune",
        model_args=",".join(f"{name}={value}" for name, value in arguments.items()),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata),
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
        log_samples=True,
    )


def samples_of(results, task):
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


@pytest.fixture(scope="module")
def results(tasks):
    return evaluate(
        ["own_choice", "own_cloze"],
        tasks[0],
        pretrained=EMBEDDED_MODEL,
        mc_num=16,
        block_length=8,
        steps=9,
        dtype="float32",
        seed=3,
    )


def make_lm(directory=EMBEDDED_MODEL, **arguments):
    from sinkprune_plugin.lm_eval.lm_eval_model import SinkpruneLM

    return SinkpruneLM(str(directory), **({"dtype": "float32", "device": "cpu"} | arguments))


def instance(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def direct(model, context, answer, mc_num, seed, ending=()):
    """The estimate written plainly: one sample at a time, every masked token separately."""
    spec = resolve_diffusion(model.config)
    tokens, length = torch.tensor([*context, *answer, *ending]), len(answer)
    generator = sample_generator(seed, mc_num, tokens)
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
        first = len(context) - spec.logit_shift
        total += sum(logs[first + place, answer[place]].item() for place in hidden) * length / count
    return total / mc_num


def test_likelihoods_are_those_of_a_direct_computation(results, tasks, model, tokenizer):
    samples = samples_of(results, "own_choice")
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
    uncut = 0
    for sample, doc in zip(samples_of(results, "own_cloze"), tasks[2], strict=True):
        prompt = torch.tensor(tokenizer.encode(doc["stem"], add_special_tokens=False))
        (tokens,) = denoise(
            model, prompt, gen_length=20, block_length=8, steps=9, seed=3, eos_token_ids=[tokenizer.eos_token_id]
        ).sequences
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert sample["resps"][0][0] == re.split(r"[.;]", text)[0]
        uncut += text == sample["resps"][0][0]
    # Both the stop strings and the length end answers here.
    assert 0 < uncut < 6


def test_the_order_of_requests_changes_nothing(tasks):
    requests = [
        instance("loglikelihood", doc["stem"], f" {option}") for doc in tasks[1][:3] for option in doc["options"]
    ]
    lm = make_lm(mc_num=4)
    forwards = lm.loglikelihood(requests, disable_tqdm=True)
    assert lm.loglikelihood(requests[::-1], disable_tqdm=True)[::-1] == forwards
    assert [lm.loglikelihood([request], disable_tqdm=True)[0] for request in requests] == pytest.approx(
        # A question's options share batches, which rounds differently in float32.
        [pytest.approx(result, rel=1e-6) for result in forwards]
    )


def test_a_sparse_checkpoint_is_evaluated_as_it_is(tmp_path, tasks, tokenizer):
    """From the command line, where nothing but lm-eval itself is imported; the dense form gives the same numbers."""
    pruned = prune_2_of_4(load_model(EMBEDDED_MODEL, torch.float32))
    pruned.save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    convert_checkpoint(tmp_path / "pruned", tmp_path / "sparse", "sparse-24-bitmask", progress=False)
    command = [sys.executable, "-m", "lm_eval", "--model", "sinkprune", "--model_args",
               f"pretrained={tmp_path / 'sparse'},mc_num=4,backend=transformers,cfg=0.5,block_length=32,cache=none",
               "--tasks", "own_choice", "--include_path", str(tasks[0]), "--limit", "2", "--device", "cpu",
               "--batch_size", "8", "--log_samples", "--output_path", str(tmp_path / "results")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (logged,) = (tmp_path / "results").rglob("samples_own_choice_*.jsonl")
    found = [json.loads(line)["filtered_resps"] for line in logged.read_text().splitlines()]
    requests = [
        instance("loglikelihood", doc["stem"], f" {option}") for doc in tasks[1][:2] for option in doc["options"]
    ]
    expected = make_lm(tmp_path / "pruned", mc_num=4, cfg=0.5, batch_size=8).loglikelihood(requests, disable_tqdm=True)
    # As text in the log; a difference in a weight would show in the first digits.
    assert [float(score) for pair in found for score, _ in pair] == pytest.approx([s for s, _ in expected], rel=1e-6)


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    """A small random Dream with the embedded tokenizer: shifted logits, first and last token kept, unequal blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("dream")
    config = AutoConfig.for_model(
        "Dream", vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, mask_token_id=2, eos_token_id=1, bos_token_id=0,
        pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    make_unequal(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).save_pretrained(folder)
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(folder)
    return folder


def test_dream_sees_an_end_behind_the_answer_and_predicts_one_position_early(dream, tasks, tokenizer):
    lm, stem = make_lm(dream, mc_num=8, add_bos_token=True), tasks[1][0]["stem"]
    ((found, _),) = lm.loglikelihood([instance("loglikelihood", stem, " the people")], disable_tqdm=True)
    context, whole = (tokenizer.encode(text, add_special_tokens=False) for text in (stem, f"{stem} the people"))
    expected = direct(lm.model, [0, *context], whole[len(context) :], mc_num=8, seed=0, ending=[1])
    # Batched against single rows in float32.
    assert found == pytest.approx(expected, rel=1e-5)
    (answer,) = lm.generate_until([instance("generate_until", stem, {"max_gen_toks": 6})], disable_tqdm=True)
    (tokens,) = denoise(lm.model, torch.tensor([0, *context]), gen_length=6, eos_token_ids=[1]).sequences
    assert answer == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(("name", "ending"), [("llada", []), ("dream", [1])])
def test_rolling_predicts_each_token_once_with_as_much_context_as_fits(name, ending, dream, tokenizer):
    lm = make_lm(EMBEDDED_MODEL if name == "llada" else dream, mc_num=8, max_length=17 + len(ending))
    text = "The President of the United States is to report to the Congress upon the state of the union. " * 2
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) % 16, "the last window must be shorter for this test"
    (total,) = lm.loglikelihood_rolling([instance("loglikelihood_rolling", text)], disable_tqdm=True)
    expected = 0.0
    for begin in range(0, len(tokens), 16):
        end = min(begin + 16, len(tokens))
        # 17 tokens together, or the whole text so far with BOS.
        context = [0, *tokens][max(end - 16, 0) : begin + 1]
        expected += direct(lm.model, context, tokens[begin:end], 8, 0, ending)
    assert total == pytest.approx(expected, rel=1e-5)


def test_whether_an_answer_is_what_the_model_would_write(model, tokenizer):
    lm, context = make_lm(mc_num=1, check_greedy=True), "The President of the"
    prompt = torch.tensor(tokenizer.encode(context, add_special_tokens=False))
    (tokens,) = denoise(model, prompt, gen_length=3, block_length=3).sequences
    written = tokens.tolist()
    other = [*written[:2], written[2] + 1]
    requests = [((context, "…"), prompt.tolist(), answer) for answer in (written, other)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(requests, disable_tqdm=True)] == [True, False]


def test_a_request_asked_again_is_drawn_anew():
    lm = make_lm(block_length=8)
    ask = instance("generate_until", "The President", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})
    answers = lm.generate_until([ask] * 3, disable_tqdm=True)
    assert len(set(answers)) == 3
    assert lm.generate_until([ask] * 3, disable_tqdm=True) == answers


def test_a_stop_string_that_is_a_special_token_ends_the_answer(monkeypatch):
    """It would be gone from the text otherwise."""
    from sinkprune_plugin.lm_eval import answer_writer

    lm = make_lm()
    words = lm.tok_encode("The President of the United States")
    output = type("Output", (), {"sequences": [torch.tensor([*words[:2], 0, *words[2:]])]})
    monkeypatch.setattr(answer_writer, "denoise", lambda *_, **__: output)
    ask = instance("generate_until", "It", {"until": ["<|startoftext|>"], "max_gen_toks": 16})
    assert lm.generate_until([ask], disable_tqdm=True) == [lm.tokenizer.decode(words[:2])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blok_length": 8}, "'blok_length' is unknown; did you mean block_length"),
        ({"backend": "tpu"}, "backend 'tpu' is unknown"),
        ({"max_length": 4096}, "max_length 4096 is longer than the model's 256"),
        # Not a name, for which the hub would be asked.
        ({"directory": "/nowhere/at/all"}, "can't load the tokenizer /nowhere/at/all"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_lm(**arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_gen_toks": 256}, "steps 8 is out of range; use 32"),
        ({"max_gen_toks": 4}, "steps 8 is out of range; use 1"),
        ({"max_gen_toks": 16, "top_p": 0.0, "do_sample": True}, "top_p 0"),
        ({"beam": 3}, "generation option 'beam' is unknown"),
    ],
)
def test_wrong_requests_are_refused_before_the_first_answer(given, message):
    lm = make_lm(block_length=8, steps=8)
    requests = [instance("generate_until", "It", settings) for settings in ({"max_gen_toks": 16}, given)]
    with pytest.raises(UsageError, match=message):
        lm.generate_until(requests, disable_tqdm=True)
    assert "model" not in vars(lm), "the model was loaded for nothing"


def test_an_answer_needs_room_for_a_prompt():
    with pytest.raises(UsageError, match="256 tokens doesn't fit max_length 256"):
        make_lm().generate_until([instance("generate_until", "It", {"max_gen_toks": 256})], disable_tqdm=True)


def test_a_chat_template_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="no chat template; leave --apply_chat_template out"):
        make_lm().apply_chat_template([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize("key", [True, False], ids=["key", "no key"])
def test_mobile_mmlu_through_the_evaluator(tmp_path, key):
    """Rows of the documented form in a local file, in place of the hub's."""
    from sinkprune_plugin.lm_eval.rotations import averaged_choice

    rows = [
        {"question_id": f"q{number}", "Question": f"Who reports to {who}?", **dict(zip("ABCD", names, strict=True))}
        for number, (who, names) in enumerate(
            {"Congress": ["He", "The President", "We", "Peace"], "the States": ["War", "Law", "Gold", "They"]}.items()
        )
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row | ({"answer": "B"} if key else {})) + "\n" for row in rows))
    results = evaluate(
        ["sinkprune_mobile_mmlu", "sinkprune_mobile_mmlu_pro"],
        TASKS,
        pretrained=EMBEDDED_MODEL,
        mc_num=2,
        metadata={"mobile_mmlu_file": str(file)},
    )
    for task in ("sinkprune_mobile_mmlu", "sinkprune_mobile_mmlu_pro"):
        samples = samples_of(results, task)
        assert len(samples) == 8
        if not key:
            assert "acc,none" not in results["results"][task]
            continue
        correct = []
        for number in (0, 4):
            mine = [
                (sample["doc"]["rotation"], [score for score, _ in sample["filtered_resps"]])
                for sample in samples[number : number + 4]
            ]
            correct.append(averaged_choice(mine) == 1)
        scored = results["results"][task]
        assert scored["acc_averaged,none"] == sum(correct) / 2
        assert scored["acc,none"] == sum(sample["acc"] for sample in samples) / 8
