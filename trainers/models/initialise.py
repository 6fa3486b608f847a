"""The initial weights of a GPT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainers.config import ModelConfig
from trainers.models.gpt import GPT, Block, SwiGlu
from trainers.models.norms import deepnorm_beta
from trainers.models.positions import Rotary, Sinusoidal


@torch.no_grad()
def initialise(model: GPT) -> None:
    """Fills every weight and table in place, drawing from the global generator of the model's device.

    Linear and embedding weights N(0, init_std), biases 0, norms 1 and 0, without depth scaling. DeepNorm blocks are
    Xavier-normal instead: gain beta = (8N)^(-1/4) on value, output and feed-forward matrices, gain 1 on query and key
    (arXiv:2203.00555, figure 2).
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            _normal(module, model.config.init_std)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.reset_parameters()
        elif isinstance(module, (Rotary, Sinusoidal)):
            module.fill()
    if model.config.norm == "deepnorm":  # draws again what the pass over all modules has drawn
        for block in model.blocks:
            assert isinstance(block, Block)
            _deepnorm(block, model.config)


def _normal(module: nn.Linear | nn.Embedding, std: float) -> None:
    nn.init.normal_(module.weight, 0.0, std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _deepnorm(block: Block, config: ModelConfig) -> None:
    beta = deepnorm_beta(config.n_layers)
    query, key, value = block.attention.qkv.weight.chunk(3)
    for matrix, gain in ((query, 1.0), (key, 1.0), (value, beta), (block.attention.out.weight, beta)):
        nn.init.xavier_normal_(matrix, gain)
    for matrix in _ffn_matrices(block):
        nn.init.xavier_normal_(matrix, beta)


def _ffn_matrices(block: Block) -> tuple[Tensor, ...]:
    """The feed-forward matrices one by one: fused ones have another fan-out, hence another Xavier width."""
    if isinstance(block.ffn, SwiGlu):
        return (*block.ffn.gate_up.weight.chunk(2), block.ffn.down.weight)
    return (block.ffn.up.weight, block.ffn.down.weight)
