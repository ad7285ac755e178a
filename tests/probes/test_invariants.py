"""Forms of relative changes: closed forms, and that other weights of the same function have the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from objectives import zoo
from torch import nn
from untouched import untouched

import curvature as cv
from curvature.linalg.congruence import congruence
from curvature.probes.invariants import filter_sharpness, fisher_rao_norm
from curvature.probes.rescaling import rescaled

ZOO = zoo()
EVERY = pytest.mark.parametrize("case", ZOO, ids=str)


def chain(*layers: nn.Module, inputs: tuple[int, ...] = (4,), **options) -> cv.Objective:
    """A classifier of these layers on random data."""
    x, y = torch.randn(20, *inputs).double(), torch.randint(0, 3, (20,))
    return cv.Objective.of(nn.Sequential(*layers).double(), "cross-entropy", (x, y), **options)


@EVERY
def test_fisher_rao_is_the_form_of_the_fisher_matrices(case):
    objective = case.objective((3, len(case.inputs) - 3), l2=0.3)
    theta = objective.position
    with untouched(objective.function.module):
        exact, empirical = fisher_rao_norm(objective), fisher_rao_norm(objective, fisher="empirical")
    plain = case.objective()  # the regulariser is no part of it
    expected = float(theta @ (cv.ggn(plain) @ theta))
    assert float(exact.value) == pytest.approx(expected, rel=1e-10) and exact.dof == 0
    assert float(empirical.value) == pytest.approx(float(theta @ (cv.empirical_fisher(plain) @ theta)), rel=1e-10)
    assert exact.cost.passes == 1
    assert float(fisher_rao_norm(case.objective(dtype=torch.float32)).value) == pytest.approx(expected, rel=1e-4)


def test_of_networks_without_biases_it_is_the_variance_of_the_outputs():
    widths = (4, 7, 6, 3)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, bias=False), nn.ReLU())]
    objective = chain(*layers[:-1])
    (x, y) = next(iter(objective.batches))
    f = objective.function.module(x).detach()
    p = f.softmax(1)
    variance = (p * f.square()).sum(1) - (p * f).sum(1).square()
    assert float(fisher_rao_norm(objective).value) == pytest.approx(9 * float(variance.mean()), rel=1e-12)
    slope = ((p - nn.functional.one_hot(y, 3)) * f).sum(1)
    found = fisher_rao_norm(objective, fisher="empirical")
    assert float(found.value) == pytest.approx(9 * float(slope.square().mean()), rel=1e-12)


@pytest.mark.parametrize("name", ["classifier", "convolution", "attention"])
def test_filter_sharpness_is_the_mean_curvature_of_random_directions(name):
    case = next(case for case in ZOO if case.name == name)
    objective = case.objective()
    exact = filter_sharpness(objective, products=10_000)
    assert exact.dof == 0 and exact.origin.question == "filter_sharpness"
    rows = cv.random_directions(objective, 4000)
    forms = ((rows @ cv.hessian(objective).dense()) * rows).sum(1)
    assert abs(float(forms.mean() - exact.value)) < 4 * float(forms.std()) / 4000**0.5
    low, high = filter_sharpness(objective, products=16, seed=3).interval(0.999)
    assert low < exact.value < high


NETS = {
    "linear": lambda: chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)),
    "deep": lambda: chain(
        nn.Linear(4, 6), nn.LeakyReLU(), nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3)), nn.Linear(5, 3)
    ),
    "convolution": lambda: chain(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3), inputs=(1, 4, 4)
    ),
}


@pytest.mark.parametrize("alpha", [0.5, 2.0, 3.0])
@pytest.mark.parametrize("make", NETS.values(), ids=list(NETS))
def test_other_weights_of_the_same_function_have_the_same(make, alpha):
    objective = make()
    other = rescaled(objective, alpha)
    batch = next(iter(objective.batches))
    with objective.context():
        outputs, again = (o.outputs(o.params, batch)[0] for o in (objective, other))
    torch.testing.assert_close(again, outputs, rtol=1e-12, atol=1e-13)
    moved = (other.position / objective.position - 1).abs()
    assert float(moved.min()) > 0.1 or float((moved < 1e-12).double().mean()) < 0.1  # but the last bias, all weights
    for ask in (fisher_rao_norm, filter_sharpness):
        assert float(ask(other).value) == pytest.approx(float(ask(objective).value), rel=1e-10)
    first, second = (
        cv.eigsh(congruence(cv.Diagonal(o.position.abs()), cv.hessian(o)), rtol=1e-12).values
        for o in (objective, other)
    )
    torch.testing.assert_close(first, second, rtol=1e-10, atol=0)
    assert abs(float(cv.trace(cv.hessian(other)).value / cv.trace(cv.hessian(objective)).value) - 1) > 0.05


def test_only_what_leaves_the_function_as_it_is_is_scaled():
    curved = chain(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    normalised = chain(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    decayed = chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), l2=0.1)
    held = chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), select="*.weight")  # without the bias of the first

    class Residual(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + self[0](x)[:, :3]

    skipped = chain(Residual(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    for objective in (curved, normalised, decayed, held, skipped):
        with pytest.raises(cv.BadObjective, match="No two layers were found"):
            rescaled(objective, 2.0)
    partly = rescaled(chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), 2.0)
    before = dict(partly.function.module.named_parameters())
    changed = {name for name, t in partly.params.items() if not torch.equal(t, before[name])}
    assert changed == {"0.weight", "0.bias", "2.weight"}
    for alpha in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="alpha is a factor"):
            rescaled(curved, alpha)


def test_bad_input_is_refused():
    objective = ZOO[0].objective()
    with pytest.raises(ValueError, match="fisher is 'type-2' or 'empirical'"):
        fisher_rao_norm(objective, fisher="sampled")  # pyright: ignore[reportArgumentType]
    scalar = cv.Objective.from_loss(nn.Linear(2, 1), lambda m, x: m(x).square().mean(), torch.ones(3, 2))
    with pytest.raises(cv.BadObjective, match="returns a scalar"):
        fisher_rao_norm(scalar)
    for ask in (fisher_rao_norm, filter_sharpness):
        with pytest.raises(TypeError, match="takes an Objective"):
            ask(nn.Linear(2, 1))
