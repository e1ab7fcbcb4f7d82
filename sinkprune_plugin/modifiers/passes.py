"""The engine that runs calibration passes, block by block.

A pass of a diffusion LM is one batch of windows, noised or clean. There are samples × timesteps of them, far more than
an autoregressive calibration has, so the order matters: all passes go through one decoder block before the next block
is touched. A block of an offloaded model is then onloaded once per sweep, however many passes there are.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tqdm
from compressed_tensors.offload import disable_offloading, get_execution_device
from compressed_tensors.offload.utils import send_tensors

from sinkprune_plugin.devices import input_device
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers.hidden_states import HiddenStates, Place
from sinkprune_plugin.modifiers.replaced_forward import forward_replaced

__all__ = ["AllSeenError", "BlockCall", "CalibrationPass", "OnloadedBlock", "PassEngine"]


@dataclass(frozen=True)
class CalibrationPass:
    """What the model is called with once, and how its tokens count in the statistics.

    :param inputs: keyword arguments of the model's forward, on CPU; ``input_ids`` (B, T) int64 among them
    :param row_weights: (B, T) float32 token weights w in [0, 1], 0 on padding; any device
    :param square_scale: factor on the pass's sums of squares Σ (w x)²: the weight of its timestep
    :param source: where it comes from, for messages: "calibration batch 3"
    :param valid: (B, T) bool, False on padding; None: there is none
    :param context: clean tokens at the beginning, which only serve the noisy ones as context; the latter follow in the
        order of the window
    """

    inputs: Mapping[str, torch.Tensor | None]
    row_weights: torch.Tensor
    square_scale: float = 1.0
    source: str = "a calibration pass"
    valid: torch.Tensor | None = None
    context: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Windows and tokens of the pass, (B, T)."""
        batch_size, tokens = self.row_weights.shape
        return batch_size, tokens


class AllSeenError(Exception):
    """Raised by a hook in a block to end the pass's call there: what the hook was for has been seen."""


@dataclass(frozen=True)
class BlockCall:
    """What a decoder block is called with in one pass.

    :param hidden: (B, T, d) hidden states
    :param args: further positional arguments
    :param kwargs: keyword arguments: attention mask, rotary tables, …
    """

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# Entered around each pass's call, with the number of the pass.
Watch = Callable[[int, CalibrationPass], contextlib.AbstractContextManager[Any]]


class OnloadedBlock:
    """A decoder block while its weights are where it runs; what the visitor of a sweep gets.

    :param engine: the engine
    :param index: index of the block
    """

    def __init__(self, engine: "PassEngine", index: int) -> None:
        self.index = index
        self.advanced = False
        self._dense_advanced = False
        self._engine = engine

    def run(
        self,
        watch: Watch | None = None,
        *,
        dense: Watch | None = None,
        advance: bool = False,
        only_first: bool = False,
    ) -> None:
        """Run all passes through the block.

        :param watch: context that is entered around each pass's call of the block; a hook in it may end a call with
            :class:`AllSeenError` unless the outputs are needed
        :param dense: in a sweep of two streams, context around the same pass's call with the dense model's hidden
            states, which comes first; the block must have its dense weights inside it
        :param advance: make the outputs the inputs of the next block; once for a block, after which it can't run again
        :param only_first: run the first pass only, to learn what is called
        :raises UsageError: if the block changes the shape of the hidden states
        """
        if self.advanced:
            raise RuntimeError(f"decoder block {self.index} has passed its outputs on already")
        if advance and (dense is None) == (self._engine._two_streams and not self._dense_advanced):
            raise RuntimeError("a sweep of two streams advances both")
        self._engine._run_block(self.index, watch, dense, advance=advance, only_first=only_first)
        self.advanced = advance

    def advance_dense(self, compute: Callable[[BlockCall], Any]) -> None:
        """In a sweep of two streams, pass the dense model's hidden states on before the pruned model's.

        :param compute: the dense model's block
        :raises UsageError: if it changes the shape of the hidden states
        """
        self._engine._advance_dense(self.index, compute)
        self._dense_advanced = True

    def call(self, number: int) -> BlockCall:
        """What the block is called with in one of the passes, on the block's device.

        :param number: number of the pass
        :return: the call; its hidden states are a copy
        """
        return self._engine._call_of(self.index, number)

    def dense_output(self, number: int) -> torch.Tensor:
        """What the dense model's block gives in one of the passes; after :meth:`advance_dense`.

        :param number: number of the pass
        :return: (B, T, d) on the block's device
        """
        if not self._dense_advanced:
            raise RuntimeError(f"the dense hidden states of decoder block {self.index} have not been passed on")
        return self._engine._dense.get(number, self._engine._device_of(self.index))

    def progress(self) -> None:
        """Count one run of the block on a pass that the visitor did itself."""
        self._engine._bar.update()


