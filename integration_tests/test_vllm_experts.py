"""vLLM's fused experts compute what the transformers classes compute, and the engine writes what `denoise` writes."""

import json

import pytest
import torch
from fused_checkpoints import LAYOUTS, fuse
from official_checkpoints import write_llada_moe
from sparse_models import prune_2_of_4
from tiny_moe import write_tiny_moe
from vllm_engine import make_engine
from vllm_modules import forward_function, loader, tokens_of

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.loading import load_model, load_tokenizer
from sinkprune_plugin.models.block_sizes import keep_units
from sinkprune_plugin.models.llada_moe import LLaDAMoEModelLM
from sinkprune_plugin.sampling import denoise
from sinkprune_plugin.text_windows import embedded_text, read_documents

# vLLM's kernels for experts on CPUs need a width of the hidden states that is a multiple of 32.
WIDTH = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "expert_intermediate_size": 48}


@pytest.fixture(scope="module")
def load():
    with loader() as load:
        yield load


@pytest.fixture
def logits(monkeypatch):
    return forward_function(monkeypatch)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Engine and plain model of a language model with unequal numbers of experts, and token ids of text."""
    folder = tmp_path_factory.mktemp("tiny-moe") / "model"
    write_tiny_moe(folder, experts=[8, 6, 5, 8, 3, 2])
    text = load_tokenizer(folder)(" ".join(read_documents(embedded_text("test")))[:4000])["input_ids"]
    return make_engine(folder), load_model(folder, torch.float32), text


def write(folder, experts=None, **changes):
    """A checkpoint; ``experts`` gives each of its layers a number of its own."""
    config, tensors = write_llada_moe(folder, experts=experts, **(WIDTH | changes))
    if experts:
        sizes = {"mlp_channels": 48, "attention_heads": 4, "key_value_heads": 4}
        config["sinkprune_block_sizes"] = [{**sizes, "experts": count} for count in experts]
        config |= {"head_dim": 16, "hidden_act": "silu with sinkprune_block_sizes (load it with sinkprune-plugin)"}
        (folder / "config.json").write_text(json.dumps(config))
    return config, tensors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"qk_layernorm": False, "attention_bias": True},
        {"tie_word_embeddings": True},
        {"moe_layer_freq": [0, 1]},
        {"experts": [5, 3]},
        {"hidden_act": "gelu"},
    ],
    ids=["official", "grouped queries", "biases", "tied", "a dense layer", "numbers of their own", "gelu"],
)
def test_logits_of_the_plain_model(changes, tmp_path, load, logits):
    config, _ = write(tmp_path, **changes)
    tokens = tokens_of(config)
    with torch.no_grad():
        expected = LLaDAMoEModelLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens[None]).logits[0]
    found = logits(*load(tmp_path), tokens)
    # float32 sums in another order (fused projections and experts, another attention kernel); logits of order 1.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_experts_give_the_logits_of_separate_ones(layout, tmp_path, load, logits):
    config, _ = write(tmp_path, experts=[5, 3])
    separate = logits(*load(tmp_path), tokens_of(config))
    fuse(tmp_path, layout, architectures=["FusedLLaDAMoEModelLM"])
    assert torch.equal(logits(*load(tmp_path), tokens_of(config)), separate)


def test_fewer_heads_and_channels(tmp_path, load, logits):
    """A dense layer that lost channels and heads, and one whose experts lost channels."""
    config, _ = write(tmp_path / "whole", moe_layer_freq=[0, 1], num_key_value_heads=2)
    model = load_model(tmp_path / "whole", torch.float32)
    keep_units(model, 0, channels=torch.arange(32), heads=torch.tensor([0, 2]))
    keep_units(model, 1, heads=torch.tensor([2, 3]), expert_channels=[torch.arange(n, n + 32) for n in range(6)])
    model.save_pretrained(tmp_path / "small")
    tokens = tokens_of(config)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    torch.testing.assert_close(logits(*load(tmp_path / "small"), tokens), expected, rtol=1e-4, atol=1e-4)


def test_fused_experts_of_another_shape_are_refused(tmp_path, load):
    config, _ = write(tmp_path)
    fuse(tmp_path, "dInfer")
    (tmp_path / "config.json").write_text(json.dumps({**config, "expert_intermediate_size": 32}))
    with pytest.raises(
        UsageError, match=r"mlp\.w1 is \[6, 96, 64\] in its file, and config\.json asks for \[6, 64, 64\]"
    ):
        load(tmp_path)


@pytest.mark.parametrize("sparse_format", ["sparse-24-bitmask", "sparse-bitmask"])
def test_sparse_experts_give_the_logits_of_dense_ones(sparse_format, tmp_path, load, logits):
    config, _ = write(tmp_path / "whole", experts=[5, 3])
    prune_2_of_4(LLaDAMoEModelLM.from_pretrained(tmp_path / "whole")).save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", sparse_format, progress=False)
    dense, sparse = (logits(*load(tmp_path / name), tokens_of(config)) for name in ("dense", "sparse"))
    assert torch.equal(sparse, dense)


@pytest.mark.parametrize("experts", [None, [5, 3]])
def test_every_parameter_comes_from_the_checkpoint(experts, tmp_path, load):
    _, tensors = write(tmp_path, experts)
    model, _ = load(tmp_path, load_format="dummy")
    assert model.checkpoint_names() == set(tensors)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "relu2"}, "hidden_act='relu2': vLLM's kernels for experts have silu, gelu"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True"),
        ({"num_experts_per_tok": 7}, "decoder block 0 has 6 experts, fewer than the num_experts_per_tok=7"),
    ],
)
def test_options_that_are_not_computed(changes, words, tmp_path, load):
    write(tmp_path, **changes)
    with pytest.raises(UsageError, match=words):
        load(tmp_path)


@pytest.mark.parametrize(("stored", "said"), [(5, 6), (6, 5)])
def test_tensors_that_disagree_with_the_number_of_experts(stored, said, tmp_path, load):
    config, _ = write(tmp_path, num_experts=stored)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts": said}))
    with pytest.raises(UsageError, match=rf"^model\.layers\..*gate\.weight is for {stored} experts, .* says {said};"):
        load(tmp_path)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "commit"])
def test_tokens_of_the_engine_equal_those_of_the_plain_sampler(cache, served):
    """Layers of 8 to 2 experts; one batch in the engine against one call of the sampler for each request.

    Both compute in float32, in other orders; two experts or tokens that tie haven't been seen.
    """
    from vllm import SamplingParams

    engine, plain, text = served
    shapes = [(1, 8, 8), (40, 32, 16), (17, 24, 8), (64, 16, 16)]
    prompts = [text[100 * i : 100 * i + length] for i, (length, _, _) in enumerate(shapes)]
    settings = [
        SamplingParams(max_tokens=count, extra_args={"dlm_cache": cache, "dlm_block_length": block})
        for _, count, block in shapes
    ]
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    for prompt, output, (_, count, block) in zip(prompts, outputs, shapes, strict=True):
        (expected,) = denoise(plain, torch.tensor(prompt), gen_length=count, block_length=block, cache=cache).sequences
        assert list(output.outputs[0].token_ids) == expected.tolist()
