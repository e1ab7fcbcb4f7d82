"""The same damaged checkpoints through all three loaders: our reader, transformers and vLLM refuse each in one line.

If one of them accepted what another refuses, a user could get a model with freshly initialised weights.
"""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from vllm_engine import prepare_vllm

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import load_sparse_checkpoint, save_sparse_checkpoint

INDEX = "model.safetensors.index.json"
MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).bfloat16()
    for weight in model.model.layers.parameters():
        if weight.ndim == 2:
            groups = weight.data.view(-1, 4)
            groups.scatter_(1, groups.float().abs().topk(2, largest=False).indices, 0)
    config = model.config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"]}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, config


def read_by_us(directory):
    return dict(load_sparse_checkpoint(directory))


def read_by_transformers(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").state_dict()


def read_by_vllm(directory):
    """vLLM's own loader, with the plugin's checks before it; this needs no engine."""
    prepare_vllm()
    from vllm.config import LoadConfig, ModelConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from sinkprune_plugin.vllm.register import register

    register()
    config = ModelConfig(model=str(directory), skip_tokenizer_init=True, dtype="float32")
    return dict(DefaultModelLoader(LoadConfig()).get_all_weights(config, torch.nn.Module()))


LOADERS = [read_by_us, read_by_transformers, read_by_vllm]


def write(tensors, directory, sparse_format="sparse-bitmask", shards=3, digests=True):
    tensors, config = tensors
    size = sum(tensor.nbytes for tensor in tensors.values())
    save_sparse_checkpoint(
        tensors, directory, config=config, format=sparse_format, max_shard_bytes=size if shards == 1 else size // 4
    )
    assert (len([*directory.glob("*.safetensors")]) > 1) == (shards > 1)
    if not digests:
        edit_block(directory, lambda block: block.pop("sinkprune_sha256"))
    return directory


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_block(directory, change):
    edit_json(directory / "config.json", lambda config: change(config["quantization_config"]))


def edit_tensors(directory, change):
    """In the file that has the parts of MODULE, which are in one."""
    for file in directory.glob("*.safetensors"):
        stored = load_file(file)
        if any(name.startswith(MODULE) for name in stored):
            change(stored)
            save_file(stored, file, metadata={"format": "pt"})
            if (directory / INDEX).exists():
                edit_json(directory / INDEX, lambda index, file=file, stored=stored: _list(index, file.name, stored))
            return


def _list(index, name, stored):
    kept = {tensor: file for tensor, file in index["weight_map"].items() if file != name}
    index["weight_map"] = kept | dict.fromkeys(stored, name)


def dense_format(directory):
    edit_block(directory, lambda block: block["sparsity_config"].update(format="dense"))


def stray_offsets(directory):
    edit_tensors(directory, lambda stored: stored.update({"model.layers.7.q.row_offsets": torch.zeros(4).long()}))


def all_parts_of_a_target(directory):
    def drop(stored):
        for name in [name for name in stored if name.startswith(MODULE)]:
            del stored[name]

    edit_tensors(directory, drop)


def one_part_of_a_target(directory):
    edit_tensors(directory, lambda stored: stored.pop(f"{MODULE}.bitmask"))


def two_flipped_bits(directory):
    def flip(stored):
        mask = stored[f"{MODULE}.bitmask"]
        bits = [int(mask[0, 0]) >> bit & 1 for bit in range(4)]
        mask[0, 0] ^= 1 << bits.index(0) | 1 << bits.index(1)

    edit_tensors(directory, flip)


def one_flipped_bit(directory):
    edit_tensors(directory, lambda stored: stored[f"{MODULE}.bitmask"][0, 0].bitwise_xor_(1))


def rows_without_columns(directory):
    def empty(stored):
        stored[f"{MODULE}.shape"] = torch.tensor([1 << 29, 0])
        stored[f"{MODULE}.bitmask"] = torch.empty(1 << 29, 0, dtype=torch.uint8)
        stored[f"{MODULE}.compressed"] = torch.empty(0, dtype=torch.bfloat16)

    edit_tensors(directory, empty)


def stored_twice(directory):
    edit_tensors(directory, lambda stored: stored.update({f"{MODULE}.weight": torch.zeros(32, 48)}))


def a_part_of_another_dtype(directory):
    edit_tensors(directory, lambda stored: stored.update({f"{MODULE}.compressed": torch.zeros(768).double()}))


def a_long_name(directory):
    edit_tensors(directory, lambda stored: stored.update({"a" * 100_000: torch.zeros(1)}))


def truncated(directory):
    file = sorted(directory.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-10])


def empty(directory):
    sorted(directory.glob("*.safetensors"))[-1].write_bytes(b"")


