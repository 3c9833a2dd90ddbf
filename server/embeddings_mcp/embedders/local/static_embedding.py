"""Token vectors that are looked up, and depend on nothing around them: sentence-transformers' `StaticEmbedding`.

To tokenize a text takes longer than all that follows, on any device: they stay in the CPU's memory. model2vec's
checkpoints are read too, as sentence-transformers reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import embedding_bag

from embeddings_mcp.embedders.local.checkpoint import Checkpoint
from embeddings_mcp.embedders.local.packing import PackedRow, Packing, pack
from embeddings_mcp.embedders.local.weights import read_tensors


class StaticEmbedding:
    """A table of token vectors; in its use like `backbone.Backbone`, but for giving a text one vector.

    Args:
        vectors: float32 ``[vocabulary, d]``.

    Attributes:
        vocabulary: tokens that it has vectors for.
        packed: True: nothing is ever padded.
        device: the CPU.
        first_position: 0; what is looked up has no position.
    """

    packed = True
    first_position = 0

    def __init__(self, vectors: torch.Tensor) -> None:
        self._vectors = vectors
        self.vocabulary = len(vectors)
        self.device = vectors.device

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Packing]:
        """The mean of each text's token vectors, in the place of these: ``[n, d]``, and a row of texts of one token."""
        means = self.forward(pack(rows, self.device))
        return means, Packing((1,) * len(rows), 1, torch.arange(len(rows) + 1, dtype=torch.int32))

    def forward(self, row: PackedRow) -> torch.Tensor:
        """From a packed row to the mean of each text's token vectors, ``[n, d]``."""
        # To write down every token's vector first would take three times as long.
        return embedding_bag(row.ids, self._vectors, row.packing.cumulative[:-1].long(), mode="mean")


def load_static(checkpoint: Checkpoint) -> StaticEmbedding:
    """Load the token vectors of a checkpoint, in float32: nothing is computed with them that fewer bits would speed up.

    Raises:
        CheckpointInvalid: the file is damaged; names it.
    """
    return StaticEmbedding(_table(read_tensors(checkpoint.pipeline.backbone)))


def _table(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A vector for each token.

    Tokens may share one in model2vec's layout (``mapping``), and each may have a weight of its own.
    """
    if "embedding.weight" in tensors:
        return tensors["embedding.weight"].float()
    vectors = tensors["embeddings"].float()
    if "mapping" in tensors:
        vectors = vectors[tensors["mapping"].long()]
    return vectors * tensors["weights"].float()[:, None] if "weights" in tensors else vectors
