"""Models of which every tensor was loaded, and token ids to run them on."""

import torch

__all__ = ["load_whole", "random_ids"]


def load_whole(model_class, folder, dtype=torch.float32, **kwargs):
    """Load, insisting on every tensor being found and used."""
    model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


def random_ids(vocabulary, *shape, seed=0):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
