"""The encoder: a loaded checkpoint, from texts to vectors. Synchronous: it computes on the thread that calls it.

texts -> Tokenizer -> rows of token ids -> Backbone -> token vectors -> pool -> stages -> vectors
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
from embeddings_mcp.embedders.local.bucketing import Bucketed
from embeddings_mcp.embedders.local.checkpoint import Checkpoint, read_checkpoint
from embeddings_mcp.embedders.local.cuda_graphs import record
from embeddings_mcp.embedders.local.inputs import InputTokenizer, Row, Tokens
from embeddings_mcp.embedders.local.latent_attention import LATENT_ATTENTION, LatentAttention
from embeddings_mcp.embedders.local.linear import prepack
from embeddings_mcp.embedders.local.malloc import raise_malloc_thresholds
from embeddings_mcp.embedders.local.packing import Packing
from embeddings_mcp.embedders.local.pipeline import Cut, Dense, LayerNorm, Stage
from embeddings_mcp.embedders.local.placement import Placement, choose_placement
from embeddings_mcp.embedders.local.pooling import pool
from embeddings_mcp.embedders.local.recipes import PoolingMode
from embeddings_mcp.embedders.local.running.loaded import Facts
from embeddings_mcp.embedders.local.static_embedding import load_static
from embeddings_mcp.embedders.local.transformer import Transformer
from embeddings_mcp.embedders.local.weights import load_weights
from embeddings_mcp.errors import CheckpointInvalid, ModelUnavailable
from embeddings_mcp.models import InputType, ModelCard, OwnCard, Precision, Truncate
from embeddings_mcp.vectors import FloatMatrix, SparseVector

_logger = logging.getLogger(__name__)

_LARGE = 768
"""Length of the vectors from which on a model counts as large, as that of BERT-base."""


class Encoder:
    """A loaded model.

    Attributes:
        facts: what is known of it.
    """

    def __init__(
        self,
        *,
        facts: Facts,
        pooling: Sequence[PoolingMode],
        inputs: InputTokenizer,
        backbone: Transformer,
        latent_attention: torch.nn.Module | None,
        heads: M3Heads | None,
        stages: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    ) -> None:
        self.facts = facts
        self._pooling = pooling
        self._inputs = inputs
        self._backbone = backbone
        self._latent_attention = latent_attention
        self._heads = heads
        self._stages = stages
        on_a_gpu = backbone.device.type == "cuda"
        self._launching: AbstractContextManager[object] = threading.Lock() if on_a_gpu else nullcontext()

    def tokenize(self, texts: Sequence[str], *, input_type: InputType | None, truncate: Truncate) -> Iterator[Tokens]:
        """The first step: see `InputTokenizer.tokenize`."""
        return self._inputs.tokenize(texts, input_type=input_type, truncate=truncate)

    def forward(self, rows: Sequence[Row], skip: int) -> FloatMatrix:
        """The vectors, float32 ``[n, d]``, of one batch of tokenized texts; see `Tokens`."""
        result: FloatMatrix = self.launch(rows, skip).cpu().numpy()
        return result

    @torch.inference_mode()
    def launch(self, rows: Sequence[Row], skip: int) -> torch.Tensor:
        """The same, on the model's device; a GPU may still be computing it.

        One batch is launched after the other: threads that did so at the same time would take turns at every kernel, be
        done at the same time, and have the GPU wait for both.
        """
        with self._launching:
            return self._dense(*self._hidden_states(rows), skip=skip)

    @torch.inference_mode()
    def forward_all(self, rows: Sequence[Row], skip: int) -> tuple[FloatMatrix, list[SparseVector], list[FloatMatrix]]:
        """As `forward`, and the lexical weights and token vectors of the same texts.

        Raises:
            ModelUnavailable: the model has only dense vectors.
        """
        if self._heads is None:
            raise ModelUnavailable(f"{self.facts.card.id} makes one dense vector of a text, and nothing else")
        hidden, packing = self._hidden_states(rows)
        sparse, colbert = self._heads.sparse(hidden, rows), self._heads.colbert(hidden, packing)
        dense: FloatMatrix = self._dense(hidden, packing, skip=skip).cpu().numpy()
        return dense, sparse, colbert

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._backbone.device

    def workers(self, cores: int) -> int:
        """On how many threads batches are best run, of which each computes on its share of the cores.

        A small model is fastest where each batch has a core of its own: threads that share a batch wait for each other
        after every product, for long when another process takes one of their cores. A large one wants all of them. On a
        GPU one batch is made ready while another runs.
        """
        match self.device.type:
            case "cpu":
                return cores if self.facts.dimensions < _LARGE else 1
            case "cuda":
                return 2
            case _:
                return 1

    @staticmethod
    def compute_on(cores: int) -> None:
        """Let what the calling thread computes from now on use so many cores."""
        torch.set_num_threads(cores)

    def _hidden_states(self, rows: Sequence[Row]) -> tuple[torch.Tensor, Packing]:
        hidden, packing = self._backbone.hidden_states(rows)
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
    known: ModelCard | None = None,
    own: OwnCard | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    max_tokens: int | None = None,
    cuda_graphs: bool = True,
) -> Encoder:
    """Load a checkpoint.

    Args:
        name: what the model is called.
        folder: the checkpoint.
        known: the built-in card of that name, where there is one.
        own: the user's, where there is one.
        device: ``auto`` (cuda, then mps, then cpu), or a torch device such as ``cuda:1``.
        precision: number format of the weights.
        max_tokens: a lower limit than the checkpoint's own.
        cuda_graphs: whether passes over few tokens are recorded, on CUDA (see `graphs`).

    Raises:
        CheckpointInvalid: something in the folder is missing, damaged or not supported.
        ModelUnavailable: this machine has no such device.
    """
    checkpoint = read_checkpoint(folder, known)
    card = checkpoint.card(name, known, own)
    if max_tokens is not None:
        card = replace(card, max_tokens=min(max_tokens, checkpoint.max_tokens))
    if card.non_commercial:
        _logger.warning("%s may not be used commercially: its licence is %s", card.id, card.licence)
    static = checkpoint.pipeline.static
    placement = choose_placement("cpu", "float32") if static else choose_placement(device, precision)
    if placement.slower_than_float32:
        _logger.warning("%s computes in %s, which takes this CPU longer than float32", card.id, placement.precision)
    if placement.quantized or placement.in_amx:
        raise_malloc_thresholds()
    with _checkpoint_errors(checkpoint, placement.device):
        encoder = _load(checkpoint, card, placement, cuda_graphs=cuda_graphs)
        _try(encoder)
    return encoder


@contextmanager
def _checkpoint_errors(checkpoint: Checkpoint, device: torch.device) -> Iterator[None]:
    """Whatever fails in here is the checkpoint's fault, unless it says otherwise.

    Raises:
        CheckpointInvalid: it failed.
        ModelUnavailable: the device has not enough memory.
    """
    advice = "; it may need the code that its config.json names, which is never run" if checkpoint.has_own_code else ""
    try:
        yield
    except CheckpointInvalid as error:
        raise CheckpointInvalid(f"{error.message}{advice}") from error
    except ModelUnavailable:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelUnavailable(f"{checkpoint.folder} does not fit into the memory of {device}: {error}") from error
    except Exception as error:  # what is wrong in a checkpoint fails in as many ways as there are readers of it
        raise CheckpointInvalid(f"{checkpoint.folder}: the model cannot be run: {error}{advice}") from error


def _load(checkpoint: Checkpoint, card: ModelCard, placement: Placement, *, cuda_graphs: bool) -> Encoder:
    recipe, backbone, device = checkpoint.recipe, checkpoint.pipeline.backbone, placement.device
    transformer = _load_backbone(checkpoint, placement)
    inputs = InputTokenizer(checkpoint, card, vocabulary=transformer.vocabulary)
    if cuda_graphs and device.type == "cuda" and transformer.packed:
        transformer = record(transformer, most_tokens=placement.tokens_per_batch, longest=checkpoint.max_tokens)
    if placement.in_amx and transformer.packed:
        transformer = Bucketed(transformer)
    latent_attention = None
    if recipe and recipe.latent_attention:
        with torch.device("meta"):  # it has as many parameters as some whole models
            latent_attention = LatentAttention(checkpoint.config["latent_attention_config"])
        load_weights(latent_attention, backbone, prefix=LATENT_ATTENTION)
        latent_attention = latent_attention.eval().to(device, placement.dtype)
        prepack(latent_attention, quantized=placement.quantized)
    heads = None
    if "sparse" in card.modes:
        weightless = inputs.ids_of("<s>", "</s>", "<pad>", "<unk>")
        heads = M3Heads(checkpoint.folder, hidden_size=checkpoint.dimensions, weightless=weightless, device=device)
    return Encoder(
        facts=Facts(
            card=card,
            dimensions=checkpoint.dimensions,
            vocabulary=transformer.vocabulary,
            packed=transformer.packed,
            tokens_per_batch=placement.tokens_per_batch,
            least_tokens_per_batch=placement.least_tokens_per_batch,
        ),
        pooling=checkpoint.pipeline.pooling,
        inputs=inputs,
        backbone=transformer,
        latent_attention=latent_attention,
        heads=heads,
        stages=[_load_stage(stage, device) for stage in checkpoint.pipeline.stages],
    )


def _try(encoder: Encoder) -> None:
    """Embed one letter, so that parts that do not fit together show before anybody waits for a vector."""
    tokens = next(encoder.tokenize(["a"], input_type=None, truncate="END"))
    if not np.isfinite(encoder.forward(tokens.rows, tokens.skip)).all():
        raise ValueError("its vectors are not numbers: the weights are damaged, or too large for their number format")


def _load_backbone(checkpoint: Checkpoint, placement: Placement) -> Transformer:
    if checkpoint.pipeline.static:
        return load_static(checkpoint)
    if is_bert(checkpoint.config):
        return load_bert(checkpoint, placement)
    from embeddings_mcp.embedders.local.backbone import load_backbone  # transformers takes seconds to import

    return load_backbone(checkpoint, placement)


def _load_stage(stage: Stage, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a stage does, in float32 whatever the transformer's precision is."""
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
    except TypeError:  # it does not go without arguments
        pass
    raise CheckpointInvalid(f"{dense.folder / 'config.json'}: {dense.activation!r} is no activation of torch.nn")
