"""config.json: every variant ever written is read, and what is written is what the old readers parsed."""

import json
import sys

import pytest
from checkpoint_files import LEGACY

from sinkprune_plugin import __version__
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import CheckpointFormat, read_sparsity_config
from sinkprune_plugin.formats.codecs.format_names import parse_format
from sinkprune_plugin.formats.sparsity_config import with_sparsity, without_sparsity

SPARSITY = {"format": "sparse-bitmask", "targets": ["Linear"], "ignore": ["lm_head"], "global_sparsity": 0.5}
QUANTIZATION = {
    "config_groups": {"group_0": {"targets": ["Linear"]}},
    "format": "float-quantized",
    "quantization_status": "compressed",
}


def test_formats_are_plain_text():
    assert [str(known) for known in CheckpointFormat] == ["dense", "sparse-bitmask", "sparse-24-bitmask"]
    assert json.dumps(CheckpointFormat.DENSE) == '"dense"'


@pytest.mark.parametrize("method", ["compressed-tensors", "compressed-tensors-sparse"])
def test_both_dispatch_keys(method):
    found = read_sparsity_config({"quantization_config": {"quant_method": method, "sparsity_config": SPARSITY}})
    assert found.format is CheckpointFormat.SPARSE_BITMASK
    assert found.quant_method == method
    assert found.targets == ("Linear",)
    assert found.ignore == ("lm_head",)
    assert found.global_sparsity == 0.5
    assert found.quantization == {}


def test_the_oldest_layout_is_read_from_compression_config():
    found = read_sparsity_config({"compression_config": {"sparsity_config": {"format": "sparse-bitmask"}}})
    assert found.format is CheckpointFormat.SPARSE_BITMASK
    assert found.quant_method is found.targets is found.ignore is found.global_sparsity is None


@pytest.mark.parametrize("name", ["sparse-24-bitmask", "sparse-bitmask", "sparse-bitmask-fp16"])
def test_the_old_writers_own(name):
    found = read_sparsity_config(json.loads((LEGACY / name / "config.json").read_text()))
    assert found.format == name.removesuffix("-fp16")
    assert "model.layers.1.mlp.down_proj" in found.targets


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "gptq", "sparsity_config": SPARSITY}},
        {"quantization_config": {"quant_method": "compressed-tensors", **QUANTIZATION}},
        {"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {}, **QUANTIZATION}},
    ],
)
def test_configurations_without_sparsity(config):
    assert read_sparsity_config(config) is None


def test_stacked_quantization():
    block = {"quant_method": "compressed-tensors", "sparsity_config": SPARSITY, "version": "0.9.0", **QUANTIZATION}
    assert read_sparsity_config({"quantization_config": block}).quantization == QUANTIZATION


@pytest.mark.parametrize(
    "name", ["os:system", "evil.py:Config", "antigravity:fly", "sparse_bitmask", "", None, 3, [], {}]
)
@pytest.mark.parametrize("method", ["compressed-tensors", "compressed-tensors-sparse"])
def test_hostile_format_is_compared_and_not_imported(name, method):
    before = set(sys.modules)
    block = {"quant_method": method, "sparsity_config": {"format": name}}
    with pytest.raises(UsageError, match=r"sparsity_config\.format in config\.json is .*the formats are dense, sparse"):
        read_sparsity_config({"quantization_config": block})
    assert set(sys.modules) == before


def test_error_of_a_hostile_format_is_one_short_line():
    with pytest.raises(UsageError) as raised:
        parse_format("\x1b[2J\n" * 1000, "format")
    assert "\n" not in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": [1]}, "quantization_config in config.json is a list"),
        ({"compression_config": "x"}, "compression_config in config.json is a str"),
        ({"quantization_config": {"quant_method": "compressed-tensors-sparse"}}, "sparsity_config in .* is a NoneType"),
        ({"quantization_config": {"sparsity_config": "dense"}}, "sparsity_config in config.json is a str"),
        ({"quantization_config": {"sparsity_config": SPARSITY | {"targets": "Linear"}}}, "targets in .* isn't a list"),
        ({"quantization_config": {"sparsity_config": SPARSITY | {"ignore": [1]}}}, "ignore in .* isn't a list"),
    ],
)
def test_a_malformed_sparsity_config_is_refused(config, message):
    with pytest.raises(UsageError, match=message):
        read_sparsity_config(config)


