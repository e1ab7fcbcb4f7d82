"""Tensors of a checkpoint under new names and in part."""

import pytest
import torch

from sinkprune_plugin.formats import save_sparse_checkpoint
from sinkprune_plugin.formats.checkpoint_reader import CheckpointReader
from sinkprune_plugin.formats.checkpoint_writer import write_checkpoint
from sinkprune_plugin.formats.files import shard_reader
from sinkprune_plugin.formats.tensor_view import TensorView, ViewedTensor
from sinkprune_plugin.formats.write_request import WriteRequest


def make_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.0.experts.{n}.weight": torch.randn(8, 16, generator=generator) for n in range(4)}
    for tensor in tensors.values():
        tensor[:, ::2] = 0
    return tensors | {
        "layers.0.gate.weight": torch.randn(4, 16, generator=generator).bfloat16(),
        "layers.0.gate.bias": torch.randn(4, generator=generator),
    }


@pytest.mark.parametrize("stored", ["dense", "sparse-bitmask"])
def test_what_is_written_has_the_chosen_tensors_and_rows_under_the_new_names(stored, tmp_path):
    tensors = make_tensors()
    save_sparse_checkpoint(tensors, tmp_path / "source", format=stored, progress=False)
    reader = CheckpointReader(tmp_path / "source")
    view = TensorView(
        reader,
        {
            "layers.0.experts.0.weight": ViewedTensor("layers.0.experts.1.weight"),
            "layers.0.experts.1.weight": ViewedTensor("layers.0.experts.3.weight"),
            "layers.0.gate.weight": ViewedTensor("layers.0.gate.weight", (1, 3)),
            "layers.0.gate.bias": ViewedTensor("layers.0.gate.bias", (1, 3)),
        },
    )
    request = WriteRequest(
        directory=tmp_path / "written",
        format=reader.format,
        layout="sinkprune",
        targets=None,
        config=reader.config,
        source=reader.directory,
        max_shard_bytes=1000,
        overwrite=False,
        progress=False,
    )
    written = write_checkpoint(view, request)
    result = CheckpointReader(tmp_path / "written")
    assert result.format == stored
    assert bool(written.targets) == (stored != "dense")
    expected = {
        "layers.0.experts.0.weight": tensors["layers.0.experts.1.weight"],
        "layers.0.experts.1.weight": tensors["layers.0.experts.3.weight"],
        "layers.0.gate.weight": tensors["layers.0.gate.weight"][[1, 3]],
        "layers.0.gate.bias": tensors["layers.0.gate.bias"][[1, 3]],
    }
    assert set(result) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(result[name], tensor), name


@pytest.mark.parametrize("rows", [(), (0,), (2, 3, 5), (0, 1, 2, 3, 4, 5), (5, 0)])
def test_rows_that_lie_in_several_pieces(rows, tmp_path, monkeypatch):
    """Pieces are 16 MiB; here 100 bytes, against rows of 48."""
    monkeypatch.setattr(shard_reader, "_PIECE", 100)
    tensors = {"layers.0.experts.down_proj": torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))}
    save_sparse_checkpoint(tensors, tmp_path, format="dense", progress=False)
    view = TensorView(CheckpointReader(tmp_path), {"new": ViewedTensor("layers.0.experts.down_proj", rows)})
    found = b"".join(bytes(piece) for piece in view.chunks("new"))
    assert found == tensors["layers.0.experts.down_proj"][list(rows)].numpy().tobytes()
    assert view.spec("new").shape == (len(rows), 3, 4)
