"""The dtype of matrix products that only steer a search. Torch only."""

import torch

__all__ = ["steering_dtype"]


def steering_dtype(device: torch.device) -> torch.dtype:
    """The fastest dtype for products whose rounding a solver makes good again.

    :param device: where the product runs
    :return: bfloat16 where the device multiplies it itself, at least twice as fast as float32 and summed in float32: on
        Nvidia GPUs since Ampere, on CPUs with AVX512-BF16 or AMX; float32 elsewhere, where bfloat16 would be emulated
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Absent from older versions of torch, which then multiply in float32.
        features: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        native = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32
