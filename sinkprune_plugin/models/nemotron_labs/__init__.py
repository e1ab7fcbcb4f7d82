"""Nemotron-Labs-Diffusion (NVIDIA, 2026)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkprune_plugin.models.nemotron_labs.configuration_nemotron_labs import NemotronLabsDiffusionConfig
    from sinkprune_plugin.models.nemotron_labs.modeling_nemotron_labs import (
        NemotronLabsDecoderLayer,
        NemotronLabsDiffusionModel,
        NemotronLabsEncoder,
    )

_MODULES = {
    "NemotronLabsDecoderLayer": "modeling_nemotron_labs",
    "NemotronLabsDiffusionConfig": "configuration_nemotron_labs",
    "NemotronLabsDiffusionModel": "modeling_nemotron_labs",
    "NemotronLabsEncoder": "modeling_nemotron_labs",
}

__all__ = [
    "NemotronLabsDecoderLayer",
    "NemotronLabsDiffusionConfig",
    "NemotronLabsDiffusionModel",
    "NemotronLabsEncoder",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
