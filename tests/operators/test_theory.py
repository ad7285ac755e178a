"""What theory says about the matrices of an objective: decompositions, limits of random matrices, blocks."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from objectives import Case, zoo
from torch import Tensor, nn

import curvature as cv

# Papyan's decomposition of the GGN of softmax cross-entropy by classes (arXiv:1901.08244; arXiv:2008.11865)


class Clusters(NamedTuple):
    """A classifier and what it has learned: well separated clusters, one a class, of unequal sizes."""

    objective: cv.Objective
    probabilities: Tensor  # (examples, classes)
    labels: Tensor  # (examples,)


class Parts(NamedTuple):
    """Summands of the GGN, (n, n) each: of class means (G_class), of means for pairs of classes around them, of examples
    around those, and of the true classes (G_{c=c'})."""

    between: Tensor
    cross: Tensor
    within: Tensor
    same: Tensor


CLASSES = 5


@pytest.fixture(scope="module")
def clusters() -> Clusters:
    torch.manual_seed(0)
    centres = 3 * torch.linalg.qr(torch.randn(8, 8).double()).Q[:CLASSES]
    labels = torch.cat([torch.arange(CLASSES).repeat(12), torch.arange(7) % 3])
    inputs = centres[labels] + 0.3 * torch.randn(len(labels), 8).double()
    net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, CLASSES)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    batches = list(zip(inputs.split(40), labels.split(40), strict=True))
    return Clusters(cv.Objective.of(net, "cross-entropy", batches), net(inputs).detach().softmax(-1), labels)


def papyan(J: Tensor, probabilities: Tensor, labels: Tensor) -> Parts:
    """The parts of G = sum over examples i and classes k of w_ik g_ik g_ik^T, with g_ik = J_i^T (p_i - e_k).

    J (examples, classes, n). Means are weighted by w_ik = p_ik / examples; a mean for the pair (c, k) is over examples
    of class c, that of class c over all k other than c.
    """
    examples, classes = probabilities.shape
    w = probabilities / examples
    g = torch.einsum("icn,ikc->ikn", J, probabilities.unsqueeze(1) - torch.eye(classes).double())
    parts = Parts(*torch.zeros(4, J.shape[-1], J.shape[-1]).double())
    for c in range(classes):
        own = labels == c
        pairs = [k for k in range(classes) if k != c]
        weights = torch.stack([w[own, k].sum() for k in pairs])
        means = torch.stack([w[own, k] @ g[own, k] for k in pairs]) / weights.unsqueeze(1)
        mean = weights @ means / weights.sum()
        parts.between.add_(weights.sum() * mean.outer(mean))
        for k, weight, centre in zip(pairs, weights, means, strict=True):
            parts.cross.add_(weight * (centre - mean).outer(centre - mean))
            parts.within.add_((w[own, k] * (g[own, k] - centre).T) @ (g[own, k] - centre))
        parts.same.add_((w[own, c] * g[own, c].T) @ g[own, c])
    return parts


@pytest.fixture(scope="module")
def parts(clusters) -> Parts:
    J = cv.jacobian(clusters.objective).dense()
    return papyan(J.view(*clusters.probabilities.shape, -1), clusters.probabilities, clusters.labels)


def rank(matrix: Tensor) -> int:
    return int((torch.linalg.svdvals(matrix) > 1e-12 * torch.linalg.matrix_norm(matrix, 2)).sum())


def test_the_ggn_is_the_sum_of_papyans_parts(clusters, parts):
    G = cv.ggn(clusters.objective).dense()
    torch.testing.assert_close(sum(parts), G, rtol=0, atol=1e-12 * float(G.abs().max()))
    for part in parts:
        assert part.trace() > 1e-3 * G.trace()  # none is left out unnoticed


def test_the_parts_of_classes_and_pairs_of_classes_have_their_ranks(parts):
    """One mean a class; C - 1 means a class around it, with one constraint."""
    assert rank(parts.between) == CLASSES
    assert rank(parts.cross) == CLASSES * (CLASSES - 2)


def test_as_many_outliers_as_classes_lie_in_the_span_of_the_class_means(clusters, parts):
    G = cv.ggn(clusters.objective)
    top = cv.eigsh(G, CLASSES + 1)
    span = torch.linalg.svd(parts.between).U[:, :CLASSES]
    overlaps = (top.vectors @ span).square().sum(1)
    assert overlaps[:CLASSES].min() > 0.95 and overlaps[CLASSES] < 0.1
    assert top.values[CLASSES - 1] > 1.5 * top.values[CLASSES]

    rest = cv.eigsh(G - cv.Dense(parts.between)).values[0]
    assert rest < 1.2 * top.values[CLASSES]  # what was behind the outliers comes first
    assert cv.eigsh(G - cv.Dense(parts.cross)).values[0] > 0.9 * top.values[0]  # and it is not the other part


def test_classes_of_one_point_each_have_the_outliers_and_the_bulk_of_the_formula():
    """At p = (a, b, ..., b), C classes: C eigenvalues a b s^2, C (C - 2) of b s^2 / C behind them, for points of norm s.

    They are those of diag(p) - p p^T, which are a b C along (p - e_c), b across it, and 0.
    """
    C, s, scale = CLASSES, 2.0, 1.5
    net = nn.Linear(C, C, bias=False).double()
    net.weight.data.copy_(scale * torch.eye(C))
    points, labels = s * torch.eye(C).double(), torch.arange(C)
    a, b, *_ = F.softmax(scale * points[0], dim=0).tolist()
    objective = cv.Objective.of(net, "cross-entropy", (points, labels))
    values = cv.eigsh(cv.ggn(objective), C * C).values
    expected = [a * b * s**2] * C + [b * s**2 / C] * (C * (C - 2)) + [0.0] * C
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-14)
    parts = papyan(cv.jacobian(objective).dense().view(C, C, -1), net(points).detach().softmax(-1), labels)
    bulk = torch.linalg.eigvalsh(parts.cross).flip(0)[: C * (C - 2)]
    torch.testing.assert_close(bulk, torch.full_like(bulk, b * s**2 / C), rtol=1e-10, atol=0)


