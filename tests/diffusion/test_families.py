import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sinkprune_plugin.diffusion import DiffusionFamily, families, register_family, resolve_diffusion
from sinkprune_plugin.diffusion.families import _FAMILIES
from sinkprune_plugin.errors import UsageError

TINY_CONFIG = Path(__file__).parent.parent.parent / "sinkprune_plugin" / "assets" / "tiny-llada" / "config.json"


@pytest.fixture
def _registry():
    before = dict(_FAMILIES)
    yield
    _FAMILIES.clear()
    _FAMILIES.update(before)


def config(model_type="llada", vocab_size=2048, **fields):
    return SimpleNamespace(model_type=model_type, vocab_size=vocab_size, **fields)


def test_embedded_config_resolves_from_plain_json():
    spec = resolve_diffusion(json.loads(TINY_CONFIG.read_text()))
    assert (spec.name, spec.mask_token_id, spec.vocab_size) == ("llada", 2, 2048)
    assert (spec.logit_shift, spec.keep_first, spec.keep_last) == (0, False, False)


def test_dream_keeps_both_ends_and_shifts_logits():
    spec = resolve_diffusion(config("Dream", 152064, mask_token_id=151666))
    assert (spec.name, spec.logit_shift, spec.keep_first, spec.keep_last) == ("dream", 1, True, True)


@pytest.mark.parametrize(
    ("model_type", "name"), [("llada", "llada"), ("mmada", "llada"), ("Dream", "dream"), ("dream", "dream")]
)
def test_model_types_belong_to_their_family_whatever_their_case(model_type, name):
    assert resolve_diffusion(config(model_type, mask_token_id=5)).name == name


@pytest.mark.parametrize(
    ("given", "in_config", "in_tokenizer", "expected"),
    [(7, 5, 6, 7), (None, 5, 6, 5), (None, None, 6, 6), (None, None, None, 126336)],
)
def test_mask_id_precedence(given, in_config, in_tokenizer, expected):
    tokenizer = SimpleNamespace(mask_token_id=in_tokenizer)
    model_config = config(vocab_size=126464, mask_token_id=in_config)
    assert resolve_diffusion(model_config, tokenizer, mask_token_id=given).mask_token_id == expected


def test_zero_is_a_mask_id():
    assert resolve_diffusion(config(mask_token_id=0), SimpleNamespace(mask_token_id=9)).mask_token_id == 0


def test_padded_embedding_rows_count_as_vocabulary():
    # LLaDA's embedding table may have more rows than the tokenizer has tokens.
    assert resolve_diffusion(config(embedding_size=2176, mask_token_id=2100)).vocab_size == 2176


def test_default_outside_the_vocabulary_is_not_used():
    with pytest.raises(UsageError, match=r"no mask token id .*126336.*vocabulary of 2048; set mask_token_id"):
        resolve_diffusion(config())


@pytest.mark.parametrize("mask_id", [-1, 2048, 126336])
def test_mask_id_out_of_range(mask_id):
    with pytest.raises(UsageError, match=rf"config.mask_token_id is {mask_id}, outside the vocabulary of 2048"):
        resolve_diffusion(config(mask_token_id=mask_id))


@pytest.mark.parametrize("mask_id", [True, 2.0, "2", [2]])
def test_mask_id_of_the_wrong_type(mask_id):
    with pytest.raises(UsageError, match="must be one whole number"):
        resolve_diffusion(config(mask_token_id=mask_id))


@pytest.mark.parametrize("model_type", ["llama", "diffusion_x", None])
def test_unknown_family_names_the_known_ones_and_the_way_to_add_one(model_type):
    with pytest.raises(UsageError) as caught:
        resolve_diffusion(SimpleNamespace(model_type=model_type, vocab_size=100))
    message = str(caught.value)
    assert "\n" not in message
    for part in (repr(model_type), "llada", "mmada", "Dream", "register_family", "docs/adding-a-family.md"):
        assert part in message


@pytest.mark.parametrize("model_type", ["diffusion_gemma", "diffusion_gemma_text", "Diffusion_Gemma"])
def test_the_refusal_of_diffusion_gemma_says_what_is_missing(model_type):
    with pytest.raises(UsageError, match=r"random ones instead of a mask token.*no likelihood, sampler") as caught:
        resolve_diffusion({"model_type": model_type, "vocab_size": 100})
    assert "\n" not in str(caught.value)


def test_missing_vocabulary_size():
    with pytest.raises(UsageError, match="no vocab_size"):
        resolve_diffusion({"model_type": "llada", "mask_token_id": 2})


@pytest.mark.usefixtures("_registry")
def test_a_registered_family_is_found_and_can_be_replaced():
    register_family(DiffusionFamily("mine", ("my_dlm",), default_mask_token_id=3))
    assert resolve_diffusion(config("my_dlm")).mask_token_id == 3
    register_family(DiffusionFamily("mine", ("my_dlm",), default_mask_token_id=4))
    assert resolve_diffusion(config("my_dlm")).mask_token_id == 4
    assert [family.name for family in families()].count("mine") == 1


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize(
    ("family", "message"),
    [
        (DiffusionFamily("", ("x",)), "needs a name"),
        (DiffusionFamily("x", ()), "at least one model_type"),
        (DiffusionFamily("x", ("LLADA",)), "already belongs to family 'llada'"),
        (DiffusionFamily("x", ("x",), logit_shift=2), "logit_shift 2"),
        (DiffusionFamily("x", ("x",), corruption="uniform"), "only 'absorbing'"),
    ],
)
def test_contradicting_families_are_refused(family, message):
    before = families()
    with pytest.raises(UsageError, match=message):
        register_family(family)
    assert families() == before
