"""How much of the gradient lies where the loss curves most."""

from __future__ import annotations

import pytest
import torch
from objectives import zoo

import curvature as cv

CASE = next(case for case in zoo() if case.name == "classifier")


def test_the_share_is_that_of_the_dense_projection():
    objective = CASE.objective((4, 5))
    found = cv.gradient_share(objective, cv.eigsh(cv.hessian(objective), 4, rtol=1e-10))
    (gradient,) = torch.autograd.grad(CASE.value(x := CASE.flat.requires_grad_()), x)
    vectors = torch.linalg.eigh(CASE.dense_hessian()).eigenvectors.flip(1)[:, :4]
    expected = (vectors.T @ gradient).square().cumsum(0) / gradient.square().sum()
    torch.testing.assert_close(found.value, expected, rtol=1e-6, atol=1e-9)
    parts = []
    for start, stop in ((0, 4), (4, 9)):
        flat = CASE.flat.requires_grad_()
        outputs = CASE.outputs(flat)[start:stop]
        (gradient,) = torch.autograd.grad(CASE.mean_loss(outputs, CASE.targets[start:stop]), flat)
        parts.append((vectors.T @ gradient).square().cumsum(0) / gradient.square().sum())
    batches = torch.stack(parts)
    torch.testing.assert_close(found.batches, batches.mean(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.batches_stderr, batches.std(0) / 2**0.5, rtol=1e-6, atol=1e-9)


def test_all_directions_hold_all_of_it():
    objective = CASE.objective()
    found = cv.gradient_share(objective, cv.eigsh(cv.hessian(objective), objective.space.size))
    assert float(found.value[-1]) == pytest.approx(1) and found.batches_stderr.isnan().all()


def test_overlap_of_subspaces():
    eye = torch.eye(6).double()
    spans = [
        cv.eigsh(cv.Dense(torch.diag(torch.tensor(d).double())), 2) for d in ([9, 8, 1, 1, 1, 1], [1, 9, 8, 1, 1, 1])
    ]
    assert cv.subspace_overlap(spans[0], spans[0]) == pytest.approx(1)
    assert cv.subspace_overlap(*spans) == pytest.approx(0.5)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()).Q
    other = cv.eigsh(cv.Dense(turned @ torch.diag(torch.tensor([9, 8, 1, 1, 1, 1]).double()) @ turned.T), 2)
    angles = torch.linalg.svdvals(eye[:2] @ turned[:, :2]).square().mean()
    assert cv.subspace_overlap(spans[0], other) == pytest.approx(float(angles))


def test_vectors_of_another_model_are_refused():
    with pytest.raises(ValueError, match="of this model"):
        cv.gradient_share(CASE.objective(), cv.eigsh(cv.Dense(torch.eye(3).double()), 2))
