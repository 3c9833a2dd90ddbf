"""A checkpoint folder, read without torch: what its model is, and what becomes of a text's token vectors.

Two layouts are understood: that of sentence-transformers (``modules.json`` and a folder for each module), and a plain
transformers model, which is pooled by mean as sentence-transformers would do. What a family says in a way of its own
is in `recipes`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from embeddings_mcp.embedders.local.recipes import PLAIN, POOLING_WORDS, RECIPES, PoolingMode, Recipe
from embeddings_mcp.errors import CheckpointInvalid
from embeddings_mcp.models import InputTypeUse, Mode, ModelCard

_LEGACY_MODES: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet"})
"""Model types whose position ids start behind the padding id, as fairseq's did."""

M3_FILES = ("sparse_linear.pt", "colbert_linear.pt")
"""The layers that make BGE-M3's other two outputs."""

_UNKNOWN_LENGTH = 512


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


Stage = Dense | LayerNorm | Normalize


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The steps from a text to its vector.

    Attributes:
        backbone: folder of the transformer itself, which may be a module's own.
        pooling: how token vectors become one.
        pool_prompt: whether the prompt's own tokens are pooled too.
        stages: what follows the pooling.
    """

    backbone: Path
    pooling: tuple[PoolingMode, ...] = ("mean",)
    pool_prompt: bool = True
    stages: tuple[Stage, ...] = ()

    def then(self, stage: Stage) -> Pipeline:
        """The same steps and one more."""
        return replace(self, stages=(*self.stages, stage))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint folder says.

    Attributes:
        folder: the checkpoint.
        config: the transformer's ``config.json``.
        recipe: what its family says in a way of its own; None for most.
        pipeline: the steps from a text to its vector.
        max_tokens: longest text, special tokens and prompt included.
        lowercase: whether texts are put in lower case before tokenizing.
        query_prompt: text before a query.
        passage_prompt: text before a passage.
        default_prompt: text before an input whose type was not said; None where the checkpoint names none.
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
        """The config of the transformers class that the model is built from."""
        return self.recipe.backbone(self.config) if self.recipe else self.config

    @property
    def position_offset(self) -> int:
        """Position id of a text's first token."""
        return _position_offset(self.config)

    @property
    def dimensions(self) -> int:
        """Length of the vectors."""
        dense = [stage.out_features for stage in self.pipeline.stages if isinstance(stage, Dense)]
        if dense:
            return dense[-1]
        return _hidden_size(self.backbone_config, self.pipeline.backbone) * len(self.pipeline.pooling)

    @property
    def _modes(self) -> tuple[Mode, ...]:
        every = all((self.folder / name).is_file() for name in M3_FILES)
        return ("dense", "sparse", "colbert", "hybrid") if every else ("dense",)

    def card(self, name: str, known: ModelCard | None = None) -> ModelCard:
        """The card of this checkpoint.

        Args:
            name: what its user calls it.
            known: the card of that name, where there is one; of sizes the files are believed, of the rest the card.
        """
        told_apart = self.query_prompt != self.passage_prompt
        asymmetric: InputTypeUse = "required" if self.default_prompt is None else "optional"
        described = ModelCard(
            id=name,
            dimensions=self.dimensions,
            max_tokens=self.max_tokens,
            input_type=asymmetric if told_apart else "ignored",
            query_prompt=self.query_prompt,
            passage_prompt=self.passage_prompt,
            default_prompt=self.default_prompt or "",
            modes=self._modes,
        )
        if known is None:
            return described
        return replace(
            known,
            modes=self._modes,
            dimensions=self.dimensions,
            max_tokens=min(self.max_tokens, known.max_tokens or self.max_tokens),
            matryoshka=tuple(length for length in known.matryoshka if length < self.dimensions),
            query_prompt=known.query_prompt or self.query_prompt,
            passage_prompt=known.passage_prompt or self.passage_prompt,
        )


def read_checkpoint(folder: Path, known: ModelCard | None = None) -> Checkpoint:
    """Read every description in a checkpoint folder.

    Args:
        folder: the checkpoint.
        known: the card of the model that the folder is said to hold, where it is in the table.

    Raises:
        CheckpointInvalid: a file is missing or broken, or asks for something that is not supported; names the file.
    """
    if not folder.is_dir():
        raise CheckpointInvalid(f"{folder} is not a folder: a checkpoint is a folder that holds config.json")
    pipeline = _read_pipeline(folder)
    backbone = pipeline.backbone if pipeline else folder
    config = _read_json(backbone / "config.json", dict)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointInvalid(f"{backbone / 'config.json'}: no `model_type`, so its architecture is unknown")
    recipe = RECIPES.get(config["model_type"])
    if pipeline is None:
        pipeline = _plain_pipeline(folder, config, recipe, known)
    sentence = _read_sentence_config(backbone)
    prompts = _read_json(folder / "config_sentence_transformers.json", dict, default={})
    named = {str(name): str(text) for name, text in (prompts.get("prompts") or {}).items()}
    default_name = prompts.get("default_prompt_name")
    return Checkpoint(
        folder=folder,
        config=config,
        recipe=recipe,
        pipeline=pipeline,
        max_tokens=_max_tokens(config, sentence, backbone),
        lowercase=bool(sentence.get("do_lower_case", False)),
        query_prompt=named.get("query", ""),
        passage_prompt=named.get("document") or named.get("passage", ""),
        default_prompt=None if default_name is None else named.get(str(default_name), ""),
    )


