"""Losses against torch's own, values and second derivatives, for every option; and the words of every refusal."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature as cv
from curvature.objective.losses import as_loss, by_class_name, described, written

SHAPES = {  # of the outputs: classes last in two axes, then on axis 1 or last
    "examples": (5, 4),
    "one-example": (4,),
    "sequences": (3, 5, 4),
    "channels": (3, 4, 5),
    "images": (2, 4, 3, 3),
}
AXES = {"examples": 1, "one-example": 0, "sequences": -1, "channels": 1, "images": 1}
WEIGHTS = (1.0, 0.3, 2.0, 0.0)


def drawn(shape: tuple[int, ...], axis: int, kind: str) -> tuple[Tensor, Tensor]:
    """Outputs and targets of the wanted kind, float64."""
    outputs = torch.randn(shape, dtype=torch.float64)
    if kind == "probabilities":
        return outputs, torch.rand(shape, dtype=torch.float64)
    without = outputs.select(axis, 0)
    targets = torch.randint(0, 4, without.shape)
    if kind == "ignored":
        targets = targets.masked_fill(torch.rand(without.shape) < 0.4, -100)
        targets.view(-1)[0] = 1  # at least one counts
    return outputs, targets


def torch_mean(outputs: Tensor, targets: Tensor, axis: int, loss: cv.CrossEntropy) -> Tensor:
    """What torch computes, which wants the classes on axis 1."""
    at = min(1, outputs.ndim - 1)
    weight = None if loss.class_weights is None else torch.tensor(loss.class_weights, dtype=outputs.dtype)
    return F.cross_entropy(
        outputs.movedim(axis, at),
        targets.movedim(axis, at) if targets.is_floating_point() else targets,
        weight,
        ignore_index=loss.ignore_index,
        label_smoothing=loss.label_smoothing,
    )


def hessian_of(function, outputs: Tensor) -> Tensor:
    n = outputs.numel()
    return torch.autograd.functional.hessian(function, outputs).reshape(n, n)


def product_matrix(loss: cv.Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The Hessian, column after column of the closed form."""
    unit = torch.eye(outputs.numel(), dtype=outputs.dtype)
    columns = [loss.hessian_product(outputs, targets, row.view_as(outputs)).reshape(-1) for row in unit]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("kind", ["index", "ignored", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_equals_torch(shape, kind, weights, smoothing):
    axis = AXES[shape]
    outputs, targets = drawn(SHAPES[shape], axis, kind)
    if kind == "ignored" and shape == "one-example":
        pytest.skip("one target, ignored or not")
    loss = cv.CrossEntropy(label_smoothing=smoothing, class_weights=weights, axis=axis)
    loss.check(outputs, targets)
    mean = torch_mean(outputs, targets, axis, loss)
    torch.testing.assert_close(loss.total(outputs, targets) / loss.weight(targets), mean, rtol=1e-12, atol=0)
    expected = hessian_of(lambda o: torch_mean(o, targets, axis, loss), outputs)
    actual = product_matrix(loss, outputs, targets) / loss.weight(targets)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shape", ["examples", "images", "sequences"])
def test_the_axis_is_found_where_only_one_fits(shape):
    axis = AXES[shape]
    outputs, targets = drawn(SHAPES[shape], axis, "index")
    found, named = cv.CrossEntropy(), cv.CrossEntropy(axis=axis)
    assert torch.equal(found.total(outputs, targets), named.total(outputs, targets))


def test_an_ambiguous_axis_is_asked_for():
    outputs, targets = torch.randn(2, 4, 4), torch.randint(0, 4, (2, 4))
    with pytest.raises(cv.BadObjective, match=r"classes of outputs \(2, 4, 4\).* may lie on axis 1 or -1"):
        cv.CrossEntropy().check(outputs, targets)
    one, last = (cv.CrossEntropy(axis=axis).total(outputs, targets) for axis in (1, -1))
    assert one != last
    torch.testing.assert_close(one, F.cross_entropy(outputs, targets, reduction="sum"))
    with pytest.raises(cv.BadObjective, match="may lie on axis 1 or -1"):
        cv.CrossEntropy().check(outputs, torch.rand(2, 4, 4))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
@pytest.mark.parametrize("weights", [None, (0.5, 2.0)], ids=["plain", "weighted"])
def test_any_integers_are_class_indices(dtype, weights):
    outputs, targets = torch.randn(2, 2, dtype=torch.float64), torch.tensor([1, 0])  # as many examples as classes
    loss = cv.CrossEntropy(class_weights=weights)
    small = targets.to(dtype)
    loss.check(outputs, small)
    assert torch.equal(loss.total(outputs, small), loss.total(outputs, targets))
    assert torch.equal(loss.weight(small), loss.weight(targets))
    assert torch.equal(product_matrix(loss, outputs, small), product_matrix(loss, outputs, targets))


def test_another_ignore_index():
    outputs, targets = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 2, 1])
    loss = cv.CrossEntropy(ignore_index=0, label_smoothing=0.1)
    assert float(loss.weight(targets)) == 4
    mean = F.cross_entropy(outputs, targets, ignore_index=0, label_smoothing=0.1)
    torch.testing.assert_close(loss.total(outputs, targets) / 4, mean)
    assert product_matrix(loss, outputs, targets)[:3].abs().max() == 0  # the first target is ignored


