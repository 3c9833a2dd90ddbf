"""CUDA graphs: a pass over few tokens as one launch.

A pass through a transformer is some hundred kernels, each launched by Python. For few tokens a GPU has run them long
before the next is launched: on an H100 a query takes a model of a billion parameters 13 ms in this way, and 2 ms where
all launches were recorded once and are replayed. A recording has fixed sizes. A packed row is filled up to them by
texts that nobody asked for, which the others do not see.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch.nn.functional import cosine_similarity

from embeddings_mcp.embedders.local.attention import SHORT
from embeddings_mcp.embedders.local.packing import PackedRow, Packing, fill, lay_out
from embeddings_mcp.embedders.local.placement import numbers_on
from embeddings_mcp.embedders.local.transformer import Transformer, Wrapped

_logger = logging.getLogger(__name__)

SMALLEST = 32
"""Tokens of the smallest recording; each has twice as many as the one before."""

_LONGEST = 512
"""Tokens of the longest text that a recording takes: what attention launches grows with its longest text."""

_LARGE = 2048
"""Tokens from which on there is another recording for short texts, since attention to them is faster."""

_TOLERANCE = 1e-3
"""How far the cosine may be from 1 between what a recording makes and what it is a recording of."""

_BUSY = 2
"""A pass for which the GPU takes more than so many times as long as Python to launch it is not recorded: the GPU is
busy without that, even where Python is held up."""

_SPARE = 1.1
"""How many times as long as a pass without it a recording may take: what it does not launch is free for others."""

_Pool: TypeAlias = Any
"""What tells CUDA's memory pools apart: it has another type in every version of PyTorch."""


class Graphed(Wrapped):
    """A transformer on CUDA with recordings of its smaller passes; in its use like the transformer itself.

    Args:
        transformer: what is recorded.
        recordings: passes through it, the smallest first.
        launching: seconds that Python takes to launch a pass without a recording.
    """

    def __init__(self, transformer: Transformer, recordings: Sequence[Recording], *, launching: float) -> None:
        super().__init__(transformer)
        self._recordings = recordings
        self._launching = launching
        self._lock = threading.Lock()  # the recordings share their memory, and each has its inputs in one place

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Packing]:
        """See `transformer.Transformer`."""
        lengths = [len(row) for row in rows]
        recording = self.recording_for(lengths)
        if recording is None:
            return self._transformer.hidden_states(rows)
        with self._lock, torch.cuda.device(self.device):
            return recording.replay(rows, lengths)

    def recording_for(self, lengths: Sequence[int]) -> Recording | None:
        """The recording that texts of these lengths are best replayed from, if any."""
        recording = next((recording for recording in self._recordings if recording.size.holds(lengths)), None)
        if recording is None:
            return None
        # Without it, a pass takes as long as Python or the GPU, whichever is slower; with it, what fills it up counts.
        usual = max(self._launching, recording.seconds * sum(lengths) / recording.size.tokens)
        return recording if recording.seconds <= _SPARE * usual else None


@torch.inference_mode()
def record(transformer: Transformer, *, most_tokens: int, longest: int) -> Transformer:
    """Record passes through a transformer on CUDA.

    Args:
        transformer: through which texts go packed.
        most_tokens: of the largest recording.
        longest: tokens of the longest text that it takes.

    Returns:
        The transformer with its recordings; or as it is, where it cannot be recorded.
    """
    recordings: list[Recording] = []
    try:
        with torch.cuda.device(transformer.device):
            pool = torch.cuda.graph_pool_handle()
            smallest = Size.of(SMALLEST, longest)
            launching = _seconds(_Pass(transformer, smallest))
            for size in _sizes(most_tokens, longest):
                recording = Recording(_Pass(transformer, size), pool)
                if recording.seconds > _BUSY * launching:
                    break
                recordings.append(recording)
    except Exception as error:  # noqa: BLE001 - it is only faster with them, and what may fail differs with every driver
        _logger.info("no passes through this model are recorded beyond the first %d: %s", len(recordings), error)
    return Graphed(transformer, recordings, launching=launching) if recordings else transformer


def _sizes(most_tokens: int, longest: int) -> Iterator[Size]:
    """The sizes of the recordings, those first that are to be preferred."""
    tokens = SMALLEST
    while tokens <= most_tokens:
        if tokens >= _LARGE and longest > SHORT:
            yield Size.of(tokens, SHORT)
        yield Size.of(tokens, longest)
        tokens *= 2


