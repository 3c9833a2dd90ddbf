"""Read the description of a checkpoint folder, without torch: the model, its inputs, and how vectors are made.

Two layouts are supported: that of sentence-transformers (``modules.json`` and a folder per module), and a plain
transformers model. Families with a layout of their own are described in `recipes`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embeddings_mcp.embedders.local.json_file import JsonObject, read_object
from embeddings_mcp.embedders.local.pipeline import CHAT_TEMPLATE, Cut, Dense, Pipeline, plain_pipeline, read_pipeline
from embeddings_mcp.embedders.local.recipes import RECIPES, UNPOOLED_PROMPTS, Recipe
from embeddings_mcp.embedders.local.sentence_transformers_config import (
    read_model_config,
    read_prompts,
    read_sentence_config,
)
from embeddings_mcp.embedders.local.sequence_length import first_position, max_tokens, static_max_tokens
from embeddings_mcp.errors import CheckpointInvalid, MissingDependency
from embeddings_mcp.models import CardOverride, Mode, ModelCard, input_type_use

_logger = logging.getLogger(__name__)

M3_FILES = ("sparse_linear.pt", "colbert_linear.pt")
"""The linear layers for BGE-M3's sparse and multi-vector outputs."""

FILE_PATTERNS = ("*.json", "*.txt", "*.model", "*.codes", "*.safetensors", CHAT_TEMPLATE, *M3_FILES)
"""The files that are read from a checkpoint, apart from pickled weights: configs, tokenizers, weights. Training may
leave other, larger files in the folder."""

PICKLE_PATTERN = "pytorch_model*.bin"
"""Weights in the format that preceded safetensors; read only if there are no safetensors files."""

_PART_CONFIGS = ("text_config", "encoder", "vision_config")
"""Fields that hold the sizes of a model of several parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The description of a checkpoint folder.

    Attributes:
        folder: the checkpoint.
        config: the transformer's ``config.json``; for static embeddings, the equivalent fields.
        recipe: how its family differs from a plain transformers model; None for most.
        pipeline: the steps from a text to its vector.
        max_tokens: length of the longest text, special tokens and prompt included.
        lowercase: whether texts are lowercased before tokenization.
        query_prompt: text before a query.
        passage_prompt: text before a passage.
        default_prompt: text before an input without an input type; None if the checkpoint names none.
    """

    folder: Path
    config: dict[str, Any]
    recipe: Recipe | None
    pipeline: Pipeline
    max_tokens: int
    lowercase: bool = False
    query_prompt: str = ""
    passage_prompt: str = ""
    default_prompt: str | None = None

    @property
    def backbone_config(self) -> dict[str, Any]:
        """The config of the transformers class from which the model is built."""
        return self.recipe.backbone(self.config) if self.recipe else self.config

    @property
    def has_custom_code(self) -> bool:
        """Whether the checkpoint names model code of its own, which is not run: transformers' class is used instead."""
        return self.recipe is None and _names_custom_code(self._config_object(self.config))

    @property
    def first_position(self) -> int:
        """Position id of a text's first token."""
        return first_position(self._config_object(self.config))

    @property
    def dimensions(self) -> int:
        """Length of the vectors."""
        length = _hidden_size(self._config_object(self.backbone_config)) * len(self.pipeline.pooling)
        for stage in self.pipeline.stages:
            match stage:
                case Dense():
                    length = stage.out_features
                case Cut():
                    length = min(length, stage.dimensions)
        return length

    @property
    def _modes(self) -> tuple[Mode, ...]:
        has_m3_layers = all((self.folder / name).is_file() for name in M3_FILES)
        return ("dense", "sparse", "colbert", "hybrid") if has_m3_layers else ("dense",)

    def card(
        self, name: str, builtin_card: ModelCard | None = None, user_card: CardOverride | None = None
    ) -> ModelCard:
        """Return the card of this checkpoint.

        Modes and dimensions are taken from the files, and so is the limit on tokens, which a card can only lower.
        Everything else is taken from the user's card, then from the built-in one; prompts that neither has, from the
        files.

        Args:
            name: the user's name for the model.
            builtin_card: the built-in card of that name, if there is one.
            user_card: the user's card, if there is one.
        """
        card = builtin_card or ModelCard(
            id=name, input_type=input_type_use(self.query_prompt, self.passage_prompt, self.default_prompt)
        )
        card = replace(
            card,
            query_prompt=card.query_prompt or self.query_prompt,
            passage_prompt=card.passage_prompt or self.passage_prompt,
            default_prompt=card.default_prompt or self.default_prompt or "",
        )
        if user_card:
            card = user_card.apply_to(card)
        return replace(
            card,
            modes=self._modes,
            dimensions=self.dimensions,
            max_tokens=min(self.max_tokens, card.max_tokens or self.max_tokens),
            matryoshka=tuple(length for length in card.matryoshka if length < self.dimensions),
        )

    def _config_object(self, fields: dict[str, Any]) -> JsonObject:
        """Return a config whose errors name the backbone's ``config.json``."""
        return JsonObject(self.pipeline.backbone / "config.json", fields)


