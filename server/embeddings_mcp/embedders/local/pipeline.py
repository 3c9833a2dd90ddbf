"""The steps from a text to its vector, as a checkpoint says them: read without torch.

In sentence-transformers' layout ``modules.json`` names them, and each has a folder. A plain transformers model says
nothing, and is pooled as sentence-transformers would do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import get_args

from embeddings_mcp.embedders.local.json_file import JsonObject, read_object, read_objects
from embeddings_mcp.embedders.local.recipes import PLAIN, POOLING_WORDS, PoolingMode, Recipe
from embeddings_mcp.errors import CheckpointInvalid
from embeddings_mcp.models import ModelCard

CHAT_TEMPLATE = "chat_template.jinja"
"""Where a chat template is that is not in ``tokenizer_config.json``."""

_FIRST = ("StaticEmbedding", "Transformer", "Pooling")
_LATER = ("Dense", "LayerNorm", "Dropout", "Normalize")
"""Classes of sentence-transformers that are understood: those that make a vector of a text, and that change it."""

_LEGACY_MODES: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

_COLBERT = "HF_ColBERT"
"""What ColBERT's own library calls its models."""

_POOLED = "sentence_embedding"
"""What sentence-transformers calls the pooled vector."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer over the pooled vector.

    Attributes:
        folder: where its weights are.
        in_features: length of the vector it takes.
        out_features: length of the vector it gives.
        bias: whether it adds one.
        activation: name of the ``torch.nn`` class that follows.
    """

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """A layer norm over the pooled vector, its weights in `folder`."""

    folder: Path
    dimensions: int


@dataclass(frozen=True, slots=True)
class Normalize:
    """Scale the pooled vector to length 1."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Keep the first numbers of the vector, as many as `dimensions`."""

    dimensions: int


Stage = Dense | LayerNorm | Normalize | Cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The steps from a text to its vector.

    Attributes:
        backbone: folder of what makes the token vectors, which may be a module's own.
        static: whether they are looked up, and there is no transformer.
        pooling: how token vectors become one.
        pool_prompt: whether the prompt's own tokens are pooled too.
        stages: what follows the pooling.
    """

    backbone: Path
    static: bool = False
    pooling: tuple[PoolingMode, ...] = ("mean",)
    pool_prompt: bool = True
    stages: tuple[Stage, ...] = ()

    def then(self, stage: Stage) -> Pipeline:
        """The same steps and one more."""
        return replace(self, stages=(*self.stages, stage))


def read_pipeline(folder: Path) -> Pipeline | None:
    """What ``modules.json`` says; None where there is none."""
    path = folder / "modules.json"
    modules = read_objects(path)
    if not modules:
        return None
    kinds = [_kind(module) for module in modules]
    places = [_place(folder, module) for module in modules]
    static = kinds[0] == "StaticEmbedding"
    first = 1 if static else 2
    if not (static or kinds[:2] == ["Transformer", "Pooling"]) or set(kinds[first:]) & set(_FIRST):
        raise CheckpointInvalid(
            f"{path}: supported is a Transformer and a Pooling, or a StaticEmbedding, then what follows the pooling"
        )
    if static:
        pipeline = Pipeline(backbone=places[0], static=True)
    else:
        modes, pool_prompt = _read_pooling(places[1])
        pipeline = Pipeline(backbone=places[0], pooling=modes, pool_prompt=pool_prompt)
    for kind, place in zip(kinds[first:], places[first:], strict=True):
        match kind:
            case "Dense":
                pipeline = pipeline.then(_read_dense(place))
            case "LayerNorm":
                pipeline = pipeline.then(LayerNorm(place, read_object(place / "config.json").size("dimension")))
            case "Normalize":
                _check_pooled(read_object(place / "config.json", optional=True))
                pipeline = pipeline.then(Normalize())
            case "Dropout":
                pass  # does nothing outside training
    return pipeline


def _kind(module: JsonObject) -> str:
    """The class of a module, if it is one of sentence-transformers' own that is supported."""
    package, _, kind = module.get("type", "").rpartition(".")
    if package.split(".")[0] != "sentence_transformers" or kind not in (*_FIRST, *_LATER):
        raise CheckpointInvalid(
            f"{module.path}: the module {module.fields.get('type')!r} is not supported; supported are "
            f"{', '.join((*_FIRST, *_LATER))} of sentence_transformers"
        )
    return kind


