"""The steps from a text to its vector, as a checkpoint defines them: read without torch.

In sentence-transformers' layout ``modules.json`` lists them, and each has a folder. A plain transformers model lists
none; it is pooled as sentence-transformers would pool it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import get_args

from embeddings_mcp.embedders.local.json_file import JsonObject, read_object, read_objects
from embeddings_mcp.embedders.local.recipes import MEAN_POOLED, NVIDIA_POOLING_NAMES, PoolingMode, Recipe
from embeddings_mcp.errors import CheckpointInvalid
from embeddings_mcp.models import ModelCard

CHAT_TEMPLATE = "chat_template.jinja"
"""File with the chat template, if it is not in ``tokenizer_config.json``."""

_ENCODING_MODULES = ("StaticEmbedding", "Transformer", "Pooling")
_LATER_MODULES = ("Dense", "LayerNorm", "Dropout", "Normalize")
"""The supported classes of sentence-transformers: those that turn a text into a vector, and those that transform it."""

_LEGACY_MODES: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

_COLBERT_ARCHITECTURE = "HF_ColBERT"
"""The architecture name that ColBERT's own library saves."""

_POOLED_OUTPUT = "sentence_embedding"
"""sentence-transformers' name for the pooled vector."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer over the pooled vector.

    Attributes:
        folder: folder of its weights.
        in_features: length of its input.
        out_features: length of its output.
        bias: whether it has a bias.
        activation: name of the ``torch.nn`` class that follows.
    """

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """A layer norm over the pooled vector, with its weights in `folder`."""

    folder: Path
    dimensions: int


@dataclass(frozen=True, slots=True)
class Normalize:
    """Scale the pooled vector to length 1."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Truncate the vector to its first `dimensions` components."""

    dimensions: int


Stage = Dense | LayerNorm | Normalize | Cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The steps from a text to its vector.

    Attributes:
        backbone: folder of the module that computes the token vectors: the checkpoint, or a folder in it.
        static: whether token vectors are static embeddings, looked up without a transformer.
        pooling: how the token vectors are pooled; the results of several modes are concatenated.
        pool_prompt: whether the prompt's tokens are pooled too.
        stages: the steps after pooling.
    """

    backbone: Path
    static: bool = False
    pooling: tuple[PoolingMode, ...] = ("mean",)
    pool_prompt: bool = True
    stages: tuple[Stage, ...] = ()

    def then(self, stage: Stage) -> Pipeline:
        """Return the pipeline with one more stage."""
        return replace(self, stages=(*self.stages, stage))


def read_pipeline(folder: Path) -> Pipeline | None:
    """Read ``modules.json`` and the config of each module; return None if there is no such file.

    Raises:
        CheckpointInvalid: a file is missing or broken, or a module is not supported; names the file.
    """
    path = folder / "modules.json"
    modules = read_objects(path)
    if not modules:
        return None
    kinds = [_module_kind(module) for module in modules]
    folders = [_module_folder(folder, module) for module in modules]
    static = kinds[0] == "StaticEmbedding"
    later = 1 if static else 2
    if not (static or kinds[:2] == ["Transformer", "Pooling"]) or set(kinds[later:]) & set(_ENCODING_MODULES):
        raise CheckpointInvalid(
            f"{path}: the modules must be a Transformer and a Pooling, or a StaticEmbedding, followed by any of "
            f"{', '.join(_LATER_MODULES)}"
        )
    if static:
        pipeline = Pipeline(backbone=folders[0], static=True)
    else:
        modes, pool_prompt = _read_pooling(folders[1])
        pipeline = Pipeline(backbone=folders[0], pooling=modes, pool_prompt=pool_prompt)
    for kind, module_folder in zip(kinds[later:], folders[later:], strict=True):
        match kind:
            case "Dense":
                pipeline = pipeline.then(_read_dense(module_folder))
            case "LayerNorm":
                dimensions = read_object(module_folder / "config.json").size("dimension")
                pipeline = pipeline.then(LayerNorm(module_folder, dimensions))
            case "Normalize":
                _check_applies_to_pooled(read_object(module_folder / "config.json", optional=True))
                pipeline = pipeline.then(Normalize())
            case "Dropout":
                pass  # has no effect outside training
    return pipeline


def _module_kind(module: JsonObject) -> str:
    """Return the class name of a module, which must be a supported class of sentence-transformers."""
    package, _, kind = module.get("type", "").rpartition(".")
    if package.split(".")[0] != "sentence_transformers" or kind not in (*_ENCODING_MODULES, *_LATER_MODULES):
        raise CheckpointInvalid(
            f"{module.path}: the module {module.fields.get('type')!r} is not supported; supported are "
            f"{', '.join((*_ENCODING_MODULES, *_LATER_MODULES))} of sentence_transformers"
        )
    return kind


def _module_folder(folder: Path, module: JsonObject) -> Path:
    """Return the folder of a module, which must be the checkpoint's or inside it."""
    part = PurePath(module.get("path", ""))
    if part.is_absolute() or ".." in part.parts:
        raise CheckpointInvalid(f"{module.path}: {str(part)!r} leads out of the checkpoint, and is not followed")
    return folder / part


