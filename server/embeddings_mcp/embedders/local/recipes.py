"""Model families whose checkpoints have a layout of their own.

Their repositories come with code; a recipe describes the same model in terms of transformers' own classes. Recipes are
keyed by the ``model_type`` of ``config.json``; to add a family, add an entry. The reference vectors in tests/golden
compare each family with its authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
"""How token vectors are pooled, in the order in which sentence-transformers concatenates several modes."""

Config = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a family differs from a plain transformers model.

    Attributes:
        backbone: maps the checkpoint's config to the config of the transformers class that the family builds on.
        parts: objects that the checkpoint's config must contain.
        prefix: prefix of the backbone's tensor names.
        suffix: text appended to every input before tokenization.
        latent_attention: whether the token vectors pass through NV-Embed's latent attention.
        pooled_prompt_tokens: if set, the prompt is left out of the pooling except for this many tokens at its end;
            None if the checkpoint's pipeline decides.
    """

    backbone: Callable[[Config], Config]
    parts: tuple[str, ...] = ()
    prefix: str = ""
    suffix: Callable[[Config], str] = lambda _config: ""
    latent_attention: bool = False
    pooled_prompt_tokens: int | None = None


def _bidirectional_llama(config: Config) -> Config:
    """Llama without the causal mask (NVIDIA's LlamaBidirectionalModel)."""
    return config | {"model_type": "llama", "is_causal": False}


def _nv_embed(config: Config) -> Config:
    """Mistral without the causal mask, and without the sliding window of its config, which was never used either."""
    text: Config = config["text_config"]
    return text | {"model_type": "mistral", "is_causal": False, "sliding_window": None}


RECIPES: Mapping[str, Recipe] = {
    "llama_bidirec": Recipe(backbone=_bidirectional_llama),
    "nvembed": Recipe(
        backbone=_nv_embed,
        parts=("text_config", "latent_attention_config"),
        prefix="embedding_model.",
        suffix=lambda config: "</s>" if config.get("add_eos", True) else "",
        latent_attention=True,
        # The reference counts the prompt's tokens without <s>, and then skips that many starting from <s>, so the last
        # prompt token is pooled. That token is a lone space, which either merges into the text's first word or is
        # pooled as a token of its own.
        pooled_prompt_tokens=1,
    ),
}

MEAN_POOLED = frozenset({"nvidia/nv-embedqa-e5-v5"})
"""Models published without sentence-transformers' files: mean over all tokens, then normalized to length 1."""

UNPOOLED_PROMPTS = frozenset({"hkunlp/instructor-base", "hkunlp/instructor-large", "hkunlp/instructor-xl"})
"""Models whose prompt is not pooled, although their files do not say so; sentence-transformers names them too."""

NVIDIA_POOLING_NAMES: Mapping[str, PoolingMode] = {"avg": "mean", "cls": "cls", "last": "lasttoken"}
"""The names of pooling modes in NVIDIA's ``config.json``."""
