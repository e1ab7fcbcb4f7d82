"""What ``oneshot(output_dir=…)`` and ``model.save_pretrained(…)`` write for a pruned model."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressed_tensors.distributed import is_source_process
from loguru import logger

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.outputs import check_output, scratch_directory, updated_directory

__all__ = ["choose_save_format", "chosen_save_format"]

# Files of an earlier save that would contradict the new weights.
STALE = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


class _SaveFormat:
    """The save_pretrained of one model: the previous one, then conversion into the chosen format.

    :param original: the model's own ``save_pretrained``, with llm-compressor's wrapper around it inside oneshot()
    :param save_format: ``auto``, ``sparse-bitmask`` or ``sparse-24-bitmask``; ``dense`` only calls the original
    """

    # llm-compressor asks for this mark before it wraps a model's save_pretrained, which it has done already.
    _overridden = True

    def __init__(self, original: Callable[..., Any], save_format: str) -> None:
        functools.update_wrapper(self, original)
        self.original = original
        self.save_format = save_format

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Save the model.

        :param save_directory: directory to write into; files of other names in it stay
        :param args: as of the original
        :param kwargs: as of the original; ``save_compressed=False`` writes dense weights
        :return: what the original returns
        :raises UsageError: if the weights don't fit the format, the directory can't be written, or the result is to be
            pushed to a hub
        """
        if self.save_format == "dense" or not kwargs.get("save_compressed", True):
            return self.original(save_directory, *args, **kwargs)
        if kwargs.get("push_to_hub"):
            raise UsageError(
                f"save_format {self.save_format} can't be pushed to a hub while saving; save, then upload the directory"
            )
        from sinkprune_plugin.formats import convert_checkpoint

        target = Path(save_directory)
        check_output(target, overwrite=True)
        with scratch_directory(target) as scratch:
            result = self.original(str(scratch), *args, **kwargs)
            if is_source_process():
                with updated_directory(target, stale=STALE) as directory:
                    converted = convert_checkpoint(scratch, directory, self.save_format, progress=False)
                for note in converted.notes:
                    logger.info(note)
        return result


def choose_save_format(model: Any, save_format: str) -> None:
    """Make ``model.save_pretrained`` write the given format from now on; the latest choice counts.

    :param model: pruned model
    :param save_format: ``auto``, ``dense``, ``sparse-bitmask`` or ``sparse-24-bitmask``
    """
    current = model.save_pretrained
    if isinstance(current, _SaveFormat):
        current.save_format = save_format
    elif save_format != "dense":
        model.save_pretrained = _SaveFormat(current, save_format)


def chosen_save_format(model: Any) -> str | None:
    """What :func:`choose_save_format` was told last.

    :param model: any model
    :return: the format, None if it wasn't told anything
    """
    current = model.save_pretrained
    return current.save_format if isinstance(current, _SaveFormat) else None
