"""Healthy models that the check of second derivatives must not refuse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature as cv


class NormalisesInSingle(nn.Module):
    """Computes a part of itself in float32 whatever it is given, as code made for mixed precision does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        unit = hidden.float() / hidden.float().square().mean(-1, keepdim=True).sqrt()
        return self.last(self.norm.weight * unit.to(x.dtype))


class Bag(nn.Module):
    """Uses its padding row, as a transformer without attention mask does, and never trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 3, bias=False)
        nn.init.normal_(self.embedding.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.embedding(tokens).tanh().mean(1))


def test_rounding_inside_the_model_is_not_mistaken_for_a_wrong_derivative():
    data = (torch.randn(16, 6), torch.randn(16, 2))
    health = cv.Objective.of(NormalisesInSingle(), "mse", data).check()
    assert health.difference is not None and health.difference < 1e-3


def test_a_padding_row_in_use_counts_as_held_fixed():
    tokens, labels = torch.randint(0, 7, (12, 5)), torch.randint(0, 3, (12,))
    model = Bag().double()

    def loss(flat: Tensor) -> Tensor:
        embedding, last = flat[:28].view(7, 4), flat[28:].view(3, 4)
        return F.cross_entropy(embedding[tokens].tanh().mean(1) @ last.T, labels)

    exact = torch.autograd.functional.hessian(loss, torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    exact[:4] = exact[:, :4] = 0
    dense = cv.hessian(cv.Objective.of(model, "cross-entropy", (tokens, labels))).dense()
    torch.testing.assert_close(dense, exact)
