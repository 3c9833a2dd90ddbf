"""A checkpoint folder, read without torch: what its model is, what it takes, and how its vectors are made.

Two layouts are understood: that of sentence-transformers (``modules.json`` and a folder for each module), and a plain
transformers model. What a family says in a way of its own is in `recipes`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embeddings_mcp.embedders.local.json_file import JsonObject, read_object
from embeddings_mcp.embedders.local.pipeline import CHAT_TEMPLATE, Cut, Dense, Pipeline, plain_pipeline, read_pipeline
from embeddings_mcp.embedders.local.recipes import RECIPES, Recipe
from embeddings_mcp.errors import CheckpointInvalid, MissingDependency
from embeddings_mcp.models import Mode, ModelCard, OwnCard, input_type_use

_logger = logging.getLogger(__name__)

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

FILES = ("*.json", "*.txt", "*.model", "*.codes", "*.safetensors", CHAT_TEMPLATE, *M3_FILES)
"""What is read of a checkpoint, pickled weights aside: descriptions, tokenizers, weights. A trainer leaves other things
beside it, and larger ones."""

PICKLES = "pytorch_model*.bin"
"""Weights as they were saved before safetensors; read where there are no others."""

_BY_LENGTH = frozenset({"dynamic", "longrope", "su"})
"""Kinds of rotary positions whose angles depend on how long a text is."""

_PARTS = ("text_config", "encoder", "vision_config")
"""Where the sizes of a model of several parts are."""

_UNKNOWN_LENGTH = 512

_STATIC_LENGTH = 32_768
"""Tokens of the longest text for token vectors that are looked up, for which there need not be a limit."""

_READ = {"method": "forward", "method_output_name": "last_hidden_state"}
"""How sentence-transformers says that the last token vectors are what is pooled."""

_DENSE = "SentenceTransformer"
"""What sentence-transformers calls a model that makes one dense vector of a text."""

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

_HARMLESS = frozenset(
    {"cache_dir", "local_files_only", "padding_side", "revision", "token", "trust_remote_code", "use_fast"}
)
"""Arguments that do not change what is read, or where nothing is padded, what is made of it."""

_PLACES = frozenset({"query", "document"})
"""Prompts that sentence-transformers has in any case, empty where the checkpoint does not say them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint folder says.

    Attributes:
        folder: the checkpoint.
        config: the transformer's ``config.json``; of token vectors that are looked up, the same in short.
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
    def has_own_code(self) -> bool:
        """Whether a model of its authors' own making comes with it, in place of which transformers' class is used."""
        return self.recipe is None and _names_code(JsonObject(self.pipeline.backbone / "config.json", self.config))

    @property
    def first_position(self) -> int:
        """Position id of a text's first token."""
        return _first_position(JsonObject(self.pipeline.backbone / "config.json", self.config))

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

    def card(self, name: str, known: ModelCard | None = None, own: OwnCard | None = None) -> ModelCard:
        """The card of this checkpoint: of sizes the files are believed, of the rest the user, then the built-in card.

        Args:
            name: what its user calls it.
            known: the built-in card of that name, where there is one.
            own: the user's, where there is one.
        """
        card = known or ModelCard(
            id=name, input_type=input_type_use(self.query_prompt, self.passage_prompt, self.default_prompt)
        )
        card = replace(
            card,
            query_prompt=card.query_prompt or self.query_prompt,
            passage_prompt=card.passage_prompt or self.passage_prompt,
            default_prompt=card.default_prompt or self.default_prompt or "",
        )
        if own:
            card = own.over(card)
        return replace(
            card,
            modes=self._modes,
            dimensions=self.dimensions,
            max_tokens=min(self.max_tokens, card.max_tokens or self.max_tokens),
            matryoshka=tuple(length for length in card.matryoshka if length < self.dimensions),
        )


