"""How many tokens a checkpoint accepts in one text, and at which position id a text starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embeddings_mcp.embedders.local.json_file import JsonObject, read_object

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
"""Model types whose position ids start after the padding id, as in fairseq."""

_N_POSITIONS_TYPES = frozenset({"codegen", "ctrl", "gpt-sw3", "gpt2", "gpt_bigcode", "gptj", "openai-gpt"})
"""Model types that call their limit ``n_positions``. T5 has a field of that name too, but it limits nothing."""

_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope", "su"})
"""RoPE types whose rotation angles depend on the length of the text."""

_DEFAULT_MAX_TOKENS = 512
"""Limit in tokens if no file of the checkpoint gives one."""

_STATIC_MAX_TOKENS = 32_768
"""Limit in tokens for static embeddings, whose checkpoint need not give one."""


def max_tokens(config: JsonObject, sentence_config: JsonObject) -> int:
    """Return the length in tokens of the longest text that a transformer accepts.

    This is the minimum of two limits: ``max_seq_length`` of the sentence encoder, or else ``model_max_length`` of the
    tokenizer; and the number of position embeddings. If ``max_seq_length`` is given, and positions are rotary with
    angles that do not depend on a text's length, it is the only limit.

    Args:
        config: the transformer's ``config.json``.
        sentence_config: ``sentence_bert_config.json``.

    Raises:
        CheckpointInvalid: a limit is not a number.
    """
    max_seq_length = _read_limit(sentence_config, "max_seq_length")
    if max_seq_length is not None and _has_unbounded_positions(config):
        return max_seq_length
    tokenizer_config = read_object(config.path.with_name("tokenizer_config.json"), optional=True)
    limits = [_read_limit(tokenizer_config, "model_max_length") if max_seq_length is None else max_seq_length]
    key = "n_positions" if config.get("model_type", "") in _N_POSITIONS_TYPES else "max_position_embeddings"
    if positions := _read_limit(config, key):
        limits.append(positions - first_position(config))
    return min((limit for limit in limits if limit is not None), default=_DEFAULT_MAX_TOKENS)


def static_max_tokens(folder: Path) -> int:
    """Return the length in tokens of the longest text for static embeddings: the truncation of ``tokenizer.json``.

    Raises:
        CheckpointInvalid: the limit is not a number.
    """
    path = folder / "tokenizer.json"
    truncation = JsonObject(path, read_object(path, optional=True).get("truncation", {}))
    return min(_STATIC_MAX_TOKENS, _read_limit(truncation, "max_length") or _STATIC_MAX_TOKENS)


def first_position(config: JsonObject) -> int:
    """Return the position id of a text's first token."""
    if config.get("model_type", "") not in OFFSET_POSITIONS:
        return 0
    return 1 + config.get("pad_token_id", 1)


def rope_parameter_sets(value: object) -> list[dict[str, Any]]:
    """Return the sets of RoPE parameters that a config's field holds: one, or one per layer type."""
    if not isinstance(value, dict):
        return []
    return [parameters for parameters in (value, *value.values()) if isinstance(parameters, dict)]


def _has_unbounded_positions(config: JsonObject) -> bool:
    """Return whether positions are rotary (RoPE), with angles that do not depend on the length of the text."""
    parameter_sets = [
        parameters
        for key in ("rope_parameters", "rope_scaling")
        for parameters in rope_parameter_sets(config.fields.get(key))
    ]
    if any(
        parameters.get("rope_type", parameters.get("type")) in _LENGTH_DEPENDENT_ROPE for parameters in parameter_sets
    ):
        return False
    return bool(parameter_sets) or any(key.endswith(("rope_theta", "rotary_emb_base")) for key in config.fields)


def _read_limit(config: JsonObject, key: str) -> int | None:
    """Return a limit, or None if there is none: a tokenizer without one stores 10^30, and some configs -1."""
    value = config.fields.get(key)
    if value is None:
        return None
    if type(value) not in {int, float}:
        raise config.invalid(key, "a number")
    return int(value) if 0 < value < 10**9 else None
