"""Options of samplers that also edit tokens which are no longer masked: LLaDA2.1's, which isn't computed here.

Its own sampler replaces a token of the open block by another one that the model finds more probable than a threshold,
until nothing changes or a number of further steps is reached ("LLaDA2.1", arXiv 2602.08676). The option is called
``editing_threshold`` and ``max_post_steps`` by the model's own code and by diffusers' LLaDA2Pipeline,
``edit_threshold`` and ``max_post_edit_steps`` by SGLang's JointThreshold. Nothing in a checkpoint marks the models.
"""

from collections.abc import Mapping
from typing import Any

from sinkprune_plugin.errors import UsageError

__all__ = ["EDIT_OPTIONS", "refuse_edits"]

EDIT_OPTIONS = ("editing_threshold", "max_post_steps", "edit_threshold", "max_post_edit_steps")


def refuse_edits(given: Mapping[str, Any]) -> None:
    """Refuse options that ask for edits; their names may begin with ``dlm_``.

    :param given: option → value; None where it is off
    :raises UsageError: naming the first one
    """
    for name, value in given.items():
        if value is not None and str(name).removeprefix("dlm_") in EDIT_OPTIONS:
            raise UsageError(
                f"{name} asks for edits of unmasked tokens, which aren't made here; leave it out to sample LLaDA2.1 "
                "like LLaDA2.0, or use the model's own sampler or SGLang"
            )
