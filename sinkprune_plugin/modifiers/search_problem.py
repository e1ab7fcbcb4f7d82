"""What the database of a search depends on, as a fingerprint: a directory is gone on with only if all of it agrees."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from compressed_tensors.offload import align_module_device

from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.calibration import CalibrationBatch
from sinkprune_plugin.modifiers.targets import PruningTarget

__all__ = ["fingerprint"]

# Fields that change neither weights nor candidates.
WITHOUT_EFFECT = {"search_budget", "search_directory", "allocation_note", "save_format", "hidden_states"}


def fingerprint(
    modifier: Any, model: torch.nn.Module, targets: Sequence[PruningTarget], batches: Sequence[CalibrationBatch]
) -> str:
    """Digest of a modifier's fields, the model, and the calibration samples; the same in every process.

    :param modifier: the modifier, a pydantic model
    :param model: the model
    :param targets: its targets; of each one's weight the first row is read
    :param batches: samples of this process
    :return: 32 hexadecimal digits
    """
    digest = hashlib.blake2b(digest_size=16)
    fields = modifier.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    digest.update(json.dumps([type(modifier).__name__, fields, type(model).__name__], sort_keys=True).encode())
    for target in targets:
        digest.update(f"{target.name}{tuple(target.module.weight.shape)}{target.module.weight.dtype}".encode())
        with align_module_device(target.module):
            digest.update(target.module.weight[0].detach().float().cpu().numpy().tobytes())
    # However the samples are split over processes.
    samples = sorted(name for part in distributed.gather_objects([each.digest() for each in batches]) for name in part)
    digest.update(json.dumps(samples).encode())
    return digest.hexdigest()
