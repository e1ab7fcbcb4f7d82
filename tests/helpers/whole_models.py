"""Models of which every tensor was loaded, saved and loaded again, and token ids to run them on."""

import json

import torch
from safetensors.torch import load_file

__all__ = ["check_saved", "load_whole", "random_ids"]


def load_whole(model_class, folder, dtype=torch.float32, **kwargs):
    """Load, insisting on every tensor being found and used."""
    model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


def random_ids(vocabulary, *shape, seed=0):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def check_saved(load, checkpoint, output):
    """Save a model that was loaded from an official checkpoint: names, values and official keys stay.

    ``checkpoint`` is its folder, config.json, tensors and the loaded model.
    """
    folder, config, tensors, model = checkpoint
    load(folder).save_pretrained(output)
    saved = load_file(output / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    written = json.loads((output / "config.json").read_text())
    for key in config.keys() - {"transformers_version"}:
        assert written.get(key, "missing") == config[key], key
    ids = random_ids(config["vocab_size"], 1, 8)
    assert torch.equal(load(output)(ids).logits, model(ids).logits)
