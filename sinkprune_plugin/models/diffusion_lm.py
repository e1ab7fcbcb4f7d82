"""What the native diffusion LMs have in common as transformers models: no generation, no cache, plain outputs."""

from pathlib import Path
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from sinkprune_plugin.errors import UsageError

__all__ = ["DiffusionLM", "HiddenStates", "check_call", "kept_positions", "lm_output"]

_GENERATION_FILE = "generation_config.json"
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class DiffusionLM(PreTrainedModel):
    """Base class of the native models.

    ``generate`` is refused: transformers' version writes tokens from left to right, which these models were not
    trained for, and would do so silently. The checkpoint's ``generation_config.json`` is still kept when a model is
    loaded and saved, because engines read token ids and sampling defaults from it.
    """

    base_model_prefix = "model"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    generation_config: GenerationConfig | None = None

    @classmethod
    def can_generate(cls) -> bool:
        """Always False: transformers must not treat the model as autoregressive."""
        return False

    def generate(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse to generate from left to right.

        :raises UsageError: always
        """
        raise UsageError(
            f"{type(self).__name__} is a diffusion LM and doesn't generate from left to right; use "
            "sinkprune_plugin.sampling.denoise"
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, see ``PreTrainedModel.from_pretrained``; also reads ``generation_config.json``."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        try:
            model.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **hub_arguments)
        except OSError:
            # There is none, and the checkpoint is complete without it.
            model.generation_config = None
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint, see ``PreTrainedModel.save_pretrained``; also writes ``generation_config.json``."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.generation_config is not None and kwargs.get("is_main_process", True):
            # Not GenerationConfig.save_pretrained: it refuses files such as Dream's (temperature 0 without sampling).
            self.generation_config.to_json_file(Path(save_directory) / _GENERATION_FILE)


class HiddenStates:
    """Collects the hidden states for ``output_hidden_states``.

    An object instead of ``if`` statements in ``forward``, which llm-compressor's tracer would have to exclude.

    :param wanted: the call's argument; None leaves it to ``default``
    :param default: the configuration's ``output_hidden_states``
    """

    def __init__(self, wanted: bool | None, default: bool | None) -> None:
        self._states: list[torch.Tensor] | None = [] if (default if wanted is None else wanted) else None

    def add(self, hidden_states: torch.Tensor) -> None:
        """Keep one state if states are wanted.

        :param hidden_states: (B, T, d)
        """
        if self._states is not None:
            self._states.append(hidden_states)

    @property
    def states(self) -> tuple[torch.Tensor, ...] | None:
        """The embedding, the output of every block but the last, and the final norm's output; or None."""
        return None if self._states is None else tuple(self._states)


def check_call(
    model: PreTrainedModel,
    *,
    input_ids: Any,
    inputs_embeds: Any,
    past_key_values: Any,
    use_cache: Any,
    **unsupported: Any,
) -> None:
    """Check the arguments of one forward call that a diffusion LM can't honour.

    :param model: the model, for its name
    :param input_ids: token ids or None
    :param inputs_embeds: embeddings or None; exactly one of the two is needed
    :param past_key_values: must be None
    :param use_cache: must not be True
    :param unsupported: further arguments that must be None or False, by name
    :raises UsageError: for any of these
    """
    name = type(model).__name__
    if (input_ids is None) == (inputs_embeds is None):
        given = "both" if input_ids is not None else "neither"
        raise UsageError(f"{name} takes either input_ids or inputs_embeds; {given} was given")
    if past_key_values is not None or use_cache is True:
        raise UsageError(
            f"{name} attends in both directions, so keys and values of earlier tokens can't be cached; pass "
            "use_cache=False and no past_key_values"
        )
    for argument, value in unsupported.items():
        if value is not None and value is not False:
            raise UsageError(f"{name} doesn't support {argument}; leave it out")


def kept_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """What the vocabulary projection is applied to; its logits may take more memory than the model.

    :param hidden_states: (B, T, d)
    :param logits_to_keep: as in transformers: so many of the last positions, 0 for all, or (n,) int64 positions
    :return: (B, n, d)
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    return hidden_states[:, logits_to_keep]


def lm_output(
    model: PreTrainedModel, logits: torch.Tensor, hidden_states: tuple[torch.Tensor, ...] | None, return_dict: Any
) -> Any:
    """Put the result into the requested form.

    :param model: the model, whose configuration gives the default form
    :param logits: (B, T, V)
    :param hidden_states: as :class:`HiddenStates` collected them
    :param return_dict: False for a plain tuple
    :return: a ``CausalLMOutputWithPast`` without a cache, or a tuple that begins with the logits
    """
    output = CausalLMOutputWithPast(logits=logits, hidden_states=hidden_states)
    wanted = model.config.return_dict if return_dict is None else return_dict
    return output if wanted else output.to_tuple()
