"""Causal multi-head self-attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trainers.config import ModelConfig
from trainers.models.kv_cache import KvCache
from trainers.models.positions import Rotation


class Attention(nn.Module):
    """Softmax attention with scale 1/sqrt(head width); dropout on the attention weights while training."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.head_width = config.d_model // config.n_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=config.bias)  # query, key, value rows in order
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, rotate: Rotation) -> Tensor:
        """x (rows, T, d_model) -> (rows, T, d_model); position t sees positions up to t."""
        query, key, value = self._project(x, rotate)
        dropout = self.dropout if self.training else 0.0
        return self._join(F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True))

    def decode(self, x: Tensor, rotate: Rotation, cache: KvCache, layer: int) -> Tensor:
        """Like forward for the columns that the cache announced, looking at what it remembers besides."""
        query, key, value = self._project(x, rotate)
        key, value = cache.append(layer, key, value)
        return self._join(F.scaled_dot_product_attention(query, key, value, attn_mask=cache.mask))

    def _project(self, x: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (rows, heads, T, head_width)."""
        rows, length, _ = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.n_heads, self.head_width)
        query, key = rotate(qkv[:, :, :2]).unbind(2)
        value = qkv[:, :, 2]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _join(self, heads: Tensor) -> Tensor:
        rows, _, length, _ = heads.shape
        out: Tensor = self.out(heads.transpose(1, 2).reshape(rows, length, self.n_heads * self.head_width))
        return out