# Linear regression on Gaussian inputs: its Hessian and GGN are a sample covariance, a random matrix of known law


def gaussian(size: int, examples: int, *, spike: float = 1.0, seed: int = 0) -> Tensor:
    """Rows from N(0, diag(spike, 1, ..., 1))."""
    torch.manual_seed(seed)
    x = torch.randn(examples, size).double()
    x[:, 0] *= spike**0.5
    return x


def regression(x: Tensor) -> cv.Objective:
    y = torch.randn(len(x), 1).double()
    return cv.Objective.of(nn.Linear(x.shape[1], 1, bias=False).double(), cv.SquaredError(scale=1), (x, y))


@pytest.mark.parametrize("matrix", [cv.hessian, cv.ggn])
def test_linear_regression_has_the_covariance_of_its_inputs(matrix):
    x = gaussian(20, 300, spike=5.0)
    torch.testing.assert_close(matrix(regression(x)).dense(), x.T @ x / 300, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "size, examples, spike, draws", [(200, 50, 20.0, 40), (300, 600, 4.0, 10), (300, 1200, 2.5, 10)]
)
def test_a_spike_is_displaced_by_the_law_of_baik_ben_arous_and_peche(size, examples, spike, draws):
    """l (1 + g / (l - 1)) for g = size / examples < (l - 1)^2: small batches have sharper Hessians.

    The variance is 2 l^2 (1 - g / (l - 1)^2) / examples (Paul 2007), and the eigenvector has the overlap
    (1 - g / (l - 1)^2) / (1 + g / (l - 1)) with the spike's.
    """
    g, excess = size / examples, spike - 1
    law = spike * (1 + g / excess)
    stderr = spike * math.sqrt(2 / examples * (1 - g / excess**2) / draws)
    matrices = (cv.hessian(regression(gaussian(size, examples, spike=spike, seed=seed))) for seed in range(draws))
    tops = [cv.eigsh(A) for A in matrices]
    mean = sum(float(top.values[0]) for top in tops) / draws
    assert abs(mean - law) < min(3 * stderr, 0.03 * law) and law - spike > 5 * stderr
    overlap = sum(float(top.vectors[0, 0]) ** 2 for top in tops) / draws
    assert overlap == pytest.approx((1 - g / excess**2) / (1 + g / excess), abs=0.03)


@pytest.mark.parametrize("size, examples, spike", [(400, 800, 1.3), (300, 1200, 1.2)])
def test_a_spike_below_the_threshold_makes_no_outlier(size, examples, spike):
    """Below 1 + sqrt(g) the top of the spectrum is the edge of the bulk, and knows nothing of the spike."""
    g = size / examples
    edge = (1 + g**0.5) ** 2
    width = examples ** (-2 / 3) * (1 + g**0.5) * (1 + g**-0.5) ** (1 / 3)  # of the Tracy-Widom law, mean -1.2, sd 1.3
    top = cv.eigsh(cv.ggn(regression(gaussian(size, examples, spike=spike))), rtol=1e-3)
    assert abs(float(top.values[0]) - (edge - 1.2 * width)) < 4 * 1.3 * width
    assert float(top.vectors[0, 0]) ** 2 < 0.1


