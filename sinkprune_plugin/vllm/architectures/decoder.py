"""What the models of LLaDA and Dream have in common in vLLM, around the layers of their blocks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from sinkprune_plugin.errors import UsageError

__all__ = ["DenoisingLM", "run_block", "run_decoder"]


def run_block(
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    *,
    attention_norm: RMSNorm,
    attention: Callable[[torch.Tensor], torch.Tensor],
    mlp_norm: RMSNorm,
    mlp: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + attention(norm(x)), then x + MLP(norm(x)), with each sum left to the norm that follows it.

    :param hidden_states: (T, d)
    :param residual: (T, d), still to be added; None in the first block
    :param attention_norm: norm before attention
    :param attention: maps (T, d) to (T, d)
    :param mlp_norm: norm before the MLP
    :param mlp: maps (T, d) to (T, d)
    :return: the MLP's output and the residual, both (T, d)
    """
    if residual is None:
        residual = hidden_states
        hidden_states = attention_norm(hidden_states)
    else:
        hidden_states, residual = attention_norm(hidden_states, residual)
    hidden_states, residual = mlp_norm(attention(hidden_states), residual)
    return mlp(hidden_states), residual


def run_decoder(
    hidden_states: torch.Tensor, positions: torch.Tensor, *, blocks: nn.ModuleList, norm: RMSNorm
) -> torch.Tensor:
    """All blocks and the final norm.

    :param hidden_states: (T, d), embedded tokens
    :param positions: (T,) int64
    :param blocks: take and give what :func:`run_block` takes and gives
    :param norm: the final norm
    :return: (T, d)
    """
    residual = None
    for block in blocks:
        hidden_states, residual = block(positions, hidden_states, residual)
    hidden_states, _ = norm(hidden_states, residual)
    return hidden_states


class DenoisingLM(nn.Module, SupportsQuant, ABC):
    """A decoder with its vocabulary projection; subclasses say where the two are and how tensors are named.

    ``pick_rows``, set by the model state, takes the place of the projection: the sampler projects what it picks, in
    chunks.
    """

    hf_to_vllm_mapper: WeightsMapper
    packed_modules_mapping: dict[str, list[str]]
    pick_rows: Callable[[torch.Tensor], torch.Tensor] | None = None
    logits_processor: LogitsProcessor

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """The class that plans denoising steps for vLLM's runner."""
        from sinkprune_plugin.vllm.model_state import DenoisingModelState

        return DenoisingModelState

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """Embedding, decoder blocks and final norm."""

    @property
    @abstractmethod
    def embedding(self) -> VocabParallelEmbedding:
        """The embedding table."""

    @property
    @abstractmethod
    def head(self) -> ParallelLMHead:
        """The vocabulary projection."""

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look tokens up.

        :param input_ids: (T,) token ids
        :return: (T, d)
        """
        return self.embedding(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,  # noqa: ARG002 - of pipeline parallelism, which is refused
        inputs_embeds: torch.Tensor | None = None,
        shift: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **_kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states after the final norm.

        :param input_ids: (T,) token ids, or
        :param positions: (T,) position of each token within its request
        :param intermediate_tensors: not used
        :param inputs_embeds: (T, d) in place of ``input_ids``
        :param shift: for models whose hidden state i predicts token i + 1: moves them so that row i predicts token i
        :return: (T, d)
        """
        hidden_states = self.decoder(input_ids, positions, inputs_embeds)
        return hidden_states if shift is None else shift(hidden_states)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Project onto the vocabulary, or pick the rows that the sampler will project.

        :param hidden_states: (T, d)
        :return: (T, embedding rows) logits, or (rows, d) hidden states that ``pick_rows`` picked
        """
        return self.project(hidden_states) if self.pick_rows is None else self.pick_rows(hidden_states)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Project onto the vocabulary.

        :param hidden_states: (T, d)
        :return: (T, embedding rows)
        """
        logits = self.logits_processor(self.head, hidden_states, self.head.bias)
        # None on ranks that don't gather; all do, since each runs the sampler.
        assert logits is not None
        return logits

    def checkpoint_names(self) -> set[str]:
        """Names that the weights and biases of this model have in a checkpoint; quantized ones may be missing."""
        names: set[str] = set()
        for name, _ in self.named_parameters():
            module, _, kind = name.rpartition(".")
            parent, _, own = module.rpartition(".")
            if kind in ("weight", "bias"):
                parts = self.packed_modules_mapping.get(own, [own])
                names.update(".".join(filter(None, (parent, part, kind))) for part in parts)
        return names

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors.

        :param weights: name in the checkpoint → tensor
        :return: names of the parameters that were loaded
        :raises UsageError: for a tensor that the model would have to leave out
        """
        return AutoWeightsLoader(self).load_weights(self._no_bias_dropped(weights), mapper=self.hf_to_vllm_mapper)

    def _no_bias_dropped(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """vLLM's loader skips biases that a model has no parameter for, which would change what it computes."""
        known = {name for name, _ in self.named_parameters()}
        for name, tensor in weights:
            if name.endswith(".bias") and self.hf_to_vllm_mapper.map_name(name) not in known and bool(tensor.any()):
                raise UsageError(
                    f"{name} is in the checkpoint, but config.json says that there is no such bias; correct config.json"
                )
            yield name, tensor
