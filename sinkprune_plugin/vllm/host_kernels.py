"""vLLM's small kernels as plain numpy, for machines without a GPU.

Model Runner V2 prepares each step with half a dozen Triton kernels of a few additions for each request. Triton's
interpreter runs them one program and one operation at a time: at batch 8 more than a hundred milliseconds a step. These
functions take the same arguments and leave the same bytes behind, in some hundred microseconds;
integration_tests/test_vllm_host_kernels.py compares the two. A kernel that isn't listed, or that another release of
vLLM has renamed or given other parameters, stays with the interpreter.
"""

import ctypes
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

__all__ = ["KERNELS", "HostKernel", "install", "replace_kernels"]

Array = np.ndarray[Any, np.dtype[Any]]


class HostKernel:
    """Takes the place of a Triton kernel.

    :param function: called with the kernel's arguments, and with the grid first
    :param original: the kernel
    """

    def __init__(self, function: Callable[..., None], original: Any) -> None:
        self.function = function
        self.original = original

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int = 1, **kwargs: Any) -> None:  # noqa: ARG001
            self.function(grid, *args, **kwargs)

        return launch


def _row(pointer: int, start: int, length: int) -> Array:
    """Int32 numbers at an address, of which vLLM keeps tables of pointers."""
    place = pointer + 4 * start
    return np.ctypeslib.as_array((ctypes.c_int32 * length).from_address(place))


def _flat(tensor: torch.Tensor) -> Array:
    return tensor.numpy().reshape(-1)


def _prepare_prefill_inputs_kernel(
    grid: tuple[int, ...],
    input_ids_ptr: torch.Tensor,
    next_prefill_tokens_ptr: torch.Tensor,
    next_prefill_tokens_stride: int,  # noqa: ARG001
    num_lookahead: int,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,  # noqa: ARG001
    prefill_lens_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    BLOCK_SIZE: int,  # noqa: ARG001
    LOOKAHEAD_BLOCK: int,  # noqa: ARG001
) -> None:
    input_ids, tokens, following = input_ids_ptr.numpy(), all_token_ids_ptr.numpy(), next_prefill_tokens_ptr.numpy()
    bounds = query_start_loc_ptr.numpy()
    for number, slot in enumerate(idx_mapping_ptr[: grid[0]].tolist()):
        prefill, computed = int(prefill_lens_ptr[slot]), int(num_computed_tokens_ptr[slot])
        if computed >= prefill:
            continue
        begin, end = bounds[number], bounds[number + 1]
        input_ids[begin:end] = tokens[slot, computed : computed + end - begin]
        after = computed + int(end - begin) + np.arange(num_lookahead)
        inside = after < prefill
        following[:num_lookahead, slot] = np.where(inside, tokens[slot, np.where(inside, after, 0)], 0)


def _prepare_pos_seq_lens_kernel(
    grid: tuple[int, ...],
    pos_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    max_num_reqs: int,
    BLOCK_SIZE: int,  # noqa: ARG001
) -> None:
    requests = grid[0] - 1
    bounds = query_start_loc_ptr.numpy()[: requests + 1]
    computed = num_computed_tokens_ptr.numpy()[idx_mapping_ptr.numpy()[:requests]]
    lengths = np.diff(bounds)
    seq_lens = seq_lens_ptr.numpy()
    seq_lens[:requests] = computed + lengths
    seq_lens[requests:max_num_reqs] = 0
    first, last = bounds[0], bounds[requests]
    pos_ptr.numpy()[first:last] = np.arange(first, last) + np.repeat(computed - bounds[:-1], lengths)


