"""BERT, RoBERTa and XLM-RoBERTa on packed batches, with fewer and larger kernels than transformers' own classes.

Most embedding models are of this family, including the default model. One matrix product computes queries, keys and
values; GELU and the residual additions are fused into the products. And it works without transformers, which takes
seconds to import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import embedding

from embeddings_mcp.embedders.local.attention import attend
from embeddings_mcp.embedders.local.checkpoint import Checkpoint
from embeddings_mcp.embedders.local.json_file import JsonObject
from embeddings_mcp.embedders.local.linear import GELU_MIN, Int8Linear, Linear, make_linear
from embeddings_mcp.embedders.local.norm import Norm
from embeddings_mcp.embedders.local.packing import PackedRow, Packing, pack
from embeddings_mcp.embedders.local.placement import Placement
from embeddings_mcp.embedders.local.weights import check_tensors, read_tensors, without_heads

MODEL_TYPES = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})

_PREFIXES = ("bert.", "roberta.", "camembert.", "model.")
"""Prefixes of the tensor names in checkpoints that were saved with a head."""

_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

_LAYER = "encoder.layer.{}"
_PROJECTIONS = ("attention.self.query", "attention.self.key", "attention.self.value")
_ATTENTION_OUTPUT, _ATTENTION_NORM = "attention.output.dense", "attention.output.LayerNorm"
_INTERMEDIATE, _OUTPUT, _OUTPUT_NORM = "intermediate.dense", "output.dense", "output.LayerNorm"


@dataclass(frozen=True, slots=True)
class _Layer:
    """One encoder layer."""

    projections: Linear | Int8Linear
    attention_output: Linear | Int8Linear
    attention_norm: Norm
    intermediate: Linear | Int8Linear
    output: Linear | Int8Linear
    output_norm: Norm

    def __call__(self, rows: torch.Tensor, heads: int, packing: Packing) -> torch.Tensor:
        """Apply the layer: ``[tokens, d]`` to ``[tokens, d]``."""
        tokens, width = rows.shape
        query, key, value = self.projections(rows).view(tokens, 3, heads, width // heads).unbind(1)
        attended = attend(query, key, value, packing).view(tokens, width)
        rows = self.attention_norm.linear_add_norm(self.attention_output, attended, rows)
        return self.output_norm.linear_add_norm(self.output, self.intermediate.gelu(rows), rows)


class Bert:
    """A loaded model of the family; see `transformer.Transformer` for the interface.

    Attributes:
        vocabulary_size: number of token ids.
        packed: always True: batches are never padded.
        device: device of the weights.
        first_position: position id of a text's first token.
    """

    packed = True

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        *,
        first_position: int,
        quantized: bool,
    ) -> None:
        epsilon = float(config.get("layer_norm_eps", 1e-12))
        self._heads = int(config["num_attention_heads"])
        self._word_embeddings = tensors["embeddings.word_embeddings.weight"]
        # All tokens are of type 0, so its embedding can be added to the position embeddings once.
        types = tensors["embeddings.token_type_embeddings.weight"]
        self._position_embeddings = tensors["embeddings.position_embeddings.weight"] + types[0]
        self._norm = _norm(tensors, "embeddings.LayerNorm", epsilon)
        self._layers = [
            _layer(tensors, _LAYER.format(number), epsilon, quantized=quantized)
            for number in range(int(config["num_hidden_layers"]))
        ]
        self.vocabulary_size = len(self._word_embeddings)
        self.first_position = first_position
        self.device = self._word_embeddings.device

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Packing]:
        """See `transformer.Transformer`."""
        row = pack(rows, self.device, self.first_position)
        return self.forward(row), row.packing

    def forward(self, row: PackedRow) -> torch.Tensor:
        """Return the token vectors of a packed row, ``[tokens, d]``."""
        hidden = self._norm(
            embedding(row.ids, self._word_embeddings) + embedding(row.positions, self._position_embeddings)
        )
        for layer in self._layers:
            hidden = layer(hidden, self._heads, row.packing)
        return hidden


def is_bert(config: Mapping[str, Any]) -> bool:
    """Return whether `Bert` implements the model of this config; it does not implement all variants of the family."""
    return (
        config.get("model_type") in MODEL_TYPES
        and config.get("hidden_act", "gelu") == "gelu"
        and config.get("position_embedding_type", "absolute") == "absolute"
        and not config.get("is_decoder")
        and not config.get("quantization_config")
    )


def load_bert(checkpoint: Checkpoint, placement: Placement) -> Bert:
    """Load a checkpoint of the family.

    Raises:
        CheckpointInvalid: a file is missing or damaged, or a tensor is missing, unexpected or of another shape than the
            config says.
    """
    folder = checkpoint.pipeline.backbone
    shapes = _shapes(JsonObject(folder / "config.json", checkpoint.config))
    all_tensors = read_tensors(folder)
    tensors = {_current_name(name): all_tensors[name] for name in without_heads(all_tensors, _PREFIXES)}
    check_tensors(
        folder,
        missing=shapes.keys() - tensors.keys(),
        extra=tensors.keys() - shapes.keys(),
        misshapen={name for name in shapes.keys() & tensors.keys() if tensors[name].shape != shapes[name]},
    )
    placed = {name: tensors[name].to(placement.device, placement.dtype) for name in shapes}
    return Bert(checkpoint.config, placed, first_position=checkpoint.first_position, quantized=placement.quantized)


def _current_name(name: str) -> str:
    """Return the current name of a tensor, without a prefix, for a name from any checkpoint."""
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name.removeprefix(prefix)


def _shapes(config: JsonObject) -> dict[str, tuple[int, ...]]:
    """Return the expected shape of every tensor."""
    size = config.size
    width, inner = size("hidden_size"), size("intermediate_size")
    if width % size("num_attention_heads"):
        raise config.invalid("hidden_size", "a multiple of `num_attention_heads`")
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (size("vocab_size"), width),
        "embeddings.position_embeddings.weight": (size("max_position_embeddings"), width),
        "embeddings.token_type_embeddings.weight": (config.get("type_vocab_size", 2), width),
    }
    linear = {_ATTENTION_OUTPUT: (width, width), _INTERMEDIATE: (inner, width), _OUTPUT: (width, inner)}
    linear |= dict.fromkeys(_PROJECTIONS, (width, width))
    norms = ["embeddings.LayerNorm"]
    for number in range(size("num_hidden_layers")):
        layer = _LAYER.format(number)
        norms += [f"{layer}.{_ATTENTION_NORM}", f"{layer}.{_OUTPUT_NORM}"]
        for name, shape in linear.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    return shapes | {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}


def _layer(tensors: Mapping[str, torch.Tensor], name: str, epsilon: float, *, quantized: bool) -> _Layer:
    def linear(*parts: str, lower_bound: float | None = None) -> Linear | Int8Linear:
        weight, bias = (torch.cat([tensors[f"{name}.{part}.{kind}"] for part in parts]) for kind in ("weight", "bias"))
        return make_linear(weight, bias, quantized=quantized, lower_bound=lower_bound)

    return _Layer(
        projections=linear(*_PROJECTIONS),
        attention_output=linear(_ATTENTION_OUTPUT),
        attention_norm=_norm(tensors, f"{name}.{_ATTENTION_NORM}", epsilon),
        intermediate=linear(_INTERMEDIATE),
        output=linear(_OUTPUT, lower_bound=GELU_MIN),
        output_norm=_norm(tensors, f"{name}.{_OUTPUT_NORM}", epsilon),
    )


def _norm(tensors: Mapping[str, torch.Tensor], name: str, epsilon: float) -> Norm:
    return Norm(tensors[f"{name}.weight"], tensors[f"{name}.bias"], epsilon)