def plain_pipeline(folder: Path, config: JsonObject, recipe: Recipe | None, builtin_card: ModelCard | None) -> Pipeline:
    """Return the steps for a checkpoint without ``modules.json``.

    Args:
        folder: the checkpoint.
        config: its ``config.json``.
        recipe: the recipe of its family, if there is one.
        builtin_card: the built-in card of the model that the folder should hold, if there is one.

    Raises:
        CheckpointInvalid: the model makes no text vectors, or its pooling is unknown.
    """
    architectures: list[object] = config.get("architectures", [])
    architecture = str(*architectures[:1])
    if architecture == _COLBERT_ARCHITECTURE:
        raise CheckpointInvalid(f"{config.path}: ColBERT makes a vector per token, and none per text")
    if architecture.endswith("ForSequenceClassification") and len(config.get("id2label", {})) == 1:
        raise CheckpointInvalid(f"{config.path}: a model that gives one score, such as a reranker, makes no vectors")
    if recipe or (builtin_card and builtin_card.id in MEAN_POOLED):
        pooling = NVIDIA_POOLING_NAMES.get(str(config.fields.get("pooling")), "mean")
        return Pipeline(backbone=folder, pooling=(pooling,), stages=(Normalize(),))
    if builtin_card:
        # A wrong guess would silently give vectors of another space.
        raise CheckpointInvalid(
            f"{folder / 'modules.json'} is missing; it defines how {builtin_card.id} pools its tokens"
        )
    tokenizer_config = read_object(folder / "tokenizer_config.json", optional=True)
    if "chat_template" in tokenizer_config.fields or (folder / CHAT_TEMPLATE).is_file():
        raise CheckpointInvalid(
            f"{folder} has a chat template and no modules.json: sentence-transformers would put every text into the "
            "template, which is not supported; define its pooling in modules.json"
        )
    is_causal = architecture.endswith("ForCausalLM") and config.get("is_causal", default=True)
    return Pipeline(backbone=folder, pooling=("lasttoken" if is_causal else "mean",))


def _read_pooling(folder: Path) -> tuple[tuple[PoolingMode, ...], bool]:
    """Return the pooling modes, and whether the prompt's tokens are pooled."""
    config = read_object(folder / "config.json")
    value = config.fields.get("pooling_mode")
    modes = [value] if isinstance(value, str) else config.get("pooling_mode", [])
    modes = modes or [mode for key, mode in _LEGACY_MODES.items() if config.get(key, default=False)] or ["mean"]
    for mode in modes:
        if mode not in get_args(PoolingMode):
            raise config.invalid("pooling_mode", f"one or several of {', '.join(get_args(PoolingMode))}")
    return tuple(modes), config.get("include_prompt", default=True)


def _read_dense(folder: Path) -> Dense:
    config = read_object(folder / "config.json")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    package, _, name = activation.rpartition(".")
    if not f"{package}.".startswith("torch.nn."):
        raise CheckpointInvalid(
            f"{config.path}: the activation {activation!r} is not one of torch.nn, and is not loaded"
        )
    _check_applies_to_pooled(config)
    if config.get("use_residual", default=False):
        raise config.invalid("use_residual", "false: a Dense module is supported without residual only")
    return Dense(
        folder,
        in_features=config.size("in_features"),
        out_features=config.size("out_features"),
        bias=config.get("bias", default=True),
        activation=name,
    )


def _check_applies_to_pooled(config: JsonObject) -> None:
    """Reject a module that does not read and replace the pooled vector."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key, _POOLED_OUTPUT) != _POOLED_OUTPUT:
            raise config.invalid(
                key, f"{_POOLED_OUTPUT!r}: modules after the pooling are supported on the pooled vector only"
            )
