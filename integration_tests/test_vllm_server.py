"""README's server and client: chat, streams, invalid input, clients that disconnect, and Ctrl-C."""

import asyncio
import json
import random
import re
import shlex
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from vllm_engine import SINKPRUNE, clean_environment, serving

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.sampling import denoise

TIMEOUT = httpx.Timeout(120)


README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def process_of_server(tmp_path_factory):
    """Address, process and log of the one server of this module: README's command with the embedded model."""
    folder = tmp_path_factory.mktemp("server")
    log, template = folder / "server.log", folder / "template.jinja"
    # The embedded model isn't a chat model and has no template.
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    (line,) = re.findall(r"^sinkprune serve .*$", README, re.MULTILINE)
    _, serve, directory, *options = shlex.split(line)
    assert (serve, directory) == ("serve", "demo-output/sink-aware-sparsegpt")
    command = [SINKPRUNE, serve, EMBEDDED_MODEL, *options, "--chat-template", template]
    # Few slots, so that clients that disconnect must free theirs for others.
    command += ["--diffusion-config", '{"canvas_length": 128}', "--max-num-seqs", "8"]
    if torch.cuda.is_available():
        command += ["--dtype", "float32", "--enforce-eager"]
    with serving(command, log) as (address, process):
        yield address, process, log


@pytest.fixture
def server(process_of_server):
    address, process, log = process_of_server
    yield address
    assert process.poll() is None, log.read_text()[-3000:]
    assert "EngineDead" not in log.read_text()


def complete(server, **body):
    return httpx.post(f"{server}/v1/completions", json={"model": "tiny", **body}, timeout=TIMEOUT)


def test_the_client_of_the_readme_as_printed(server):
    (client,) = re.findall(r"^```python\n(from openai import OpenAI\n.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert client.count("http://localhost:8000/") == 1
    done = subprocess.run(
        [sys.executable, "-c", client.replace("http://localhost:8000", server)],
        capture_output=True,
        text=True,
        timeout=120,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = load_model(EMBEDDED_MODEL, torch.float32), load_tokenizer(EMBEDDED_MODEL)
    prompt = torch.tensor(tokenizer("The President of the United States")["input_ids"])
    tokens = denoise(model, prompt, gen_length=32, block_length=8, cache="dual")
    assert done.stdout == tokenizer.decode(tokens.sequences[0]) + "\n"


def test_text_is_that_of_the_plain_sampler(server):
    prompt, tokenizer = "The President of the United States", load_tokenizer(EMBEDDED_MODEL)
    answer = complete(
        server, prompt=prompt, max_tokens=32, temperature=0, vllm_xargs={"dlm_block_length": 8, "dlm_steps": 16}
    )
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    model = load_model(EMBEDDED_MODEL, torch.float32)
    tokens = denoise(model, torch.tensor(tokenizer(prompt)["input_ids"]), gen_length=32, block_length=8, steps=16)
    assert choice["text"] == tokenizer.decode(tokens.sequences[0])
    assert choice["finish_reason"] == "length"
    assert answer.json()["usage"]["completion_tokens"] == 32


def test_a_temperature_of_one_counts_if_it_is_asked_for_by_its_own_name(server):
    """vLLM fills in temperature 1.0 for clients that send none, so that number by itself can't mean anything."""
    prompt, model = [5, 6, 7, 8], load_model(EMBEDDED_MODEL, torch.float32)

    def text(temperature, **options):
        body = {"prompt": prompt, "max_tokens": 16, "temperature": temperature, "vllm_xargs": options}
        answer = complete(server, **body, ignore_eos=True)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def plain(temperature):
        tokens = denoise(model, torch.tensor(prompt), gen_length=16, temperature=temperature, seed=3).sequences[0]
        return load_tokenizer(EMBEDDED_MODEL).decode(tokens)

    assert text(1.0, dlm_temperature=1.0, dlm_seed=3) == plain(1.0) != plain(0.0)
    assert text(1.0, dlm_seed=3) == plain(0.0)


def test_numbers_may_come_as_text_and_token_ids_as_a_prompt(server):
    numbers = complete(server, prompt=[5, 6, 7], max_tokens=16, vllm_xargs={"dlm_block_length": 8, "dlm_cache": "dual"})
    text = complete(server, prompt=[5, 6, 7], max_tokens=16, vllm_xargs={"dlm_block_length": "8", "dlm_cache": "dual"})
    assert numbers.status_code == text.status_code == 200
    assert numbers.json()["choices"] == text.json()["choices"]


def test_chat_without_max_tokens_fills_the_canvas(server):
    text = "Who is the President?"
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=TIMEOUT)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 128
    assert (
        answer.json()["choices"][0]["message"]["content"]
        == complete(server, prompt=text, max_tokens=128, temperature=0, ignore_eos=True).json()["choices"][0]["text"]
    )


def events(response):
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def test_a_stream_comes_block_by_block(server):
    body = {"model": "tiny", "prompt": "Congress", "max_tokens": 32, "temperature": 0, "stream": True}
    body["vllm_xargs"] = {"dlm_block_length": 8}
    counting = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    with httpx.stream("POST", f"{server}/v1/completions", json=body | counting, timeout=TIMEOUT) as response:
        # The last event has usage only.
        *found, _ = [
            ("".join(choice["text"] for choice in event["choices"]), event["usage"]["completion_tokens"])
            for event in events(response)
        ]
    whole = complete(server, **{**body, "stream": False}).json()["choices"][0]["text"]
    assert "".join(text for text, _ in found) == whole
    # Whole blocks; a server that is slower than its engine sends two of them at once.
    counts = [count for text, count in found if text]
    assert set(counts) <= {8, 16, 24, 32}
    assert counts == sorted(set(counts))
    assert len(counts) > 1


async def _client(client, server, number, leave):
    body = {"model": "tiny", "prompt": [number + 5] * (number % 30 + 1), "max_tokens": 48, "stream": True}
    body["vllm_xargs"] = {"dlm_block_length": 8, "dlm_cache": ("none", "prefix", "dual", "commit")[number % 4]}
    pieces = []
    async with client.stream("POST", f"{server}/v1/completions", json=body, timeout=TIMEOUT) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
                if leave:
                    return None
    return "".join(pieces)


def test_many_streams_and_clients_that_leave_in_the_middle(server):
    async def everyone():
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=64)) as client:
            return await asyncio.gather(
                *(_client(client, server, number, leave=number % 4 == 3) for number in range(32))
            )

    texts = asyncio.run(everyone())
    assert sum(text is None for text in texts) == 8
    for number in (0, 1, 2):
        alone = complete(
            server,
            prompt=[number + 5] * (number % 30 + 1),
            max_tokens=48,
            vllm_xargs={"dlm_block_length": 8, "dlm_cache": ("none", "prefix", "dual")[number]},
        )
        assert alone.json()["choices"][0]["text"] == texts[number]
    # Every slot is free again: nothing runs and nothing waits.
    gauges = httpx.get(f"{server}/metrics", timeout=TIMEOUT).text
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        values = [line.rsplit(" ", 1)[1] for line in gauges.splitlines() if line.startswith(name + "{")]
        assert values, name
        assert all(float(value) == 0 for value in values), name