def marchenko_pastur(g: float, points: Tensor) -> Tensor:
    """The share of eigenvalues at or below each of `points`, for g < 1."""
    angles = torch.linspace(0, math.pi, 100_001).double()
    t = 1 + g - 2 * g**0.5 * angles.cos()  # from one edge to the other
    mass = torch.cumulative_trapezoid(2 / math.pi * angles.sin().square() / t, angles)
    return mass[(torch.searchsorted(t, points) - 1).clamp(min=0)]


@pytest.mark.parametrize("size, examples", [(300, 1200), (400, 800)])
def test_the_spectral_density_is_that_of_marchenko_and_pastur(size, examples):
    g = size / examples
    density = cv.spectral_density(cv.hessian(regression(gaussian(size, examples))), probes=8, steps=25)
    edges = [(1 - g**0.5) ** 2, (1 + g**0.5) ** 2]
    assert [density.quantile(0), density.quantile(1)] == pytest.approx(edges, rel=0.05)  # fluctuations: size**(-2/3)
    assert len(density.outliers) == 0 and float(density.negative.value) == 0
    points = torch.linspace(*edges, 12).double()[1:-1]
    low, high = density.cdf(points).interval(0.999)
    law = marchenko_pastur(g, points)
    assert ((low < law) & (law < high)).all() and (high - low).max() < 0.5
    torch.testing.assert_close(density.cdf(points).value, law, rtol=0, atol=0.04)
    for power, moment in {1: 1, 2: 1 + g, 3: 1 + 3 * g + g**2}.items():
        estimate = density.mean(lambda t, power=power: t**power)
        assert abs(float(estimate.value) - moment) < 5 * float(estimate.stderr) + 0.03 * moment


# Blocks


def math_attention() -> object:
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


SOME = ("class-weights-and-ignored", "regression", "convolution", "attention", "lstm", "tied-head")


@pytest.mark.parametrize("case", [case for case in zoo() if case.name in SOME], ids=str)
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_the_matrix_of_some_parameters_is_a_block_of_that_of_all(case: Case, matrix):
    """Whether the others are frozen or not selected."""
    with math_attention():
        whole = case.dense_hessian() if matrix == "hessian" else case.dense_ggn()
    places = case.objective().space.named(torch.arange(len(whole)))
    names = list(places)[1::2]
    at = torch.cat([places[name].flatten() for name in names])
    make = getattr(cv, matrix)
    sizes = (3, len(case.inputs) - 3)
    selected = make(case.objective(sizes, select=names)).dense()
    for name, p in case.module.named_parameters():
        p.requires_grad_(name in names)
    frozen = make(case.objective(sizes)).dense()
    for p in case.module.parameters():
        p.requires_grad_(True)
    for block in (selected, frozen):
        torch.testing.assert_close(block, whole[at[:, None], at], rtol=1e-10, atol=1e-12)


# Physics-informed losses


def test_a_differential_equation_and_its_boundary_have_the_hessian_of_their_formula():
    """u'' + u = 0 with u(0) = 0 and u(1) = 1 for u = sum of a tanh(w x + b): what the loss differentiates, written out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1, bias=False)).double()
    x = torch.linspace(0, 1, 9).double().unsqueeze(1)

    def loss(model: nn.Module, points: Tensor) -> Tensor:
        points = points.detach().requires_grad_()
        u = model(points)
        (du,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), points, create_graph=True)
        ends = model(torch.tensor([[0.0], [1.0]]).double()).squeeze(1)
        return (ddu + u).square().mean() + ends[0].square() + (ends[1] - 1).square()

    def formula(flat: Tensor) -> Tensor:
        w, b, a = flat.split(5)
        t, ends = (w * x + b).tanh(), (w * x[[0, -1]] + b).tanh() @ a
        residual = (-2 * w**2 * t * (1 - t**2) + t) @ a
        return residual.square().mean() + ends[0].square() + (ends[1] - 1).square()

    objective = cv.Objective.from_loss(net, loss, [x[:4], x[4:]])  # uneven, and each with the boundary
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    assert objective.value() == pytest.approx(float(formula(flat)), rel=1e-12)
    H = cv.hessian(objective)
    expected = torch.autograd.functional.hessian(formula, flat)
    torch.testing.assert_close(H.dense(), expected, rtol=1e-10, atol=1e-12)
    ends = cv.eigsh(H, 2, which="both").values
    torch.testing.assert_close(ends, torch.linalg.eigvalsh(expected)[[-1, 0]], rtol=1e-9, atol=1e-12)
