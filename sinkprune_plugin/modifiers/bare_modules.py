"""A module's structure without its weights, to compute with weights that are given for each call."""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading

__all__ = ["bare_copy", "compute_with"]

# What other libraries hang onto a single module: compressed-tensors' offloading and whatever replaces a forward.
_FOREIGN = ("forward", "_original_forward_func", "_hf_hook", "_old_forward")


def bare_copy(module: torch.nn.Module) -> torch.nn.Module:
    """Copy a module with its submodules; parameters and buffers become meta tensors, hooks and offloading are left out.

    Later changes to the module's shape (numbers of heads, of channels) don't reach the copy.

    :param module: any module, also an offloaded one, whose weights stay where they are
    :return: the copy, for :func:`compute_with`
    """
    bare = module.__class__.__new__(module.__class__)
    state = dict(module.__dict__)
    for name, value in state.items():
        if name.endswith("_hooks") or name.endswith(("_hooks_with_kwargs", "_hooks_always_called")):
            state[name] = OrderedDict()
        elif isinstance(value, dict | list | set):
            state[name] = copy.copy(value)
    for name in _FOREIGN:
        state.pop(name, None)
    with disable_onloading():
        for kind in ("_parameters", "_buffers"):
            state[kind] = {
                name: None if tensor is None else _meta(tensor) for name, tensor in getattr(module, kind).items()
            }
    state["_modules"] = {name: None if child is None else bare_copy(child) for name, child in module._modules.items()}
    bare.__dict__ = state
    return bare


def compute_with(bare: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """Call a bare module with its weights.

    :param bare: as :func:`bare_copy` gives it
    :param tensors: name in the module → parameter or buffer; shapes may differ from those the module was made with
    :param args: arguments of the forward
    :param kwargs: the same
    :return: what the module returns
    """
    return torch.func.functional_call(bare, dict(tensors), args, kwargs, strict=False)


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return torch.nn.Parameter(empty, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else empty
