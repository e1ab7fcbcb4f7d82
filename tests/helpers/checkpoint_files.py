"""What a checkpoint's folder holds."""

import json
from pathlib import Path

from safetensors.torch import load_file

LEGACY = Path(__file__).parent.parent / "fixtures" / "legacy_checkpoints"
LEGACY_NAMES = ["sparse-24-bitmask", "sparse-bitmask", "sparse-bitmask-fp16"]
FORMATS = ["dense", "sparse-bitmask", "sparse-24-bitmask"]
OTHER_FILES = {
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "recipe.yaml",
}


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def stored_names(directory):
    return {name for file in directory.glob("*.safetensors") for name in load_file(file)}


def files_of(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
