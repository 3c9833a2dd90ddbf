"""The encoder: a loaded checkpoint, from texts to vectors. Synchronous: it computes on the calling thread.

texts -> InputTokenizer -> rows of token ids -> Transformer -> token vectors -> pool -> stages -> vectors
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from embeddings_mcp.embedders.local.bert import is_bert, load_bert
from embeddings_mcp.embedders.local.bge_m3 import M3Heads
from embeddings_mcp.embedders.local.bucketing import BucketedTransformer
from embeddings_mcp.embedders.local.checkpoint import Checkpoint, read_checkpoint
from embeddings_mcp.embedders.local.cuda_graphs import capture_graphs
from embeddings_mcp.embedders.local.inputs import InputTokenizer, Row, TokenizedBatch
from embeddings_mcp.embedders.local.latent_attention import LATENT_ATTENTION, LatentAttention
from embeddings_mcp.embedders.local.linear import prepack
from embeddings_mcp.embedders.local.malloc import raise_malloc_thresholds
from embeddings_mcp.embedders.local.packing import Packing
from embeddings_mcp.embedders.local.pipeline import Cut, Dense, LayerNorm, Stage
from embeddings_mcp.embedders.local.placement import Placement, choose_placement
from embeddings_mcp.embedders.local.pooling import pool
from embeddings_mcp.embedders.local.recipes import PoolingMode
from embeddings_mcp.embedders.local.runtime.loaded_model import ModelInfo
from embeddings_mcp.embedders.local.static_embedding import load_static
from embeddings_mcp.embedders.local.transformer import Transformer
from embeddings_mcp.embedders.local.weights import load_weights
from embeddings_mcp.errors import CheckpointInvalid, ModelUnavailable
from embeddings_mcp.models import CardOverride, InputType, ModelCard, Precision, Truncate
from embeddings_mcp.vectors import FloatMatrix, SparseVector

_logger = logging.getLogger(__name__)

_LARGE = 768
"""Number of dimensions, that of BERT-base, from which a model counts as large."""


class Encoder:
    """A loaded model.

    Attributes:
        info: its properties.
    """

    def __init__(
        self,
        *,
        info: ModelInfo,
        pooling: Sequence[PoolingMode],
        inputs: InputTokenizer,
        transformer: Transformer,
        latent_attention: torch.nn.Module | None,
        heads: M3Heads | None,
        stages: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    ) -> None:
        self.info = info
        self._pooling = pooling
        self._inputs = inputs
        self._transformer = transformer
        self._latent_attention = latent_attention
        self._heads = heads
        self._stages = stages
        on_gpu = transformer.device.type == "cuda"
        self._launch_lock: AbstractContextManager[object] = threading.Lock() if on_gpu else nullcontext()

    def tokenize(
        self, texts: Sequence[str], *, input_type: InputType | None, truncate: Truncate
    ) -> Iterator[TokenizedBatch]:
        """Tokenize texts, the first step; see `InputTokenizer.tokenize`."""
        return self._inputs.tokenize(texts, input_type=input_type, truncate=truncate)

    def forward(self, rows: Sequence[Row], skip: int) -> FloatMatrix:
        """Return the vectors of one batch of tokenized texts, float32 ``[n, d]``; see `TokenizedBatch`."""
        vectors: FloatMatrix = self.launch(rows, skip).cpu().numpy()
        return vectors

    @torch.inference_mode()
    def launch(self, rows: Sequence[Row], skip: int) -> torch.Tensor:
        """Return the vectors as a tensor on the model's device, without waiting for a GPU to compute them.

        Launches are serialized: threads that launched concurrently would interleave their kernels, finish at the same
        time, and leave the GPU idle until they launch their next batches.
        """
        with self._launch_lock:
            return self._dense(*self._hidden_states(rows), skip=skip)

    @torch.inference_mode()
    def forward_all(self, rows: Sequence[Row], skip: int) -> tuple[FloatMatrix, list[SparseVector], list[FloatMatrix]]:
        """Return the vectors as `forward` does, and the lexical weights and token vectors of the same texts.

        Raises:
            ModelUnavailable: the model has dense vectors only.
        """
        if self._heads is None:
            raise ModelUnavailable(f"{self.info.card.id} has dense vectors only, no sparse or token vectors")
        hidden, packing = self._hidden_states(rows)
        sparse, colbert = self._heads.sparse(hidden, rows), self._heads.colbert(hidden, packing)
        dense: FloatMatrix = self._dense(hidden, packing, skip=skip).cpu().numpy()
        return dense, sparse, colbert

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return self._transformer.device

    def workers(self, cores: int) -> int:
        """Return the best number of worker threads; each runs a batch at a time, on its share of the cores.

        A small model is fastest with one core per batch: threads that share a batch synchronize after every matrix
        product, and all wait if another process occupies one of their cores. A large model is fastest with all cores on
        one batch. On a GPU, two workers prepare one batch while the other is computed.
        """
        match self.device.type:
            case "cpu":
                return cores if self.info.dimensions < _LARGE else 1
            case "cuda":
                return 2
            case _:
                return 1

    @staticmethod
    def set_thread_cores(cores: int) -> None:
        """Set the number of intra-op threads of the calling thread."""
        torch.set_num_threads(cores)

    def _hidden_states(self, rows: Sequence[Row]) -> tuple[torch.Tensor, Packing]:
        hidden, packing = self._transformer.hidden_states(rows)
        return (hidden if self._latent_attention is None else self._latent_attention(hidden)), packing

    def _dense(self, hidden: torch.Tensor, packing: Packing, *, skip: int) -> torch.Tensor:
        vectors = pool(hidden, packing, self._pooling, skip=skip)
        for stage in self._stages:
            vectors = stage(vectors)
        return vectors


def load_encoder(
    name: str,
    folder: Path,
    *,
    builtin_card: ModelCard | None = None,
    user_card: CardOverride | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    max_tokens: int | None = None,
    cuda_graphs: bool = True,
) -> Encoder:
    """Load a checkpoint.

    Args:
        name: name of the model.
        folder: the checkpoint.
        builtin_card: the built-in card of that name, if any.
        user_card: the user's card, if any.
        device: ``auto`` (cuda, then mps, then cpu), or a torch device such as ``cuda:1``.
        precision: the number format.
        max_tokens: a limit on tokens per text that is lower than the checkpoint's own.
        cuda_graphs: whether to capture graphs of passes over few tokens, on CUDA (see `cuda_graphs`).

    Raises:
        CheckpointInvalid: something in the folder is missing, damaged or not supported.
        ModelUnavailable: the device is not available, has too little memory, or does not support the number format.
    """
    checkpoint = read_checkpoint(folder, builtin_card, name=name)
    card = checkpoint.card(name, builtin_card, user_card)
    if max_tokens is not None:
        card = replace(card, max_tokens=min(max_tokens, checkpoint.max_tokens))
    if card.non_commercial:
        _logger.warning("%s may not be used commercially: its license is %s", card.id, card.license)
    static = checkpoint.pipeline.static
    placement = choose_placement("cpu", "float32") if static else choose_placement(device, precision)
    if placement.slower_than_float32:
        _logger.warning("%s computes in %s, which is slower than float32 on this CPU", card.id, placement.precision)
    if placement.quantized or placement.in_amx:
        raise_malloc_thresholds()
    with _checkpoint_errors(checkpoint, placement.device):
        encoder = _load(checkpoint, card, placement, cuda_graphs=cuda_graphs)
        _smoke_test(encoder)
    return encoder


@contextmanager
def _checkpoint_errors(checkpoint: Checkpoint, device: torch.device) -> Iterator[None]:
    """Convert any error in this block to one about the checkpoint, except those that have another cause.

    Raises:
        CheckpointInvalid: the block raised any other error.
        ModelUnavailable: the block raised this error, or the device ran out of memory.
    """
    advice = (
        "; it may need the code that its config.json names, which is never run" if checkpoint.has_custom_code else ""
    )
    try:
        yield
    except CheckpointInvalid as error:
        raise CheckpointInvalid(f"{error.message}{advice}") from error
    except ModelUnavailable:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelUnavailable(f"{checkpoint.folder} does not fit into the memory of {device}: {error}") from error
    except Exception as error:  # each library that reads a damaged checkpoint fails in its own way
        raise CheckpointInvalid(f"{checkpoint.folder}: the model cannot be run: {error}{advice}") from error


def _load(checkpoint: Checkpoint, card: ModelCard, placement: Placement, *, cuda_graphs: bool) -> Encoder:
    device = placement.device
    transformer = _load_transformer(checkpoint, placement)
    inputs = InputTokenizer(checkpoint, card, vocabulary_size=transformer.vocabulary_size)
    if cuda_graphs and device.type == "cuda" and transformer.packed:
        transformer = capture_graphs(transformer, max_tokens=placement.tokens_per_batch, longest=checkpoint.max_tokens)
    if placement.in_amx and transformer.packed:
        transformer = BucketedTransformer(transformer)
    heads = None
    if "sparse" in card.modes:
        weightless = inputs.token_ids("<s>", "</s>", "<pad>", "<unk>")
        heads = M3Heads(checkpoint.folder, hidden_size=checkpoint.dimensions, weightless=weightless, device=device)
    return Encoder(
        info=ModelInfo(
            card=card,
            dimensions=checkpoint.dimensions,
            vocabulary_size=transformer.vocabulary_size,
            packed=transformer.packed,
            tokens_per_batch=placement.tokens_per_batch,
            min_tokens_per_batch=placement.min_tokens_per_batch,
        ),
        pooling=checkpoint.pipeline.pooling,
        inputs=inputs,
        transformer=transformer,
        latent_attention=_load_latent_attention(checkpoint, placement),
        heads=heads,
        stages=[_load_stage(stage, device) for stage in checkpoint.pipeline.stages],
    )


def _smoke_test(encoder: Encoder) -> None:
    """Embed one letter, so that mismatched parts of a checkpoint fail at load time, not in a request."""
    tokens = next(encoder.tokenize(["a"], input_type=None, truncate="END"))
    if not np.isfinite(encoder.forward(tokens.rows, tokens.skip)).all():
        raise ValueError("its vectors are not numbers: the weights are damaged, or too large for their number format")


def _load_transformer(checkpoint: Checkpoint, placement: Placement) -> Transformer:
    if checkpoint.pipeline.static:
        return load_static(checkpoint)
    if is_bert(checkpoint.config):
        return load_bert(checkpoint, placement)
    from embeddings_mcp.embedders.local.backbone import load_backbone  # transformers takes seconds to import

    return load_backbone(checkpoint, placement)


def _load_latent_attention(checkpoint: Checkpoint, placement: Placement) -> LatentAttention | None:
    """Load the layer between the transformer and pooling that only NV-Embed has."""
    if checkpoint.recipe is None or not checkpoint.recipe.latent_attention:
        return None
    with torch.device("meta"):  # not initialized: it has as many parameters as a small model
        module = LatentAttention(checkpoint.config["latent_attention_config"])
    load_weights(module, checkpoint.pipeline.backbone, prefix=LATENT_ATTENTION)
    module = module.eval().to(placement.device, placement.dtype)
    prepack(module, quantized=placement.quantized)
    return module


def _load_stage(stage: Stage, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Load a stage as a function of vectors. It computes in float32, whatever the transformer's precision."""
    match stage:
        case Dense():
            linear = torch.nn.Linear(stage.in_features, stage.out_features, bias=stage.bias)
            load_weights(linear, stage.folder, prefix="linear.")
            activation = _activation(stage)
            load_weights(activation, stage.folder, prefix="activation_function.")
            return torch.nn.Sequential(linear, activation).eval().to(device)
        case LayerNorm():
            norm = torch.nn.LayerNorm(stage.dimensions)
            load_weights(norm, stage.folder, prefix="norm.")
            return norm.eval().to(device)
        case Cut():
            return lambda vectors: vectors[:, : stage.dimensions]
        case _:
            return lambda vectors: torch.nn.functional.normalize(vectors, dim=1)


def _activation(dense: Dense) -> torch.nn.Module:
    kind = getattr(torch.nn, dense.activation, None)
    try:
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
            return kind()
    except TypeError:  # it requires arguments
        pass
    raise CheckpointInvalid(f"{dense.folder / 'config.json'}: {dense.activation!r} is no activation of torch.nn")
