"""Normalisation layers and the DeepNorm constants."""

from __future__ import annotations

from torch import nn

from trainers.config import ModelConfig

DEFAULT_EPS = {"layernorm": 1e-5, "rmsnorm": 1e-6, "deepnorm": 1e-5}


def build_norm(kind: str, config: ModelConfig) -> nn.Module:
    """A norm over the last d_model features; LayerNorm has weight and bias, RMSNorm (arXiv:1910.07467) a weight alone.

    DeepNorm blocks use LayerNorm: what is deep about them is the residual scale and the initialisation.
    """
    eps = config.norm_eps or DEFAULT_EPS[kind]
    if kind == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=eps)
    return nn.LayerNorm(config.d_model, eps=eps)


def build_final_norm(config: ModelConfig) -> nn.Module:
    """The norm between the last block and the head: the blocks' own kind, RMSNorm, or nothing."""
    if config.final_norm == "none":
        return nn.Identity()
    return build_norm(config.norm if config.final_norm == "same" else config.final_norm, config)


def deepnorm_alpha(n_layers: int) -> float:
    """(2N)^(1/4): the factor on the residual of an N-layer decoder (DeepNet, arXiv:2203.00555, table 1)."""
    return float((2 * n_layers) ** 0.25)


def deepnorm_beta(n_layers: int) -> float:
    """(8N)^(-1/4): the Xavier gain of feed-forward, value and output projections (arXiv:2203.00555, table 1)."""
    return float((8 * n_layers) ** -0.25)
