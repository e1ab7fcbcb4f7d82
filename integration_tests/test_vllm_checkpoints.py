"""Other checkpoints in the engine: Dream with its shifted logits, and what we export sparse."""

import json
import random

import pytest
import torch
from sparse_models import prune_2_of_4
from vllm_engine import make_engine

from sinkprune_plugin.formats import convert_checkpoint, load_sparse_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.sampling import denoise

CACHES = ("none", "prefix", "dual", "commit")


def generate(engine, prompts, max_tokens, options):
    from vllm import SamplingParams

    settings = [
        SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={f"dlm_{name}": value for name, value in each.items()},
        )
        for each in options
    ]
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def random_prompts(count, vocabulary, longest):
    rng = random.Random(0)
    return [[rng.randrange(5, vocabulary) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def test_dream_in_every_cache(tmp_path):
    """Row i of its logits predicts token i + 1: the row before the block is another's, or was kept."""
    from sinkprune_plugin.models.dream.configuration_dream import DreamConfig
    from sinkprune_plugin.models.dream.modeling_dream import DreamModel

    torch.manual_seed(0)
    config = DreamConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        mask_token_id=511,
        initializer_range=0.3,
        architectures=["DreamModel"],
    )
    model = DreamModel(config).eval()
    model.save_pretrained(tmp_path)
    engine = make_engine(tmp_path, skip_tokenizer_init=True)
    prompts = random_prompts(16, 500, 40)
    options = [
        {"cache": CACHES[number % 4], "block_length": (8, 16)[number // 4 % 2], "seed": number}
        | ({"temperature": 0.7} if number % 3 == 0 else {})
        for number in range(16)
    ]
    found = generate(engine, prompts, 32, options)
    for prompt, option, tokens in zip(prompts, options, found, strict=True):
        expected = denoise(model, torch.tensor(prompt), gen_length=32, **option).sequences[0].tolist()
        assert tokens == expected, option
    assert len({tuple(tokens) for tokens in found}) == 16


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """tiny-llada pruned 2:4 by magnitude, dense and as we export it."""
    folder = tmp_path_factory.mktemp("pruned")
    model = load_model(EMBEDDED_MODEL, torch.float32)
    prune_2_of_4(model)
    model.save_pretrained(folder / "dense", max_shard_size="4MB")
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(folder / "dense")
    for name, (to, layout) in {
        "sparse-bitmask": ("sparse-bitmask", "sinkprune"),
        "sparse-24-bitmask": ("sparse-24-bitmask", "sinkprune"),
        "legacy": ("sparse-24-bitmask", "legacy"),
    }.items():
        convert_checkpoint(folder / "dense", folder / name, to, layout=layout, progress=False)
    return folder


PROMPTS = random_prompts(8, 400, 30)
OPTIONS = [{"cache": CACHES[number % 4], "block_length": 8, "steps": 16} for number in range(8)]


@pytest.fixture(scope="module")
def dense_tokens(pruned):
    return generate(make_engine(pruned / "dense"), PROMPTS, 32, OPTIONS)


@pytest.mark.parametrize("name", ["sparse-bitmask", "sparse-24-bitmask", "legacy"])
def test_sparse_checkpoints_give_the_tokens_of_the_dense_one(name, pruned, dense_tokens):
    assert load_sparse_checkpoint(pruned / name).format != "dense"
    assert generate(make_engine(pruned / name), PROMPTS, 32, OPTIONS) == dense_tokens


def test_the_dense_tokens_are_those_of_the_pruned_model(pruned, dense_tokens):
    model = load_model(pruned / "dense", torch.float32)
    for prompt, option, tokens in zip(PROMPTS, OPTIONS, dense_tokens, strict=True):
        assert tokens == denoise(model, torch.tensor(prompt), gen_length=32, **option).sequences[0].tolist()


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8"])
def test_quantized_on_top_of_2_of_4(scheme, tmp_path, golden_windows):
    """The same stacked weights, dense and sparse on disk; quantized matrix products are vLLM's own."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
    from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

    model, tokenizer = load_model(EMBEDDED_MODEL, torch.bfloat16), load_tokenizer(EMBEDDED_MODEL)
    recipe = [
        SinkAwareWandaModifier(mask_structure="2:4", diffusion_steps=4, sample_interval=2),
        QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=[r"re:.*transformer\.ff_out$"]),
    ]
    run_oneshot(model, tokenizer, recipe, golden_windows[:2, :64])
    tokens = {}
    for name in ("sparse", "dense"):
        model.save_pretrained(str(tmp_path / name), save_compressed=True) if name == "sparse" else convert_checkpoint(
            tmp_path / "sparse", tmp_path / name, "dense", progress=False
        )
        tokenizer.save_pretrained(str(tmp_path / name))
        config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert ("sparsity_config" in config) == (name == "sparse")
        tokens[name] = generate(make_engine(tmp_path / name), PROMPTS[:4], 16, OPTIONS[:4])
    assert tokens["sparse"] == tokens["dense"]
