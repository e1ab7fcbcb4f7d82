"""Wrong input to the plain sampler: one line each, naming the thing, the number and the remedy."""

import types

import pytest
import torch
from official_checkpoints import write_llada
from torch import nn
from torch.nn import functional as F

from sinkprune_plugin.diffusion import DiffusionSpec, families
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.sampling import denoise

MASK = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llada")
    write_llada(folder)
    return load_model(folder, torch.float32)


def message_of(model, input_ids, **options):
    with pytest.raises(UsageError) as caught:
        denoise(model, input_ids, **({"gen_length": 16} | options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


GOOD = ids(5, 6, 7)


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        ([], "there is no prompt; give at least one"),
        (torch.empty(0, 3, dtype=torch.int64), "there is no prompt; give at least one"),
        ([GOOD, ids()], "prompt 1 is empty; give it at least one token, such as the model's BOS token"),
        (
            torch.empty(2, 0, dtype=torch.int64),
            "prompt 0 is empty; give it at least one token, such as the model's BOS token",
        ),
        (GOOD.int(), "prompt 0 has shape (3,) and dtype torch.int32; it must be one row of int64"),
        (GOOD.float(), "prompt 0 has shape (3,) and dtype torch.float32; it must be one row of int64"),
        ([GOOD[None]], "prompt 0 has shape (1, 3) and dtype torch.int64; it must be one row of int64"),
        (torch.tensor(5), "prompt 0 has shape () and dtype torch.int64; it must be one row of int64"),
        ([[5, 6]], "prompt 0 is a list; make it a tensor: torch.tensor(ids)"),
        (ids(5, 96), "prompt 0 holds the token id 96, outside the vocabulary of 96; use the model's own tokenizer"),
        (
            [GOOD, ids(-1, 5)],
            "prompt 1 holds the token id -1, outside the vocabulary of 96; use the model's own tokenizer",
        ),
        (
            ids(5, MASK, 6),
            "prompt 0 holds the mask token 2 at position 1; only what comes after a prompt is filled in, "
            "so take it out",
        ),
        (
            [GOOD, torch.full((50,), 5)],
            "prompt 1 of 50 tokens and 16 to generate take 66 positions, but the model has 64; shorten the prompt or "
            "generate at most 14",
        ),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(model, input_ids, message):
    assert message_of(model, input_ids) == message


def test_the_longest_prompt_is_admitted(model):
    assert len(denoise(model, torch.full((48,), 5), gen_length=16, steps=1, block_length=16).sequences[0]) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_length": 0}, "dlm_gen_length 0 is out of range; use a whole number from 1 to 2147483647"),
        ({"block_length": 8, "steps": 5}, "dlm_steps 5 isn't a multiple of the 2 blocks; use 4 or 6"),
        ({"seed": [1, 2]}, "there are 2 seeds for 1 prompts; give one for all, or one for each"),
        ({"seed": -3}, "dlm_seed -3 is out of range; use a whole number from 0 to 9223372036854775807"),
        ({"seed": [True]}, "dlm_seed True isn't a whole number; use one from 0 to 9223372036854775807"),
        (
            {"cache": "prefix", "cfg_scale": 1.0},
            "dlm_cfg_scale 1 works without a cache only; use dlm_cache none, not prefix",
        ),
    ],
)
def test_options_out_of_range_are_refused(model, options, message):
    assert message_of(model, GOOD, **options) == message


class Tiny(nn.Module):
    """A model of another kind: ``attend`` is its attention."""

    def __init__(self, attend, model_type="llada", **config):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.attend = attend
        self.config = types.SimpleNamespace(model_type=model_type, vocab_size=12, **config)
        self.device = torch.device("cpu")

    def forward(self, input_ids, position_ids=None):
        x = self.embedding(input_ids)[:, None]
        return types.SimpleNamespace(logits=(self.attend(x) @ self.embedding.weight.T)[:, 0])


def sdpa(x):
    return F.scaled_dot_product_attention(x, x, x)


def eager(x):
    return (x @ x.transpose(-1, -2)).softmax(-1) @ x


def masked(x):
    return F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(x.shape[2], x.shape[2], dtype=torch.bool))


def causal(x):
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class WithoutPositions(Tiny):
    def forward(self, input_ids):
        return super().forward(input_ids)


def test_any_model_with_logits_can_be_sampled():
    tiny = Tiny(eager, mask_token_id=MASK)
    assert len(denoise(tiny, GOOD, gen_length=4).sequences[0]) == 4
    spec = DiffusionSpec(families()[0], MASK, 12)
    assert len(denoise(Tiny(sdpa, model_type="unknown"), GOOD, gen_length=4, cache="dual", spec=spec).sequences[0]) == 4


def test_models_without_family_or_mask():
    assert "is no known family" in message_of(Tiny(sdpa, model_type="gpt2"), GOOD)
    assert "set mask_token_id" in message_of(Tiny(sdpa), GOOD)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [(eager, "doesn't call scaled_dot_product_attention"), (masked, "has no mask"), (causal, "has no mask")],
)
def test_models_whose_keys_cant_be_kept(attend, reason):
    message = message_of(Tiny(attend, mask_token_id=MASK), GOOD, cache="prefix")
    assert reason in message
    assert "use cache none" in message


def test_models_without_positions():
    message = message_of(WithoutPositions(sdpa, mask_token_id=MASK), GOOD, cache="dual")
    assert message == "WithoutPositions takes no position_ids, which cache dual needs; use cache none"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_logits_that_are_not_finite_are_an_error(value, remasking):
    tiny = Tiny(lambda x: x * value, mask_token_id=MASK)
    message = message_of(tiny, GOOD, remasking=remasking)
    assert message == "the logits of Tiny hold NaN or Inf; check the weights, or run in float32"


@pytest.mark.parametrize("name", ["editing_threshold", "max_post_steps", "edit_threshold", "max_post_edit_steps"])
def test_edits_of_unmasked_tokens_are_refused_with_what_to_do(name, model):
    message = message_of(model, GOOD, **{name: 0.5})
    assert message.startswith(f"{name} asks for edits of unmasked tokens, which aren't made here; leave it out")
    # None turns them off in the samplers that have the option.
    assert len(denoise(model, GOOD, gen_length=4, **{name: None}).sequences) == 1


def test_another_unknown_option_is_the_error_that_python_gives(model):
    with pytest.raises(TypeError, match="unexpected keyword argument 'editing'"):
        denoise(model, GOOD, gen_length=4, editing=0.5)