def read_checkpoint(folder: Path, known: ModelCard | None = None) -> Checkpoint:
    """Read every description in a checkpoint folder.

    Args:
        folder: the checkpoint.
        known: the built-in card of the model that the folder is said to hold, where there is one.

    Raises:
        CheckpointInvalid: a file is missing or broken, or asks for something that is not supported; names the file.
    """
    if not folder.is_dir():
        raise CheckpointInvalid(f"{folder} is not a folder: a checkpoint is a folder that holds config.json")
    pipeline = read_pipeline(folder)
    backbone = pipeline.backbone if pipeline else folder
    if (backbone / "adapter_config.json").is_file():
        raise CheckpointInvalid(f"{backbone} holds an adapter: merge it into its model, and serve that")
    static = pipeline is not None and pipeline.static
    config = _static_config(backbone) if static else read_object(backbone / "config.json")
    model_type = config.get("model_type", "")
    if not model_type:
        raise CheckpointInvalid(f"{config.path}: no `model_type`, so its architecture is unknown")
    recipe = RECIPES.get(model_type)
    for part in recipe.parts if recipe else ():
        if not config.get(part, {}):
            raise config.wrong(part, "an object")
    if recipe is None and _names_code(config):
        _logger.warning(
            "%s names code of its own for %s, which is not run: transformers' own class of that type is used",
            config.path,
            model_type,
        )
    if pipeline is None:
        pipeline = plain_pipeline(folder, config, recipe, known)
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
        max_tokens=_static_length(backbone) if static else _max_tokens(config, sentence),
        lowercase=sentence.get("do_lower_case", default=False),
        query_prompt=query,
        passage_prompt=passage,
        default_prompt=default,
    )


def _names_code(config: JsonObject) -> bool:
    return "AutoModel" in config.get("auto_map", {})


def _static_config(folder: Path) -> JsonObject:
    """How many token vectors of which length there are to be looked up, in the words of a ``config.json``."""
    path = folder / "model.safetensors"
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingDependency(f"to read {path} needs a package: pip install 'embeddings-mcp[local]'") from error
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
            raise CheckpointInvalid(f"{path}: no `embedding.weight`, nor model2vec's `embeddings`, of token vectors")


def _static_length(folder: Path) -> int:
    """The longest text: with token vectors that are looked up, as ``tokenizer.json`` says."""
    cut = JsonObject(
        folder / "tokenizer.json", read_object(folder / "tokenizer.json", optional=True).get("truncation", {})
    )
    return min(_STATIC_LENGTH, _limit(cut, "max_length") or _STATIC_LENGTH)


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
    if default and default not in prompts.fields.keys() | _PLACES:
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
        limits.append(positions - _first_position(config))
    known = [limit for limit in limits if limit is not None]
    return min(known, default=_UNKNOWN_LENGTH)


def _has_endless_positions(config: JsonObject) -> bool:
    """Whether positions are angles, which never run out, and those of a token are the same in texts of any length."""
    said = [config.fields.get(key) for key in ("rope_parameters", "rope_scaling")]
    # One of them, or one for each type of layer.
    kinds = [kind for one in said if isinstance(one, dict) for kind in (one, *one.values()) if isinstance(kind, dict)]
    if any(kind.get("rope_type", kind.get("type")) in _BY_LENGTH for kind in kinds):
        return False
    return bool(kinds) or any(key.endswith(("rope_theta", "rotary_emb_base")) for key in config.fields)


def _limit(config: JsonObject, key: str) -> int | None:
    """A limit, or None where there is none: a tokenizer without one writes 10^30, and some configs -1."""
    value = config.fields.get(key)
    if value is None:
        return None
    if type(value) not in {int, float}:
        raise config.wrong(key, "a number")
    return int(value) if 0 < value < 10**9 else None


def _first_position(config: JsonObject) -> int:
    if config.get("model_type", "") not in OFFSET_POSITIONS:
        return 0
    return 1 + config.get("pad_token_id", 1)


def _hidden_size(config: JsonObject) -> int:
    key = next((key for key in ("hidden_size", "d_model", "dim", "n_embd") if key in config.fields), None)
    if key is None and any(part in config.fields for part in _PARTS):
        raise CheckpointInvalid(
            f"{config.path}: a model of several parts, such as one for texts and images, is not supported"
        )
    return config.size(key or "hidden_size")
