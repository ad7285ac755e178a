"""Predictive covariances against dense linear algebra and Bayesian linear regression."""

from __future__ import annotations

import pytest
import torch
from matrices import Stopping
from objectives import Case, zoo
from torch import Tensor, nn

import curvature as cv

CASES = {case.name: case for case in zoo()}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=str)
SOME = pytest.mark.parametrize("case", [CASES[name] for name in ("classifier", "regression", "tokens")], ids=str)


def by_hand(case: Case, curvature: Tensor, terms: float, prior: float) -> Tensor:
    """J S J^T, (b, c, c), for the case's own inputs."""
    count = len(case.inputs)
    jacobian = torch.autograd.functional.jacobian(case.outputs, case.flat).reshape(count, -1, len(case.flat))
    precision = terms * curvature + prior * torch.eye(len(case.flat), dtype=torch.float64)
    return jacobian @ torch.linalg.inv(precision) @ jacobian.mT


def terms_of(case: Case) -> float:
    """What the mean loss is a mean over: the ratio of the sum over one example twice to a mean."""
    return sum(terms for terms, _ in case.objective().split())


@ALL
def test_covariances_equal_dense_ones(case):
    objective = case.objective()
    G = cv.Dense(case.dense_ggn(), psd=True)
    found = cv.laplace_predictive(objective, case.inputs, G, prior=0.7)
    expected = by_hand(case, case.dense_ggn(), terms_of(case), 0.7)
    torch.testing.assert_close(found.covariance, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.mean, case.outputs(case.flat), rtol=1e-12, atol=1e-12)
    variance = expected.diagonal(dim1=1, dim2=2).reshape(found.mean.shape)
    torch.testing.assert_close(found.variance, variance, rtol=1e-9, atol=1e-11)


@SOME
@pytest.mark.parametrize("matrix", [cv.kfac, cv.ekfac, cv.ggn_diagonal], ids=lambda matrix: matrix.__name__)
def test_structured_matrices_are_inverted_exactly(case, matrix):
    objective = case.objective()
    curvature = matrix(objective)
    found = cv.laplace_predictive(objective, case.inputs, curvature, prior=0.7)
    expected = by_hand(case, curvature.dense(), terms_of(case), 0.7)
    torch.testing.assert_close(found.covariance, expected, rtol=1e-9, atol=1e-11)
    assert found.cost.products == found.mean.numel() and found.cost.passes == 1


