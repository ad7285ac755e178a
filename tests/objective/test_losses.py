"""Losses against torch's own, values and second derivatives, for every option; and the words of every refusal."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature as cv
from curvature.objective.losses import CLASSES, Likelihood, as_loss, by_class_name, closed, described, written

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


# Every likelihood: its derivatives, and what it draws


def kl(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.kl_div(outputs.log_softmax(-1), targets, reduction="batchmean")


def gaussian(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.gaussian_nll_loss(outputs[..., 0], targets, outputs[..., 1].exp())


LIKELIHOODS = {  # loss, what torch computes, shape of the outputs, targets
    "index": (cv.CrossEntropy(), F.cross_entropy, (5, 4), torch.tensor([0, 3, 1, 1, 2])),
    "ignored": (
        cv.CrossEntropy(label_smoothing=0.2, class_weights=WEIGHTS),
        nn.CrossEntropyLoss(torch.tensor(WEIGHTS, dtype=torch.float64), label_smoothing=0.2),
        (5, 4),
        torch.tensor([0, -100, 1, 1, 2]),
    ),
    "probabilities": (cv.CrossEntropy(), F.cross_entropy, (5, 4), torch.rand(5, 4).double()),
    "kl": (cv.KLDivergence(), kl, (5, 4), torch.rand(5, 4).double().softmax(-1)),
    "bce": (cv.BinaryCrossEntropy(), F.binary_cross_entropy_with_logits, (4, 3), torch.rand(4, 3).double()),
    "bce-weighted": (
        cv.BinaryCrossEntropy(positive_weights=(0.5, 2.0, 3.0)),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 2, 3]).double()),
        (4, 3),
        torch.randint(0, 2, (4, 3)).double(),
    ),
    "mse": (cv.SquaredError(), F.mse_loss, (4, 3), torch.randn(4, 3).double()),
    "poisson": (cv.PoissonNLL(), F.poisson_nll_loss, (4, 3), torch.randint(0, 5, (4, 3)).double()),
    "poisson-full": (cv.PoissonNLL(full=True), nn.PoissonNLLLoss(full=True), (4,), torch.randint(0, 5, (4,)).double()),
    "gaussian": (cv.GaussianNLL(), gaussian, (4, 3, 2), torch.randn(4, 3).double()),
}
EACH = pytest.mark.parametrize("name", LIKELIHOODS)


@EACH
def test_value_and_derivatives_equal_torchs(name):
    loss, torchs, shape, targets = LIKELIHOODS[name]
    outputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    loss.check(outputs, targets)
    mean = torchs(outputs, targets)
    weight = loss.weight(targets)
    torch.testing.assert_close(loss.total(outputs, targets) / weight, mean, rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(mean, outputs)
    torch.testing.assert_close(loss.residual(outputs, targets) / weight, gradient, rtol=1e-10, atol=1e-14)
    expected = hessian_of(lambda o: torchs(o, targets), outputs.detach())
    torch.testing.assert_close(
        product_matrix(loss, outputs.detach(), targets) / weight, expected, rtol=1e-10, atol=1e-13
    )


@EACH
def test_a_sample_has_mean_zero_and_the_expected_hessian_as_second_moment(name):
    """Exactly, by quadrature: the same example many times over, its random numbers on a grid."""
    loss, _, shape, targets = LIKELIHOODS[name]
    outputs = torch.randn(shape, dtype=torch.float64)
    count = 20_000 if name not in ("gaussian",) else 400_000  # of a squared normal the tails weigh more
    one, target = outputs[:1], targets[:1]
    many, repeated = one.expand(count, *one.shape[1:]), target.expand(count, *target.shape[1:])
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    step = 7919  # coordinates of one example run over the grid in different orders, so that they are independent

    def uniform(size: tuple[int, ...]) -> Tensor:
        columns = max(1, torch.Size(size[1:]).numel())
        order = [(torch.arange(count) * step**power) % count for power in range(columns)]
        return torch.stack([grid[o] if i == 0 else grid[o.flip(0).roll(i * 977)] for i, o in enumerate(order)], 1).view(
            size
        )

    drawn = loss.sample(many, repeated, uniform).reshape(count, -1)
    expected = expected_hessian(name, one, target)
    scale = float(expected.abs().max())
    assert float(drawn.mean(0).abs().max()) < 1e-2 * max(scale, 1)
    second = drawn.T @ drawn / count
    torch.testing.assert_close(second.diagonal(), expected.diagonal(), rtol=1e-2, atol=1e-3 * scale)
    torch.testing.assert_close(second, expected, rtol=0, atol=5e-2 * scale)


def expected_hessian(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    if name == "gaussian":  # the Hessian itself depends on the targets: its expectation is diag(1/variance, 1/2)
        return torch.stack([(-outputs[..., 1]).exp(), torch.full_like(outputs[..., 1], 0.5)], -1).reshape(-1).diag()
    return product_matrix(LIKELIHOODS[name][0], outputs, targets)


@EACH
def test_the_outer_products_of_a_root_sum_to_the_expected_hessian_of_each_example(name):
    loss, _, shape, targets = LIKELIHOODS[name]
    outputs = torch.randn(shape, dtype=torch.float64)
    root = torch.stack(list(loss.root(outputs, targets)))
    for index in range(len(outputs)):
        rows = root[:, index].reshape(len(root), -1)
        one = slice(index, index + 1)
        torch.testing.assert_close(
            rows.T @ rows, expected_hessian(name, outputs[one], targets[one]), rtol=1e-10, atol=1e-12
        )


@EACH
def test_samples_do_not_depend_on_how_examples_are_cut(name):
    loss, _, shape, targets = LIKELIHOODS[name]
    outputs = torch.randn(shape, dtype=torch.float64)

    def drawn(*sizes: int) -> Tensor:
        generator = torch.Generator().manual_seed(3)

        def uniform(size: tuple[int, ...]) -> Tensor:
            return torch.rand(size, generator=generator, dtype=torch.float64)

        pieces = zip(outputs.split(list(sizes)), targets.split(list(sizes)), strict=True)
        return torch.cat([loss.sample(o, t, uniform) for o, t in pieces])

    assert torch.equal(drawn(len(outputs)), drawn(1, 2, len(outputs) - 3))


@EACH
def test_every_likelihood_says_what_belongs_to_one_term(name):
    loss, _, shape, targets = LIKELIHOODS[name]
    assert isinstance(loss, Likelihood) and "sample" in loss.offers
    assert loss.event(torch.zeros(shape), targets) == tuple(range(1, len(shape)))
    images = torch.zeros(2, 4, 3, 3), torch.zeros(2, 3, 3).long()
    assert cv.CrossEntropy().event(*images) == (1,)


# From torch's modules and from names


def test_losses_from_modules_and_names():
    module = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]), ignore_index=7, label_smoothing=0.25)
    assert as_loss(module) == cv.CrossEntropy(ignore_index=7, label_smoothing=0.25, class_weights=(1.0, 2.0))
    assert as_loss("cross-entropy") == cv.CrossEntropy()
    assert as_loss("mse") == as_loss(nn.MSELoss()) == cv.SquaredError()
    assert as_loss("bce") == as_loss(nn.BCEWithLogitsLoss()) == cv.BinaryCrossEntropy()
    weighted = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0]))
    assert as_loss(weighted) == cv.BinaryCrossEntropy(positive_weights=(1.0, 2.0))
    assert as_loss("poisson-nll") == as_loss(nn.PoissonNLLLoss()) == cv.PoissonNLL()
    assert (as_loss("kl"), as_loss("gaussian-nll")) == (cv.KLDivergence(), cv.GaussianNLL())
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
        (nn.BCEWithLogitsLoss(reduction="sum"), "BCEWithLogitsLoss with a weight, or another reduction"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(3)), "BCEWithLogitsLoss with a weight"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3, 2)), r"pos_weight has shape \(3, 2\)"),
        (nn.PoissonNLLLoss(log_input=False), r"PoissonNLLLoss\(log_input=False, reduction='mean'\) is not"),
        (nn.GaussianNLLLoss(), "GaussianNLLLoss takes three arguments. Use curvature.GaussianNLL"),
        (F.gaussian_nll_loss, "gaussian_nll_loss takes three arguments. Use curvature.GaussianNLL"),
        (nn.L1Loss(reduction="sum"), r"L1Loss\(\) is not a mean over examples. Use reduction='mean'"),
        (nn.NLLLoss(weight=torch.ones(3)), r"NLLLoss\(\) is not a mean over examples"),
        (nn.CrossEntropyLoss, "CrossEntropyLoss is no loss. Give a name, a loss such as"),
        (cv.CrossEntropy, "CrossEntropy is no loss"),
        (None, "NoneType is no loss"),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_what_is_no_loss(loss, words):
    with pytest.raises(cv.BadObjective, match=words):
        as_loss(loss)


def test_names_of_losses_that_there_are_none_of():
    with pytest.raises(ValueError, match=r"There is no loss called 'nll'. The names are cross-entropy, kl, bce, mse, "):
        as_loss("nll")
    with pytest.raises(ValueError, match=r"Did you mean cross-entropy\?"):
        as_loss("cross_entropy")


CRITERIA = {  # any function of outputs and targets: what it computes, and what it says when asked for a GGN
    "nll": (nn.NLLLoss(), "Use nn.CrossEntropyLoss, on logits"),
    "nll-function": (F.nll_loss, "Use nn.CrossEntropyLoss, on logits"),
    "focal": (Focal(), "Use a loss of logits or predictions, such as CrossEntropy"),
    "lambda": (lambda o, t: F.cross_entropy(o, t) + o.square().mean(), "Use a loss of logits"),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_any_criterion_has_a_hessian_and_no_ggn(name):
    criterion, words = CRITERIA[name]
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.LogSoftmax(-1)).double()
    x, y = torch.randn(9, 3).double(), torch.tensor([0, 1, 2, -100, 1, 0, 2, 2, 1])
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    if name == "focal":  # the square of a mean is no sum over examples: only one batch makes sense
        batches = [(x, y)]
    if name == "lambda":  # its second part counts every example
        batches = [(b, t.clamp(min=0)) for b, t in batches]
    objective = cv.Objective.of(module, criterion, batches)
    flat = nn.utils.parameters_to_vector(module.parameters()).detach()

    def value(vector: Tensor) -> Tensor:
        params, start = {}, 0
        for key, p in module.named_parameters():
            params[key], start = vector[start : start + p.numel()].view(p.shape), start + p.numel()
        inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
        return criterion(torch.func.functional_call(module, params, (inputs,)), targets)

    expected = torch.autograd.functional.hessian(value, flat)
    torch.testing.assert_close(cv.hessian(objective).dense(), expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(cv.BadObjective, match=rf"has no closed-form Hessian here, which ggn needs. {words}.* Hessian"):
        cv.ggn(objective)
    with pytest.raises(cv.BadObjective, match=r"which fisher needs"):
        cv.fisher(objective)


def test_torchs_functions_are_mapped_too():
    assert as_loss(F.cross_entropy) == cv.CrossEntropy() and as_loss(F.mse_loss) == cv.SquaredError()
    assert as_loss(F.binary_cross_entropy_with_logits) == cv.BinaryCrossEntropy()
    assert as_loss(F.poisson_nll_loss) == cv.PoissonNLL()


def test_no_closed_form_where_it_would_not_be_a_matrix():
    data = torch.randn(5, 3), torch.randn(5, 1)
    net = nn.Sequential(nn.Linear(3, 2), nn.Unflatten(1, (1, 2)))
    heteroscedastic = cv.Objective.of(net, "gaussian-nll", data)
    with pytest.raises(cv.BadObjective, match=r"GaussianNLL\(\) is not convex in the outputs: there is no ggn"):
        cv.ggn(heteroscedastic)
    cv.fisher(heteroscedastic).dense()
    with pytest.raises(cv.BadObjective, match=r"Huberish\(\) says nothing about how targets are distributed"):
        cv.fisher(cv.Objective.of(nn.Linear(3, 1), Huberish(), data))


@pytest.mark.parametrize("shape", [(4,), (4, 1, 1)])
def test_targets_are_not_broadcast(shape):
    for loss in (cv.SquaredError(), cv.PoissonNLL()):
        with pytest.raises(cv.BadObjective, match="targets shaped like the outputs"):
            loss.total(torch.zeros(4, 1), torch.zeros(shape))


@pytest.mark.parametrize(
    "outputs, targets, words",
    [
        (torch.zeros(4, 3), [0, 1, 2, 0], "takes a tensor of targets, but a list came"),
        (torch.zeros(4, 3), torch.zeros(4), r"but got outputs \(4, 3\) and torch.float32 targets \(4,\)"),
        (torch.zeros(4, 3), torch.zeros(5).long(), r"outputs \(4, 3\) have 4 rows, but the targets \(5,\) have 5\."),
        (torch.zeros(4, 3), torch.zeros(5, 3), r"outputs \(4, 3\) have 4 rows, but the targets \(5, 3\) have 5\."),
        (torch.zeros(4, 3), torch.zeros(4, 1).long(), r"torch.int64 targets \(4, 1\)"),
        (torch.zeros(4, 3), torch.tensor([0, 3, 1, 2]), "run from 0 to 3, but there are 3 outputs"),
        (torch.zeros(4, 3), torch.tensor([0, -1, 1, 2]), "run from -1 to 2, but there are 3 outputs"),
        (torch.zeros(()), torch.tensor(0), r"outputs \(\)"),
        (torch.zeros(3), torch.tensor(5), "run from 5 to 5, but there are 3 outputs"),
        (torch.zeros(4, 1), torch.ones(4, 1), r"outputs \(4, 1\) have one class"),
        (torch.zeros(4, 1), torch.zeros(4).long(), r"outputs \(4, 1\) have one class"),
        (torch.zeros(4, 3), torch.tensor([0.5, 1.0, -0.5]).expand(4, 3), "but some are negative"),
        (torch.zeros(4, 3), torch.tensor([0.5, 0.5, float("nan")]).expand(4, 3), "or not a number"),
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


@pytest.mark.parametrize(
    "loss, outputs, targets, words",
    [
        (cv.BinaryCrossEntropy(), torch.zeros(4, 2), torch.zeros(4), "Binary cross-entropy takes targets shaped like"),
        (cv.BinaryCrossEntropy(), torch.zeros(4), torch.full((4,), 2.0), "run from 2 to 2, but lie between 0 and 1"),
        (cv.BinaryCrossEntropy((1.0, 2.0)), torch.zeros(4, 3), torch.zeros(4, 3), "2 positive weights were given"),
        (cv.KLDivergence(), torch.zeros(4, 3), torch.zeros(4).long(), "takes target distributions"),
        (
            cv.KLDivergence(),
            torch.zeros(4, 3),
            -torch.ones(4, 3),
            "negative entries. Give probabilities, not their log",
        ),
        (cv.PoissonNLL(), torch.zeros(4), torch.full((4,), -1.0), "A count is -1"),
        (cv.PoissonNLL(), torch.zeros(4), torch.zeros(4, 1), "PoissonNLL takes targets shaped like"),
        (cv.GaussianNLL(), torch.zeros(4), torch.zeros(4), r"takes outputs \(..., 2\)"),
        (cv.GaussianNLL(), torch.zeros(4, 2), torch.zeros(4, 1), r"shaped like the outputs \(4,\)"),
        (
            cv.SquaredError(),
            torch.zeros(4, 2),
            torch.zeros(3, 2),
            r"4 rows, but the targets \(3, 2\) have 3\. Give one",
        ),
    ],
)
def test_what_the_others_cannot_take(loss, outputs, targets, words):
    with pytest.raises(cv.BadObjective, match=words):
        loss.check(outputs, targets)


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


@pytest.mark.parametrize(
    "loss",
    [
        cv.CrossEntropy(class_weights=(1.0, 0.5), axis=-1),
        cv.SquaredError(over="examples"),
        cv.BinaryCrossEntropy(positive_weights=(2.0,)),
        *(make() for make in CLASSES.values()),
    ],
)
def test_written_reads_back(loss):
    entry = written(loss)
    assert by_class_name(entry["name"], entry["options"]) == loss


def test_only_our_own_are_written():
    with pytest.raises(cv.BadObjective, match="The loss Huberish is your own, and cannot be written"):
        written(Huberish())
    with pytest.raises(cv.BadObjective, match=r"There is no loss class 'Huberish' here. Known are CrossEntropy"):
        by_class_name("Huberish", {})


@pytest.mark.parametrize("kind", ["index", "ignored", "probabilities"])
@pytest.mark.parametrize("shape", ["examples", "sequences", "images"])
def test_large_outputs_are_computed_in_chunks(monkeypatch, shape, kind):
    axis = AXES[shape]
    outputs, targets = drawn(SHAPES[shape], axis, kind)
    loss = cv.CrossEntropy(label_smoothing=0.1, class_weights=WEIGHTS, axis=axis)

    def everything() -> list[Tensor]:
        tangent = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64).view_as(outputs)
        generator = torch.Generator().manual_seed(0)
        sample = loss.sample(outputs, targets, lambda size: torch.rand(size, generator=generator).double())
        return [
            loss.total(outputs, targets),
            loss.residual(outputs, targets),
            loss.hessian_product(outputs, targets, tangent),
            sample,
        ]

    whole = everything()
    monkeypatch.setattr(closed, "CHUNK", outputs.numel() // len(outputs))
    calls = []
    monkeypatch.setattr(
        cv.CrossEntropy,
        "_mass",
        lambda self, o, t, a, mass=cv.CrossEntropy._mass: calls.append(len(o)) or mass(self, o, t, a),
    )
    for found, expected in zip(everything(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert set(calls) == {1}


def test_the_graph_of_a_gradient_holds_nothing_of_the_size_of_a_vocabulary_but_the_outputs():
    head, x, y = nn.Linear(4, 5000), torch.randn(20, 4), torch.randint(0, 5000, (20,))
    held = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = cv.CrossEntropy().total(head(x), y)
        gradients = torch.autograd.grad(total, list(head.parameters()), create_graph=True)
    assert len(gradients) == 2 and sum(held.values()) < 1.1 * 20 * 5000 * 4  # torch's own: twice that