REFUSED = [
    ({"vllm_xargs": {"dlm_steps": 0}}, "dlm_steps 0"),
    ({"vllm_xargs": {"dlm_steps": 17}}, "dlm_steps 17"),
    ({"vllm_xargs": {"dlm_steps": "many"}}, "dlm_steps 'many'"),
    ({"vllm_xargs": {"dlm_block_length": 0}}, "dlm_block_length 0"),
    ({"vllm_xargs": {"dlm_block_length": 5, "dlm_gen_length": 16}}, "doesn't divide dlm_gen_length 16"),
    ({"vllm_xargs": {"dlm_block_length": 3.5}}, "dlm_block_length 3.5"),
    ({"vllm_xargs": {"dlm_gen_length": 129}}, "served canvas of 128"),
    ({"prompt": [5] * 200, "max_tokens": 50, "vllm_xargs": {"dlm_gen_length": 100}}, "max_model_len 256"),
    ({"vllm_xargs": {"dlm_cache": "all"}}, "dlm_cache 'all' is unknown"),
    ({"vllm_xargs": {"dlm_remasking": "none"}}, "dlm_remasking 'none' is unknown"),
    ({"vllm_xargs": {"dlm_temperature": -1}}, "dlm_temperature -1"),
    ({"vllm_xargs": {"dlm_threshold": 2}}, "dlm_threshold 2"),
    ({"vllm_xargs": {"dlm_cfg_scale": 1.5}}, "guidance needs a second forward pass"),
    ({"vllm_xargs": {"dlm_seed": -1}}, "dlm_seed -1"),
    ({"vllm_xargs": {"dlm_blocklength": 8}}, "did you mean dlm_block_length?"),
    ({"vllm_xargs": {"sinkprune_plan": "x"}}, "unknown option 'sinkprune_plan'"),
    ({"temperature": 0.5, "vllm_xargs": {"dlm_temperature": 0.7}}, "both given"),
    ({"max_tokens": 129}, "served canvas of 128"),
    ({"logprobs": 2}, "logprobs 2"),
    ({"echo": True, "logprobs": 1}, "logprobs"),
    ({"prompt_logprobs": 1}, "prompt_logprobs 1"),
    ({"presence_penalty": 0.5}, "presence_penalty 0.5"),
    ({"frequency_penalty": 0.5}, "frequency_penalty 0.5"),
    ({"repetition_penalty": 1.2}, "repetition_penalty 1.2"),
    ({"min_tokens": 3}, "min_tokens 3"),
    ({"min_p": 0.1}, "min_p 0.1"),
    ({"logit_bias": {"5": 1.0}}, "logit_bias"),
    ({"bad_words": ["the"]}, "bad_words"),
    ({"allowed_token_ids": [5]}, "allowed_token_ids"),
    ({"response_format": {"type": "json_object"}}, "structured_outputs"),
]