@pytest.mark.parametrize("share", [None, "half", -1, 2, 10**400, float("nan")])
def test_odd_global_sparsity_is_of_no_consequence(share):
    config = {"quantization_config": {"sparsity_config": SPARSITY | {"global_sparsity": share}}}
    assert read_sparsity_config(config).global_sparsity is None


def add(config, layout, sparse_format=CheckpointFormat.SPARSE_BITMASK):
    return with_sparsity(
        config, sparse_format, targets=["a", "b"], ignore=["lm_head"], global_sparsity=0.4805, layout=layout
    )


def test_legacy_layout_is_what_the_old_writer_wrote():
    assert add({"model_type": "llama"}, "legacy") == {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "sparsity_config": {
                "format": "sparse-bitmask",
                "global_sparsity": 0.4805,
                "ignore": ["lm_head"],
                "registry_requires_subclass": False,
                "sparsity_structure": "unstructured",
                "targets": ["a", "b"],
            },
            "transform_config": {},
            "version": "0.14.0",
        },
    }


def test_the_own_layout_has_its_own_dispatch_key():
    block = add({}, "sinkprune", CheckpointFormat.SPARSE_24_BITMASK)["quantization_config"]
    assert block == {
        "quant_method": "compressed-tensors-sparse",
        "sinkprune_version": __version__,
        "sparsity_config": {
            "format": "sparse-24-bitmask",
            "global_sparsity": 0.4805,
            "ignore": ["lm_head"],
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4",
            "targets": ["a", "b"],
        },
    }


@pytest.mark.parametrize("layout", ["sinkprune", "legacy"])
@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"quantization_config": {"quant_method": "compressed-tensors", "version": "0.19.0", **QUANTIZATION}},
        {"quantization_config": {"quant_method": "compressed-tensors", "transform_config": {"a": 1}}},
    ],
)
def test_added_and_taken_out_again(config, layout):
    before = json.dumps(config)
    added = add(config, layout)
    assert read_sparsity_config(added).targets == ("a", "b")
    assert add(added, layout) == added
    taken = without_sparsity(added)
    if layout == "legacy" and "config_groups" in before:
        assert taken["quantization_config"].pop("version") == "0.14.0"
        assert taken["quantization_config"].pop("transform_config") == {}
        config["quantization_config"].pop("version")
    if layout == "legacy" and "transform_config" in before:
        assert taken["quantization_config"].pop("version") == "0.14.0"
    assert taken == config


def test_stacked_quantization_stays_beside_the_sparsity():
    config = {"quantization_config": {"quant_method": "compressed-tensors", "version": "0.19.0", **QUANTIZATION}}
    block = add(config, "sinkprune")["quantization_config"]
    assert block["quant_method"] == "compressed-tensors-sparse"
    assert QUANTIZATION.items() <= block.items()
    assert read_sparsity_config({"quantization_config": block}).quantization == QUANTIZATION


def test_another_tools_quantization_is_not_touched():
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert without_sparsity(config) == config
    with pytest.raises(UsageError, match="quantization_config of 'gptq'; sparse-bitmask goes together with"):
        add(config, "sinkprune")


def test_oldest_layout_is_replaced():
    new = add({"compression_config": {"sparsity_config": SPARSITY}, "x": 1}, "sinkprune")
    assert new.keys() == {"x", "quantization_config"}
    assert without_sparsity({"compression_config": {"sparsity_config": SPARSITY}, "x": 1}) == {"x": 1}