class PassEngine:
    """Runs passes through the decoder blocks, each block with all passes before the next one.

    :param model: the model; may be offloaded with compressed-tensors' caches
    :param blocks: its decoder blocks, each mapping hidden states to hidden states (or a tuple that begins with them)
    :param hidden_states: where they are kept between blocks, ``memory`` or ``disk``
    :param progress: show a bar for each sweep
    :raises UsageError: if the model masks attention in some blocks otherwise than in others
    """

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: torch.nn.ModuleList,
        *,
        hidden_states: Place = "memory",
        progress: bool = True,
    ) -> None:
        _require_like_blocks(model)
        self._model = model
        self._blocks = blocks
        self._hidden = HiddenStates(hidden_states)
        self._dense = HiddenStates(hidden_states)
        self._two_streams = False
        self._progress = progress
        self._passes: Sequence[CalibrationPass] = ()
        self._calls: list[_OtherArguments] = []
        # Turns hidden states into the last block's output: some blocks return more than these.
        self._as_output: Callable[[torch.Tensor], Any] = _identity
        self._bar = tqdm.tqdm(disable=True)

    @property
    def model(self) -> torch.nn.Module:
        """The model."""
        return self._model

    def sweep(
        self,
        passes: Sequence[CalibrationPass],
        visit: Callable[[OnloadedBlock], None],
        *,
        title: str,
        block_runs: int,
        two_streams: bool = False,
    ) -> None:
        """Run all passes through all decoder blocks, starting at the embedding.

        :param passes: the passes
        :param visit: does the work of a block: it may run the passes (several times), change the block's weights, and
            advances the passes to the next block
        :param title: name of the progress bar
        :param block_runs: how many times a block will be run with a pass at most, for the progress bar's estimate;
            corrected as soon as a block has taken fewer
        :param two_streams: carry the dense model's hidden states along, next to those of the model as pruned so far
        :raises UsageError: if the model doesn't call its first block, a block changes the shape of the hidden states,
            or these don't fit where they are to be kept
        """
        self._passes = passes
        self._two_streams = two_streams
        # The mean rate over the whole sweep: blocks are alike, the passes and the solver within a block are not.
        bar = tqdm.tqdm(desc=title, total=block_runs, unit="pass", smoothing=0, disable=not self._progress)
        with bar as self._bar:
            with disable_offloading():
                self._embed()
            for index in range(len(self._blocks)):
                # Weights that are fetched in here stay until the end of it: once in, however many passes there are.
                before = bar.n
                with disable_offloading():
                    block = OnloadedBlock(self, index)
                    visit(block)
                    # Blocks are alike.
                    total = bar.n + (bar.n - before) * (len(self._blocks) - index - 1)
                    bar.total = total if bar.total is None else min(bar.total, total)
                    if not block.advanced and index + 1 < len(self._blocks):
                        raise RuntimeError(f"decoder block {index} has not passed its outputs on")

    def run_head(self, watch: Watch, *, title: str, count: int | None = None) -> None:
        """Run what follows the last block, on the hidden states of a sweep that advanced beyond it.

        The blocks are skipped, so their weights aren't onloaded.

        :param watch: context that is entered around each pass
        :param title: name of the progress bar
        :param count: run the first so many passes; None runs all
        """
        device = input_device(self._model)
        passes = self._passes[:count]
        bar = tqdm.tqdm(desc=title, total=len(passes), unit="pass", disable=not self._progress)
        with bar, disable_offloading():
            for number, (each, hidden) in enumerate(zip(passes, self._hidden.read(device), strict=False)):
                output = self._as_output(hidden)
                skipped = [(block, lambda *_args, _output=output, **_kwargs: _output) for block in self._blocks]
                with forward_replaced(skipped), watch(number, each):
                    self._model(**_moved(each.inputs, device))
                bar.update()

    def _embed(self) -> None:
        """Record what each pass calls the first block with."""
        self._calls = []
        device = input_device(self._model)
        pinned = torch.device(get_execution_device(self._blocks[0])).type == "cuda"
        for index, each in enumerate(self._passes):
            args, kwargs = self._first_call(_moved(each.inputs, device))
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                shapes = [(*each.shape, hidden.shape[-1]) for each in self._passes]
                for states in self._streams():
                    states.allocate(shapes, hidden.dtype, pinned=pinned)
            for states in self._streams():
                states.write(index, hidden.detach())
            # Masks and rotary tables are the same for the timesteps of a batch, and often for all passes: keep one.
            previous = self._calls[-1] if self._calls else _OtherArguments((), {})
            self._calls.append(_OtherArguments(_shared(args[1:], previous.args), _shared(kwargs, previous.kwargs)))
        self._settle()

    def _first_call(self, inputs: dict[str, torch.Tensor | None]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def hook(_block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, dict(kwargs)))
            raise _FirstBlockReachedError

        handle = self._blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self._model(**inputs)
        except _FirstBlockReachedError:
            return seen[0]
        finally:
            handle.remove()
        raise UsageError(
            "a forward pass never called the first decoder block, so calibration can't go block by block; use a "
            "native class of this package or a decoder-only model of transformers"
        )

    def _run_block(
        self, index: int, watch: Watch | None, dense: Watch | None, *, advance: bool, only_first: bool
    ) -> None:
        block = self._blocks[index]
        device = self._device_of(index)
        # From the dense model's stream to that of the pruned one, which may have to be compared with it.
        streams = [(self._dense, dense), (self._hidden, watch)] if dense is not None else [(self._hidden, watch)]
        reads = [(states, around, states.read(device)) for states, around in streams]
        count = 1 if only_first else len(self._passes)
        for number, (each, other) in enumerate(zip(self._passes[:count], self._calls[:count], strict=True)):
            for states, around, incoming in reads:
                hidden = next(incoming)
                try:
                    with contextlib.nullcontext() if around is None else around(number, each):
                        output = block(hidden, *other.args, **other.kwargs)
                except AllSeenError:
                    if advance:
                        raise
                if advance:
                    states.write(number, self._hidden_of(index, hidden, output))
                if not only_first:
                    self._bar.update()
        self._settle()

    def _advance_dense(self, index: int, compute: Callable[[BlockCall], Any]) -> None:
        for number, hidden in enumerate(self._dense.read(self._device_of(index))):
            output = compute(self._call_with(hidden, number))
            self._dense.write(number, self._hidden_of(index, hidden, output))
            self._bar.update()
        self._settle()

    def _call_of(self, index: int, number: int) -> BlockCall:
        return self._call_with(self._hidden.get(number, self._device_of(index)), number)

    def _call_with(self, hidden: torch.Tensor, number: int) -> BlockCall:
        # Those of the first block, which may be on another device.
        other = self._calls[number]
        return BlockCall(hidden, send_tensors(other.args, hidden.device), send_tensors(other.kwargs, hidden.device))

    def _device_of(self, index: int) -> torch.device:
        return torch.device(get_execution_device(self._blocks[index]))

    def _streams(self) -> list[HiddenStates]:
        return [self._dense, self._hidden] if self._two_streams else [self._hidden]

    def _settle(self) -> None:
        for states in self._streams():
            states.settle()

    def _hidden_of(self, index: int, hidden: torch.Tensor, output: Any) -> torch.Tensor:
        self._as_output = _identity
        if isinstance(output, tuple):
            rest = output[1:]
            output = output[0]
            self._as_output = lambda last: (last, *rest)
        if output.shape != hidden.shape:
            raise UsageError(
                f"decoder block {index} maps hidden states of shape {tuple(hidden.shape)} to {tuple(output.shape)}; "
                "block-by-block calibration needs blocks that keep the shape"
            )
        return output


