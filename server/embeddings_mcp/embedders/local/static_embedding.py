"""Static embeddings: token vectors from a lookup table, independent of context.

These are the models of sentence-transformers' `StaticEmbedding`. They stay on the CPU: tokenization takes longer than
everything after it on any device. Checkpoints of model2vec are supported too, as in sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import embedding_bag

from embeddings_mcp.embedders.local.checkpoint import Checkpoint
from embeddings_mcp.embedders.local.packing import PackedRow, Packing, pack
from embeddings_mcp.embedders.local.weights import read_tensors


class StaticEmbedding:
    """A lookup table of token vectors, with the interface of a `Transformer`, but one vector per text as its output.

    Args:
        vectors: float32 ``[vocabulary, d]``.

    Attributes:
        vocabulary_size: number of token ids.
        packed: always True: batches are never padded.
        device: the CPU.
        first_position: 0; positions are not used.
    """

    packed = True
    first_position = 0

    def __init__(self, vectors: torch.Tensor) -> None:
        self._vectors = vectors
        self.vocabulary_size = len(vectors)
        self.device = vectors.device

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Packing]:
        """Return the mean of each text's token vectors, ``[n, d]``, as a packed row of texts of one token each."""
        means = self.forward(pack(rows, self.device))
        return means, Packing((1,) * len(rows), 1, torch.arange(len(rows) + 1, dtype=torch.int32))

    def forward(self, row: PackedRow) -> torch.Tensor:
        """Return the mean of each text's token vectors in a packed row, ``[n, d]``."""
        # Materializing all token vectors first would take three times as long.
        return embedding_bag(row.ids, self._vectors, row.packing.cumulative[:-1].long(), mode="mean")


def load_static(checkpoint: Checkpoint) -> StaticEmbedding:
    """Load the token vectors of a checkpoint, in float32: a smaller number format would not make lookups faster.

    Raises:
        CheckpointInvalid: the file is damaged; the message names it.
    """
    return StaticEmbedding(_table(read_tensors(checkpoint.pipeline.backbone)))


def _table(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the table of token vectors.

    In model2vec's format, several tokens may share a vector (``mapping``), and each token may have a weight.
    """
    if "embedding.weight" in tensors:
        return tensors["embedding.weight"].float()
    vectors = tensors["embeddings"].float()
    if "mapping" in tensors:
        vectors = vectors[tensors["mapping"].long()]
    return vectors * tensors["weights"].float()[:, None] if "weights" in tensors else vectors
