"""Which samples of a data loader are calibrated on: drawn with the recipe's seed, without those that are too short."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from loguru import logger
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.text_windows import MINIMUM_TOKENS

__all__ = ["SampleChoice"]

_REMEDY = "`concatenate_data=True` in oneshot() packs text into full windows"


class SampleChoice:
    """Chooses samples, and counts those that it leaves out.

    A sampler that shuffles without a generator of its own, as llm-compressor's does, depends on the global generator,
    and so on everything that ran before. Here the recipe's seed takes its place, so the same recipe takes the same
    samples.

    :param seed: the recipe's ``seed``
    :param minimum: real tokens that a sample must have
    """

    def __init__(self, seed: int, minimum: int = MINIMUM_TOKENS) -> None:
        self._seed = seed
        self._minimum = minimum
        self._short = 0

    def batches(self, dataloader: Iterable[Any]) -> Iterable[Any]:
        """Make a loader yield the samples to use, in an order determined by the seed.

        Rows that are too short are skipped before they reach the collator, which would cut all other rows of their
        batch to that length; where the loader shuffles, further rows take their place.

        :param dataloader: any iterable of batches
        :return: iterable of batches; a loader whose single rows can't be accessed is returned as it is
        """
        if not isinstance(dataloader, DataLoader) or isinstance(dataloader.dataset, IterableDataset):
            return dataloader
        # Without a batch size, an item of the data set or of a batch sampler is a whole batch already.
        if dataloader.batch_size is None:
            return dataloader
        rows, indices, wanted = self._order(dataloader)
        chosen: Any = []
        for index in indices:
            row = rows[index]
            if self.keeps(_length(row)):
                chosen.append(row)
            if len(chosen) == wanted:
                break
        return DataLoader(
            chosen,
            batch_size=dataloader.batch_size,
            collate_fn=dataloader.collate_fn,
            drop_last=dataloader.drop_last,
        )

    def keeps(self, length: int | None) -> bool:
        """Whether a sample is used; each one that isn't is counted.

        :param length: its number of real tokens, None if it can't be told yet
        """
        short = length is not None and length < self._minimum
        self._short += short
        return not short

    def report(self, left: int) -> None:
        """Say in one line how many samples were left out.

        :param left: samples that are used, in this process
        :raises UsageError: if none is left though there were some
        """
        if self._short and not left:
            raise UsageError(
                f"all {self._short} calibration samples have fewer than {self._minimum} tokens, the least that can be "
                f"used; pass longer text, or pack it: {_REMEDY}"
            )
        if self._short and distributed.rank() == 0:
            logger.warning(
                f"skipped {self._short} calibration samples of fewer than {self._minimum} tokens, {left} are left; "
                f"{_REMEDY}"
            )

    def _order(self, dataloader: DataLoader) -> tuple[Any, Iterator[int], int | None]:
        """Rows, indices to try in turn, and the number of rows wanted (None: as many as there are indices).

        A sampler's indices count in its own data source, which is this rank's part of the data where llm-compressor
        split it.
        """
        sampler: Any = dataloader.sampler
        everything: Any = dataloader.dataset
        rows = getattr(sampler, "data_source", everything)
        if not isinstance(sampler, RandomSampler):
            return rows, iter(sampler), None
        wanted = len(sampler)
        if sampler.generator is not None:
            return rows, iter(sampler), wanted
        if len(rows) < len(everything):
            # With several processes llm-compressor 0.14 gives the sampler this rank's part of the data, but goes on
            # loading from the whole. All ranks draw the same from the whole here, and each takes its share of that
            # later, so the choice doesn't depend on the number of processes.
            rows, wanted = everything, sum(distributed.gather_objects(wanted))
        generator = torch.Generator().manual_seed(self._seed)
        # More than are wanted, so that others can take the place of short ones.
        return rows, iter(RandomSampler(rows, sampler.replacement, max(wanted, len(rows)), generator)), wanted


def _length(row: Any) -> int | None:
    if not isinstance(row, Mapping) or "input_ids" not in row:
        return None
    mask = row.get("attention_mask")
    return torch.as_tensor(row["input_ids"]).numel() if mask is None else int(torch.as_tensor(mask).sum())
