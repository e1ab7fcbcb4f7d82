"""Checkpoints whose experts are one tensor for all of a layer give the model of those with a tensor for each."""

import json

import pytest
import torch
from fused_checkpoints import LAYOUTS, fuse
from official_checkpoints import write_llada2, write_llada_moe
from safetensors.torch import load_file, save_file
from whole_models import load_whole, random_ids

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.llada2_moe import LLaDA2MoeModelLM
from sinkprune_plugin.models.llada_moe import LLaDAMoEModel, LLaDAMoEModelLM

# A dense layer, and one with experts. In the first family two times the channels are the width, as in LLaDA-MoE 7B.
FAMILIES = {
    "llada-moe": (
        lambda folder: write_llada_moe(folder, moe_layer_freq=[0, 1], expert_intermediate_size=24),
        LLaDAMoEModelLM,
    ),
    "llada2": (write_llada2, LLaDA2MoeModelLM),
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """Folder of a checkpoint in the official layout, its tensors, and the model's class."""
    write, model_class = FAMILIES[request.param]
    _, tensors = write(tmp_path)
    return tmp_path, tensors, model_class


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights_and_is_saved_in_the_official_one(layout, family):
    folder, tensors, model_class = family
    fuse(folder, layout)
    model = load_whole(model_class, folder)
    assert {name: tensor for name, tensor in model.state_dict().items() if not torch.equal(tensor, tensors[name])} == {}
    assert model.state_dict().keys() == tensors.keys()
    model.save_pretrained(folder / "saved")
    saved = load_file(folder / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    # Experts own their weights: removing one frees them.
    weight = model.model.layers[1].mlp.experts[0].up_proj.weight
    assert weight.untyped_storage().nbytes() == weight.nbytes


def test_loaded_as_the_commands_do_in_another_dtype_and_without_the_vocabulary_projection(tmp_path):
    _, tensors = write_llada_moe(tmp_path)
    fuse(tmp_path, "dInfer", architectures=["FusedLLaDAMoEModelLM"])
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    model = load_model(tmp_path, torch.bfloat16)
    assert torch.equal(model.state_dict()[name], tensors[name].bfloat16())
    base = LLaDAMoEModel.from_pretrained(tmp_path)
    assert torch.equal(base.state_dict()[name.removeprefix("model.")], tensors[name])
    # A model that was loaded fused loads others as before.
    write_llada_moe(tmp_path / "official", seed=1)
    load_whole(LLaDAMoEModelLM, tmp_path / "official")


def test_other_weights_may_be_sparse(tmp_path):
    """Sparse formats hold matrices only; what is three-dimensional stays as it is in the same files."""
    _, tensors = write_llada_moe(tmp_path / "dense")
    stored = fuse(tmp_path / "dense", "transformers")
    pruned = {n: t for n, t in stored.items() if n.endswith("q_proj.weight")}
    for tensor in pruned.values():
        tensor[:, ::2] = 0
        tensor[:, 1::4] = 0
    save_file(stored, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    written = convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", "sparse-bitmask", progress=False)
    assert set(written.targets) == set(pruned)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(tmp_path / "sparse", dtype)
        for name, tensor in (tensors | pruned).items():
            assert torch.equal(model.state_dict()[name], tensor.to(dtype)), name


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


LAYER = "model.layers.1.mlp"


def rename(old, new):
    return lambda tensors: tensors.update({f"{LAYER}.{new}": tensors.pop(f"{LAYER}.{old}")})


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        (
            "transformers",
            lambda tensors: tensors.update(
                {f"{LAYER}.experts.gate_up_proj": tensors[f"{LAYER}.experts.gate_up_proj"].transpose(1, 2)}
            ),
            rf"^{LAYER}\.experts\.gate_up_proj is \[6, 48, 80\] in its file, and config\.json asks for \[6, 80, 48\]",
        ),
        (
            "dFactory",
            lambda tensors: tensors.update({f"{LAYER}.experts.up_proj": tensors[f"{LAYER}.experts.up_proj"][:5]}),
            rf"^{LAYER}\.experts\.up_proj is \[5, 40, 48\] in its file, and config\.json asks for \[6, 40, 48\]",
        ),
        (
            "transformers",
            rename("experts.gate_up_proj", "experts.w13_weight"),
            rf"^{LAYER}\.experts\.w13_weight \[6, 80, 48\] isn't a layout of experts that is understood",
        ),
        (
            "dInfer",
            rename("w1", "switch_mlp.gate_up_proj.weight"),
            rf"^{LAYER}\.switch_mlp\.gate_up_proj\.weight \[6, 80, 48\] isn't a layout of experts",
        ),
        (
            "dInfer",
            lambda tensors: tensors.pop(f"{LAYER}.w2"),
            rf"^{LAYER}\.experts\.0\.down_proj\.weight and 5 more of the experts .* are in no file of",
        ),
        (
            "dInfer",
            lambda tensors: tensors.update({"model.layers.1.moe.w2": tensors.pop(f"{LAYER}.w2")}),
            r"and 5 more of the experts .*, which has model\.layers\.1\.moe\.w2 that config\.json doesn't ask for;",
        ),
    ],
    ids=["transposed", "experts", "another name", "another module", "missing", "elsewhere"],
)
def test_what_is_not_understood_is_refused_and_never_left_at_random(layout, change, words, tmp_path):
    write_llada_moe(tmp_path)
    fuse(tmp_path, layout)
    rewrite(tmp_path, change)
    with pytest.raises(UsageError, match=words) as caught:
        LLaDAMoEModelLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_numbers_of_experts_of_their_own(tmp_path):
    config, tensors = write_llada_moe(tmp_path, experts=[5, 3])
    sizes = [{"mlp_channels": 40, "attention_heads": 6, "key_value_heads": 6, "experts": count} for count in (5, 3)]
    mark = "silu with sinkprune_block_sizes (load it with sinkprune-plugin)"
    fuse(tmp_path, "transformers", sinkprune_block_sizes=sizes, head_dim=8, hidden_act=mark)
    model = load_whole(LLaDAMoEModelLM, tmp_path)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts": 5}))
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.experts\.\w+ is \[3, .* config\.json asks for \[5, "):
        LLaDAMoEModelLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert model(random_ids(40, 1, 5)).logits.isfinite().all()