@pytest.mark.parametrize(("body", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_wrong_request_is_one_clear_line(server, body, message):
    answer = complete(server, **{"prompt": "Congress", "max_tokens": 16, **body})
    assert answer.status_code == 400, answer.text
    said = answer.json()["error"]["message"]
    assert message in said
    assert "\n" not in said.strip()


def _nonsense(rng):
    """A request that is wrong in some way; returns its body."""
    junk = [None, True, -1, 0, 10**30, 1.5, float(10**300), "", "x" * 50, [], [1, "a"], {"a": 1}, "８", "1e400", "-0"]
    body = {"model": "tiny", "prompt": "Congress", "max_tokens": 8}
    kind = rng.randrange(4)
    options = [
        "block_length",
        "steps",
        "gen_length",
        "cache",
        "temperature",
        "remasking",
        "threshold",
        "factor",
        "early_stop",
        "seed",
    ]
    if kind == 0:
        # One option with an invalid value.
        wrong = ["", "x" * 50, [1, "a"], -1, 10**30, "８", "1e400", "nan", "-3"]
        body["vllm_xargs"] = {f"dlm_{rng.choice(options)}": rng.choice(wrong)}
    elif kind == 1:
        name = "dlm_" + "".join(rng.choices(string.ascii_lowercase, k=rng.randrange(1, 12)))
        body["vllm_xargs"] = {name + "_": rng.choice([1, "a", 0.5])}
    elif kind == 2:
        body[rng.choice(["logprobs", "prompt_logprobs", "min_tokens"])] = rng.randrange(1, 5)
    else:
        body[rng.choice(["prompt", "max_tokens", "vllm_xargs", "temperature"])] = rng.choice(
            [junk[2], "x" * 50 if rng.random() < 0.5 else {"a": 1}]
        )
        body["min_tokens"] = 2
    return body


def test_five_hundred_wrong_requests_are_all_refused_and_the_server_stays_up(server):
    rng = random.Random(0)
    before = complete(server, prompt="Congress", max_tokens=8, temperature=0).json()["choices"]
    with httpx.Client(timeout=TIMEOUT) as client:
        for _ in range(500):
            body = _nonsense(rng)
            answer = client.post(f"{server}/v1/completions", content=json.dumps(body))
            assert 400 <= answer.status_code < 500, (body, answer.status_code, answer.text)
    assert complete(server, prompt="Congress", max_tokens=8, temperature=0).json()["choices"] == before


def test_ctrl_c_ends_the_server_within_seconds_although_a_client_waits(process_of_server):
    """The last test of this module: it ends the module's server."""
    address, process, log = process_of_server
    assert "for trying out" in log.read_text() or torch.cuda.is_available()
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(processes) > 1
    body = {"model": "tiny", "prompt": [5] * 100, "max_tokens": 128, "stream": True, "ignore_eos": True}
    body["vllm_xargs"] = {"dlm_block_length": 8}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=TIMEOUT) as response:
        next(response.iter_lines())
        started = time.monotonic()
        # To this process alone: in a terminal, the server's processes have a separate session.
        process.send_signal(signal.SIGINT)
        status = process.wait(60)
        # Five seconds for the server, two for its processes, and a busy machine.
        assert time.monotonic() - started < 30
    assert status in (0, 130)
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
