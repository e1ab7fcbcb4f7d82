"""What ``--model_args`` may hold, checked before anything is loaded."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sinkprune_plugin.devices import choose_device
from sinkprune_plugin.diffusion import DiffusionSpec
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sampling import SamplingOptions
from sinkprune_plugin.sampling.edit_options import refuse_edits
from sinkprune_plugin.sampling.family_options import family_options

__all__ = ["ModelArguments", "sampling_options"]

BACKENDS = ("transformers", "vllm")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# lm-eval passes them to every model class. Nothing from a checkpoint is executed, whatever the value of the second one.
_IGNORED = ("max_batch_size", "trust_remote_code")
# What lm-eval's command line passes where the user names no device, also on a machine without one.
_DEFAULT_DEVICE = "cuda:0"


@dataclass(frozen=True)
class ModelArguments:
    """Arguments of :class:`~sinkprune_plugin.lm_eval.lm_eval_model.SinkpruneLM`; made by :meth:`read`.

    :param pretrained: checkpoint directory or hub name
    :param backend: what generates answers, ``transformers`` or ``vllm``; likelihoods are always transformers'
    :param mc_num: Monte-Carlo samples of a likelihood
    :param cfg: scale of classifier-free guidance; 0 is off
    :param block_length: tokens in a block of an answer; of a shorter answer, all of it; None: 32, or the model's own
    :param steps: denoising steps of an answer; None is one for each token
    :param cache: cache mode of an answer: ``none``, ``prefix``, ``dual`` or ``commit``; None: ``none``, or ``commit``
        for a model that denoises block by block
    :param add_bos_token: put the tokenizer's BOS token before every context
    :param check_greedy: also find out whether each answer is what the model would write, at as many forward passes as
        the answer has tokens; only tasks such as LAMBADA's accuracy use it
    :param max_length: longest context and answer in tokens; None is the model's, at most 4096
    :param batch_size: noisy rows, or prompts, in a forward pass
    :param device: None is the accelerator if there is one; so is lm-eval's own default ``cuda:0`` without CUDA
    :param dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``
    :param seed: of all noise
    """

    pretrained: str
    backend: str = "transformers"
    mc_num: int = 128
    cfg: float = 0.0
    block_length: int | None = None
    steps: int | None = None
    cache: str | None = None
    add_bos_token: bool = False
    check_greedy: bool = False
    max_length: int | None = None
    batch_size: int = 32
    device: str | None = None
    dtype: str = "auto"
    seed: int = 0

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "ModelArguments":
        """Check arguments as lm-eval parsed them.

        :param given: argument → value
        :return: the arguments
        :raises UsageError: for an unknown argument or a wrong value, in one line with the remedy
        """
        values = {name: value for name, value in given.items() if name not in _IGNORED and value is not None}
        refuse_edits(values)
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise UsageError(f"model argument {name!r} is unknown; {hint}")
        if not isinstance(values.get("pretrained"), str | Path) or not str(values["pretrained"]):
            raise UsageError("there is no model; pass --model_args pretrained=DIRECTORY_OR_HUB_NAME")
        values["pretrained"] = str(values["pretrained"])
        if str(values.get("batch_size", "")).split(":")[0] == "auto":
            # There is nothing to tune: rows of one request all have one length.
            del values["batch_size"]
        elif isinstance(values.get("batch_size"), str) and values["batch_size"].isdigit():
            values["batch_size"] = int(values["batch_size"])
        if values.get("device") == _DEFAULT_DEVICE and choose_device().type != "cuda":
            del values["device"]
        arguments = cls(**values)
        arguments._check()
        return arguments

    def _check(self) -> None:
        _one_of("backend", self.backend, BACKENDS)
        _one_of("dtype", self.dtype, DTYPES)
        _whole("mc_num", self.mc_num, 1)
        _whole("batch_size", self.batch_size, 1)
        for name in ("steps", "max_length"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 2 if name == "max_length" else 1)
        for name in ("add_bos_token", "check_greedy"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} {getattr(self, name)!r} is neither True nor False; use one of them")
        if isinstance(self.cfg, bool) or not isinstance(self.cfg, int | float) or not 0 <= self.cfg < math.inf:
            raise UsageError(f"cfg {self.cfg!r} is out of range; use a number from 0")
        sampling_options(
            gen_length=32 if self.block_length is None else self.block_length,
            block_length=self.block_length,
            cache=self.cache or "none",
            cfg_scale=self.cfg,
            seed=self.seed,
        )
        if self.backend == "vllm" and self.cfg:
            raise UsageError(f"cfg {self.cfg:g} isn't served by vLLM; use backend=transformers")
        if self.device is not None:
            choose_device(str(self.device))


def sampling_options(spec: DiffusionSpec | None = None, **options: Any) -> SamplingOptions:
    """Resolve sampling options, with messages that use the names of ``--model_args``.

    :param spec: the model's diffusion spec, if it is known
    :param options: see :meth:`SamplingOptions.resolve`
    :return: the options
    :raises UsageError: on a wrong value
    """
    try:
        return SamplingOptions.resolve(**family_options(spec, options, options["gen_length"]))
    except UsageError as error:
        message = str(error).replace("dlm_cfg_scale", "cfg").replace("dlm_gen_length", "max_gen_toks")
        raise UsageError(message.replace("dlm_", "")) from error


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name} {value!r} is unknown; use {', '.join(known[:-1])} or {known[-1]}")


def _whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(f"{name} {value!r} is out of range; use a whole number from {low}")