def read_checkpoint(folder: Path, builtin_card: ModelCard | None = None, *, name: str = "") -> Checkpoint:
    """Read all config files of a checkpoint folder.

    Args:
        folder: the checkpoint.
        builtin_card: the built-in card of the model that the folder should hold, if there is one.
        name: the model's name.

    Raises:
        CheckpointInvalid: a file is missing or broken, or asks for something that is not supported; names the file.
        MissingDependency: safetensors, which static embeddings need, is not installed.
    """
    if not folder.is_dir():
        raise CheckpointInvalid(f"{folder} is not a folder: a checkpoint is a folder that holds config.json")
    pipeline = read_pipeline(folder)
    backbone = pipeline.backbone if pipeline else folder
    if (backbone / "adapter_config.json").is_file():
        raise CheckpointInvalid(f"{backbone} holds an adapter: merge it into its base model, and serve the result")
    is_static = pipeline is not None and pipeline.static
    config = _static_config(backbone) if is_static else read_object(backbone / "config.json")
    model_type = config.get("model_type", "")
    if not model_type:
        raise CheckpointInvalid(f"{config.path}: no `model_type`, so its architecture is unknown")
    recipe = RECIPES.get(model_type)
    for part in recipe.parts if recipe else ():
        if not config.get(part, {}):
            raise config.invalid(part, "an object")
    if recipe is None and _names_custom_code(config):
        _logger.warning(
            "%s names code of its own for %s, which is not run: transformers' own class of that type is used",
            config.path,
            model_type,
        )
    if pipeline is None:
        pipeline = plain_pipeline(folder, config, recipe, builtin_card)
    if name in UNPOOLED_PROMPTS:
        pipeline = replace(pipeline, pool_prompt=False)
    sentence_config = read_sentence_config(backbone)
    model_config = read_model_config(folder)
    if model_config.fields.get("truncate_dim") is not None:
        pipeline = pipeline.then(Cut(model_config.size("truncate_dim")))
    query_prompt, passage_prompt, default_prompt = read_prompts(model_config)
    return Checkpoint(
        folder=folder,
        config=config.fields,
        recipe=recipe,
        pipeline=pipeline,
        max_tokens=static_max_tokens(backbone) if is_static else max_tokens(config, sentence_config),
        lowercase=sentence_config.get("do_lower_case", default=False),
        query_prompt=query_prompt,
        passage_prompt=passage_prompt,
        default_prompt=default_prompt,
    )


def _names_custom_code(config: JsonObject) -> bool:
    return "AutoModel" in config.get("auto_map", {})


def _static_config(folder: Path) -> JsonObject:
    """Return the fields that ``config.json`` would have for static embeddings, from the shapes of the weights."""
    path = folder / "model.safetensors"
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingDependency(
            f"reading {path} requires a package that is not installed: pip install 'embeddings-mcp[local]'"
        ) from error
    try:
        with safe_open(path, framework="np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointInvalid(f"{path} is missing") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointInvalid(f"{path}: the weights cannot be read: {error}") from error
    match shapes:
        case {"embedding.weight": [_, width]} | {"embeddings": [_, width]}:
            return JsonObject(path, {"model_type": "static", "hidden_size": width})
        case _:
            raise CheckpointInvalid(
                f"{path}: no matrix of token vectors: neither `embedding.weight`, nor model2vec's `embeddings`"
            )


def _hidden_size(config: JsonObject) -> int:
    key = next((key for key in ("hidden_size", "d_model", "dim", "n_embd") if key in config.fields), None)
    if key is None and any(part in config.fields for part in _PART_CONFIGS):
        raise CheckpointInvalid(
            f"{config.path}: a model of several parts, such as one for texts and images, is not supported"
        )
    return config.size(key or "hidden_size")
