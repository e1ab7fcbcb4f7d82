"""A random batch for the sampler's step, and what must come of it: the plain functions, request by request.

On a machine without a GPU the Triton kernels run in Triton's interpreter. Import this before anything that imports
Triton: it reads the variable where a kernel is defined.
"""

import os

import numpy as np
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from sinkprune_plugin.sampling import torch_backend, triton_backend  # noqa: E402
from sinkprune_plugin.sampling.batch_state import BatchState, DeviceBatch  # noqa: E402
from sinkprune_plugin.sampling.batch_table import Column  # noqa: E402
from sinkprune_plugin.sampling.batched import BatchSampler, StepNeeds  # noqa: E402
from sinkprune_plugin.sampling.select import select_unmask  # noqa: E402
from sinkprune_plugin.sampling.tokens import Needs, propose  # noqa: E402

__all__ = ["DEVICE", "GPU", "MASK", "Case", "device_batch", "prepared", "torch_backend", "triton_backend"]

MASK = 3
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = {"torch": torch_backend, "triton": triton_backend}


def device_batch(case, device=DEVICE):
    """A case's step on a device."""
    return DeviceBatch(*(torch.from_numpy(part).to(device) for part in (case.table, case.row_request, case.filtered)))


def prepared(case, device=DEVICE):
    """A case's slots before its step."""
    state = BatchState(case.canvas.clone().to(device), MASK)
    for line, columns in zip(case.table, case.masked, strict=True):
        state.order[line[Column.SLOT], : len(columns)] = torch.from_numpy(columns).int().to(device)
        if case.needs.stops:
            state.set_stops(int(line[Column.SLOT]), case.stop_tokens[int(line[Column.SLOT])])
    return state


