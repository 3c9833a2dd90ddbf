"""CUDA graphs: replay a captured forward pass over few tokens with a single launch.

A forward pass of a transformer is some hundred kernels, each launched from Python. For few tokens, the GPU finishes a
kernel long before the next one is launched: on an H100, a query takes 13 ms in a model of a billion parameters, and 2
ms if all launches were captured in a graph that is replayed. A graph has fixed sizes. Filler texts pad a packed row to
these sizes; attention within each text keeps them from affecting the others.
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
from embeddings_mcp.embedders.local.packing import PackedRow, Packing, filler_lengths, lay_out
from embeddings_mcp.embedders.local.placement import to_device
from embeddings_mcp.embedders.local.transformer import Transformer, TransformerWrapper

_logger = logging.getLogger(__name__)

MIN_TOKENS = 32
"""Number of tokens of the smallest graph; each further size has twice as many."""

_MAX_TEXT_TOKENS = 512
"""Longest text of a graph, in tokens: the work that attention launches grows with the longest text allowed."""

_LARGE = 2048
"""Number of tokens from which there are additional graphs for short texts, which have faster attention kernels."""

_TOLERANCE = 1e-3
"""Largest deviation from 1 of the cosine between the outputs of a graph and of the pass that it was captured from."""

_MAX_GPU_TO_LAUNCH_RATIO = 2
"""A pass is not captured if its GPU time is more than this multiple of its launch time: it keeps the GPU busy without a
graph, even if Python is delayed."""

_MAX_SLOWDOWN = 1.1
"""A graph may take up to this factor of the time of a pass without a graph, since it leaves the CPU free for others."""

_MemoryPool: TypeAlias = Any
"""Handle of a CUDA memory pool, whose type differs between PyTorch versions."""


class GraphedTransformer(TransformerWrapper):
    """A transformer on CUDA that replays captured graphs for small batches.

    Args:
        transformer: the transformer that was captured.
        graphs: captured passes through it, smallest first.
        launch_seconds: time that Python takes to launch a pass without a graph.
    """

    def __init__(self, transformer: Transformer, graphs: Sequence[CapturedGraph], *, launch_seconds: float) -> None:
        super().__init__(transformer)
        self._graphs = graphs
        self._launch_seconds = launch_seconds
        self._lock = threading.Lock()  # the graphs share a memory pool, and each has static input buffers

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Packing]:
        """See `transformer.Transformer`."""
        lengths = [len(row) for row in rows]
        graph = self.graph_for(lengths)
        if graph is None:
            return self._transformer.hidden_states(rows)
        with self._lock, torch.cuda.device(self.device):
            return graph.replay(rows, lengths)

    def graph_for(self, lengths: Sequence[int]) -> CapturedGraph | None:
        """Return the best graph to replay for texts of these lengths, or None if a pass without one is faster."""
        graph = next((graph for graph in self._graphs if graph.size.fits(lengths)), None)
        if graph is None:
            return None
        # A pass without a graph takes its launch time or the GPU time of its own tokens, whichever is longer; a replay
        # takes the GPU time of all tokens, fillers included.
        eager_seconds = max(self._launch_seconds, graph.seconds * sum(lengths) / graph.size.tokens)
        return graph if graph.seconds <= _MAX_SLOWDOWN * eager_seconds else None


@torch.inference_mode()
def capture_graphs(transformer: Transformer, *, max_tokens: int, longest: int) -> Transformer:
    """Capture graphs of passes through a transformer on CUDA.

    Args:
        transformer: a packed transformer.
        max_tokens: number of tokens of the largest graph.
        longest: number of tokens of the longest text that the transformer accepts.

    Returns:
        The transformer with its graphs, or the transformer itself if none could be captured.
    """
    graphs: list[CapturedGraph] = []
    try:
        with torch.cuda.device(transformer.device):
            pool = torch.cuda.graph_pool_handle()
            smallest = GraphSize.of(MIN_TOKENS, longest)
            launch_seconds = _measure(_StaticPass(transformer, smallest))
            for size in _sizes(max_tokens, longest):
                graph = CapturedGraph(_StaticPass(transformer, size), pool)
                if graph.seconds > _MAX_GPU_TO_LAUNCH_RATIO * launch_seconds:
                    break
                graphs.append(graph)
    except Exception as error:  # noqa: BLE001 - graphs are optional, and what may fail depends on the driver
        _logger.info("Capturing CUDA graphs of this model stopped after %d: %s", len(graphs), error)
    return GraphedTransformer(transformer, graphs, launch_seconds=launch_seconds) if graphs else transformer


def _sizes(max_tokens: int, longest: int) -> Iterator[GraphSize]:
    """Yield the sizes of the graphs, in order of preference."""
    tokens = MIN_TOKENS
    while tokens <= max_tokens:
        if tokens >= _LARGE and longest > SHORT:
            yield GraphSize.of(tokens, SHORT)
        yield GraphSize.of(tokens, longest)
        tokens *= 2


class GraphSize:
    """The fixed capacity of a graph.

    Args:
        tokens: number of tokens of all texts, fillers included.
        texts: number of texts, fillers included.
        longest: number of tokens of the longest text.
    """

    def __init__(self, tokens: int, *, texts: int, longest: int) -> None:
        self.tokens = tokens
        self.texts = texts
        self.longest = longest
        self._max_fillers = -(-tokens // longest)

    @classmethod
    def of(cls, tokens: int, longest: int) -> GraphSize:
        """Return the default capacity for a number of tokens.

        Attention spends time on every text slot, used or not, and more for a larger maximum length. The capacity
        assumes texts of 16 tokens on average, or 48 in large graphs for long texts.

        Args:
            tokens: number of tokens of all texts.
            longest: number of tokens of the longest text to expect.
        """
        longest = min(tokens, longest, _MAX_TEXT_TOKENS)
        tokens_per_text = 48 if tokens >= _LARGE and longest > SHORT else 16
        return cls(tokens, texts=tokens // tokens_per_text + 8 + tokens // longest, longest=longest)

    def fits(self, lengths: Sequence[int]) -> bool:
        """Return whether texts of these lengths fit, together with any fillers they need."""
        return (
            len(lengths) + self._max_fillers <= self.texts
            and sum(lengths) <= self.tokens
            and max(lengths) <= self.longest
        )

    def pad(self, lengths: Sequence[int]) -> list[int]:
        """Return these lengths, followed by those of the fillers, and by 0 for every unused text slot."""
        padded = [*lengths, *filler_lengths(self.tokens - sum(lengths), self.longest)]
        return [*padded, *[0] * (self.texts - len(padded))]


class _StaticPass:
    """A forward pass with static input buffers, as capturing requires.

    Args:
        transformer: the transformer.
        size: the capacity.

    Attributes:
        size: the capacity.
        first_position: that of the transformer.
        inputs: the buffer, int64 on the transformer's device, in the layout of `packing.lay_out`; initially with
            placeholder texts.
    """

    def __init__(self, transformer: Transformer, size: GraphSize) -> None:
        self.size = size
        self.first_position = transformer.first_position
        self._transformer = transformer
        rows = [[1] * size.longest] * (size.tokens // size.longest)
        layout = lay_out(rows, size.pad([len(row) for row in rows]), self.first_position)
        self.inputs = to_device(layout, transformer.device)
        self()  # warm up: one-time initialization must be neither captured nor timed

    def __call__(self) -> torch.Tensor:
        """Return the token vectors for the current inputs."""
        tokens = self.size.tokens
        packing = Packing((), self.size.longest, self.inputs[2 * tokens :].int())
        return self._transformer.forward(PackedRow(self.inputs[:tokens], self.inputs[tokens : 2 * tokens], packing))


class CapturedGraph:
    """A CUDA graph of a forward pass.

    Args:
        eager: the pass to capture.
        pool: the memory pool shared by all graphs of a transformer.

    Attributes:
        size: its capacity.
        seconds: GPU time of a replay, which does not depend on how many tokens are fillers.

    Raises:
        RuntimeError: the outputs of the graph differ from those of the pass.
    """

    def __init__(self, eager: _StaticPass, pool: _MemoryPool) -> None:
        self.size = eager.size
        self._inputs = eager.inputs
        self._first_position = eager.first_position
        expected = eager()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, for other models; their work must not be captured.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = eager()
        self._graph.replay()
        self.seconds = _measure(self._graph.replay)
        if not bool(cosine_similarity(self._outputs.float(), expected.float()).min() > 1 - _TOLERANCE):
            raise RuntimeError(
                f"a graph of {self.size.tokens} tokens gives other vectors than the pass it was captured from"
            )

    def replay(self, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[torch.Tensor, Packing]:
        """Return the token vectors of texts that fit, and their boundaries. The caller must serialize replays."""
        layout = torch.from_numpy(lay_out(rows, self.size.pad(lengths), self._first_position))
        self._inputs.copy_(layout.pin_memory(), non_blocking=True)
        self._graph.replay()
        first = 2 * self.size.tokens
        packing = Packing(tuple(lengths), max(lengths), self._inputs[first : first + len(lengths) + 1].int())
        return self._outputs[: sum(lengths)].clone(), packing


def _measure(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes on the GPU, or that Python takes to launch it, whichever is longer."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start
