"""A decoder-only transformer whose ModelConfig covers every dense architecture of the presets."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainers.config import ModelConfig
from trainers.models.attention import Attention
from trainers.models.kv_cache import KvCache
from trainers.models.norms import build_final_norm, build_norm, deepnorm_alpha
from trainers.models.positions import Rotary, Rotation, Sinusoidal, unrotated
from trainers.models.state import State


class Gelu(nn.Module):
    """linear, exact GELU, dropout, linear."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.up = nn.Linear(config.d_model, config.ffn_width, bias=config.bias)
        self.down = nn.Linear(config.ffn_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, T, d_model) -> the same shape."""
        out: Tensor = self.down(F.dropout(F.gelu(self.up(x)), self.dropout, self.training))
        return out


class SwiGlu(nn.Module):
    """down(silu(gate x) * up x) (Shazeer, arXiv:2002.05202); gate and up are one matrix, gate first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.gate_up = nn.Linear(config.d_model, 2 * config.ffn_width, bias=config.bias)
        self.down = nn.Linear(config.ffn_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, T, d_model) -> the same shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.dropout(F.silu(gate) * up, self.dropout, self.training))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each in a residual branch.

    pre:      x + f(norm(x))
    post:     norm(x + f(x))
    deepnorm: norm(alpha x + f(x)), alpha = (2N)^(1/4)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.pre = config.norm_position == "pre"
        self.alpha = deepnorm_alpha(config.n_layers) if config.norm == "deepnorm" else 1.0
        self.attention_norm = build_norm(config.norm, config)
        self.attention = Attention(config)
        self.ffn_norm = build_norm(config.norm, config)
        self.ffn = SwiGlu(config) if config.activation == "swiglu" else Gelu(config)

    def forward(self, x: Tensor, rotate: Rotation) -> Tensor:
        """(rows, T, d_model) -> the same shape."""
        return self._branches(x, lambda inner: self.attention(inner, rotate))

    def decode(self, x: Tensor, rotate: Rotation, cache: KvCache, layer: int) -> Tensor:
        """Like forward, for the columns that the cache announced."""
        return self._branches(x, lambda inner: self.attention.decode(inner, rotate, cache, layer))

    def _branches(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        x = self._residual(x, attend, self.attention_norm)
        return self._residual(x, self.ffn, self.ffn_norm)

    def _residual(self, x: Tensor, branch: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        if self.pre:
            return x + F.dropout(branch(norm(x)), self.dropout, self.training)
        update = F.dropout(branch(x), self.dropout, self.training)
        out: Tensor = norm(update.add(x, alpha=self.alpha))
        return out


class GPT(nn.Module):
    """Token and position embeddings, N blocks, a final norm, a head without bias.

    A tied head is the embedding matrix itself, so `state_dict` holds it once. `build_model` is the way to make one:
    the constructor alone leaves weights unset.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.context_length = config.context_length
        self.vocab_size = vocab_size
        self.dropout = config.dropout
        self.activation_checkpointing = config.activation_checkpointing
        # Vaswani et al. 2017, section 3.4: beside unit sinusoids, token vectors of 0.02 would hardly be seen
        self.embedding_scale = math.sqrt(config.d_model) if config.positions == "sinusoidal" else 1.0
        self.embedding = _unset_embedding(vocab_size, config.d_model)
        self.positions = _positions(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = build_final_norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, vocab_size, bias=False)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, None]:
        """tokens int64 (rows, T), T <= context_length -> logits (rows, T, vocab_size), and no state."""
        assert state is None, "a GPT carries no runtime state"
        return self._logits(self.hidden(tokens)), None

    def initial_state(self, rows: int) -> None:
        """None: nothing is carried between chunks."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens int64 (rows, T) -> hidden states after the final norm (rows, T, d_model)."""
        length = tokens.shape[1]
        assert length <= self.context_length, f"{length} tokens in a context of {self.context_length}"
        if isinstance(self.positions, Rotary):
            x, rotate = self._embed(tokens), self.positions.first(length)
        else:
            x, rotate = self._embed(tokens, self.positions.weight[:length]), unrotated
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                # non-reentrant: works under DDP and compile, and replays the dropout masks from the saved RNG state
                x = checkpoint(block, x, rotate, use_reentrant=False)
            else:
                x = block(x, rotate)
        out: Tensor = self.final_norm(x)
        return out

    def new_cache(self, rows: int) -> KvCache:
        """An empty cache for `decode` on the model's device."""
        return KvCache(rows, len(self.blocks), self.context_length, self.embedding.weight.device)

    def decode(self, tokens: Tensor, cache: KvCache, counts: Tensor | None = None) -> Tensor:
        """Reads tokens (rows, T) behind what the cache holds; logits (rows, vocab_size) of what follows each row.

        counts int64 (rows,): how many of a row's tokens are real, at least one, the rest being padding on the right;
        None: all. ValueError where a row would exceed context_length.
        """
        rows, width = tokens.shape
        counts = tokens.new_full((rows,), width) if counts is None else counts
        cache.begin(width, counts)
        if isinstance(self.positions, Rotary):
            x, rotate = self._embed(tokens), self.positions.at(cache.positions)
        else:
            x, rotate = self._embed(tokens, self.positions.weight[cache.positions]), unrotated
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x = block.decode(x, rotate, cache, layer)
        cache.commit()
        last = x[torch.arange(rows, device=x.device), counts - 1]
        return self._logits(self.final_norm(last))

    def _embed(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        x: Tensor = self.embedding(tokens)
        if positions is not None:
            if self.config.dropout_positions:
                positions = F.dropout(positions, self.dropout, self.training)
            x = positions.add(x, alpha=self.embedding_scale)
        return F.dropout(x, self.dropout, self.training)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight if self.head is None else self.head.weight)


def _unset_embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without values: nn.Embedding's own draw costs 1.2 s of imports on the meta device."""
    unset = torch.empty(rows, width)
    return nn.Embedding(rows, width, _weight=unset)


def _positions(config: ModelConfig) -> nn.Embedding | Sinusoidal | Rotary:
    """The one position scheme of the configuration."""
    if config.positions == "learned":
        return _unset_embedding(config.context_length, config.d_model)
    if config.positions == "sinusoidal":
        return Sinusoidal(config.context_length, config.d_model)
    return Rotary(
        config.context_length,
        config.d_model // config.n_heads,
        config.rope_base,
        interleaved=config.positions == "rope_interleaved",
    )
