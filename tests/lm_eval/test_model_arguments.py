"""Arguments of the model class: what is read and what is refused."""

import pytest
import torch

from sinkprune_plugin import devices
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.lm_eval.model_arguments import ModelArguments


def test_arguments_as_lm_eval_passes_them():
    given = {"pretrained": "somewhere", "cfg": 0.5, "mc_num": 4, "steps": 16, "batch_size": "8", "device": None}
    arguments = ModelArguments.read(given | {"max_batch_size": None, "trust_remote_code": True})
    assert (arguments.cfg, arguments.mc_num, arguments.steps, arguments.batch_size) == (0.5, 4, 16, 8)
    # Block length and cache are the model's own.
    assert (arguments.backend, arguments.block_length, arguments.cache) == ("transformers", None, None)


def test_an_automatic_batch_size_is_the_default():
    assert ModelArguments.read({"pretrained": "somewhere", "batch_size": "auto:4"}).batch_size == 32


@pytest.mark.parametrize(("kind", "taken"), [(None, None), ("mps", None), ("cuda", "cuda:0")])
def test_the_device_that_lm_eval_passes_by_itself_is_taken_where_it_is_there(kind, taken, monkeypatch):
    found = (torch.device(kind), 1) if kind else (None, 0)
    monkeypatch.setattr(devices, "_accelerators", lambda: found)
    assert ModelArguments.read({"pretrained": "somewhere", "device": "cuda:0"}).device == taken


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretrained": None}, "there is no model; pass --model_args pretrained="),
        ({"editing_threshold": 0.5}, "editing_threshold asks for edits of unmasked tokens, which aren't made here"),
        ({"blok_length": 8}, "'blok_length' is unknown; did you mean block_length?"),
        ({"zzz": 8}, "'zzz' is unknown; known are pretrained, backend"),
        ({"backend": "tpu"}, "backend 'tpu' is unknown; use transformers or vllm"),
        ({"backend": "vllm", "cfg": 0.5}, "cfg 0.5 isn't served by vLLM"),
        ({"mc_num": 0}, "mc_num 0 is out of range; use a whole number from 1"),
        ({"mc_num": 1.5}, "mc_num 1.5 is out of range"),
        ({"mc_num": True}, "mc_num True is out of range"),
        ({"cfg": -1}, "cfg -1 is out of range; use a number from 0"),
        ({"cfg": "much"}, "cfg 'much' is out of range"),
        ({"cfg": float("nan")}, "cfg nan is out of range"),
        ({"cfg": 1.0, "cache": "dual"}, "cfg 1 works without a cache only; use cache none, not dual"),
        ({"cache": "all"}, "cache 'all' is unknown; use none, prefix, dual or commit"),
        ({"block_length": 0}, "0 is out of range; use a whole number from 1"),
        ({"steps": 0}, "steps 0 is out of range"),
        ({"steps": "none"}, "steps 'none' is out of range"),
        ({"max_length": 1}, "max_length 1 is out of range; use a whole number from 2"),
        ({"batch_size": 0}, "batch_size 0 is out of range"),
        ({"batch_size": "many"}, "batch_size 'many' is out of range"),
        ({"check_greedy": "yes"}, "check_greedy 'yes' is neither True nor False"),
        ({"dtype": "int3"}, "dtype 'int3' is unknown; use auto, float32"),
        ({"device": "abacus"}, "device 'abacus' is unknown"),
        ({"device": "cuda:99"}, "device 'cuda:99' isn't there"),
        ({"seed": -1}, "seed -1 is out of range"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(given, message):
    with pytest.raises(UsageError) as caught:
        ModelArguments.read({"pretrained": "somewhere"} | given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "dlm_" not in str(caught.value)
