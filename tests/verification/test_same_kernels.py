"""Why a pruned model can't be faster, on real checkpoints of one small block."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.inspection.info import inspect_checkpoint
from sinkprune_plugin.verification.same_kernels import why_not_faster


def weight(kind):
    full = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    if kind == "2:4":
        full.view(-1, 4)[:, :2] = 0
    elif kind == "1:4":
        full.view(-1, 4)[:, 0] = 0
    elif kind == "unstructured":
        full[torch.rand(32, 64, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    return full[:16] if kind == "smaller" else full.half() if kind == "half" else full


def found(folder, kind, stored="dense"):
    path = folder / f"{kind}-{stored}".replace(":", "of")
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"model.layers.0.mlp.up_proj.weight": weight(kind)}, path / "model.safetensors")
    if stored != "dense":
        convert_checkpoint(path, folder / f"{path.name}-sparse", stored, progress=False)
        path = folder / f"{path.name}-sparse"
    return inspect_checkpoint(path)


@pytest.mark.parametrize(
    ("kind", "stored", "backend", "on_gpu", "why"),
    [
        ("unstructured", "dense", "transformers", True, "unstructured zeros run dense kernels here"),
        ("unstructured", "sparse-bitmask", "vllm", True, "unstructured zeros run dense kernels here"),
        ("1:4", "dense", "vllm", True, "1:4 zeros run dense kernels here"),
        ("2:4", "dense", "vllm", True, "2:4 zeros that are stored dense run dense kernels"),
        ("2:4", "sparse-24-bitmask", "transformers", True, "transformers runs 2:4 zeros with dense kernels"),
        ("2:4", "sparse-24-bitmask", "vllm", False, "2:4 kernels need a GPU"),
        ("2:4", "sparse-24-bitmask", "vllm", True, None),
        ("plain", "dense", "transformers", False, "both run the same dense kernels"),
        ("smaller", "dense", "transformers", False, None),
        ("half", "dense", "transformers", False, None),
    ],
)
def test_reasons(tmp_path, kind, stored, backend, on_gpu, why):
    (tmp_path / "dense").mkdir()
    reason = why_not_faster(
        found(tmp_path / "dense", "plain"), found(tmp_path, kind, stored), backend, on_gpu=on_gpu
    )  # fmt: skip
    assert reason is None if why is None else reason.startswith(why)
