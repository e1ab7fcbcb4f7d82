"""Modules that compute something else for a while."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["forward_replaced", "linear_with"]


@contextlib.contextmanager
def forward_replaced(replacements: Iterable[tuple[torch.nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Put other functions in place of modules' ``forward``; their hooks stay.

    :param replacements: module and the function that computes in its place
    """
    replacements = list(replacements)
    before = [module.__dict__.get("forward") for module, _ in replacements]
    for module, function in replacements:
        module.forward = function
    try:
        yield
    finally:
        for (module, _), forward in zip(replacements, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def linear_with(weight: torch.Tensor, module: torch.nn.Linear) -> Callable[..., torch.Tensor]:
    """The forward of a Linear with another weight.

    :param weight: (out_features, in_features); not the module's parameter, which would be written back if offloaded
    :param module: gives the bias
    :return: function to put in place of its ``forward``
    """
    return lambda input: F.linear(input, weight, module.bias)
