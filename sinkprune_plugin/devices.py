"""Where a model runs: the device that a user asks for, and the one on which a loaded model takes its input."""

import torch

from sinkprune_plugin.errors import UsageError

__all__ = ["choose_device", "input_device", "wait_for_device"]


def choose_device(name: str = "auto") -> torch.device:
    """Turn a user's choice into an existing device.

    :param name: ``auto`` (the accelerator if there is one, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, …
    :return: the device
    :raises UsageError: if the name is no device or this machine has none of that name
    """
    accelerator, count = _accelerators()
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:0") from error
    if device.type == "cpu":
        return device
    if accelerator is None or device.type != accelerator.type:
        there = "no accelerator" if accelerator is None else f"{accelerator.type} only"
        raise UsageError(f"device {name!r} isn't there: torch sees {there}; use auto or cpu")
    if device.index is not None and device.index >= count:
        raise UsageError(f"device {name!r} isn't there: torch sees {count} of them; use {device.type}:{count - 1}")
    return device


def input_device(model: torch.nn.Module) -> torch.device:
    """Device on which a model takes its token ids, also where its weights are offloaded.

    :param model: any model; the embedding decides where there is one
    :return: the device; the CPU for a model without weights
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    source = embedding if isinstance(embedding, torch.nn.Module) else model
    # compressed-tensors keeps the parameters of an offloaded module in a mapping that knows where it onloads them.
    onload = getattr(source._parameters, "onload_device", None)
    if onload is not None:
        return torch.device(onload)
    parameter = next(source.parameters(), None)
    # A parameter on "meta" is one that accelerate offloaded; its hook moves the input.
    if parameter is None or parameter.device.type == "meta":
        return torch.device("cpu")
    return parameter.device


def wait_for_device() -> None:
    """Wait until the accelerator has finished its work, before a clock is read."""
    if _accelerators()[0] is not None:
        torch.accelerator.synchronize()


def _accelerators() -> tuple[torch.device | None, int]:
    """The kind of accelerator of this machine and how many there are; the only place that asks torch."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator, 0 if accelerator is None else torch.accelerator.device_count()