def _combine_sampled_and_draft_tokens_kernel(
    grid: tuple[int, ...],
    input_ids_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    last_sampled_tokens_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    draft_tokens_ptr: torch.Tensor,
    draft_tokens_stride: int,  # noqa: ARG001
    cu_num_logits_ptr: torch.Tensor,
    logits_indices_ptr: torch.Tensor,
    BLOCK_SIZE: int,  # noqa: ARG001
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> None:
    bounds, rows = query_start_loc_ptr.numpy(), cu_num_logits_ptr.numpy()
    input_ids, drafts = input_ids_ptr.numpy(), draft_tokens_ptr.numpy()
    indices = logits_indices_ptr.numpy()
    for number, slot in enumerate(idx_mapping_ptr[: grid[0]].tolist()):
        end = int(bounds[number + 1])
        count = int(rows[number + 1] - rows[number])
        indices[rows[number] : rows[number + 1]] = np.arange(end - count, end)
        length, prefill = int(seq_lens_ptr[number]), int(prefill_len_ptr[slot])
        if length <= prefill:
            continue
        if NUM_NEW_SAMPLED_TOKENS > 0 and length - count >= prefill:
            input_ids[end - count] = int(last_sampled_tokens_ptr.reshape(-1)[slot])
        width = count - NUM_NEW_SAMPLED_TOKENS
        if width > 0:
            input_ids[end - width : end] = drafts[slot, :width]


def _expand_idx_mapping_kernel(
    grid: tuple[int, ...],
    idx_mapping_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    BLOCK_SIZE: int,  # noqa: ARG001
) -> None:
    bounds = cu_num_logits_ptr.numpy()[: grid[0] + 1]
    counts = np.diff(bounds)
    first, last = bounds[0], bounds[-1]
    expanded_idx_mapping_ptr.numpy()[first:last] = np.repeat(idx_mapping_ptr.numpy()[: grid[0]], counts)
    expanded_local_pos_ptr.numpy()[first:last] = np.arange(first, last) - np.repeat(bounds[:-1], counts)


def _post_update_kernel(
    grid: tuple[int, ...],
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    last_sampled_tokens_ptr: torch.Tensor,
    output_bin_counts_ptr: torch.Tensor | None,
    output_bin_counts_stride: int,  # noqa: ARG001
    sampled_tokens_ptr: torch.Tensor,
    sampled_tokens_stride: int,  # noqa: ARG001
    num_sampled_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor | None,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,  # noqa: ARG001
    total_len_ptr: torch.Tensor,
) -> None:
    sampled, tokens, computed = sampled_tokens_ptr.numpy(), all_token_ids_ptr.numpy(), num_computed_tokens_ptr.numpy()
    bounds = None if query_start_loc_ptr is None else query_start_loc_ptr.numpy()
    for number, slot in enumerate(idx_mapping_ptr[: grid[0]].tolist()):
        if slot < 0:
            continue
        count = int(num_sampled_ptr[number])
        if count > 0:
            total = int(total_len_ptr[slot])
            _flat(last_sampled_tokens_ptr)[slot] = sampled[number, count - 1]
            total_len_ptr[slot] = total + count
            tokens[slot, total : total + count] = sampled[number, :count]
            if output_bin_counts_ptr is not None:
                np.add.at(output_bin_counts_ptr.numpy()[slot], sampled[number, :count], 1)
        query = 0 if bounds is None else int(bounds[number + 1] - bounds[number])
        computed[slot] += query - int(num_rejected_ptr[number])


def _gather_block_tables_kernel(
    grid: tuple[int, ...],
    batch_idx_to_req_idx: torch.Tensor,
    src_block_table_ptrs: torch.Tensor,
    dst_block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    num_blocks_ptr: torch.Tensor,
    num_blocks_stride: int,  # noqa: ARG001
    num_reqs: int,
    BLOCK_SIZE: int,  # noqa: ARG001
) -> None:
    groups, padded = grid
    slots = batch_idx_to_req_idx[:num_reqs].tolist()
    counts = num_blocks_ptr.numpy().reshape(groups, -1)
    for group in range(groups):
        source, target = int(src_block_table_ptrs[group]), int(dst_block_table_ptrs[group])
        stride = int(block_table_strides[group])
        for number in range(padded):
            if number >= num_reqs:
                _row(target, number * stride, stride)[:] = 0
                continue
            blocks = int(counts[group, slots[number]])
            if blocks:
                _row(target, number * stride, blocks)[:] = _row(source, slots[number] * stride, blocks)


def _compute_slot_mappings_kernel(
    grid: tuple[int, ...],
    max_num_tokens: int,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    pos: torch.Tensor,
    block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    block_sizes: torch.Tensor,
    slot_mapping_enabled: torch.Tensor,
    dcp_sharded: torch.Tensor,  # noqa: ARG001
    slot_mappings_ptr: torch.Tensor,
    slot_mappings_stride: int,  # noqa: ARG001
    cp_rank: int,  # noqa: ARG001
    CP_SIZE: int,
    CP_INTERLEAVE: int,  # noqa: ARG001
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,  # noqa: ARG001
) -> None:
    # Context parallelism is refused in the configuration.
    assert CP_SIZE == 1
    groups, requests = grid[0], grid[1] - 1
    bounds, positions = query_start_loc.numpy(), pos.numpy()
    for group in range(groups):
        mapping = slot_mappings_ptr.numpy()[group]
        mapping[bounds[requests] : max_num_tokens] = PAD_ID
        size, stride = int(block_sizes[group]), int(block_table_strides[group])
        for number, slot in enumerate(idx_mapping[:requests].tolist()):
            own = slice(bounds[number], bounds[number + 1])
            if slot < 0 or not slot_mapping_enabled[group]:
                mapping[own] = PAD_ID
                continue
            blocks = _row(int(block_table_ptrs[group]), slot * stride, stride)
            mapping[own] = blocks[positions[own] // size].astype(np.int64) * size + positions[own] % size


def _apply_write_kernel(
    grid: tuple[int, ...],
    output_ptr: torch.Tensor,
    output_stride: Any,
    write_indices_ptr: torch.Tensor,
    write_starts_ptr: torch.Tensor,
    write_contents_ptr: torch.Tensor,
    write_cu_lens_ptr: torch.Tensor,
    write_group_ids_ptr: torch.Tensor | None,
    BLOCK_SIZE: int,  # noqa: ARG001
    MULTI_GROUP: bool,
) -> None:
    contents, bounds = write_contents_ptr.numpy(), write_cu_lens_ptr.numpy()
    for number in range(grid[0]):
        begin = int(bounds[number - 1]) if number else 0
        new = contents[begin : int(bounds[number])]
        row, start = int(write_indices_ptr[number]), int(write_starts_ptr[number])
        if MULTI_GROUP:
            assert write_group_ids_ptr is not None
            group = int(write_group_ids_ptr[number])
            _row(int(output_ptr[group]), row * int(output_stride[group]) + start, len(new))[:] = new
        else:
            _flat(output_ptr)[row * output_stride + start :][: len(new)] = new


# Where vLLM keeps each kernel, under the function's name.
KERNELS: dict[str, tuple[Callable[..., None], ...]] = {
    "vllm.v1.worker.gpu.input_batch": (
        _prepare_prefill_inputs_kernel,
        _prepare_pos_seq_lens_kernel,
        _combine_sampled_and_draft_tokens_kernel,
        _expand_idx_mapping_kernel,
        _post_update_kernel,
    ),
    "vllm.v1.worker.gpu.block_table": (_gather_block_tables_kernel, _compute_slot_mappings_kernel),
    "vllm.v1.worker.gpu.buffer_utils": (_apply_write_kernel,),
}


def install() -> list[str]:
    """Replace vLLM's kernels by these functions. Idempotent.

    :return: names of kernels that stay with the interpreter, because this vLLM's differ
    """
    differing = []
    for place, functions in KERNELS.items():
        module = importlib.import_module(place)
        for function in functions:
            kernel = getattr(module, function.__name__, None)
            if isinstance(kernel, HostKernel):
                continue
            names = list(inspect.signature(function).parameters)[1:]
            if getattr(kernel, "arg_names", None) == names:
                setattr(module, function.__name__, HostKernel(function, kernel))
            else:
                differing.append(f"{place}.{function.__name__}")
    return differing


def replace_kernels() -> None:
    """Call :func:`install`, with a warning for each kernel that differs."""
    from vllm.logger import init_logger

    for name in install():
        init_logger("vllm.sinkprune").warning_once(
            "%s differs from the one of the vLLM this was tested with; Triton's interpreter runs it, slowly", name
        )
