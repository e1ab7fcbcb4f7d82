"""vLLM's model state for denoising models: plans each step and builds the attention metadata."""

from typing import Any

import numpy as np
import torch
from torch import nn
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.tasks import GenerationTask
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.sampling.batch_state import DeviceBatch
from sinkprune_plugin.sampling.batch_table import Column
from sinkprune_plugin.vllm.host_kernels import replace_kernels
from sinkprune_plugin.vllm.logit_shift import BoundaryStates, StateKeeper
from sinkprune_plugin.vllm.query_cuts import DeviceCuts
from sinkprune_plugin.vllm.request_plan import has_plan, plan_of
from sinkprune_plugin.vllm.sampler import DenoisingSampler
from sinkprune_plugin.vllm.step_plan import BatchLayout, SlotTable

__all__ = ["DenoisingModelState"]


class DenoisingModelState(ModelState):
    """State of all models of the catalogue.

    :param vllm_config: configuration, with a ``diffusion_config``
    :param model: the vLLM model
    :param encoder_cache: None, there is no encoder
    :param device: where the model is
    """

    # A denoising step samples nothing beyond the canvas.
    num_new_sampled_tokens_per_step: int = 0

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        if device.type == "cpu":
            replace_kernels()
        assert vllm_config.diffusion_config is not None
        self._canvas_length = vllm_config.diffusion_config.canvas_length
        self._spec = resolve_diffusion(self.model_config.hf_config)
        self._slots = SlotTable(self.max_num_reqs, self._canvas_length)
        self._one_rank = vllm_config.parallel_config.tensor_parallel_size == 1
        self._sampler: DenoisingSampler | None = None
        self._batch: DeviceBatch | None = None
        # Positions after each query that attention must see as well; None if there are none.
        self._hidden_suffix: np.ndarray[Any, np.dtype[np.int64]] | None = None
        # The queries of the step in parts, where a block-causal context is read.
        self._cuts: DeviceCuts | None = None
        self._keep: StateKeeper | None = None
        # Which requests' tokens see only what comes before them. Kept, since graphs remember where it is; int32, which
        # is what FlashAttention asks for.
        self._causal = (
            torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device) if self._spec.context == "causal" else None
        )
        model_dtype = self.dtype
        assert isinstance(model_dtype, torch.dtype)
        self._boundary = (
            BoundaryStates(self.max_num_reqs, self.inputs_embeds_size, model_dtype, device)
            if self._spec.logit_shift
            else None
        )

    def get_supported_generation_tasks(self) -> tuple[GenerationTask, ...]:
        """Text generation."""
        return ("generate",)

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """No full CUDA graphs, whatever the attention backend supports: steps of one request differ in width."""
        return AttentionCGSupport.NEVER, type(self).__name__

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        """Replace vLLM's sampler.

        :param sampler: vLLM's, for its view of the request states
        :return: ours, and no rejection sampler
        """
        vocabulary = self.model_config.get_vocab_size()
        self._sampler = DenoisingSampler(sampler.req_states, self._spec.mask_token_id, self.model, vocabulary)
        # The sampler projects the hidden states of the positions that are still masked. setattr: to mypy an attribute
        # of a Module is a tensor or a module.
        setattr(self.model, "pick_rows", self._pick_rows)  # noqa: B010
        return self._sampler, None

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Add a request, new or resumed.

        :param req_index: its slot
        :param new_req_data: the request
        """
        params = new_req_data.sampling_params
        if not has_plan(params):
            # vLLM warms up with every option, such as logprobs of the prompt, for which it would ask the model itself.
            new_req_data.sampling_params = SamplingParams(max_tokens=params.max_tokens if params else 1)
        options = plan_of(params, self._canvas_length)
        self._slots.add(req_index, new_req_data.prompt_len, options)

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],  # noqa: ARG002
        kv_cache_config: Any,  # noqa: ARG002
        num_computed_tokens: torch.Tensor,  # noqa: ARG002
    ) -> None:
        """Plan the step. vLLM calls this first, and for real batches only.

        :param input_batch: the batch
        :param block_tables: not used
        :param kv_cache_config: not used
        :param num_computed_tokens: not used, the host has the same numbers
        """
        if self._sampler is None:
            return
        num_reqs = input_batch.num_reqs
        layout = BatchLayout(
            slots=input_batch.idx_mapping_np[:num_reqs].astype(np.int64),
            computed=input_batch.num_computed_tokens_np[:num_reqs].astype(np.int64),
            query=input_batch.num_scheduled_tokens[:num_reqs].astype(np.int64),
            canvas=np.diff(input_batch.cu_num_logits_np[: num_reqs + 1]).astype(np.int64),
        )
        # Ranks may hear of it at different times, and all of them must project the same rows.
        left = self._sampler.known_left() if self._one_rank else None
        if left is not None:
            self._slots.note_left(left)
        plan = self._slots.plan(layout)
        self._hidden_suffix = plan.hidden_suffix if plan.hidden_suffix.any() else None
        parts = [plan.table.ravel(), plan.row_request, plan.needs.filtered]
        if self._boundary is not None:
            parts += self._boundary.plan(layout, plan.table)
        if plan.cuts is not None:
            parts += [plan.cuts.request, plan.cuts.starts, plan.cuts.ends]
        # One copy to the device; everything below is a view of it.
        lengths = [len(part) for part in parts]
        packed = async_tensor_h2d(np.concatenate(parts), device=self.device).split(lengths)
        self._batch = DeviceBatch(packed[0].view(num_reqs, len(Column)), packed[1], packed[2])
        self._keep = None if self._boundary is None else StateKeeper(self._boundary.states, packed[3], packed[4])
        self._cuts = None
        if plan.cuts is not None:
            request, starts, ends = packed[-3:]
            self._cuts = DeviceCuts(plan.cuts, request, starts.to(torch.int32), ends.to(torch.int32))
        self._sampler.begin(self._batch, plan.needs)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:  # noqa: ARG002
        """Let the model keep the hidden states that later steps need.

        :param input_batch: not used
        :param req_states: not used
        :return: further arguments of the model's forward
        """
        keep, self._keep, self._hidden_suffix, self._cuts = self._keep, None, None, None
        return {} if keep is None else {"shift": keep}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:  # noqa: ARG002
        """Nothing is planned in a dummy run.

        :param num_reqs: not used
        :param num_tokens: not used
        :return: no further arguments
        """
        return {}

    def _pick_rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, self._batch = self._batch, None
        if batch is None or self._sampler is None:
            return hidden_states
        return self._sampler.batched.gather(
            hidden_states, None if self._boundary is None else self._boundary.states, batch
        )

    def prepare_inputs_embeds(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],  # noqa: ARG002
        input_batch: InputBatch,  # noqa: ARG002
        req_states: RequestState,  # noqa: ARG002
    ) -> torch.Tensor | None:
        """Nothing to do: the model embeds its own inputs.

        :param scheduled_encoder_inputs: not used
        :param input_batch: not used
        :param req_states: not used
        """
        return None

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Attention in both directions; for cache ``dual`` also over the kept positions after the block.

        A model with a causal context has it in both directions in an open block only: a prompt is read causally, and so
        is a finished block, once more, for the keys and values that are kept of it. A block-causal context is read in
        both directions block by block, each as a sequence of its own to the attention backend.

        :param input_batch: the batch
        :param cudagraph_mode: never FULL, see the config hook
        :param block_tables: pages of each request
        :param slot_mappings: where keys and values are written
        :param attn_groups: layers by kind of cache
        :param kv_cache_config: the cache
        :param for_capture: whether a graph is being captured
        :param ubatch_idx: always 0
        :return: metadata by layer
        """
        assert cudagraph_mode != CUDAGraphMode.FULL
        assert ubatch_idx == 0
        num_reqs = input_batch.num_reqs
        starts, starts_cpu = input_batch.query_start_loc, torch.from_numpy(input_batch.query_start_loc_np)
        seq_lens, upper_bound = input_batch.seq_lens, input_batch.seq_lens_cpu_upper_bound
        widest = int(input_batch.num_scheduled_tokens.max())
        if not for_capture and self._hidden_suffix is not None and self._batch is not None:
            seq_lens = seq_lens.clone()
            seq_lens[:num_reqs] += self._batch.column(Column.HIDDEN_SUFFIX)
            upper_bound = upper_bound.clone()
            upper_bound[:num_reqs] += torch.from_numpy(self._hidden_suffix)
        cuts = None if for_capture else self._cuts
        if cuts is not None:
            num_reqs, widest = len(cuts.host.request), cuts.host.widest
            starts, starts_cpu = cuts.starts, torch.from_numpy(cuts.host.starts.astype(np.int32))
            seq_lens, upper_bound = cuts.ends, torch.from_numpy(cuts.host.ends.astype(np.int32))
            block_tables = tuple(table[cuts.request] for table in block_tables)
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=num_reqs,
            num_tokens=input_batch.num_tokens,
            query_start_loc_gpu=starts[: num_reqs + 1],
            query_start_loc_cpu=starts_cpu[: num_reqs + 1],
            max_query_len=widest,
            seq_lens=seq_lens,
            max_seq_len=self.max_model_len if for_capture else int(upper_bound[:num_reqs].max()),
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=upper_bound,
            positions=input_batch.positions,
            for_cudagraph_capture=for_capture,
            causal=False if for_capture or self._batch is None else self._attention_of(self._batch),
        )

    def _attention_of(self, batch: DeviceBatch) -> bool | torch.Tensor:
        """False for both directions, or for each request of the step 1 for causal attention, (num_reqs,) int32."""
        if self._causal is None or self._sampler is None:
            return False
        finished = self._sampler.state.committing[batch.column(Column.SLOT)] != 0
        flags = self._causal[: len(batch.table)]
        # Without a canvas it is a prompt, or, after preemption, a finished block.
        flags.copy_(finished | (batch.column(Column.WIDTH) == 0))
        return flags