class Case:
    """A random batch: requests of all kinds, some with their prompt only, blocks partly unmasked.

    :param seed: of everything
    :param vocabulary: V
    :param greedy: no temperatures, filters and other remaskings
    """

    def __init__(self, seed, vocabulary=40, requests=6, width=8, *, greedy=False, stops=False, dtype=torch.float32):
        rng = np.random.default_rng(seed)
        slots, longest = requests + 2, 3 * width
        self.vocabulary = vocabulary
        self.canvas = torch.full((slots, longest), MASK)
        table = np.zeros((requests, len(Column)), np.int64)
        floats = table.view(np.float64)
        table[:, Column.SLOT] = rng.permutation(slots)[:requests]
        table[:, Column.WIDTH] = rng.integers(0, width + 1, requests)
        masked = []
        for line in table:
            open_ = rng.permutation(line[Column.WIDTH])[: rng.integers(0, line[Column.WIDTH] + 1)]
            masked.append(np.setdiff1d(np.arange(line[Column.WIDTH]), open_))
            tokens = rng.integers(4, vocabulary, len(open_))
            self.canvas[line[Column.SLOT], torch.from_numpy(open_)] = torch.from_numpy(tokens)
        rows = np.array([len(columns) for columns in masked])
        table[:, Column.ROWS] = rows
        table[:, Column.FIRST_ROW] = rows.cumsum() - rows
        table[:, Column.FIRST_HIDDEN] = np.arange(requests) * longest
        for column, high in ((Column.COUNT, 4), (Column.NOISE_STEP, 50), (Column.START, 90), (Column.SEED, 2**40)):
            table[:, column] = rng.integers(0, high, requests)
        table[:, Column.REJECTED] = rng.integers(0, 90, requests)
        table[:, Column.REJECTED_FINISHED] = rng.integers(0, 90, requests)
        table[:, Column.STATE_BEFORE] = rng.permutation(2 * slots)[:requests]
        for column in (Column.IS_LAST, Column.COMMITS):
            table[:, column] = rng.integers(0, 2, requests)
        floats[:, Column.THRESHOLD] = np.inf
        floats[:, Column.TOP_P] = 1.0
        rule = rng.integers(0, 3, requests)
        floats[rule == 1, Column.THRESHOLD] = rng.choice([0.05, 0.3, 0.9], (rule == 1).sum())
        floats[rule == 2, Column.FACTOR] = rng.choice([0.5, 1.0, 2.5], (rule == 2).sum())
        if not greedy:
            table[:, Column.REMASKING] = rng.integers(0, 4, requests)
            floats[:, Column.TEMPERATURE] = rng.choice([0.0, 0.7, 1.5], requests)
            table[:, Column.TOP_K] = rng.choice([0, 1, 5, vocabulary + 3], requests)
            floats[:, Column.TOP_P] = rng.choice([1.0, 0.3, 0.8], requests)
        if stops:
            table[:, Column.EARLY_STOP] = rng.integers(0, 2, requests)
        self.table, self.floats, self.masked = table, floats, masked
        self.row_request = np.repeat(np.arange(requests), rows)
        filters = (floats[:, Column.TEMPERATURE] > 0) & ((table[:, Column.TOP_K] > 0) | (floats[:, Column.TOP_P] < 1))
        self.filtered = np.flatnonzero(filters[self.row_request])
        hot = (floats[:, Column.TEMPERATURE] > 0).any()
        self.needs = StepNeeds(
            widest=int(table[:, Column.WIDTH].max()),
            proposals=Needs(bool(hot), len(self.filtered) > 0, frozenset(table[:, Column.REMASKING].tolist())),
            filtered=self.filtered,
            stops=stops,
        )
        generator = torch.Generator().manual_seed(seed)
        self.logits = (torch.randn(len(self.row_request), vocabulary, generator=generator) * 3).to(dtype)
        self.stop_tokens = {int(slot): tuple(rng.integers(4, vocabulary, 3).tolist()) for slot in range(slots)}

    def run(self, backend, *, chunk=None):
        """One step; the state after it and what came of it."""
        state = prepared(self, DEVICE)
        sampler = BatchSampler(
            state,
            lambda numbers: self.logits.to(DEVICE)[numbers[:, 0]].clone(),
            self.vocabulary,
            backend=BACKENDS[backend],
            logits_bytes=None if chunk is None else 4 * self.vocabulary * chunk,
        )
        batch = device_batch(self, DEVICE)
        numbers = torch.arange(len(self.row_request), device=DEVICE)[:, None]
        return state, sampler(numbers, batch, self.needs)

    def proposals(self):
        """Token and confidence of each row from the plain function, on the CPU."""
        lines, floats = self.table[self.row_request], self.floats[self.row_request]
        column = np.concatenate(self.masked)

        def of(values):
            return torch.from_numpy(np.ascontiguousarray(values))

        return propose(
            self.logits,
            temperature=of(floats[:, Column.TEMPERATURE]),
            top_k=of(lines[:, Column.TOP_K]),
            top_p=of(floats[:, Column.TOP_P]),
            remasking=of(lines[:, Column.REMASKING]),
            seed=of(lines[:, Column.SEED]),
            step=of(lines[:, Column.NOISE_STEP]),
            position=of(lines[:, Column.START] + column),
            mask_token_id=MASK,
        )

    def expected(self):
        """Canvas, emitted blocks, rejected positions and masked columns after the step, request by request."""
        tokens, confidence = self.proposals()
        canvas, results = self.canvas.clone(), []
        for line, floats, columns in zip(self.table, self.floats, self.masked, strict=True):
            slot, width, first = (int(line[c]) for c in (Column.SLOT, Column.WIDTH, Column.FIRST_ROW))
            if width == 0:
                results.append((None, int(line[Column.REJECTED]), None))
                continue
            own = slice(first, first + len(columns))
            chosen = select_unmask(
                confidence[own][None],
                torch.tensor([line[Column.COUNT]]),
                torch.tensor([floats[Column.THRESHOLD]]),
                torch.tensor([floats[Column.FACTOR]]),
            )[0]
            block = canvas[slot, :width].clone()
            block[torch.from_numpy(columns)[chosen]] = tokens[own][chosen]
            text = block.tolist()
            settled = False
            if line[Column.EARLY_STOP]:
                ends = [i for i, token in enumerate(text) if token in self.stop_tokens[slot]]
                settled = bool(ends) and MASK not in text[: ends[0]]
                if settled:
                    text = [text[ends[0]] if token == MASK else token for token in text]
            finished = MASK not in text
            emits = finished and (settled or not line[Column.COMMITS] or bool(line[Column.IS_LAST]))
            rejected = int(line[Column.REJECTED_FINISHED if emits else Column.REJECTED])
            canvas[slot, :width] = MASK if emits else torch.tensor(text)
            left = None if emits else [i for i, token in enumerate(text) if token == MASK]
            results.append((text if emits else None, rejected, left))
        return canvas, results

    def check(self, backend, **options):
        state, result = self.run(backend, **options)
        canvas, results = self.expected()
        assert torch.equal(state.canvas.cpu(), canvas)
        for number, (text, rejected, left) in enumerate(results):
            slot = self.table[number, Column.SLOT]
            count = int(result.num_sampled[number])
            assert result.num_rejected[number] == rejected
            assert (result.sampled[number, :count].tolist() if count else None) == text
            if left is not None:
                assert state.order[slot, : len(left)].tolist() == left
                assert state.left[slot] == len(left)
                # Finished, but its keys and values are still to come.
                assert bool(state.committing[slot]) == (not left)
        assert not result.num_nans.any()
