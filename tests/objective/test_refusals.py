"""What an objective refuses because its numbers would be of something else, and what it then says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import curvature as cv


class Language(nn.Module):
    """A causal model that takes and returns what Hugging Face's do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embedding(input_ids).cumsum(1).tanh())}


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.last, self.use_reentrant = nn.Linear(3, 4), nn.Linear(4, 2), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return checkpoint(lambda h: self.last(h.tanh()), hidden, use_reentrant=self.use_reentrant)


def test_labels_that_are_the_inputs_are_refused():
    ids = torch.randint(0, 11, (5, 6))
    labels = ids.masked_fill(torch.arange(6) > 3, -100)
    with pytest.raises(cv.BadObjective, match=r"compared with its own token.*Shift the labels"):
        cv.Objective.of(Language(), "cross-entropy", {"input_ids": ids, "labels": labels}).check()


def test_labels_shifted_by_one_are_taken():
    ids = torch.randint(0, 11, (5, 7))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    model = Language()
    expected = nn.functional.cross_entropy(model(ids[:, :-1])["logits"].flatten(0, 1), ids[:, 1:].flatten())
    objective = cv.Objective.of(model, "cross-entropy", batch)
    objective.check()
    assert objective.value() == pytest.approx(float(expected.detach()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_is_left_out(use_reentrant):
    """Its second forward pass would run with the module's own parameters, which need not be those of the objective."""
    data = (torch.randn(8, 3), torch.randn(8, 2))
    model = Checkpointed(use_reentrant)
    plain = nn.Sequential(model.first, nn.Tanh(), model.last)
    for matrix in (cv.hessian, cv.ggn):
        dense, expected = (matrix(cv.Objective.of(m, "mse", data)).dense() for m in (model, plain))
        torch.testing.assert_close(dense, expected)
