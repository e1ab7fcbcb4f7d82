"""What a calibration will take, known before its first pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.offload import get_execution_device, get_offloaded_device

from sinkprune_plugin.modifiers.targets import PruningTarget

__all__ = ["RunEstimate", "SearchPlan", "SweepPlan", "brought_in_bytes", "hessian_bytes", "hidden_state_bytes"]


@dataclass(frozen=True)
class SweepPlan:
    """One sweep: all passes through all decoder blocks.

    :param num_passes: passes
    :param tokens: tokens of all passes, padding included
    :param runs_per_block: how often a block is run on all passes: twice where the statistics come before its pruning
        and the next block's inputs after it
    :param streams: hidden states of each pass: 2 where the dense model's are carried along
    """

    num_passes: int
    tokens: int
    runs_per_block: int = 1
    streams: int = 1


@dataclass(frozen=True)
class SearchPlan:
    """What ``allocation: search`` takes in addition to its sweep.

    :param tokens: forward tokens of all candidates
    :param candidates: measurements of a candidate, each of which reads the weights of all blocks at one level
    :param recovered: how many of them are recovered for a few steps before they are measured
    :param prediction_bytes: the dense model's predictions, in main memory
    :param database_bytes: weights at all levels, on disk
    :param decoded_bytes: the same as dense weights
    """

    tokens: int
    candidates: int
    recovered: int
    prediction_bytes: int
    database_bytes: int = 0
    decoded_bytes: int = 0


@dataclass(frozen=True)
class RunEstimate:
    """What a calibration takes; upper bounds where the model decides while it runs.

    :param sweeps: the sweeps, in order
    :param num_blocks: decoder blocks
    :param hidden_bytes: hidden states that wait between two blocks
    :param statistics_bytes: statistics that are held at once, on the device
    :param brought_in_bytes: offloaded weights that are brought to the device, over all sweeps
    :param training_bytes: weights, gradients and optimizer states of a block that is trained, on the device
    :param search: what a search takes, if there is one
    """

    sweeps: tuple[SweepPlan, ...]
    num_blocks: int
    hidden_bytes: int
    statistics_bytes: int
    brought_in_bytes: int
    training_bytes: int = 0
    search: SearchPlan | None = None

    @property
    def block_runs(self) -> int:
        """Runs of one block on one pass, summed over all blocks and passes; what the progress bars count."""
        return sum(sweep.num_passes * sweep.runs_per_block * self.num_blocks for sweep in self.sweeps)

    def __str__(self) -> str:
        sweeps = " + ".join(f"{sweep.num_passes} passes" for sweep in self.sweeps) or "no passes"
        text = (
            f"{sweeps} through {self.num_blocks} blocks, {self.block_runs} runs of a block; hidden states "
            f"{_size(self.hidden_bytes)}, "
        )
        parts = []
        if self.statistics_bytes or not self.training_bytes:
            parts.append(f"statistics at most {_size(self.statistics_bytes)} at once")
        if self.training_bytes:
            parts.append(f"weights and optimizer states of a block at most {_size(self.training_bytes)}")
        text += ", ".join(parts)
        if self.brought_in_bytes:
            text += f", {_size(self.brought_in_bytes)} of offloaded weights brought in"
        if self.search is not None:
            text += (
                f"; search of at most {self.search.tokens:,} forward tokens on {self.search.candidates:,} candidates, "
            )
            if self.search.recovered:
                text += f"{self.search.recovered:,} of them recovered before they are measured, "
            if self.search.database_bytes:
                text += f"{_size(self.search.database_bytes)} on disk, "
            text += f"dense predictions {_size(self.search.prediction_bytes)}"
        return text


def hidden_state_bytes(model: torch.nn.Module, tokens: int) -> int:
    """Bytes of the hidden states between two blocks for a number of tokens.

    :param model: the model, with an input embedding as wide as its hidden states
    :param tokens: tokens of all passes
    :return: tokens × width × bytes of the dtype
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return tokens * embedding.embedding_dim * embedding.weight.element_size()


def hessian_bytes(targets: Sequence[PruningTarget], matrices: int = 1) -> int:
    """Bytes of the float32 Hessians of the largest block, if none of its Linears shared an input.

    :param targets: all targets
    :param matrices: for each input
    :return: upper bound of the bytes held at once
    """
    of_block: dict[int | None, int] = {}
    for target in targets:
        of_block[target.block] = of_block.get(target.block, 0) + 4 * matrices * target.module.in_features**2
    return max(of_block.values(), default=0)


def brought_in_bytes(model: torch.nn.Module, blocks: torch.nn.ModuleList, num_sweeps: int) -> int:
    """Bytes of offloaded weights that a run moves to the device: embedding and blocks once per sweep.

    :param model: the model
    :param blocks: its decoder blocks
    :param num_sweeps: sweeps of the run
    :return: 0 where nothing is offloaded
    """
    total = 0
    for part in (model.get_input_embeddings(), blocks):  # type: ignore[operator]
        for module in part.modules():
            for parameter in module._parameters.values() if _is_offloaded(module) else ():
                total += 0 if parameter is None else parameter.numel() * parameter.element_size()
    return total * num_sweeps


def _is_offloaded(module: torch.nn.Module) -> bool:
    default = torch.device("cpu")
    return str(get_execution_device(module, default)) != str(get_offloaded_device(module, default))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 5e8 else f"{num_bytes / 1e6:.1f} MB"
