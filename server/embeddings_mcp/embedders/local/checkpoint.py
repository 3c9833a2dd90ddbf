"""A checkpoint folder, read without torch: what its model is, and what becomes of a text's token vectors.

Two layouts are understood: that of sentence-transformers (``modules.json`` and a folder for each module), and a plain
transformers model, which is pooled as sentence-transformers would do. What a family says in a way of its own is in
`recipes`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, get_args

from embeddings_mcp.embedders.local.jsonfile import JsonObject, read_object, read_objects
from embeddings_mcp.embedders.local.recipes import PLAIN, POOLING_WORDS, RECIPES, PoolingMode, Recipe
from embeddings_mcp.errors import CheckpointInvalid
from embeddings_mcp.models import InputTypeUse, Mode, ModelCard

_logger = logging.getLogger(__name__)

_MODULES = ("Transformer", "Pooling", "Dense", "LayerNorm", "Dropout", "Normalize")
"""Classes of sentence-transformers that are understood."""

_LEGACY_MODES: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

OFFSET_POSITIONS = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""Model types whose position ids start behind the padding id, as fairseq's did."""

_N_POSITIONS = frozenset({"codegen", "ctrl", "gpt-sw3", "gpt2", "gpt_bigcode", "gptj", "openai-gpt"})
"""Model types that call their limit ``n_positions``; T5's, of the same name, limits nothing."""

M3_FILES = ("sparse_linear.pt", "colbert_linear.pt")
"""The layers that make BGE-M3's other two outputs."""

_BY_LENGTH = frozenset({"dynamic", "longrope", "su"})
"""Kinds of rotary positions whose angles depend on how long a text is."""

_UNKNOWN_LENGTH = 512

_READ = {"method": "forward", "method_output_name": "last_hidden_state"}
"""How sentence-transformers says that the last token vectors are what is pooled."""

_DENSE = "SentenceTransformer"
"""What sentence-transformers calls a model that makes one dense vector of a text."""

_POOLED = "sentence_embedding"
"""What sentence-transformers calls the pooled vector."""

_USUAL: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "processing_kwargs": {},
    "query_length": 0,
    "document_length": 0,
    "query_expansion": {},
}
"""What ``sentence_bert_config.json`` may say that would change vectors, as it is where it is not said."""

_ARGUMENTS = ("config_args", "config_kwargs", "tokenizer_args", "processor_kwargs")
"""Where it may hold arguments for what transformers reads a config and a tokenizer with, which say more than those."""

