"""Running a model without dropout and gradients, and restoring its mode afterwards."""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["evaluation_mode"]


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Context in which a model is in evaluation mode and nothing records gradients.

    :param model: its mode is restored
    """
    was_training = model.training
    model.eval()
    try:
        # Not inference mode: its tensors can't be changed in place later.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