@pytest.mark.parametrize("noise", [0.25, 2.0])
def test_of_a_linear_model_it_is_bayesian_linear_regression(noise):
    """Outputs w.x with w ~ N(0, 1 / prior) and normal noise: x.(X^T X / noise + prior I)^-1 x for each output."""
    x, y, fresh = (torch.randn(*shape, dtype=torch.float64) for shape in ((12, 3), (12, 2), (5, 3)))
    loss = cv.SquaredError(scale=1 / noise, over="examples")
    objective = cv.Objective.of(nn.Linear(3, 2, bias=False).double(), loss, (x, y))
    posterior = torch.linalg.inv(x.T @ x / noise + 0.3 * torch.eye(3, dtype=torch.float64))
    variance = ((fresh @ posterior) * fresh).sum(1)
    expected = variance[:, None, None] * torch.eye(2, dtype=torch.float64)
    for curvature in (cv.egn(objective), cv.Dense(cv.ggn(objective).dense(), psd=True)):
        found = cv.laplace_predictive(objective, fresh, curvature, prior=0.3)
        torch.testing.assert_close(found.covariance, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", [CASES[name] for name in ("classifier", "regression", "attention")], ids=str)
def test_matrices_without_structure_are_inverted_by_systems_that_share_their_passes(case):
    objective = case.objective((3, len(case.inputs) - 3))
    found = cv.laplace_predictive(objective, case.inputs, cv.ggn(objective, memory=0), prior=2.0)
    expected = by_hand(case, case.dense_ggn(), terms_of(case), 2.0)
    torch.testing.assert_close(found.covariance, expected, rtol=1e-4, atol=1e-5)
    assert found.cost.products == found.mean.numel()
    assert found.cost.passes <= (found.cost.products // 64 + 1) * (len(case.flat) + 10)


def test_the_mean_over_elements_is_the_same_likelihood():
    """nn.MSELoss: a noise of variance 1/2 in each element, however many an example has."""
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    model = nn.Linear(3, 2).double()
    elements = cv.Objective.of(model, nn.MSELoss(), (x, y))
    examples = cv.Objective.of(model, cv.SquaredError(scale=2, over="examples"), (x, y))
    one, other = (cv.laplace_predictive(o, x, cv.kfac(o), prior=0.3).covariance for o in (elements, examples))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@SOME
def test_more_data_and_a_stronger_prior_make_it_surer(case):
    def variance(times: int, prior: float) -> Tensor:
        objective = case.objective().on([(case.inputs, case.targets)] * times)
        return cv.laplace_predictive(objective, case.inputs, cv.ggn_diagonal(objective), prior=prior).variance

    base = variance(1, 0.5)
    assert (variance(2, 0.5) < base).all() and (variance(1, 1.0) < base).all()
    # twice the data and twice the prior: half of everything
    torch.testing.assert_close(variance(2, 1.0), base / 2, rtol=1e-9, atol=0)


def test_far_from_the_data_it_is_less_sure():
    case = CASES["softmax-regression"]
    objective = case.objective()
    near, far = (
        cv.laplace_predictive(objective, scale * case.inputs, cv.kfac(objective), prior=0.1).variance.mean()
        for scale in (1.0, 10.0)
    )
    assert float(far) == pytest.approx(101 / 2 * float(near), rel=1)  # but for the bias, a hundred times


def test_inputs_may_be_several_tensors_and_are_read_one_by_one():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2).double()

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.layer(torch.cat([left, right], 1))

    left, right, y = (torch.randn(6, width, dtype=torch.float64) for width in (1, 3, 2))
    objective = cv.Objective.of(Both(), "mse", (left, right, y))
    curvature = cv.ggn_diagonal(objective)
    whole = cv.laplace_predictive(objective, (left, right), curvature, prior=1.0)
    named = cv.laplace_predictive(objective, {"left": left, "right": right.numpy()}, curvature, prior=1.0)
    few = cv.laplace_predictive(objective, (left[:2], right[:2]), curvature, prior=1.0)
    assert whole.covariance.shape == (6, 2, 2)
    assert torch.equal(whole.covariance, named.covariance) and torch.equal(whole.covariance[:2], few.covariance)


def test_float32_agrees_with_float64():
    case = CASES["convolution"]
    found = [
        cv.laplace_predictive(objective, case.inputs, cv.kfac(objective), prior=0.5)
        for objective in (case.objective(), case.objective(dtype=torch.float32))
    ]
    assert found[1].covariance.dtype == torch.float32
    torch.testing.assert_close(found[1].covariance.double(), found[0].covariance, rtol=1e-3, atol=1e-5)


def test_the_model_is_as_before_and_the_result_is_saved(tmp_path):
    case = CASES["grouped-convolution"]
    before = {name: t.clone() for name, t in case.module.state_dict().items()}
    objective = case.objective()
    found = cv.laplace_predictive(objective, case.inputs, cv.kfac(objective), prior=0.5)
    assert all(torch.equal(t, before[name]) for name, t in case.module.state_dict().items())
    assert all(p.grad is None for p in case.module.parameters())
    back = cv.Result.load(found.save(tmp_path))
    assert isinstance(back, cv.Predictive)
    assert torch.equal(back.covariance, found.covariance) and torch.equal(back.mean, found.mean)
    assert "standard deviation" in back.summary() and "8 inputs" in str(back)
    assert back.origin.options["terms"] == 8 and back.origin.question == "laplace_predictive"


def test_an_interrupt_is_let_through():
    case = CASES["classifier"]
    objective = case.objective()
    with pytest.raises(KeyboardInterrupt):
        run = cv.Run(progress=Stopping(0))
        cv.laplace_predictive(objective, case.inputs, cv.kfac(objective), prior=0.5, run=run)


def test_arguments_without_sense_are_refused():
    case = CASES["classifier"]
    objective = case.objective()
    kfac = cv.kfac(objective)
    with pytest.raises(ValueError, match=r"psd matrix of the 43 parameters .* Take kfac, ekfac"):
        cv.laplace_predictive(objective, case.inputs, cv.hessian(objective), prior=1.0)
    with pytest.raises(ValueError, match="psd matrix of the 43 parameters"):
        cv.laplace_predictive(objective, case.inputs, cv.Diagonal(torch.ones(3)), prior=1.0)
    with pytest.raises(ValueError, match="prior is a precision, finite and 0 or more, but got -1"):
        cv.laplace_predictive(objective, case.inputs, kfac, prior=-1.0)
    with pytest.raises(ValueError, match="there is no example in them"):
        cv.laplace_predictive(objective, case.inputs[:0], kfac, prior=1.0)
    with pytest.raises(ValueError, match="Add damping"):
        cv.laplace_predictive(objective, case.inputs, cv.Diagonal(torch.zeros(43).double()), prior=0.0)
    with pytest.raises(cv.BadObjective, match="failed on batch 1"):
        cv.laplace_predictive(objective, case.inputs[:, :2], kfac, prior=1.0)
    with pytest.raises(TypeError, match="laplace_predictive takes an Objective"):
        cv.laplace_predictive(case.module, case.inputs, kfac, prior=1.0)


def test_inputs_that_are_not_what_they_are_among_others_are_refused():
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2).double()

        def forward(self, x, scale):
            return self.layer(x) * scale.sum()

    x, scale = torch.randn(4, 3).double(), torch.rand(4).double()
    objective = cv.Objective.of(Shared(), "mse", [((x, scale), torch.zeros(4, 2).double())])
    with pytest.raises(cv.BadObjective, match="by itself"):
        cv.laplace_predictive(objective, (x, scale), cv.identity(objective.space), prior=1.0)


def test_an_interrupt_returns_the_inputs_so_far():
    x = torch.randn(130, 3).double()
    objective = cv.Objective.of(torch.nn.Linear(3, 1).double(), "mse", (x, x[:, :1]))
    A = cv.ggn_diagonal(objective)
    whole = cv.laplace_predictive(objective, x, A, prior=1.0)
    with pytest.raises(cv.Interrupted) as caught:
        cv.laplace_predictive(objective, x, A, prior=1.0, run=cv.Run(progress=Stopping(0)))
    part = caught.value.result
    assert (
        not part.complete and torch.equal(part.covariance, whole.covariance[: len(part.mean)]) and len(part.mean) == 64
    )