_HARMLESS = frozenset({"cache_dir", "local_files_only", "revision", "token", "trust_remote_code", "use_fast"})
"""Arguments that do not change what is read."""


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
        return _position_offset(JsonObject(self.pipeline.backbone / "config.json", self.config))

    @property
    def dimensions(self) -> int:
        """Length of the vectors."""
        config = JsonObject(self.pipeline.backbone / "config.json", self.backbone_config)
        length = _hidden_size(config) * len(self.pipeline.pooling)
        for stage in self.pipeline.stages:
            match stage:
                case Dense():
                    length = stage.out_features
                case Cut():
                    length = min(length, stage.dimensions)
        return length

    @property
    def _modes(self) -> tuple[Mode, ...]:
        every = all((self.folder / name).is_file() for name in M3_FILES)
        return ("dense", "sparse", "colbert", "hybrid") if every else ("dense",)

    @property
    def _input_type(self) -> InputTypeUse:
        """Whether a text's type has to be said: not where both have one prompt, or there is one for neither."""
        told_apart = self.query_prompt != self.passage_prompt
        if not told_apart and self.query_prompt == (self.default_prompt or ""):
            return "ignored"
        return "required" if told_apart and self.default_prompt is None else "optional"

    def card(self, name: str, known: ModelCard | None = None) -> ModelCard:
        """The card of this checkpoint.

        Args:
            name: what its user calls it.
            known: the card of that name, where there is one; of sizes the files are believed, of the rest the card.
        """
        described = ModelCard(
            id=name,
            dimensions=self.dimensions,
            max_tokens=self.max_tokens,
            input_type=self._input_type,
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
    config = read_object(backbone / "config.json")
    model_type = config.get("model_type", "")
    if not model_type:
        raise CheckpointInvalid(f"{config.path}: no `model_type`, so its architecture is unknown")
    if (backbone / "adapter_config.json").is_file():
        raise CheckpointInvalid(f"{backbone} holds an adapter: merge it into its model, and serve that")
    recipe = RECIPES.get(model_type)
    for part in recipe.parts if recipe else ():
        if not config.get(part, {}):
            raise config.wrong(part, "an object")
    if recipe is None and "AutoModel" in config.get("auto_map", {}):
        _logger.warning(
            "%s names code of its own for %s, which is not run: transformers' own class of that type is used",
            config.path,
            model_type,
        )
    if pipeline is None:
        pipeline = _plain_pipeline(folder, config.fields, recipe, known)
    sentence = _read_sentence_config(backbone)
    whole = read_object(folder / "config_sentence_transformers.json", optional=True)
    if whole.get("model_type", _DENSE) != _DENSE:
        raise whole.wrong("model_type", f"{_DENSE!r}: models of other kinds do not make one vector of a text")
    if whole.fields.get("truncate_dim") is not None:
        pipeline = pipeline.then(Cut(whole.size("truncate_dim")))
    query, passage, default = _read_prompts(whole)
    return Checkpoint(
        folder=folder,
        config=config.fields,
        recipe=recipe,
        pipeline=pipeline,
        max_tokens=_max_tokens(config, sentence),
        lowercase=sentence.get("do_lower_case", default=False),
        query_prompt=query,
        passage_prompt=passage,
        default_prompt=default,
    )


def _read_pipeline(folder: Path) -> Pipeline | None:
    """What ``modules.json`` says; None where there is none."""
    path = folder / "modules.json"
    modules = read_objects(path)
    if not modules:
        return None
    kinds = [_kind(module) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or {"Transformer", "Pooling"} & set(kinds[2:]):
        raise CheckpointInvalid(f"{path}: supported is a Transformer, then a Pooling, then what follows the pooling")
    places = [_place(folder, module) for module in modules]
    modes, pool_prompt = _read_pooling(places[1])
    pipeline = Pipeline(backbone=places[0], pooling=modes, pool_prompt=pool_prompt)
    for kind, place in zip(kinds[2:], places[2:], strict=True):
        match kind:
            case "Dense":
                pipeline = pipeline.then(_read_dense(place))
            case "LayerNorm":
                pipeline = pipeline.then(LayerNorm(place, read_object(place / "config.json").size("dimension")))
            case "Normalize":
                pipeline = pipeline.then(Normalize())
            case "Dropout":
                pass  # does nothing outside training
    return pipeline


def _kind(module: JsonObject) -> str:
    """The class of a module, if it is one of sentence-transformers' own that is supported."""
    package, _, kind = module.get("type", "").rpartition(".")
    if package.split(".")[0] != "sentence_transformers" or kind not in _MODULES:
        raise CheckpointInvalid(
            f"{module.path}: the module {module.fields.get('type')!r} is not supported; supported are "
            f"{', '.join(_MODULES)} of sentence_transformers"
        )
    return kind


def _place(folder: Path, module: JsonObject) -> Path:
    """The folder of a module, which has to be the checkpoint's or in it."""
    part = PurePath(module.get("path", ""))
    if part.is_absolute() or ".." in part.parts:
        raise CheckpointInvalid(f"{module.path}: {str(part)!r} leads out of the checkpoint, and is not followed")
    return folder / part


def _plain_pipeline(folder: Path, config: dict[str, Any], recipe: Recipe | None, known: ModelCard | None) -> Pipeline:
    """The steps where no ``modules.json`` says them."""
    if recipe or (known and known.id in PLAIN):
        pooling = POOLING_WORDS.get(str(config.get("pooling")), "mean")
        return Pipeline(backbone=folder, pooling=(pooling,), stages=(Normalize(),))
    if known:
        # To guess here would be to give vectors of a space that nobody asked for.
        raise CheckpointInvalid(f"{folder / 'modules.json'} is missing, which says how {known.id} pools its tokens")
    architecture = next(iter(config.get("architectures") or ()), "")
    causal = str(architecture).endswith("ForCausalLM") and config.get("is_causal", True)
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
    names = {config.get(key, _POOLED) for key in ("module_input_name", "module_output_name")}
    if config.get("use_residual", default=False) or names != {_POOLED}:
        raise CheckpointInvalid(
            f"{config.path}: a Dense module is supported on the pooled vector only, without residual"
        )
    return Dense(
        folder,
        in_features=config.size("in_features"),
        out_features=config.size("out_features"),
        bias=config.get("bias", default=True),
        activation=name,
    )


def _read_sentence_config(folder: Path) -> JsonObject:
    """``sentence_bert_config.json``, by whichever of its names it has."""
    names = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    paths = (folder / f"sentence_{name}_config.json" for name in names)
    config = next((read_object(path) for path in paths if path.is_file()), JsonObject(folder, {}))
    for key, usual in _USUAL.items():
        if config.get(key, usual) != usual:
            raise config.wrong(key, f"{usual!r}: nothing else is supported")
    for key in _ARGUMENTS:
        if not config.get(key, {}).keys() <= _HARMLESS:
            raise config.wrong(key, "empty: say it in config.json or tokenizer_config.json")
    modalities = config.get("modality_config", {})
    if "message" in modalities:
        raise CheckpointInvalid(f"{config.path}: texts within a chat template are not supported")
    if modalities.get("text", _READ) != _READ:
        raise config.wrong("modality_config", f"{ {'text': _READ} }: nothing else is supported for texts")
    return config


def _read_prompts(config: JsonObject) -> tuple[str, str, str | None]:
    """The prompts for queries, for passages, and for texts whose type was not said."""
    prompts = JsonObject(config.path, config.get("prompts", {}))
    passages = (prompts.get(name, "") for name in ("document", "passage", "corpus"))
    default = config.get("default_prompt_name", "")
    if default and default not in prompts.fields:
        raise config.wrong("default_prompt_name", f"one of {', '.join(map(repr, prompts.fields)) or 'its prompts'}")
    return prompts.get("query", ""), next(filter(None, passages), ""), prompts.get(default, "") if default else None


def _max_tokens(config: JsonObject, sentence: JsonObject) -> int:
    """The shortest of what the sentence encoder, or else the tokenizer, and the position embeddings allow."""
    said = _limit(sentence, "max_seq_length")
    if said is not None and _has_endless_positions(config):
        return said
    tokenizer = read_object(config.path.with_name("tokenizer_config.json"), optional=True)
    limits = [_limit(tokenizer, "model_max_length") if said is None else said]
    key = "n_positions" if config.get("model_type", "") in _N_POSITIONS else "max_position_embeddings"
    if positions := _limit(config, key):
        limits.append(positions - _position_offset(config))
    known = [limit for limit in limits if limit is not None]
    return min(known, default=_UNKNOWN_LENGTH)


def _has_endless_positions(config: JsonObject) -> bool:
    """Whether positions are angles, which never run out, and those of a token are the same in texts of any length."""
    said = [config.fields.get(key) for key in ("rope_parameters", "rope_scaling")]
    # One of them, or one for each type of layer.
    kinds = [kind for one in said if isinstance(one, dict) for kind in (one, *one.values()) if isinstance(kind, dict)]
    if any(kind.get("rope_type", kind.get("type")) in _BY_LENGTH for kind in kinds):
        return False
    return bool(kinds) or any(key.endswith("rope_theta") for key in config.fields)


def _limit(config: JsonObject, key: str) -> int | None:
    """A limit, or None where there is none: a tokenizer without one writes 10^30, and some configs -1."""
    value = config.fields.get(key)
    if value is None:
        return None
    if type(value) not in {int, float}:
        raise config.wrong(key, "a number")
    return int(value) if 0 < value < 10**9 else None


def _position_offset(config: JsonObject) -> int:
    if config.get("model_type", "") not in OFFSET_POSITIONS:
        return 0
    return 1 + config.get("pad_token_id", 1)


def _hidden_size(config: JsonObject) -> int:
    key = next((key for key in ("hidden_size", "d_model", "dim", "n_embd") if key in config.fields), "hidden_size")
    return config.size(key)
