"""Recipes as files: read and parsed before any long work."""

from pathlib import Path
from typing import Any

import yaml

from sinkprune_plugin.errors import UsageError, reason_of, short

__all__ = ["RECIPE_FILE", "read_recipe"]

# What llm-compressor writes next to a model, and extends when that model is pruned again.
RECIPE_FILE = "recipe.yaml"


def read_recipe(file: Path) -> tuple[str, dict[str, Any]]:
    """Read a recipe.

    :param file: YAML file
    :return: its text and its content
    :raises UsageError: if it can't be read, or isn't a mapping in YAML
    """
    if not file.is_file():
        raise UsageError(f"recipe {file} doesn't exist; the recipes folder has one for every method")
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"recipe {file} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {file} is not UTF-8 text (byte {error.start}); convert it") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        what = getattr(error, "problem", None) or reason_of(error)
        raise UsageError(f"recipe {file}{where} isn't YAML ({short(what)}); correct it") from error
    if not isinstance(content, dict):
        raise UsageError(f"recipe {file} holds a {type(content).__name__}, not stages with modifiers; correct it")
    return text, content