@pytest.mark.parametrize("over", ["elements", "examples"])
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3])
@pytest.mark.parametrize("shape", [(5,), (5, 2), (4, 2, 3)])
def test_squared_error_equals_torch(shape, over, scale):
    outputs, targets = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    loss = cv.SquaredError(scale=scale, over=over)
    loss.check(outputs, targets)

    def mean(o: Tensor) -> Tensor:
        error = F.mse_loss(o, targets, reduction="sum") * scale / 2
        return error / (targets.numel() if over == "elements" else len(targets))

    torch.testing.assert_close(loss.total(outputs, targets) / loss.weight(targets), mean(outputs), rtol=1e-12, atol=0)
    actual = product_matrix(loss, outputs, targets) / loss.weight(targets)
    torch.testing.assert_close(actual, hessian_of(mean, outputs), rtol=1e-12, atol=1e-14)


def test_the_default_squared_error_is_torchs_mean():
    outputs, targets = torch.randn(4, 3), torch.randn(4, 3)
    loss = as_loss(nn.MSELoss())
    mean = loss.total(outputs, targets) / loss.weight(targets)
    torch.testing.assert_close(mean.float(), F.mse_loss(outputs, targets))


def test_products_are_linear_symmetric_and_psd():
    for kind, weights in itertools.product(["index", "ignored", "probabilities"], [None, WEIGHTS]):
        outputs, targets = drawn((5, 4), 1, kind)
        M = product_matrix(cv.CrossEntropy(class_weights=weights, label_smoothing=0.1), outputs, targets)
        torch.testing.assert_close(M, M.T, rtol=0, atol=1e-15)
        assert torch.linalg.eigvalsh(M)[0] > -1e-14


# From torch's modules and from names


def test_losses_from_modules_and_names():
    module = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]), ignore_index=7, label_smoothing=0.25)
    assert as_loss(module) == cv.CrossEntropy(ignore_index=7, label_smoothing=0.25, class_weights=(1.0, 2.0))
    assert as_loss("cross-entropy") == cv.CrossEntropy()
    assert as_loss("mse") == as_loss(nn.MSELoss()) == cv.SquaredError()
    own = cv.SquaredError(scale=3.0)
    assert as_loss(own) is own


class Focal(nn.CrossEntropyLoss):
    """Its forward is another function than that of its base class."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) ** 2


class Huberish:
    """A Loss of the user's own: what the protocol asks, and no more."""

    offers = frozenset({"ggn"})

    def check(self, outputs, targets):
        pass

    def total(self, outputs, targets):
        return (outputs - targets).square().sum()

    def weight(self, targets):
        return torch.tensor(float(len(targets)))

    def hessian_product(self, outputs, targets, tangent):
        return 2 * tangent