def _read_pipeline(folder: Path) -> Pipeline | None:
    """What ``modules.json`` says; None where there is none."""
    path = folder / "modules.json"
    modules = _read_json(path, list, default=[])
    if not modules:
        return None
    pipeline = Pipeline(backbone=folder)
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        place = folder / str(module.get("path", ""))
        match kind:
            case "Transformer":
                pipeline = replace(pipeline, backbone=place)
            case "Pooling":
                modes, pool_prompt = _read_pooling(place / "config.json")
                pipeline = replace(pipeline, pooling=modes, pool_prompt=pool_prompt)
            case "Dense":
                pipeline = pipeline.then(_read_dense(place))
            case "LayerNorm":
                pipeline = pipeline.then(_read_layer_norm(place))
            case "Normalize":
                pipeline = pipeline.then(Normalize())
            case "Dropout":
                pass  # does nothing outside training
            case _:
                raise CheckpointInvalid(
                    f"{path}: the module {kind!r} is not supported; supported are Transformer, Pooling, Dense, "
                    "LayerNorm, Dropout and Normalize"
                )
    return pipeline


def _plain_pipeline(folder: Path, config: dict[str, Any], recipe: Recipe | None, known: ModelCard | None) -> Pipeline:
    """The steps where no ``modules.json`` says them."""
    if recipe or (known and known.id in PLAIN):
        pooling = POOLING_WORDS.get(str(config.get("pooling")), "mean")
        return Pipeline(backbone=folder, pooling=(pooling,), stages=(Normalize(),))
    if known:
        # To guess here would be to give vectors of a space that nobody asked for.
        raise CheckpointInvalid(f"{folder / 'modules.json'} is missing, which says how {known.id} pools its tokens")
    return Pipeline(backbone=folder)


def _read_pooling(path: Path) -> tuple[tuple[PoolingMode, ...], bool]:
    config = _read_json(path, dict)
    modes = config.get("pooling_mode") or [mode for key, mode in _LEGACY_MODES.items() if config.get(key)] or "mean"
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    for mode in modes:
        if mode not in get_args(PoolingMode):
            raise CheckpointInvalid(
                f"{path}: the pooling mode {mode!r} is not supported; supported are {', '.join(get_args(PoolingMode))}"
            )
    return cast("tuple[PoolingMode, ...]", modes), bool(config.get("include_prompt", True))


def _read_dense(folder: Path) -> Dense:
    path = folder / "config.json"
    config = _read_json(path, dict)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    package, _, name = activation.rpartition(".")
    if not f"{package}.".startswith("torch.nn."):
        raise CheckpointInvalid(f"{path}: the activation {activation!r} is not one of torch.nn, and is not loaded")
    if config.get("use_residual") or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise CheckpointInvalid(f"{path}: a Dense module is supported on the pooled vector only, without residual")
    return Dense(
        folder,
        in_features=_whole_number(config, "in_features", path),
        out_features=_whole_number(config, "out_features", path),
        bias=bool(config.get("bias", True)),
        activation=name,
    )


def _read_layer_norm(folder: Path) -> LayerNorm:
    path = folder / "config.json"
    return LayerNorm(folder, _whole_number(_read_json(path, dict), "dimension", path))


def _read_sentence_config(folder: Path) -> dict[str, Any]:
    """``sentence_bert_config.json``, by whichever of its names it has."""
    names = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    paths = (folder / f"sentence_{name}_config.json" for name in names)
    return next((_read_json(path, dict) for path in paths if path.is_file()), {})


def _max_tokens(config: dict[str, Any], sentence: dict[str, Any], folder: Path) -> int:
    """The shortest of what the sentence encoder, or else the tokenizer, and the position embeddings allow."""
    limits = [sentence.get("max_seq_length")]
    if limits == [None]:
        limits = [_read_json(folder / "tokenizer_config.json", dict, default={}).get("model_max_length")]
    if positions := config.get("max_position_embeddings"):
        limits.append(positions - _position_offset(config))
    # A tokenizer without a limit writes 10^30.
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 10**9]
    return min(known, default=_UNKNOWN_LENGTH)


def _position_offset(config: dict[str, Any]) -> int:
    if config["model_type"] not in OFFSET_POSITIONS:
        return 0
    padding = config.get("pad_token_id")
    return 1 + (1 if padding is None else int(padding))


def _hidden_size(config: dict[str, Any], folder: Path) -> int:
    key = next((key for key in ("hidden_size", "d_model", "dim", "n_embd") if key in config), "hidden_size")
    return _whole_number(config, key, folder / "config.json")


def _whole_number(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointInvalid(f"{path}: `{key}` must be a positive whole number, not {value!r}")
    return value


def _read_json(path: Path, kind: type, default: Any = None) -> Any:  # noqa: ANN401 - JSON
    """A JSON file whose top is a list or an object; `default` where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is not None:
            return default
        raise CheckpointInvalid(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointInvalid(f"{path} cannot be read: {error}") from None
    if not isinstance(value, kind):
        raise CheckpointInvalid(f"{path} does not hold a JSON {'object' if kind is dict else 'array'}")
    return value
