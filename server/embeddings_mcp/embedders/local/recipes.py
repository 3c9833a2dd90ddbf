"""Families whose checkpoints say in a way of their own what they are.

Their repositories come with code; a recipe says the same in a few words, over transformers' own classes. It is found by
the ``model_type`` of ``config.json``; adding a family is adding a row. The reference vectors in tests/golden hold each
to its authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
"""How token vectors become one; in the order in which sentence-transformers joins several."""

Config = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a family differs from a plain transformers model.

    Attributes:
        backbone: from the checkpoint's config to that of the transformers class which the family is built from.
        parts: objects that the checkpoint's config must hold.
        prefix: what stands before the backbone's tensor names.
        suffix: text that goes behind every input, before tokenizing.
        latent_attention: whether the token vectors pass through NV-Embed's latent attention.
        pooled_of_prompt: tokens at the end of a prompt that are pooled all the same; None where all of it is.
    """

    backbone: Callable[[Config], Config]
    parts: tuple[str, ...] = ()
    prefix: str = ""
    suffix: Callable[[Config], str] = lambda _config: ""
    latent_attention: bool = False
    pooled_of_prompt: int | None = None


def _bidirectional_llama(config: Config) -> Config:
    """Llama without the causal mask (NVIDIA's LlamaBidirectionalModel)."""
    return config | {"model_type": "llama", "is_causal": False}


def _nv_embed(config: Config) -> Config:
    """Mistral without the causal mask; the sliding window of its config was never used either."""
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
        # The reference counts the prompt's tokens without <s>, and then leaves out that many from <s> on. The last of
        # the prompt is a lone space, which joins the text's first word, or is pooled with it where it cannot.
        pooled_of_prompt=1,
    ),
}

PLAIN = frozenset({"nvidia/nv-embedqa-e5-v5"})
"""Cards whose checkpoints are published without sentence-transformers' files: mean over all tokens, then length 1."""

POOLING_WORDS: Mapping[str, PoolingMode] = {"avg": "mean", "cls": "cls", "last": "lasttoken"}
"""What NVIDIA's ``config.json`` calls the ways to pool."""
