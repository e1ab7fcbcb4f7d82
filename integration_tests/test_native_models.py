"""The native classes under the real tools: stock modifiers in ``oneshot()``, tracing, device maps."""

import json

import pytest
import torch
from nemotron_labs_checkpoints import write_nemotron_labs
from official_checkpoints import write_dream, write_llada2, write_llada_moe
from safetensors.torch import load_file
from sdar_checkpoints import write_sdar

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot, stock_modifier

DREAM_SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}


@pytest.fixture
def dream(tmp_path):
    """Folder of a random Dream checkpoint in the official layout."""
    write_dream(tmp_path / "dream", **DREAM_SIZES)
    return tmp_path / "dream"


def folder_of(kind, dream):
    return EMBEDDED_MODEL if kind == "llada" else dream


def calibration(vocabulary, *, padded):
    """Four rows of 32 tokens; the first without padding, since the tracer sees only that one."""
    from datasets import Dataset

    ids = torch.randint(4, vocabulary, (4, 32), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1:, 20:] = 0
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})


def zeros(weight):
    return float((weight == 0).float().mean())


OURS = ["SinkAwareWandaModifier", "SinkAwareSparseGPTModifier", "SinkAwareADMMModifier"]


@pytest.mark.parametrize("modifier", ["WandaPruningModifier", "SparseGPTModifier", *OURS])
@pytest.mark.parametrize("kind", ["llada", "Dream"])
def test_stock_modifiers_and_ours_prune_the_native_classes(kind, modifier, dream, tmp_path):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.factory import ModifierFactory
    from transformers import AutoModelForCausalLM

    folder = folder_of(kind, dream)
    head = "model.transformer.ff_out" if kind == "llada" else "lm_head"
    ModifierFactory.refresh()
    quick = {"diffusion_steps": 2, "sample_interval": 1, "save_format": "dense"} if modifier in OURS else {}
    recipe = ModifierFactory.create(
        modifier,
        allow_registered=True,
        allow_experimental=False,
        sparsity=0.5,
        mask_structure="0:0",
        targets=["Linear"],
        # The stock modifiers match names with a trailing dot, which a plain "lm_head" doesn't.
        ignore=[f"re:^{head}\\b"],
        **quick,
    )
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        dataset=calibration(88 if kind == "Dream" else 2048, padded=True),
        recipe=recipe,
        num_calibration_samples=4,
        max_seq_length=32,
        output_dir=str(tmp_path / "pruned"),
    )
    saved = load_file(tmp_path / "pruned" / "model.safetensors")
    original = load_file(folder / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, weight in saved.items():
        is_linear = weight.dim() == 2 and (".blocks." in name or ".layers." in name)
        # SparseGPT prunes by a threshold over blocks of 128 columns: one entry more or less in each.
        assert zeros(weight) == pytest.approx(0.5 if is_linear else zeros(original[name]), abs=2e-3), name
    assert torch.equal(saved[f"{head}.weight"], original[f"{head}.weight"].float())
    written = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert written["model_type"] == kind
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert type(again).__module__.startswith("sinkprune_plugin.")
    assert torch.equal(again.state_dict()[f"{head}.weight"], saved[f"{head}.weight"])


OTHERS = {
    "nemotron": (write_nemotron_labs, {}),
    "nemotron, queries not scaled": (
        write_nemotron_labs,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "sdar": (write_sdar, {}),
    "llada2": (write_llada2, {}),
    "llada-moe": (write_llada_moe, {}),
}


@pytest.mark.parametrize("family", OTHERS)
def test_stock_sparsegpt_traces_and_prunes_the_other_families(family, tmp_path):
    """Half of the rows of every Linear within the blocks, routers excepted, which aren't Linears."""
    write, changes = OTHERS[family]
    write(tmp_path, vocab_size=2048, **changes)
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(tmp_path)
    model, original = load_model(tmp_path, torch.float32), load_model(tmp_path, torch.float32)
    windows = torch.randint(4, 2048, (4, 32), generator=torch.Generator().manual_seed(0))
    run_oneshot(model, load_tokenizer(tmp_path), stock_modifier("SparseGPTModifier", 0.5, "0:0"), windows)
    linears = block_linears(original)
    assert len(linears) > 10
    before = original.state_dict()
    for name, weight in model.state_dict().items():
        if name.removesuffix(".weight") in linears:
            # By a threshold over blocks of 128 columns, and few rows here.
            assert zeros(weight) == pytest.approx(0.5, abs=5e-3), name
        else:
            assert torch.equal(weight, before[name]), name


def test_oneshot_loads_and_saves_by_path_with_the_tokenizer(tmp_path):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import WandaPruningModifier
    from transformers import AutoTokenizer

    oneshot(
        model=str(EMBEDDED_MODEL),
        dataset=calibration(2048, padded=False),
        recipe=WandaPruningModifier(sparsity=0.5, targets=["re:.*q_proj"]),
        num_calibration_samples=4,
        max_seq_length=32,
        output_dir=str(tmp_path / "pruned"),
    )
    saved = load_file(tmp_path / "pruned" / "model.safetensors")
    assert zeros(saved["model.transformer.blocks.5.q_proj.weight"]) == pytest.approx(0.5, abs=1e-3)
    assert saved["model.transformer.blocks.5.q_proj.weight"].dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned").mask_token_id == 2
    generation = json.loads((tmp_path / "pruned" / "generation_config.json").read_text())
    original = json.loads((EMBEDDED_MODEL / "generation_config.json").read_text())
    assert {key: generation[key] for key in original} == original


@pytest.mark.parametrize("kind", ["llada", "Dream"])
@pytest.mark.parametrize("traced_with_padding", [False, True])
@torch.no_grad()
def test_the_traced_graph_asks_each_batch_for_its_own_padding(kind, traced_with_padding, dream):
    from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder_of(kind, dream), dtype=torch.float32)
    ids = torch.randint(4, 80, (2, 12), generator=torch.Generator().manual_seed(0))
    full, padded = torch.ones_like(ids), torch.ones_like(ids)
    padded[1, 7:] = 0
    sample = {"input_ids": ids, "attention_mask": padded if traced_with_padding else full}
    subgraphs = trace_subgraphs(model, sample, sorted(model._no_split_modules), [])
    layers = 6 if kind == "llada" else 2
    assert len(subgraphs) == layers + 1
    for mask in (padded, full):
        values = {"input_ids": ids, "attention_mask": mask}
        for subgraph in subgraphs:
            result = subgraph.forward(model, **{name: values[name] for name in subgraph.input_names})
            values.update(result)
        # The same operations in the same order: equal to the bit.
        assert torch.equal(result["logits"], model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("kind", ["llada", "Dream"])
@torch.no_grad()
def test_device_maps_with_offloading_give_the_same_logits(kind, dream, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = folder_of(kind, dream)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(4, 80, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    expected = plain(ids, attention_mask=mask).logits
    blocks = "model.transformer.blocks" if kind == "llada" else "model.layers"
    names = [name for name, module in plain.named_modules() if name and not list(module.children())]
    on_disk = {f"{blocks}.1": "disk"}
    some_on_disk = {name: "cpu" for name in names if not name.startswith(f"{blocks}.1.")} | on_disk
    for number, device_map in enumerate(({"": "cpu"}, "auto", some_on_disk)):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / str(number)
        )
        ids_there, mask_there = ids.to(model.device), mask.to(model.device)
        logits = model(ids_there, attention_mask=mask_there).logits.cpu()
        # With "auto" this may be an accelerator, whose kernels sum in another order.
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_no_block_is_split_between_devices():
    from accelerate import infer_auto_device_map, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(EMBEDDED_MODEL))
    # Bytes of bfloat16: about half of the 3.4 million weights fit on the first device.
    device_map = infer_auto_device_map(
        model,
        max_memory={"cpu": 3_500_000, "disk": 10**9},
        no_split_module_classes=sorted(model._no_split_modules),
        dtype=torch.bfloat16,
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    assert not [name for name in device_map if "blocks." in name and name.count(".") > 3], device_map