def _place(folder: Path, module: JsonObject) -> Path:
    """The folder of a module, which has to be the checkpoint's or in it."""
    part = PurePath(module.get("path", ""))
    if part.is_absolute() or ".." in part.parts:
        raise CheckpointInvalid(f"{module.path}: {str(part)!r} leads out of the checkpoint, and is not followed")
    return folder / part


def plain_pipeline(folder: Path, config: JsonObject, recipe: Recipe | None, known: ModelCard | None) -> Pipeline:
    """The steps where no ``modules.json`` says them."""
    architectures: list[object] = config.get("architectures", [])
    architecture = str(*architectures[:1])
    if architecture == _COLBERT:
        raise CheckpointInvalid(f"{config.path}: ColBERT makes a vector of every token, and none of a text")
    if architecture.endswith("ForSequenceClassification") and len(config.get("id2label", {})) == 1:
        raise CheckpointInvalid(f"{config.path}: a model that gives one score, such as a reranker, makes no vectors")
    if recipe or (known and known.id in PLAIN):
        pooling = POOLING_WORDS.get(str(config.fields.get("pooling")), "mean")
        return Pipeline(backbone=folder, pooling=(pooling,), stages=(Normalize(),))
    if known:
        # To guess here would be to give vectors of a space that nobody asked for.
        raise CheckpointInvalid(f"{folder / 'modules.json'} is missing, which says how {known.id} pools its tokens")
    tokenizer = read_object(folder / "tokenizer_config.json", optional=True)
    if "chat_template" in tokenizer.fields or (folder / CHAT_TEMPLATE).is_file():
        raise CheckpointInvalid(
            f"{folder} has a chat template and no modules.json: sentence-transformers would put every text into the "
            "template, which is not supported; say how it is pooled in modules.json"
        )
    causal = architecture.endswith("ForCausalLM") and config.get("is_causal", default=True)
    return Pipeline(backbone=folder, pooling=("lasttoken" if causal else "mean",))


def _read_pooling(folder: Path) -> tuple[tuple[PoolingMode, ...], bool]:
    config = read_object(folder / "config.json")
    said = config.fields.get("pooling_mode")
    modes = [said] if isinstance(said, str) else config.get("pooling_mode", [])
    modes = modes or [mode for key, mode in _LEGACY_MODES.items() if config.get(key, default=False)] or ["mean"]
    for mode in modes:
        if mode not in get_args(PoolingMode):
            raise config.wrong("pooling_mode", f"one or several of {', '.join(get_args(PoolingMode))}")
    return tuple(modes), config.get("include_prompt", default=True)


def _read_dense(folder: Path) -> Dense:
    config = read_object(folder / "config.json")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    package, _, name = activation.rpartition(".")
    if not f"{package}.".startswith("torch.nn."):
        raise CheckpointInvalid(
            f"{config.path}: the activation {activation!r} is not one of torch.nn, and is not loaded"
        )
    _check_pooled(config)
    if config.get("use_residual", default=False):
        raise config.wrong("use_residual", "false: a Dense module is supported without residual only")
    return Dense(
        folder,
        in_features=config.size("in_features"),
        out_features=config.size("out_features"),
        bias=config.get("bias", default=True),
        activation=name,
    )


def _check_pooled(config: JsonObject) -> None:
    """Refuse a module that takes something else than the pooled vector, or puts its result elsewhere."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key, _POOLED) != _POOLED:
            raise config.wrong(key, f"{_POOLED!r}: modules behind the pooling are supported on the pooled vector only")
