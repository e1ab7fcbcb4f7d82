"""Expert pruning on the files of a checkpoint: scored and written tensor by tensor, no model in memory."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.checkpoint_reader import CheckpointReader
from sinkprune_plugin.formats.checkpoint_writer import write_checkpoint
from sinkprune_plugin.formats.files.safetensors_header import TORCH_DTYPES
from sinkprune_plugin.formats.files.shard_reader import INDEX_NAME, SINGLE_NAME
from sinkprune_plugin.formats.tensor_view import TensorView, ViewedTensor
from sinkprune_plugin.formats.write_request import LARGEST_SHARD, WriteRequest
from sinkprune_plugin.loading import load_config
from sinkprune_plugin.models.expert_lists import experts_of, note_kept_experts, set_expert_counts
from sinkprune_plugin.models.fused_experts import FusedTensor, find_fused, refuse_unknown, unknown_pattern
from sinkprune_plugin.models.sizes_in_config import DENSE_KEY, sizes_in_config, with_sizes
from sinkprune_plugin.modifiers.expert_choice import ExpertChoice
from sinkprune_plugin.modifiers.experts import ExpertPruningModifier, described
from sinkprune_plugin.modifiers.targets import PRUNABLE_DTYPES
from sinkprune_plugin.pruning.experts import WeightSums, weight_importance

__all__ = ["ExpertFiles", "has_expert_files"]


@dataclass(frozen=True)
class _Expert:
    """Where a tensor belongs.

    :param block: number of the decoder block
    :param expert: number of the expert
    :param rest: the name after it, ``gate_proj.weight``
    """

    block: int
    expert: int
    rest: str


def has_expert_files(model_name: str | Path) -> bool:
    """Whether a checkpoint is a directory of safetensors files with experts in a layout that is understood.

    :param model_name: directory or hub name
    :raises UsageError: if the files are damaged, or the family has no experts
    """
    directory = Path(model_name)
    if not any((directory / file).is_file() for file in (SINGLE_NAME, INDEX_NAME)):
        return False
    reader, names = CheckpointReader(directory), experts_of(load_config(directory))
    pattern = _pattern(names.experts)
    return any(pattern.match(name) or find_fused(name, names) for name in reader)


class ExpertFiles:
    """A checkpoint whose experts are to be pruned in its files. Refuses on creation what doesn't fit.

    :param model_name: directory of the checkpoint
    :param modifier: what is to be done; its score needs no data
    :raises UsageError: if the tensors aren't those that config.json asks for, or the routers can't do with what stays
    """

    def __init__(self, model_name: str | Path, modifier: ExpertPruningModifier) -> None:
        self._reader = CheckpointReader(model_name)
        self._modifier = modifier
        self._config: Any = load_config(model_name)
        self._names = experts_of(self._config)
        self._choice = ExpertChoice(self._config, modifier.experts, modifier.allocation, modifier.allocation_spread)
        self._fused = {name: fused for name in self._reader if (fused := find_fused(name, self._names))}
        self._experts, self._prefix = self._find_experts()
        self._check()

    @property
    def written_bytes(self) -> int:
        """About how many bytes :meth:`write` needs when dense."""
        left = {index: 1 - self._choice.removed[index] / layer.experts for index, layer in self._choice.layers.items()}
        total = 0.0
        for name in self._reader:
            place = self._experts.get(name) or self._fused.get(name)
            total += self._reader.spec(name).nbytes * (1.0 if place is None else left[place.block])
        return int(total)

    def scores(self) -> dict[int, torch.Tensor]:
        """Read the weights of all experts and score them; shows a progress bar.

        :return: number of the block → (E,) float64, the higher the more important
        :raises UsageError: if a file has changed meanwhile, or weights aren't finite
        """
        sums = {index: [WeightSums() for _ in range(layer.experts)] for index, layer in self._choice.layers.items()}
        weights = {name: place for name, place in self._experts.items() if place.rest in self._projections}
        total = sum(self._reader.spec(name).nbytes for name in (*weights, *self._fused))
        with tqdm(total=total, desc="scoring experts", unit="B", unit_scale=True) as bar:
            for name, place in weights.items():
                self._add(name, [sums[place.block][place.expert]], bar)
            for name, fused in self._fused.items():
                self._add(name, sums[fused.block], bar)
        score = self._modifier.score
        return {index: weight_importance(each, score, f"decoder block {index}") for index, each in sums.items()}

    def _add(self, name: str, sums: list[WeightSums], bar: Any) -> None:
        """Read one tensor, whose first dimension is divided among the experts of ``sums``."""
        spec = self._reader.spec(name)
        each, done = spec.elements // len(sums), 0
        for piece in self._reader.chunks(name):
            values = torch.frombuffer(piece, dtype=TORCH_DTYPES[spec.dtype])
            while len(values):
                part = values[: each - done % each]
                sums[done // each].add(part)
                values, done = values[len(part) :], done + len(part)
            bar.update(len(piece))

    @property
    def blocks(self) -> int:
        """Decoder blocks."""
        return self._choice.blocks

    def choose(self, importances: Mapping[int, torch.Tensor]) -> dict[int, list[int]]:
        """Choose the experts that stay.

        :param importances: see :meth:`scores`
        :return: number of the block → their numbers, ascending
        """
        return self._choice.kept(importances, self._modifier.score)

    def removed(self, kept: Mapping[int, list[int]]) -> dict[int, int]:
        """How many go.

        :param kept: see :meth:`choose`
        :return: number of the block → their number
        """
        return {index: layer.experts - len(kept[index]) for index, layer in self._choice.layers.items()}

    def write(self, kept: Mapping[int, list[int]], directory: Path) -> str:
        """Write the checkpoint without the other experts, in the format that it is in.

        :param kept: see :meth:`choose`
        :param directory: directory to be written; it appears whole or not at all
        :return: one line about what was done
        :raises UsageError: if the disk is full; nothing is left behind
        """
        view = TensorView(self._reader, self._viewed(kept))
        specs = [self._reader.spec(name) for name in self._reader]
        before, after = sum(spec.elements for spec in specs), sum(view.spec(name).elements for name in view)
        write_checkpoint(
            view,
            WriteRequest(
                directory=directory,
                format=self._reader.format,
                layout="sinkprune",
                targets=None,
                candidates=frozenset(view) if self._reader.sparse_names else frozenset(),
                config=self._new_config(kept, before),
                source=self._reader.directory,
                max_shard_bytes=LARGEST_SHARD,
                overwrite=False,
                progress=True,
            ),
        )
        return described(self._choice, kept, self._modifier.score, before, after)

    # ---- what is in the files

    @property
    def _projections(self) -> frozenset[str]:
        return frozenset(f"{name}.weight" for name in (self._names.gate, self._names.up, self._names.down))

    def _find_experts(self) -> tuple[dict[str, _Expert], str]:
        pattern, unknown = _pattern(self._names.experts), re.compile(unknown_pattern(self._names))
        for name in self._reader:
            if unknown.search(name):
                raise refuse_unknown(name, self._reader.spec(name).shape, self._names)
        found = {name: match for name in self._reader if (match := pattern.match(name))}
        prefixes = sorted(
            {match["prefix"] for match in found.values()} | {fused.prefix for fused in self._fused.values()}
        )
        if len(prefixes) != 1:
            where = " and ".join(prefixes) or "no list of blocks"
            raise UsageError(
                f"{self._reader.directory} has experts in {where}; expected are those of one list of decoder blocks"
            )
        experts = {
            name: _Expert(int(match["block"]), int(match["expert"]), match["rest"]) for name, match in found.items()
        }
        return experts, prefixes[0]

    def _check(self) -> None:
        """Compare the tensors of experts and routers with the configuration."""
        there = {(place.block, place.expert, place.rest) for place in self._experts.values()}
        counts = {index: layer.experts for index, layer in self._choice.layers.items()}
        for name, fused in self._fused.items():
            there |= self._check_fused(name, fused)
        for place in self._experts.values():
            if place.expert >= counts.get(place.block, 0):
                raise UsageError(
                    f"decoder block {place.block} has a tensor of expert {place.expert}, and config.json asks for "
                    f"{counts.get(place.block, 0)} experts there; correct config.json, or fetch both again"
                )
        for index, count in counts.items():
            for number in range(count):
                for rest in sorted(self._projections):
                    if (index, number, rest) not in there:
                        raise UsageError(
                            f"{self._prefix}{index}.{self._names.experts}.{number}.{rest} is in no file, and "
                            f"config.json asks for {count} experts there; correct config.json, or fetch both again"
                        )
        weights = [name for name, place in self._experts.items() if place.rest in self._projections]
        for name in (*weights, *self._fused):
            dtype = self._reader.spec(name).dtype
            if TORCH_DTYPES.get(dtype) not in PRUNABLE_DTYPES:
                raise UsageError(f"{name} has {dtype} weights; remove experts before quantizing")
        for name, index in self._rows().items():
            shape = self._reader.spec(name).shape
            if not shape or shape[0] != counts[index]:
                raise UsageError(
                    f"{name} has {shape[0] if shape else 0} rows, and config.json asks for {counts[index]} experts in "
                    f"decoder block {index}; correct config.json, or fetch both again"
                )
        router = self._names.rows[0]
        for index in counts:
            if f"{self._prefix}{index}.{router}" not in self._reader:
                raise UsageError(f"{self._prefix}{index}.{router}, the router's weight, is in no file; fetch it again")

    def _check_fused(self, name: str, fused: FusedTensor) -> set[tuple[int, int, str]]:
        """What is in a fused tensor: blocks, experts and names of weights."""
        sizes = sizes_in_config(self._config)
        if fused.block not in self._choice.layers:
            raise UsageError(
                f"decoder block {fused.block} has {name}, and config.json asks for no experts there; correct "
                "config.json, or fetch both again"
            )
        fused.check(self._reader.spec(name).shape, self._names, sizes[fused.block], self._config.hidden_size)
        count = self._choice.layers[fused.block].experts
        return {(fused.block, number, f"{each}.weight") for number in range(count) for each in fused.projections}

    def _rows(self) -> dict[str, int]:
        """Tensors with a row for each expert, and the block they are in."""
        names = {f"{self._prefix}{index}.{row}": index for index in self._choice.layers for row in self._names.rows}
        return {name: index for name, index in names.items() if name in self._reader}

    # ---- what is written

    def _viewed(self, kept: Mapping[int, list[int]]) -> dict[str, ViewedTensor]:
        places = {index: {number: place for place, number in enumerate(numbers)} for index, numbers in kept.items()}
        rows = self._rows()
        viewed = {}
        for name in self._reader:
            expert = self._experts.get(name)
            if expert is not None:
                place = places[expert.block].get(expert.expert)
                if place is not None:
                    new = f"{self._prefix}{expert.block}.{self._names.experts}.{place}.{expert.rest}"
                    viewed[new] = ViewedTensor(name)
            elif name in rows or name in self._fused:
                block = rows[name] if name in rows else self._fused[name].block
                viewed[name] = ViewedTensor(name, tuple(kept[block]))
            else:
                viewed[name] = ViewedTensor(name)
        return viewed

    def _new_config(self, kept: Mapping[int, list[int]], parameters: int) -> dict[str, Any]:
        config = self._config
        if getattr(config, DENSE_KEY, None) is None:
            setattr(config, DENSE_KEY, parameters)
        note_kept_experts(config, kept)
        set_expert_counts(config, {index: len(numbers) for index, numbers in kept.items()})
        return with_sizes(self._reader.config, config.to_dict())


def _pattern(experts: str) -> re.Pattern[str]:
    return re.compile(rf"(?P<prefix>(?:.*\.)?)(?P<block>\d+)\.{re.escape(experts)}\.(?P<expert>\d+)\.(?P<rest>.+)")
