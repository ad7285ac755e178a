"""Architectures of the three embedded models, untrained.

The two digits models are `nn.Sequential` of stock layers, so that `weights_only=True` can load a pickled copy
once their classes are allowed; `CharGPT` is a transformer as users write them: a module class, fused causal
attention, a tied output head.
Weights start from the global generator, as in any torch module; `curvature.assets.make` seeds it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def digits_mlp() -> nn.Sequential:
    """Tanh network 64-32-32-10 from pixels (N, 64) to logits (N, 10), 3,466 parameters."""
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


def digits_cnn() -> nn.Sequential:
    """Smooth convolutional network from pixels (N, 64) to logits (N, 10), 38,570 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(64, 32, kernel_size=3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


def char_gpt(vocabulary: int) -> CharGPT:
    """Two-layer transformer over `vocabulary` characters; 62,832 parameters for the 65 of Hamlet."""
    return CharGPT(vocabulary)


class CharGPT(nn.Module):
    """Decoder-only transformer whose output head is its token embedding, so that matrix has one name.

    Maps ids (N, T) with T at most `context` to next-character logits (N, T, vocabulary).
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        context: int = 64,
        width: int = 48,
        heads: int = 4,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.1)  # torch's std of 1 starts a tied head at logits near 7

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (N, T, vocabulary) of the character after each of `ids` (N, T)."""
        length, context = ids.shape[1], self.positions.num_embeddings
        if length > context:
            raise ValueError(f"CharGPT reads at most {context} characters, got {length}: shorten the input.")
        x = self.tokens(ids) + self.positions(torch.arange(length, device=ids.device))  # (N, T, width)
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


class Block(nn.Module):
    """Pre-norm transformer block: attention then perceptron, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), CausalAttention(width, heads))
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Activations (N, T, width) after both residual branches."""
        x = x + self.attention(x)
        return x + self.perceptron(x)


class CausalAttention(nn.Module):
    """Multi-head attention of each position to itself and those before it, on torch's default backend."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attended values (N, T, width) of activations (N, T, width)."""
        queries, keys, values = self.projection(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)  # (N, heads, T, d)
        return self.output(attended.transpose(1, 2).flatten(2))
