"""NV-Embed's latent attention: cross-attention of token vectors to learned latents (arXiv 2405.17428, section 3.1).

With h the token vectors and L the latents: ``y = to_out(softmax(q k' / sqrt(d)) v) + h`` where ``q = to_q(LN(h))`` and
``k, v = to_kv(LN(L))``, then ``z = net2(a * gelu(b)) + y`` where ``a, b = net0(LN(y))``. Tokens do not
attend to each other here, so a packed row needs no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import gelu, scaled_dot_product_attention

LATENT_ATTENTION = "latent_attention_model."
"""Prefix of the layer's tensor names in a checkpoint."""

_CHUNK_TOKENS = 2048
"""Number of tokens to process at once. Every head is as wide as the model, so that the queries of a large batch would
take more memory than the model itself."""


class _CrossAttention(torch.nn.Module):
    def __init__(self, *, latent: int, hidden: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = torch.nn.Linear(latent, heads * width, bias=False)
        self.to_kv = torch.nn.Linear(hidden, 2 * heads * width, bias=False)
        self.to_out = torch.nn.Linear(heads * width, latent, bias=False)

    def forward(self, queries: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        key, value = self.to_kv(context).chunk(2, dim=-1)
        attended = scaled_dot_product_attention(
            self._split(self.to_q(queries)), self._split(key), self._split(value)
        )  # [heads, tokens, width]
        joined: torch.Tensor = self.to_out(attended.transpose(0, 1).flatten(1))
        return joined

    def _split(self, rows: torch.Tensor) -> torch.Tensor:
        """Reshape ``[n, heads * width]`` to ``[heads, n, width]``."""
        return rows.view(len(rows), self.heads, -1).transpose(0, 1)


class _GatedFeedForward(torch.nn.Module):
    def __init__(self, latent: int) -> None:
        super().__init__()
        # In the checkpoint, the two layers have the indices 0 and 2 of a list; index 1 has no weights.
        self.net = torch.nn.ModuleList(
            [torch.nn.Linear(latent, 8 * latent), torch.nn.Identity(), torch.nn.Linear(4 * latent, latent)]
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        values, gates = self.net[0](rows).chunk(2, dim=-1)
        result: torch.Tensor = self.net[2](values * gelu(gates))
        return result


class _AttentionBlock(torch.nn.Module):
    """Cross-attention with layer norms before it and a residual connection."""

    def __init__(self, attention: _CrossAttention, *, latent: int, hidden: int) -> None:
        super().__init__()
        self.fn = attention
        self.norm = torch.nn.LayerNorm(latent)
        self.norm_context = torch.nn.LayerNorm(hidden)

    def forward(self, rows: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fn(self.norm(rows), self.norm_context(context)) + rows
        return result


class _FeedForwardBlock(torch.nn.Module):
    """The feed-forward layer with a layer norm before it and a residual connection."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.fn = _GatedFeedForward(latent)
        self.norm = torch.nn.LayerNorm(latent)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fn(self.norm(rows)) + rows
        return result


class LatentAttention(torch.nn.Module):
    """The latent attention layer. Its parameters have the names that they have in the checkpoint.

    Args:
        config: the checkpoint's ``latent_attention_config``; the defaults are those of NV-Embed's own class.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        latent, hidden = int(config.get("latent_dim", 4096)), int(config.get("hidden_dim", 4096))
        attention = _CrossAttention(
            latent=latent,
            hidden=hidden,
            heads=int(config.get("num_cross_heads", 8)),
            width=int(config.get("cross_dim_head", 4096)),
        )
        self.latents = torch.nn.Parameter(torch.empty(int(config.get("num_latents_value", 512)), hidden))
        self.cross_attend_blocks = torch.nn.ModuleList(
            [_AttentionBlock(attention, latent=latent, hidden=hidden), _FeedForwardBlock(latent)]
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the layer to token vectors: ``[tokens, d]`` to ``[tokens, d]``."""
        return torch.cat([self._forward_chunk(rows) for rows in torch.split(hidden, _CHUNK_TOKENS)])

    def _forward_chunk(self, hidden: torch.Tensor) -> torch.Tensor:
        attention, feed_forward = self.cross_attend_blocks
        result: torch.Tensor = feed_forward(attention(hidden, self.latents))
        return result
