"""Options of a generation: every rule with its message, and how steps and tokens are distributed."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sampling import SamplingOptions, parse_options
from sinkprune_plugin.sampling.edit_options import EDIT_OPTIONS
from sinkprune_plugin.sampling.options import CACHES, OPTION_NAMES, REMASKINGS


def message_of(**options):
    with pytest.raises(UsageError) as caught:
        SamplingOptions.resolve(**({"gen_length": 64} | options))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 200
    return message


def parse_message(**options):
    with pytest.raises(UsageError) as caught:
        parse_options(options, max_tokens=64)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_length": 0}, "dlm_gen_length 0 is out of range; use a whole number from 1 to 2147483647"),
        ({"gen_length": 2.0}, "dlm_gen_length 2.0 isn't a whole number; use one from 1 to 2147483647"),
        ({"gen_length": True}, "dlm_gen_length True isn't a whole number; use one from 1 to 2147483647"),
        ({"block_length": 0}, "dlm_block_length 0 is out of range; use a whole number from 1 to 2147483647"),
        ({"block_length": 16.0}, "dlm_block_length 16.0 isn't a whole number; use one from 1 to 2147483647"),
        (
            {"block_length": 65},
            "dlm_block_length 65 is longer than the generation of 64 tokens; use at most 64, or generate more",
        ),
        (
            {"block_length": 24, "gen_length_given": True},
            "dlm_block_length 24 doesn't divide dlm_gen_length 64; use a divisor, or leave dlm_gen_length out for a "
            "shorter last block",
        ),
        ({"steps": 1}, "dlm_steps 1 is out of range; use 2 (one per block) to 64 (one per token)"),
        ({"steps": 65}, "dlm_steps 65 is out of range; use 2 (one per block) to 64 (one per token)"),
        ({"steps": 9}, "dlm_steps 9 isn't a multiple of the 2 blocks; use 8 or 10"),
        ({"steps": "8"}, "dlm_steps '8' isn't a whole number; use one from 1 to 2147483647"),
        ({"steps": 10**5000}, "dlm_steps of 16610 bits is out of range; use a whole number from 1 to 2147483647"),
        ({"temperature": -0.1}, "dlm_temperature -0.1 is out of range; use a number from 0 and up to 100"),
        ({"temperature": 100.5}, "dlm_temperature 100.5 is out of range; use a number from 0 and up to 100"),
        ({"temperature": math.nan}, "dlm_temperature nan is out of range; use a number from 0 and up to 100"),
        ({"temperature": True}, "dlm_temperature True is out of range; use a number from 0 and up to 100"),
        ({"temperature": "1"}, "dlm_temperature '1' is out of range; use a number from 0 and up to 100"),
        ({"threshold": 0}, "dlm_threshold 0 is out of range; use a number above 0 and up to 1"),
        ({"threshold": 1.01}, "dlm_threshold 1.01 is out of range; use a number above 0 and up to 1"),
        (
            {"threshold": 0.9, "remasking": "entropy"},
            "dlm_threshold 0.9 is for probabilities, not entropies; use dlm_remasking low_confidence with it",
        ),
        (
            {"factor": 1, "remasking": "entropy"},
            "dlm_factor 1 is for probabilities, not entropies; use dlm_remasking low_confidence with it",
        ),
        ({"factor": 0}, "dlm_factor 0 is out of range; use a number above 0"),
        ({"factor": math.inf}, "dlm_factor inf is out of range; use a number above 0"),
        (
            {"factor": 1.5, "threshold": 0.9},
            "dlm_threshold 0.9 and dlm_factor 1.5 are two rules for the same choice; leave one out",
        ),
        ({"early_stop": 1}, "dlm_early_stop 1 isn't true or false; use one of these"),
        ({"cfg_scale": -1}, "dlm_cfg_scale -1 is out of range; use a number from 0"),
        ({"cfg_scale": math.inf}, "dlm_cfg_scale inf is out of range; use a number from 0"),
        (
            {"cfg_scale": 1.5, "cache": "dual"},
            "dlm_cfg_scale 1.5 works without a cache only; use dlm_cache none, not dual",
        ),
        ({"seed": -1}, "dlm_seed -1 is out of range; use a whole number from 0 to 9223372036854775807"),
        (
            {"seed": 2**63},
            "dlm_seed 9223372036854775808 is out of range; use a whole number from 0 to 9223372036854775807",
        ),
        ({"seed": None}, "dlm_seed None isn't a whole number; use one from 0 to 9223372036854775807"),
        ({"top_k": -1}, "top_k -1 is out of range; use a whole number from 0 to 2147483647"),
        ({"top_p": 0.0}, "top_p 0.0 is out of range; use a number above 0 and up to 1"),
        ({"top_p": 1.5}, "top_p 1.5 is out of range; use a number above 0 and up to 1"),
        ({"cache": "duel"}, "dlm_cache 'duel' is unknown; use none, prefix, dual or commit"),
        ({"cache": ["a\nb"]}, "dlm_cache ['a\\nb'] is unknown; use none, prefix, dual or commit"),
        (
            {"remasking": "topk_margin"},
            "dlm_remasking 'topk_margin' is unknown; use low_confidence, random, margin or entropy",
        ),
    ],
)
def test_each_rule_names_option_value_and_remedy(options, message):
    assert message_of(**options) == message


def test_a_huge_value_makes_no_huge_message():
    assert len(message_of(cache="x" * 100_000)) < 120


def test_limits_themselves_are_admitted():
    options = SamplingOptions.resolve(
        gen_length=1,
        block_length=1,
        steps=1,
        temperature=100,
        threshold=1,
        seed=2**63 - 1,
        top_k=0,
        top_p=1,
        gen_length_given=True,
    )
    assert options == SamplingOptions(1, 1, 1, temperature=100.0, threshold=1.0, seed=2**63 - 1)


def test_defaults_are_blocks_of_32_and_a_step_for_each_token():
    assert SamplingOptions.resolve(gen_length=8) == SamplingOptions(gen_length=8, block_length=8, steps=8)
    assert SamplingOptions.resolve(gen_length=128) == SamplingOptions(gen_length=128, block_length=32, steps=128)
    # A default never fails, and never shrinks to blocks of one token where the length is a prime number.
    assert SamplingOptions.resolve(gen_length=67, gen_length_given=True).blocks == ((0, 32), (32, 64), (64, 67))


def test_dividing_sizes_are_distributed_as_published():
    # LLaDA's sampler: steps // blocks steps per block, the first of them taking the remainder.
    options = SamplingOptions.resolve(gen_length=60, block_length=20, steps=9)
    assert [options.tokens_per_step(block) for block in range(3)] == [(7, 7, 6)] * 3


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_blocks_and_steps_cover_everything_once(data):
    gen_length = data.draw(st.integers(1, 200))
    block_length = data.draw(st.integers(1, gen_length))
    blocks = math.ceil(gen_length / block_length)
    steps = data.draw(st.integers(blocks, gen_length))
    if gen_length % block_length == 0:
        steps -= steps % blocks
    options = SamplingOptions.resolve(gen_length=gen_length, block_length=block_length, steps=steps)

    covered = [position for begin, end in options.blocks for position in range(begin, end)]
    assert covered == list(range(gen_length))
    widths = [end - begin for begin, end in options.blocks]
    assert widths[:-1] == [block_length] * (blocks - 1)

    per_block = [options.steps_in_block(block) for block in range(blocks)]
    assert sum(per_block) == steps
    # In proportion to the width, up to rounding: within one step.
    assert all(abs(n - steps * width / gen_length) < 1 for n, width in zip(per_block, widths, strict=True))
    for block, width in enumerate(widths):
        counts = options.tokens_per_step(block)
        assert len(counts) == per_block[block]
        assert sum(counts) == width
        assert min(counts) >= 1
        assert max(counts) - min(counts) <= 1
        assert list(counts) == sorted(counts, reverse=True)


def test_text_from_http_is_read_as_numbers():
    options = parse_options(
        {
            "dlm_gen_length": "128",
            "dlm_block_length": "16",
            "dlm_steps": "32",
            "dlm_cache": "prefix",
            "dlm_temperature": "0.5",
            "dlm_remasking": "margin",
            "dlm_threshold": ".9",
            "dlm_cfg_scale": "0",
            "dlm_seed": "9223372036854775807",
        },
        max_tokens=5,
        top_k=7,
        top_p=0.25,
    )
    assert options == SamplingOptions(
        128, 16, 32, "prefix", 0.5, "margin", 0.9, cfg_scale=0.0, seed=2**63 - 1, top_k=7, top_p=0.25
    )


def test_max_tokens_stands_in_for_the_length_and_allows_a_short_last_block():
    options = parse_options({"dlm_block_length": 16}, max_tokens=40)
    assert options.blocks == ((0, 16), (16, 32), (32, 40))
    assert "doesn't divide" in parse_message(dlm_block_length=16, dlm_gen_length=40)


def test_none_is_not_given():
    assert parse_options(dict.fromkeys(OPTION_NAMES), max_tokens=64) == SamplingOptions.resolve(gen_length=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dlm_block_lenght": 8}, "unknown option 'dlm_block_lenght'; did you mean dlm_block_length?"),
        ({"dlm_step": 8}, "unknown option 'dlm_step'; did you mean dlm_steps?"),
        (
            {"dlm_editing_threshold": 0.5},
            "dlm_editing_threshold asks for edits of unmasked tokens, which aren't made here; leave it out to sample "
            "LLaDA2.1 like LLaDA2.0, or use the model's own sampler or SGLang",
        ),
        ({"dlm_steps": "8.0"}, "dlm_steps '8.0' isn't a whole number; send one in digits"),
        ({"dlm_steps": "1_6"}, "dlm_steps '1_6' isn't a whole number; send one in digits"),
        ({"dlm_steps": " 8"}, "dlm_steps ' 8' isn't a whole number; send one in digits"),
        ({"dlm_steps": ""}, "dlm_steps '' isn't a whole number; send one in digits"),
        ({"dlm_steps": 8.0}, "dlm_steps 8.0 isn't a whole number; use one from 1 to 2147483647"),
        ({"dlm_steps": [8]}, "dlm_steps [8] isn't a whole number; use one from 1 to 2147483647"),
        ({"dlm_temperature": "nan"}, "dlm_temperature 'nan' isn't a number; send one in digits"),
        ({"dlm_temperature": "1e999"}, "dlm_temperature inf is out of range; use a number from 0 and up to 100"),
        ({"dlm_early_stop": "yes"}, "dlm_early_stop 'yes' isn't true or false; use one of these"),
        ({"dlm_threshold": "high"}, "dlm_threshold 'high' isn't a number; send one in digits"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(options, message):
    assert parse_message(**options) == message


def test_an_option_like_no_other_is_answered_with_all_names():
    message = parse_message(zzz=1)
    assert all(name in message for name in OPTION_NAMES)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(OPTION_NAMES) | st.text(max_size=12)


@given(st.dictionaries(NAMES, JSON | st.sampled_from(CACHES + REMASKINGS), max_size=4), st.integers(1, 64))
@settings(deadline=None, max_examples=300)
def test_whatever_a_client_sends_gives_options_or_one_line(given_options, max_tokens):
    message = "one line"
    try:
        options = parse_options(given_options, max_tokens=max_tokens)
        assert 1 <= len(options.blocks) <= options.steps <= options.gen_length
    except UsageError as error:
        message = str(error)
    # splitlines knows more separators than \n: none of them may reach a log either.
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("value", [True, "true", "True", 1, "1"])
def test_early_stop_over_http(value):
    assert parse_options({"dlm_early_stop": value}, max_tokens=8).early_stop is True
    off = parse_options({"dlm_early_stop": "false", "dlm_factor": "1.5"}, max_tokens=8)
    assert (off.early_stop, off.factor) == (False, 1.5)


@pytest.mark.parametrize("changes", [{"threshold": 0.9}, {"factor": 1.0}, {"early_stop": True}])
def test_whether_the_number_of_steps_is_known(changes):
    assert SamplingOptions.resolve(gen_length=8).fixed_steps
    assert not SamplingOptions.resolve(gen_length=8, **changes).fixed_steps


def test_edits_are_refused_whatever_a_request_calls_them():
    for name in EDIT_OPTIONS:
        with pytest.raises(UsageError, match=f"^{name} asks for edits of unmasked tokens"):
            parse_options({name: "0.5"}, max_tokens=8)