@pytest.mark.parametrize(
    "loss, words",
    [
        (nn.CrossEntropyLoss(reduction="sum"), r"CrossEntropyLoss\(reduction='sum'\) is not a mean"),
        (nn.MSELoss(reduction="none"), r"MSELoss\(reduction='none'\) is not a mean"),
        ("nll", "There is no loss called 'nll'. The names are cross-entropy, mse."),
        (nn.L1Loss(), "L1Loss has no closed-form Hessian here"),
        (Focal(), "Focal has no closed-form Hessian here. Use Objective.from_loss"),
        (F.cross_entropy, "cross_entropy has no closed-form Hessian here"),
        (nn.CrossEntropyLoss, "CrossEntropyLoss has no closed-form Hessian here"),
        (cv.CrossEntropy, "CrossEntropy has no closed-form Hessian here"),
        (None, "NoneType has no closed-form Hessian here"),
    ],
    ids=str,
)
def test_what_is_no_loss(loss, words):
    with pytest.raises(cv.BadObjective, match=words):
        as_loss(loss)


@pytest.mark.parametrize(
    "outputs, targets, words",
    [
        (torch.zeros(4, 3), [0, 1, 2, 0], "takes a tensor of targets, but a list came"),
        (torch.zeros(4, 3), torch.zeros(4), r"but got outputs \(4, 3\) and torch.float32 targets \(4,\)"),
        (torch.zeros(4, 3), torch.zeros(5).long(), r"torch.int64 targets \(5,\)"),
        (torch.zeros(4, 3), torch.zeros(4, 1).long(), r"torch.int64 targets \(4, 1\)"),
        (torch.zeros(4, 3), torch.tensor([0, 3, 1, 2]), "run from 0 to 3, but there are 3 outputs"),
        (torch.zeros(4, 3), torch.tensor([0, -1, 1, 2]), "run from -1 to 2, but there are 3 outputs"),
        (torch.zeros(()), torch.tensor(0), r"outputs \(\)"),
        (torch.zeros(3), torch.tensor(5), "run from 5 to 5, but there are 3 outputs"),
    ],
)
def test_what_cross_entropy_cannot_take(outputs, targets, words):
    with pytest.raises(cv.BadObjective, match=words):
        cv.CrossEntropy().check(outputs, targets)


def test_class_weights_of_another_length():
    with pytest.raises(cv.BadObjective, match="2 class weights were given for 3 classes"):
        cv.CrossEntropy(class_weights=(1.0, 2.0)).check(torch.zeros(4, 3), torch.zeros(4).long())


def test_an_axis_that_does_not_fit():
    with pytest.raises(cv.BadObjective, match="Cross-entropy takes class indices"):
        cv.CrossEntropy(axis=-1).check(torch.zeros(2, 3, 5), torch.zeros(2, 5).long())


@pytest.mark.parametrize("targets", [torch.zeros(4), torch.zeros(4, 1), [1.0, 2.0]])
def test_what_squared_error_cannot_take(targets):
    with pytest.raises(cv.BadObjective, match=r"shaped like the outputs \(4, 2\), but .* came"):
        cv.SquaredError().check(torch.zeros(4, 2), targets)


def test_a_loss_of_ones_own_works_like_ours():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    own, ours = (cv.Objective.of(net, loss, data) for loss in (Huberish(), cv.SquaredError(over="examples")))
    for matrix in (cv.hessian, cv.ggn):
        torch.testing.assert_close(matrix(own).dense(), matrix(ours).dense(), rtol=1e-12, atol=1e-14)


# As text and as data


def test_described_names_what_is_not_default():
    assert described(cv.CrossEntropy()) == "CrossEntropy()"
    assert described(cv.CrossEntropy(axis=1, label_smoothing=0.1)) == "CrossEntropy(label_smoothing=0.1, axis=1)"
    assert described(Huberish()) == "Huberish()"


@pytest.mark.parametrize("loss", [cv.CrossEntropy(class_weights=(1.0, 0.5), axis=-1), cv.SquaredError(over="examples")])
def test_written_reads_back(loss):
    entry = written(loss)
    assert by_class_name(entry["name"], entry["options"]) == loss


def test_only_our_own_are_written():
    with pytest.raises(cv.BadObjective, match="The loss Huberish is your own, and cannot be written"):
        written(Huberish())
    with pytest.raises(cv.BadObjective, match=r"There is no loss class 'Huberish' here. Known are CrossEntropy"):
        by_class_name("Huberish", {})