class Size:
    """How much a recording holds.

    Args:
        tokens: of all texts, those that fill it up included.
        texts: likewise.
        longest: tokens of the longest text.
    """

    def __init__(self, tokens: int, *, texts: int, longest: int) -> None:
        self.tokens = tokens
        self.texts = texts
        self.longest = longest
        self._fillers = -(-tokens // longest)

    @classmethod
    def of(cls, tokens: int, longest: int) -> Size:
        """The usual one for so many tokens.

        Every text that there is room for costs attention some time, whether it is there or not, and the more the
        longer it may be. So there is room for texts of 16 tokens each, but not in large recordings of longer ones.

        Args:
            tokens: of all texts.
            longest: tokens of the longest text that is to be expected.
        """
        longest = min(tokens, longest, _LONGEST)
        usual = 48 if tokens >= _LARGE and longest > SHORT else 16
        return cls(tokens, texts=tokens // usual + 8 + tokens // longest, longest=longest)

    def holds(self, lengths: Sequence[int]) -> bool:
        """Whether there is room for texts of these lengths, whatever fills it up."""
        return (
            len(lengths) + self._fillers <= self.texts and sum(lengths) <= self.tokens and max(lengths) <= self.longest
        )

    def fill(self, lengths: Sequence[int]) -> list[int]:
        """These lengths, and those of the texts that fill it up."""
        filled = [*lengths, *fill(self.tokens - sum(lengths), self.longest)]
        return [*filled, *[0] * (self.texts - len(filled))]


class _Pass:
    """A pass over tokens that are always in the same place, as a recording needs them.

    Args:
        transformer: whose pass it is.
        size: how much goes through it.

    Attributes:
        size: as it was given.
        first_position: that of the transformer.
        inputs: what `packing.lay_out` makes, int64 on the transformer's device; at first of some texts or other.
    """

    def __init__(self, transformer: Transformer, size: Size) -> None:
        self.size = size
        self.first_position = transformer.first_position
        self._transformer = transformer
        rows = [[1] * size.longest] * (size.tokens // size.longest)
        numbers = lay_out(rows, size.fill([len(row) for row in rows]), self.first_position)
        self.inputs = numbers_on(transformer.device, numbers)
        self()  # whatever is made at the first time is neither to be recorded nor to be timed

    def __call__(self) -> torch.Tensor:
        """The token vectors."""
        tokens = self.size.tokens
        packing = Packing((), self.size.longest, self.inputs[2 * tokens :].int())
        return self._transformer.forward(PackedRow(self.inputs[:tokens], self.inputs[tokens : 2 * tokens], packing))


class Recording:
    """A recorded pass.

    Args:
        usual: the pass.
        pool: the memory that all recordings of a transformer share.

    Attributes:
        size: how much it holds.
        seconds: how long the GPU takes for it, however few its tokens.

    Raises:
        RuntimeError: what it makes is not what it is a recording of.
    """

    def __init__(self, usual: _Pass, pool: _Pool) -> None:
        self.size = usual.size
        self._inputs = usual.inputs
        self._first_position = usual.first_position
        expected = usual()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, for other models: what they do must not count as a part of it.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = usual()
        self._graph.replay()
        self.seconds = _seconds(self._graph.replay)
        if not bool(cosine_similarity(self._outputs.float(), expected.float()).min() > 1 - _TOLERANCE):
            raise RuntimeError(f"what a recording of {self.size.tokens} tokens makes is not what the pass makes")

    def replay(self, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[torch.Tensor, Packing]:
        """The token vectors of texts that it holds, and where each lies; no other replay may run beside it."""
        numbers = torch.from_numpy(lay_out(rows, self.size.fill(lengths), self._first_position))
        self._inputs.copy_(numbers.pin_memory(), non_blocking=True)
        self._graph.replay()
        first = 2 * self.size.tokens
        packing = Packing(tuple(lengths), max(lengths), self._inputs[first : first + len(lengths) + 1].int())
        return self._outputs[: sum(lengths)].clone(), packing


def _seconds(work: Callable[[], object]) -> float:
    """How long something takes on the GPU, or Python to launch it, whichever is longer."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began