def a_file_lost(directory):
    sorted(directory.glob("*.safetensors"))[-1].unlink()


def index_elsewhere(directory):
    file = sorted(directory.glob("*.safetensors"))[-1]
    (directory.parent / "elsewhere").mkdir()
    shutil.move(file, directory.parent / "elsewhere" / file.name)
    _rename(directory, file.name, f"../elsewhere/{file.name}")


def index_all_elsewhere(directory):
    (directory.parent / "elsewhere").mkdir()
    for file in directory.glob("*.safetensors"):
        shutil.move(file, directory.parent / "elsewhere" / file.name)
        _rename(directory, file.name, f"../elsewhere/{file.name}")


def index_absolute(directory):
    file = sorted(directory.glob("*.safetensors"))[-1]
    (directory.parent / "elsewhere").mkdir()
    shutil.move(file, directory.parent / "elsewhere" / file.name)
    _rename(directory, file.name, str(directory.parent / "elsewhere" / file.name))


def index_below(directory):
    (directory / "below").mkdir()
    for file in directory.glob("*.safetensors"):
        shutil.move(file, directory / "below" / file.name)
        _rename(directory, file.name, f"below/{file.name}")


def _rename(directory, old, new):
    def rename(index):
        index["weight_map"] = {name: new if file == old else file for name, file in index["weight_map"].items()}

    edit_json(directory / INDEX, rename)


def index_of_another_checkpoint(directory):
    edit_json(directory / INDEX, lambda index: index["weight_map"].update({"nothing": "model.safetensors"}))


DAMAGES = [
    dense_format,
    stray_offsets,
    all_parts_of_a_target,
    one_part_of_a_target,
    two_flipped_bits,
    one_flipped_bit,
    rows_without_columns,
    stored_twice,
    a_part_of_another_dtype,
    a_long_name,
    truncated,
    empty,
    a_file_lost,
    index_elsewhere,
    index_all_elsewhere,
    index_absolute,
    index_below,
    index_of_another_checkpoint,
]
# What transformers and vLLM detect first, with errors of their own.
NOT_OURS = {
    read_by_transformers: [truncated, empty, a_file_lost, index_of_another_checkpoint],
    read_by_vllm: [
        empty,
        a_file_lost,
        index_elsewhere,
        index_all_elsewhere,
        index_absolute,
        index_below,
        index_of_another_checkpoint,
    ],
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("sparse_format", ["sparse-bitmask", "sparse-24-bitmask"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_loader_reads_the_undamaged_checkpoint(tensors, tmp_path, load, sparse_format, shards):
    found = load(write(tensors, tmp_path / "c", sparse_format, shards))
    assert found.keys() == tensors[0].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors[0].items())


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_in_one_line(tensors, tmp_path, load, damage):
    # Without digests, to test the other checks; a digest would reveal each of these.
    directory = write(tensors, tmp_path / "c", digests=damage is two_flipped_bits)
    damage(directory)
    with pytest.raises(Exception, match=r".") as raised:
        load(directory)
    message = str(raised.value).strip()
    assert "\n" not in message
    assert len(message) < 1500
    if damage not in NOT_OURS.get(load, ()):
        assert isinstance(raised.value, UsageError), message


@pytest.mark.parametrize("load", LOADERS)
def test_names_of_another_writer_are_compared_where_they_speak_of_these_files(tensors, tmp_path, load):
    directory = write(tensors, tmp_path / "c", digests=False)
    edit_block(directory, lambda block: block.pop("sinkprune_version"))
    for targets in (["Linear"], None, ["re:.*proj"], ["language.layers.0.mlp.up_proj"], ["Linear", "a.b"]):
        edit_block(directory, lambda block, targets=targets: block["sparsity_config"].update(targets=targets))
        load(directory)
    listed = ["model.layers.0.mlp.up_proj", "model.layers.9.mlp.up_proj"]
    edit_block(directory, lambda block: block["sparsity_config"].update(targets=listed))
    with pytest.raises(UsageError, match=r"lists model\.layers\.9\.mlp\.up_proj among the sparse weights, but"):
        load(directory)


def test_transformers_takes_a_folder_of_a_checkpoint(tensors, tmp_path):
    write(tensors, tmp_path / "c" / "folder")
    shutil.copy(tmp_path / "c" / "folder" / "config.json", tmp_path / "c")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "c", subfolder="folder", dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors[0].items())


@pytest.mark.parametrize("load", LOADERS)
def test_links_of_a_hub_cache(tensors, tmp_path, load):
    repository = tmp_path / "models--a--b"
    snapshot = write(tensors, repository / "snapshots" / "0123abc")
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = repository / "blobs" / f"{number:040}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    found = load(snapshot)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors[0].items())