@dataclass(frozen=True)
class _OtherArguments:
    """Arguments of a block besides the hidden states: attention mask, rotary tables, …"""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _FirstBlockReachedError(Exception):
    """Ends a forward pass whose only purpose was the first block's input."""


def _require_like_blocks(model: torch.nn.Module) -> None:
    # All blocks are called with what the first one gets: mask, rotary tables.
    kinds = getattr(getattr(model, "config", None), "layer_types", None)
    if kinds is not None and len(set(kinds)) > 1:
        raise UsageError(
            f"{type(model).__name__} has decoder blocks of several kinds ({', '.join(sorted(set(kinds)))}), each with "
            "a mask of its own, which block-by-block calibration can't give them; take a model whose blocks are alike"
        )


def _shared(value: Any, previous: Any) -> Any:
    """The same value, reusing the earlier one's tensors where these are equal."""
    if isinstance(value, dict) and isinstance(previous, dict):
        return {key: _shared(each, previous.get(key)) for key, each in value.items()}
    if isinstance(value, tuple) and isinstance(previous, tuple) and len(value) == len(previous):
        return tuple(_shared(a, b) for a, b in zip(value, previous, strict=True))
    if (
        isinstance(value, torch.Tensor)
        and isinstance(previous, torch.Tensor)
        and value.shape == previous.shape
        and value.dtype == previous.dtype
        and torch.equal(value, previous)
    ):
        return previous
    return value


def _identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _moved(inputs: Mapping[str, torch.Tensor | None], device: torch.device) -> dict[str, torch.Tensor | None]:
    return {name: None if value is None else value.to(device) for name, value in inputs.items()}
