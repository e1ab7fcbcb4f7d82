"""Generation requests: what is read, what is refused, where answers end."""

import pytest

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.lm_eval.generation_requests import AnswerRequest, cut_text, cut_tokens


def test_a_request_without_options_is_greedy():
    assert AnswerRequest.read({}) == AnswerRequest(256)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"until": "\n", "max_gen_toks": 8}, AnswerRequest(8, ("\n",))),
        ({"until": ["a", "", "b"], "max_new_tokens": 9}, AnswerRequest(9, ("a", "b"))),
        ({"max_gen_toks": 8, "max_tokens": 9}, AnswerRequest(8)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5, "num_beams": 1}, AnswerRequest(256)),
        ({"temperature": 0.7}, AnswerRequest(256, temperature=0.7)),
        ({"do_sample": True, "top_k": 4, "top_p": 0.9}, AnswerRequest(256, temperature=1.0, top_k=4, top_p=0.9)),
        ({"do_sample": True, "temperature": 0.0}, AnswerRequest(256)),
    ],
)
def test_requests_are_read(given, expected):
    assert AnswerRequest.read(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block_length": 8}, "generation option 'block_length' is unknown to sinkprune"),
        ({"repetition_penalty": 1.1}, "'repetition_penalty' is unknown"),
        ({"max_post_steps": 16}, "^max_post_steps asks for edits of unmasked tokens"),
        ({"num_beams": 4}, "num_beams 4 doesn't apply"),
        ({"max_gen_toks": 0}, "max_gen_toks 0 is out of range"),
        ({"max_gen_toks": "many"}, "max_gen_toks 'many' is out of range"),
    ],
)
def test_wrong_requests_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        AnswerRequest.read(given)


def test_text_is_cut_at_the_first_stop_string():
    assert cut_text("one. two\nthree", ["\n", ". "]) == "one"
    assert cut_text("one. two\nthree", ["Q:"]) == "one. two\nthree"
    assert cut_text("one", []) == "one"


def test_tokens_are_cut_before_the_first_stop_token():
    assert cut_tokens([5, 6, 1, 7, 1], {1, 9}) == [5, 6]
    assert cut_tokens([5, 6], {1}) == [5, 6]
