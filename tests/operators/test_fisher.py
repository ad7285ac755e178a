"""Fisher matrices, gradient covariance, Jacobian and tangent kernel against dense matrices computed the obvious way."""

from __future__ import annotations

import pytest
import torch
from objectives import Case, zoo
from torch import Tensor, nn

import curvature as cv
from curvature.objective.losses import as_loss

ZOO = pytest.mark.parametrize("case", zoo(), ids=str)


def math_attention() -> object:
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


def uneven(case: Case) -> tuple[int, ...]:
    return 1, 5, len(case.inputs) - 6


def dense_jacobian(case: Case) -> Tensor:
    """(m, n): every output's derivative."""
    with math_attention():
        return torch.autograd.functional.jacobian(case.outputs, case.flat).reshape(-1, len(case.flat))


def residuals(case: Case) -> Tensor:
    """The derivatives of the sum of the losses in the outputs, shaped like these."""
    outputs = case.outputs(case.flat).detach().requires_grad_()
    total = case.mean_loss(outputs, case.targets) * as_loss(case.loss).weight(case.targets)
    return torch.autograd.grad(total, outputs)[0]


def gradients(case: Case, axes: tuple[int, ...]) -> Tensor:
    """One row for each index of the outputs outside `axes`: the gradient of all that belongs to it."""
    J, R = dense_jacobian(case), residuals(case)
    shape = [1 if axis in axes else length for axis, length in enumerate(R.shape)]
    terms = torch.Size(shape).numel()
    owner = torch.arange(terms).view(shape).expand(R.shape).reshape(-1)
    return torch.zeros(terms, J.shape[1]).double().index_add(0, owner, R.reshape(-1, 1) * J)


@ZOO
def test_the_empirical_fisher_is_the_second_moment_of_gradients_of_terms(case):
    loss = as_loss(case.loss)
    event = loss.event(case.outputs(case.flat), case.targets)
    G = gradients(case, event)
    expected = G.T @ G / loss.weight(case.targets)
    A = cv.empirical_fisher(case.objective(uneven(case)))
    torch.testing.assert_close(A.dense(), expected, rtol=1e-10, atol=1e-12)
    assert A.symmetric and A.psd


@ZOO
def test_the_gradient_covariance_is_that_of_examples(case):
    outputs = case.outputs(case.flat)
    G = gradients(case, tuple(range(1, outputs.ndim))) * len(case.inputs) / as_loss(case.loss).weight(case.targets)
    centred = G - G.mean(0)
    A = cv.gradient_covariance(case.objective(uneven(case)))
    torch.testing.assert_close(A.dense(), centred.T @ centred / len(G), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(G.mean(0), case.objective().gradient(), rtol=1e-9, atol=1e-12)


def test_the_gradient_covariance_says_so_and_has_no_regulariser():
    plain, decayed = (cv.gradient_covariance(zoo()[1].objective(l2=l2)) for l2 in (0.0, 0.3))
    result = cv.trace(decayed, products=2)
    assert result.origin.operator["operator"] == "gradient_covariance"
    assert result.cost.passes == 3  # for the mean, the number of examples and the products
    torch.testing.assert_close(decayed.dense(), plain.dense(), rtol=0, atol=0)


@ZOO
def test_the_sampled_fisher_approaches_the_ggn(case):
    """Its error falls with the square root of the samples: four times as many halve it."""
    objective = case.objective()
    G = cv.ggn(objective).dense()
    errors = []
    for samples in (32, 512):
        draws = [cv.fisher(objective, samples=samples, seed=seed).dense() - G for seed in range(8)]
        errors.append(float(torch.stack(draws).square().sum((1, 2)).mean().sqrt()))
    assert 2.5 < errors[0] / errors[1] < 6.5
    assert errors[1] < 0.3 * float(G.norm())


@ZOO
def test_the_sampled_fisher_is_one_matrix_however_it_is_computed(case):
    rows = cv.hessian(case.objective()).domain.draw(3, seed=1)
    expected = cv.fisher(case.objective(), samples=2, seed=5).apply(rows)
    for sizes, engine in (
        (uneven(case), "retained"),
        (uneven(case), "recomputed"),
        ((3, len(case.inputs) - 3), "auto"),
    ):
        A = cv.fisher(case.objective(sizes), samples=2, seed=5, engine=engine)
        for _ in range(2):  # the second pass draws what the first one drew
            torch.testing.assert_close(A.apply(rows), expected, rtol=1e-10, atol=1e-12)
    other = cv.fisher(case.objective(), samples=2, seed=6).apply(rows)
    assert not torch.allclose(other, expected)


def test_the_fisher_of_a_loss_that_is_not_convex_is_its_expected_hessian():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 2), nn.Unflatten(1, (1, 2))).double()
    x = torch.randn(4, 3).double()
    objective = cv.Objective.of(net, cv.GaussianNLL(), (x, torch.randn(4, 1).double()))
    outputs = net(x).detach()
    J = torch.autograd.functional.jacobian(
        lambda flat: torch.func.functional_call(net, objective.space.named(flat), (x,)).reshape(-1),
        nn.utils.parameters_to_vector(net.parameters()).detach(),
    )
    log_variance = outputs[..., 1]
    M = torch.stack([(-log_variance).exp(), torch.full_like(log_variance, 0.5)], -1).reshape(-1)
    expected = J.T @ (M.unsqueeze(1) * J) / 4
    F = cv.fisher(objective, samples=20_000).dense()
    torch.testing.assert_close(F, expected, rtol=0, atol=0.1 * float(expected.abs().max()))


@pytest.mark.parametrize("make", [cv.fisher, cv.empirical_fisher, cv.gradient_covariance, cv.ggn, cv.jacobian, cv.ntk])
def test_what_needs_outputs_says_so(make):
    objective = cv.Objective.from_loss(nn.Linear(2, 2), lambda m, b: m(b).square().mean(), torch.randn(3, 2))
    with pytest.raises(cv.BadObjective, match="needs the model's outputs"):
        make(objective).dense()


def test_a_fisher_needs_a_sample():
    with pytest.raises(ValueError, match="at least one sample, but got samples=0"):
        cv.fisher(zoo()[1].objective(), samples=0)


@ZOO
def test_the_jacobian_and_its_kernel_are_dense(case):
    J = dense_jacobian(case)
    A, K = cv.jacobian(case.objective(uneven(case))), cv.ntk(case.objective(uneven(case)))
    assert A.shape == J.shape and K.shape == (len(J), len(J)) and K.psd
    torch.testing.assert_close(A.dense(), J, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(A.adjoint().dense(), J.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(K.dense(), J @ J.T, rtol=1e-10, atol=1e-12)
    assert A.adjoint().adjoint() is A


def test_the_kernel_has_the_eigenvalues_of_the_ggn_of_squared_error():
    case = zoo()[5]
    objective = cv.Objective.of(case.module, cv.SquaredError(scale=1, over="examples"), (case.inputs, case.targets))
    kernel = cv.eigsh(cv.ntk(objective), 5).values / len(case.inputs)
    torch.testing.assert_close(kernel, cv.eigsh(cv.ggn(objective), 5).values, rtol=1e-8, atol=0)
