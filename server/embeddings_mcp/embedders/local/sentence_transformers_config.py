"""sentence-transformers' own config files: what is supported of them, and the prompts that they define."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embeddings_mcp.embedders.local.json_file import JsonObject, read_object
from embeddings_mcp.errors import CheckpointInvalid

_MODEL_TYPE = "SentenceTransformer"
"""``model_type`` of a model that makes one dense vector per text."""

_REQUIRED: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "processing_kwargs": {},
    "query_length": 0,
    "document_length": 0,
    "query_expansion": {},
}
"""Fields of ``sentence_bert_config.json`` that would change vectors, with their default, the only supported value."""

_LOADER_ARGUMENTS = ("config_args", "config_kwargs", "tokenizer_args", "processor_kwargs")
"""Fields of ``sentence_bert_config.json`` with arguments for transformers' loaders of the config and the tokenizer.
They override the files."""

_HARMLESS_ARGUMENTS = frozenset(
    {"cache_dir", "local_files_only", "padding_side", "revision", "token", "trust_remote_code", "use_fast"}
)
"""Loader arguments that do not change the loaded config or tokenizer, or have no effect without padding."""

_TEXT_MODALITY = {"method": "forward", "method_output_name": "last_hidden_state"}
"""The ``modality_config`` of texts whose last hidden state is pooled."""

_BUILTIN_PROMPTS = frozenset({"query", "document"})
"""Prompts that sentence-transformers always defines; empty if the checkpoint does not set them."""


def read_sentence_config(folder: Path) -> JsonObject:
    """Read ``sentence_bert_config.json``, under any of the names that it may have; empty if there is none.

    Raises:
        CheckpointInvalid: the file is broken, or asks for something that is not supported.
    """
    names = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    paths = (folder / f"sentence_{name}_config.json" for name in names)
    config = next((read_object(path) for path in paths if path.is_file()), JsonObject(folder, {}))
    for key, required in _REQUIRED.items():
        if config.get(key, required) != required:
            raise config.invalid(key, f"{required!r}: nothing else is supported")
    for key in _LOADER_ARGUMENTS:
        if not config.get(key, {}).keys() <= _HARMLESS_ARGUMENTS:
            raise config.invalid(key, "empty: set these in config.json or tokenizer_config.json")
    modalities = config.get("modality_config", {})
    if "message" in modalities:
        raise CheckpointInvalid(f"{config.path}: chat templates around texts are not supported")
    if modalities.get("text", _TEXT_MODALITY) != _TEXT_MODALITY:
        raise config.invalid("modality_config", f"{ {'text': _TEXT_MODALITY} }: nothing else is supported for texts")
    return config


def read_model_config(folder: Path) -> JsonObject:
    """Read ``config_sentence_transformers.json``; empty if there is none.

    Raises:
        CheckpointInvalid: the file is broken, or describes a model of another kind.
    """
    config = read_object(folder / "config_sentence_transformers.json", optional=True)
    if config.get("model_type", _MODEL_TYPE) != _MODEL_TYPE:
        raise config.invalid("model_type", f"{_MODEL_TYPE!r}: models of other kinds do not make one vector per text")
    return config


def read_prompts(config: JsonObject) -> tuple[str, str, str | None]:
    """Return the prompts for queries, for passages, and for texts without an input type.

    Args:
        config: ``config_sentence_transformers.json``.

    Raises:
        CheckpointInvalid: a prompt is not a string, or the default prompt does not exist.
    """
    prompts = JsonObject(config.path, config.get("prompts", {}))
    passage_prompts = (prompts.get(name, "") for name in ("document", "passage", "corpus"))
    default = config.get("default_prompt_name", "")
    if default and default not in prompts.fields.keys() | _BUILTIN_PROMPTS:
        raise config.invalid("default_prompt_name", f"one of {', '.join(map(repr, prompts.fields)) or 'its prompts'}")
    default_prompt = prompts.get(default, "") if default else None
    return prompts.get("query", ""), next(filter(None, passage_prompts), ""), default_prompt
