"""A model that computes in this process, on one device or on several."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from embeddings_mcp.embedders.local.encoder import Encoder
from embeddings_mcp.embedders.local.inputs import Row
from embeddings_mcp.embedders.local.malloc import HeapTrimmer
from embeddings_mcp.embedders.local.out_of_memory import split_on_oom
from embeddings_mcp.vectors import FloatMatrix, SparseVector


class InProcessModel:
    """A model that computes in this process, and splits batches that do not fit into memory.

    On several devices, each holds a complete copy of the weights. Worker threads are assigned to the devices
    round-robin, and each computes on its own device only.

    Args:
        encoders: one encoder per device, at least one; they differ in their device only.

    Attributes:
        alive: always True: the model lives as long as the process.
        info: what the encoders have in common; the token limits of a batch are the minimum over all devices.
    """

    alive = True

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        first = encoders[0]
        self.info = replace(
            first.info,
            tokens_per_batch=min(encoder.info.tokens_per_batch for encoder in encoders),
            min_tokens_per_batch=min(encoder.info.min_tokens_per_batch for encoder in encoders),
        )
        self.tokenize = first.tokenize
        self._encoders = encoders
        self._round_robin = itertools.cycle(encoders)
        self._thread_local = threading.local()
        self._heap_trimmer = HeapTrimmer() if first.device.type == "cpu" else None

    def workers(self, cores: int) -> int:
        """Return the total number of worker threads for all devices; see `Encoder.workers`."""
        share = max(1, cores // len(self._encoders))
        return sum(encoder.workers(share) for encoder in self._encoders)

    def set_thread_cores(self, cores: int) -> None:
        """See `LoadedModel.set_thread_cores`; also assigns the calling thread to the next device."""
        self._thread_local.encoder = encoder = next(self._round_robin)
        encoder.set_thread_cores(cores)

    def forward(self, rows: Sequence[Row], skip: int) -> FloatMatrix:
        """See `LoadedModel.forward`."""
        encoder = self._encoder
        parts = split_on_oom(lambda part: encoder.forward(part, skip), rows)
        self._trim_heap(rows)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def forward_all(self, rows: Sequence[Row], skip: int) -> tuple[FloatMatrix, list[SparseVector], list[FloatMatrix]]:
        """See `LoadedModel.forward_all`."""
        encoder = self._encoder
        dense, sparse, colbert = zip(*split_on_oom(lambda part: encoder.forward_all(part, skip), rows), strict=True)
        self._trim_heap(rows)
        return np.concatenate(dense), [*itertools.chain(*sparse)], [*itertools.chain(*colbert)]

    def close(self) -> None:
        """See `LoadedModel.close`; there is nothing to close."""

    @property
    def _encoder(self) -> Encoder:
        """The encoder of the calling thread."""
        encoder: Encoder = self._thread_local.encoder
        return encoder

    def _trim_heap(self, rows: Sequence[Row]) -> None:
        """Count the tokens of a finished batch towards the next trim of the heap."""
        if self._heap_trimmer is not None:
            self._heap_trimmer.add(sum(map(len, rows)))
