"""The check before the first product: what is wrong is refused in words that help, and what is healthy passes."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from objectives import zoo
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import curvature as cv
from curvature.objective import check, difference


def data(n: int = 16, width: int = 4, classes: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, width, generator=generator).to(dtype), torch.arange(n) % classes


def perceptron(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), activation or nn.Tanh(), nn.Linear(8, 3))


def classifier(module: nn.Module, pair: tuple[Tensor, Tensor] | None = None, **options) -> cv.Objective:
    return cv.Objective.of(module, "cross-entropy", pair or data(), **options)


def bare(loss: Callable, module: nn.Module | None = None, **options) -> cv.Objective:
    """A scalar loss of logits and targets."""
    return cv.Objective.from_loss(
        module or perceptron(), lambda model, batch: loss(model(batch[0]), batch[1]), data(), **options
    )


# Backwards that cannot be differentiated, or give wrong numbers when they are


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Detaching(torch.autograd.Function):
    """Its backward is right, and loses how it depends on x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * g


class DetachingItsGradient(torch.autograd.Function):
    """Loses how the backward depends on what comes from above: products are not even symmetric."""

    @staticmethod
    def forward(ctx, x):
        return x * torch.linspace(1, 2, x.shape[-1], dtype=x.dtype)

    @staticmethod
    def backward(ctx, g):
        return g.detach() * torch.linspace(1, 2, g.shape[-1], dtype=g.dtype)


class Applied(nn.Module):
    """A Function between layers."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function, self.inner = function, perceptron()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.function.apply(self.inner[0](x))
        return self.inner[2](self.inner[1](hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "function, words",
    [
        (OnceDifferentiable, "A backward in the model cannot be differentiated again"),
        (Detaching, "Second derivatives are wrong"),
        (DetachingItsGradient, "Second derivatives are wrong"),
    ],
)
def test_wrong_second_derivatives_are_refused(function, words, seed, dtype):
    torch.manual_seed(seed)
    objective = classifier(Applied(function).to(dtype), data(dtype=dtype))
    with pytest.raises(cv.BadObjective, match=words):
        objective.check()
    for matrix in (cv.hessian, cv.ggn):
        with pytest.raises(cv.BadObjective, match=words):
            matrix(objective) @ torch.ones(objective.space.size, dtype=dtype)


def test_a_detached_part_is_a_constant_and_no_error():
    """Stopping a gradient in the forward makes another function, whose derivatives are all consistent."""
    torch.manual_seed(0)
    objective = bare(lambda logits, y: F.cross_entropy(logits - logits.mean(1, keepdim=True).detach(), y))
    with pytest.raises(cv.BadObjective, match="Second derivatives are wrong"):
        bare(lambda logits, y: (logits.square().detach() * logits).mean()).check()
    with pytest.raises(cv.BadObjective, match="Second derivatives are wrong"):
        objective_of_entropy = bare(lambda logits, y: (logits.softmax(1).detach() * logits).sum(1).mean())
        objective_of_entropy.check()
    assert objective.check().difference < 1e-6  # a shift of the logits changes nothing


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: F.ctc_loss(o.log_softmax(1)[:, None], y[None, :1] + 1, [16], [1]),
        lambda o, y: F.multilabel_margin_loss(o, y[:, None].expand(-1, 3)),
    ],
    ids=["ctc", "multilabel-margin"],
)
def test_unsupported_operations_are_refused(loss):
    with pytest.raises(cv.BadObjective, match=r"no derivative known|no second derivatives") as caught:
        bare(loss).check()
    assert "plain torch operations" in caught.value.fix


def test_weight_norm_inside_torchscript_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)))
        script = torch.jit.trace(inner, data()[0])
    with pytest.raises(cv.BadObjective, match="weight_norm inside TorchScript has wrong second derivatives"):
        classifier(script).check()


# Losses that are no function of the parameters


@pytest.mark.parametrize("loss", [lambda o, y: torch.tensor(3.0), lambda o, y: y.float().mean()])
def test_a_loss_without_the_parameters_is_refused(loss):
    with pytest.raises(
        cv.BadObjective, match=r"does not depend on the selected parameters\. .*model that is passed in"
    ):
        bare(loss).check()


@pytest.mark.parametrize(
    "loss", [lambda o, y: o.detach().square().mean(), lambda o, y: (o.argmax(1) == y).float().mean()]
)
def test_a_loss_that_changes_with_parameters_that_no_gradient_reaches_is_refused_in_other_words(loss):
    words = (
        r"changes with the selected parameters, but no gradient goes through the loss\. Compute it without detach\(\)"
    )
    with pytest.raises(cv.BadObjective, match=words):
        bare(loss).check()


def test_parameters_that_do_nothing_are_told():
    module = perceptron()
    module.extra = nn.Linear(2, 2)
    module.forward = lambda x: module[2](module[1](module[0](x)))
    objective = classifier(module)
    health = objective.check()
    assert health.unused == health.idle == ("extra.weight", "extra.bias") and not health.detached
    with pytest.raises(cv.BadObjective, match="does not depend on the selected parameters"):
        classifier(module, select="extra.*").check()


# Parameters that no gradient reaches, and with which the loss changes all the same


class Cut(nn.Module):
    """Gradients end between its body and its head; the other layer is called for nothing."""

    def __init__(self, cut: Callable[[Tensor], Tensor], *, extra: bool = False, body: nn.Module | None = None) -> None:
        super().__init__()
        self.cut, self.body = cut, body or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))
        self.head, self.extra = nn.Linear(5, 3), nn.Linear(4, 2) if extra else None

    def forward(self, x: Tensor) -> Tensor:
        if self.extra is not None:
            self.extra(x)
        return self.head(self.cut(self.body(x)))


def in_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.tanh(x.detach().numpy()))


def in_silence(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.tanh()


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "no_grad": in_silence,
    "numpy": in_numpy,
    "item": lambda x: x.new_tensor([[number.item() for number in row] for row in x]),
    "argmax": lambda x: F.one_hot(x.argmax(1), 5).to(x.dtype),
    "sign": lambda x: x.detach().sign(),
}
BODY = ("body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias")
EXTRA = ("extra.weight", "extra.bias")


@pytest.mark.parametrize("extra", [(), EXTRA], ids=["alone", "with a layer that does nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cut", CUTS)
def test_parameters_that_matter_and_get_no_gradient_are_told_from_those_that_do_nothing(cut, dtype, extra):
    torch.manual_seed(0)
    health = classifier(Cut(CUTS[cut], extra=bool(extra)), dtype=dtype).check()
    assert health.unused == BODY + extra and health.detached == BODY and health.idle == extra
    part = health.narrowed(("body.0.bias", "extra.bias", "head.bias"))
    assert part.detached == ("body.0.bias",) and part.idle == extra[1:]


def test_indices_of_a_table_are_no_derivatives():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.table = nn.Linear(4, 6), nn.Embedding(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(self.router(x).argmax(1))

    assert classifier(Routed()).check().detached == ("router.weight", "router.bias")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("start", [0.0, -100.0], ids=["zero", "dead"])
def test_what_changes_nothing_nearby_may_do_so_further_away(start, seed):
    """A bias of zero has no size to displace it by, and a dead unit hears of one side only, and there not at once."""
    body, head = nn.Linear(4, 1), nn.Linear(1, 3)
    nn.init.zeros_(body.weight)
    nn.init.constant_(body.bias, start)
    module = Cut(lambda x: x.detach().relu(), body=body)
    module.head = head
    assert "body.bias" in classifier(module, seed=seed).check().detached


@pytest.mark.parametrize("guard", [lambda x: x, torch.log], ids=["error", "nan"])
def test_what_can_be_computed_at_the_parameters_only_depends_on_them(guard):
    class Guarded(Cut):
        def forward(self, x: Tensor) -> Tensor:
            distance = (self.body.bias.detach() - 1).square().sum()
            if guard is not torch.log and distance > 0:
                raise ValueError("burnt")
            return self.head(x[:, :1].expand(-1, 5)) + (0 * guard(-distance).exp() if distance > 0 else 0)

    module = Guarded(lambda x: x, body=nn.Linear(4, 5))
    nn.init.ones_(module.body.bias)
    health = classifier(module).check()
    assert health.detached == ("body.bias",) and health.idle == ("body.weight",)


def test_two_that_are_zero_and_matter_together_are_told_together():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.zeros(3)) for _ in range(2))
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.first.detach() * self.second.detach()

    assert classifier(Product()).check().detached == ("first", "second")


def test_parameters_that_are_held_fixed_are_not_told():
    module = Cut(CUTS["detach"], extra=True)
    assert classifier(module, select="head").check().unused == ()
    assert classifier(module, select=["head", "extra"]).check().idle == EXTRA
    assert classifier(module, select=["head", "body.2"]).check().detached == BODY[2:]
    health = classifier(module)
    health.check()
    assert health.narrowed(["head", "body.0"]).check().detached == BODY[:2]


def test_a_selection_that_is_all_cut_off_is_refused_with_the_place():
    module = Cut(CUTS["detach"], extra=True)
    with pytest.raises(
        cv.BadObjective, match=r"loss changes with .*, but no gradient goes through body \(Sequential\)"
    ):
        classifier(module, select=["body", "extra"]).check()
    with pytest.raises(cv.BadObjective, match=r"does not depend on .*: no gradient goes through extra \(Linear\)"):
        classifier(module, select="extra").check()


class Passing(torch.autograd.Function):
    """Rounds, and lets gradients pass as if it did not."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def test_gradients_that_are_passed_on_reach_the_parameters():
    module = nn.Sequential(nn.Linear(4, 3), Cut(Passing.apply, body=nn.Linear(3, 5)))
    objective = classifier(module)
    examination = check.Examination(objective)
    for name in ("parameters", "data", "loss", "gradient"):
        examination.run(check.PROBES[name])
    assert examination.unused == ()


def test_many_parameters_are_told_apart_by_few_losses(monkeypatch):
    """Neighbours may go together; nothing is computed where gradients reach all."""
    calls, plain = [], difference.value_of

    def counting(*args):
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(difference, "value_of", counting)
    body = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(4, 4), nn.LayerNorm(4))), nn.Linear(4, 5))
    module = Cut(CUTS["detach"], extra=True, body=body)
    objective = classifier(module)
    health = objective.check()
    names = [name for name, _ in module.named_parameters() if name.startswith("body.")]
    assert len(names) == 82 and set(names) <= set(health.detached) and len(calls) <= 80
    calls.clear()
    assert classifier(module, select=["head", "extra"]).check().idle == EXTRA and len(calls) == len(difference.STRIDES)
    calls.clear()
    assert classifier(perceptron()).check().unused == () and not calls


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_layers_that_do_nothing_are_not_taken_for_others_where_masks_are_drawn(mode):
    module = Cut(nn.Dropout(0.5), extra=True, body=nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    health = classifier(module, mode=mode).check()
    assert health.idle == health.unused == EXTRA


class Restless(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.generator = perceptron(), random.Random(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 + 0.01 * self.generator.random())


def test_a_random_loss_is_refused():
    with pytest.raises(cv.BadObjective, match=r"The loss is random: the first batch gave .*, then .*global generators"):
        classifier(Restless()).check()


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), lambda: random.random()], ids=["torch", "python"])
def test_global_generators_are_held_still(draw):
    assert bare(lambda o, y: F.cross_entropy(o * (1 + draw()), y)).check().difference < 1e-6


# Numbers that are none


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["2.weight", "1.running_mean"])
def test_tensors_that_are_not_finite(where, value):
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    module.state_dict()[where].view(-1)[1] = value
    count = module.state_dict()[where].numel()
    with pytest.raises(cv.NonFinite, match=rf"{where} has 1 of {count} entries that are not finite"):
        classifier(module).check()


def test_a_mask_of_infinities_is_no_error():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = perceptron()
            self.register_buffer("causal_mask", torch.tensor([0.0, 0.0, -torch.inf]))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.causal_mask

    x, _ = data()
    assert classifier(Masked(), (x, torch.zeros(16).long())).check().difference < 1e-6


@pytest.mark.parametrize(
    "loss, words",
    [
        (lambda o, y: (o * torch.inf).mean(), "The loss of the first batch is"),
        (lambda o, y: (o.sum() * 0).log(), "The loss of the first batch is -inf"),
        (lambda o, y: (o * 0).sum().sqrt(), "The gradient with respect to 0.weight is not finite"),
    ],
)
def test_losses_and_gradients_that_are_not_finite(loss, words):
    with pytest.raises(cv.NonFinite, match=words):
        bare(loss).check()


def test_a_later_batch_that_is_not_finite():
    x, y = data()
    x[15, 2] = torch.nan
    objective = classifier(perceptron(), (x, y), batch_size=4)
    objective.check()
    with pytest.raises(cv.NonFinite, match="has entries that are not finite"):
        cv.trace(cv.hessian(objective), products=4)


# Outputs, targets and data that do not fit


def test_outputs_that_cannot_be_differentiated():
    class Thresholded(nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax(1)

    with pytest.raises(cv.BadObjective, match=r"returned torch.int64 of shape \(16,\), which cannot be differentiated"):
        classifier(Thresholded(4, 3)).check()


@pytest.mark.parametrize("empty", [[], (torch.zeros(0, 4), torch.zeros(0).long())])
def test_no_data(empty):
    with pytest.raises(cv.BadObjective, match="The data is empty: no batch came"):
        cv.Objective.of(perceptron(), "cross-entropy", empty).check()


@pytest.mark.parametrize("error", [ValueError, KeyError, ZeroDivisionError, AssertionError, StopIteration, OSError])
def test_whatever_a_loss_raises_is_explained(error):
    def loss(o, y):
        raise error("burnt\nand more")

    with pytest.raises(cv.BadObjective, match="The model or the loss failed on batch 1: ") as caught:
        bare(loss).check()
    assert type(caught.value.__cause__) is error
    assert "and more" not in str(caught.value) or error is KeyError


def test_memory_that_does_not_suffice_is_told_apart():
    with pytest.raises(cv.TooLarge, match="Batch 1 does not fit into memory"):
        bare(lambda o, y: torch.empty(2**55).sum() + o.sum()).check()


def test_the_check_runs_once():
    calls = []

    def loss(o, y):
        calls.append(1)
        return F.cross_entropy(o, y)

    objective = bare(loss)
    health = objective.check()
    count = len(calls)
    assert objective.check() is health and len(calls) == count
    assert count <= 10  # about ten gradients
    assert objective.at(objective.params).check() is health
    assert objective.in_mode("train").check() is not health


# Healthy models


KINKED: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(),
    "leaky-relu": lambda: nn.LeakyReLU(),
    "prelu": lambda: nn.PReLU(),
    "hardswish": lambda: nn.Hardswish(),
    "hardtanh": lambda: nn.Hardtanh(),
    "relu6": lambda: nn.ReLU6(),
    "elu": lambda: nn.ELU(),
    "softshrink": lambda: nn.Softshrink(),
    "gelu": lambda: nn.GELU(),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", KINKED)
def test_kinks_are_no_errors(name, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 64), KINKED[name](), nn.Linear(64, 64), KINKED[name](), nn.Linear(64, 3))
    assert classifier(net, data(64)).check().difference < 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_lying_on_a_kink_is_no_error(seed):
    """Biases of zero and inputs of zero, as at every start: ReLU sits where it has no derivative."""
    torch.manual_seed(seed)
    net = perceptron(nn.ReLU())
    for layer in (net[0], net[2]):
        nn.init.zeros_(layer.bias)
    x, y = data()
    x[::3] = 0
    for dtype in (torch.float32, torch.float64):
        assert classifier(net, (x, y), dtype=dtype).check().difference < 1e-6


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.2),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_convolutional_networks_with_pooling_in_single_precision(seed, mode):
    torch.manual_seed(seed)
    images = torch.rand(32, 1, 16, 16)
    images[:, :, :4] = 0  # black borders: ties in every pool
    health = classifier(convolutional(), (images, torch.arange(32) % 10), mode=mode).check()
    assert health.difference < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_deep_residual_networks(seed, mode):
    """A million units that may cross a kink on the way of a finite difference."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 32, 3, padding=1), nn.Linear(32, 10)
            self.blocks = nn.ModuleList(
                nn.Sequential(
                    nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, bias=False),
                    nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, bias=False),
                )
                for _ in range(4)
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = x + block(x)
            return self.last(x.mean((2, 3)))

    torch.manual_seed(seed)
    images = torch.rand(32, 1, 28, 28)
    images[:, :, :6] = 0
    assert classifier(Residual(), (images, torch.arange(32) % 10), mode=mode).check().difference < 1e-2


@pytest.mark.parametrize("case", zoo(), ids=str)
def test_the_zoo_is_healthy(case):
    assert case.objective((3, len(case.inputs) - 3)).check().difference < 1e-6
    assert case.objective(dtype=torch.float32).check().difference < 1e-6


@pytest.mark.parametrize("name", ["digits", "digits-cnn", "hamlet"])
def test_the_demos_are_healthy(name):
    health = cv.demo(name).check()
    assert health.difference < 1e-5 and health.unused == ()
    assert ("attention" in health.rewrites) == (name == "hamlet")


@pytest.mark.parametrize("seed", range(8))
def test_curvature_that_vanishes_is_no_error(seed):
    """A Hessian of zero, or one that the probe hardly meets, leaves nothing but rounding to compare."""
    torch.manual_seed(seed)
    x, _ = data(6, 2)
    linear = nn.Linear(2, 2)
    assert cv.Objective.of(linear, "cross-entropy", (x, torch.zeros(6).long()), seed=seed).check().unused == ()
    cv.Objective.from_loss(linear, lambda model, batch: model(batch).mean(), x, seed=seed).check()


@pytest.mark.parametrize("sureness, fits", [(5.0, True), (16.0, False)])
def test_losses_near_zero_need_more_precision(sureness, fits):
    """Trained to the end: p (1 - p) is then the difference of numbers that are equal in float32."""
    x, y = data()
    net = nn.Linear(7, 3, bias=False)
    net.weight.data = torch.cat([torch.zeros(3, 4), torch.eye(3)], 1) + 0.01 * torch.randn(3, 7)
    objective = classifier(net, (torch.cat([x, sureness * F.one_hot(y, 3)], 1), y))
    if fits:
        assert objective.check().difference < 1e-6
    else:
        with pytest.raises(cv.BadObjective, match=r"float32 is too coarse here.*Compute in float64"):
            objective.check()
    assert objective.to(dtype=torch.float64).check().difference < 1e-3


def test_single_precision_inside_a_double_objective_is_taken():
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = perceptron()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner[1](self.inner[0](x))
            return self.inner[2](F.layer_norm(hidden.float(), (8,)).to(hidden.dtype))

    module = Casting()
    single, double = (classifier(module, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert single.check().difference < 1e-2 and double.check().difference < 1e-2
    found, expected = (cv.eigsh(cv.hessian(objective), 2) for objective in (double, single))
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=0)


def test_models_with_constants_in_single_precision():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = perceptron(), torch.linspace(1, 2, 8, dtype=torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[2](self.inner[1](self.inner[0](x)) @ torch.diag(self.scale))

    health = classifier(Constant()).check()
    assert health.difference is None  # it does not run in float64: less is known, nothing is wrong
    assert (cv.hessian(classifier(Constant())) @ torch.ones(67)).isfinite().all()


def test_models_that_always_compute_in_single_precision():
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = perceptron()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).float()

    assert classifier(Casting()).check().difference < 1e-2


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scales_do_not_matter(scale):
    for _ in range(3):
        assert bare(lambda o, y: scale * F.cross_entropy(o, y)).check().difference < 1e-5
    net = perceptron()
    with torch.no_grad():
        net[0].weight *= scale
    x, y = data()
    assert classifier(net, (x / scale, y)).check().difference < 1e-2


def test_rewrites_are_told():
    module = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.MultiheadAttention(2, 1, batch_first=True))

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = module, nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.inner[0](x)
            return self.last(self.inner[1](tokens, tokens, tokens, need_weights=False)[0].flatten(1))

    assert classifier(Attending()).check().rewrites["attention"] > 0
    assert classifier(perceptron()).check().rewrites == {}


# Tensors that were cut into batches


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Batched(nn.Module):
    """Normalises over the examples of the call, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x))


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.last(adjacency @ x)


COUPLED = {
    "time-first": (TimeFirst(), (torch.randn(300, 5, 2), torch.randint(0, 3, (300, 5))), "cut into .* has the loss"),
    "batch-statistics": (Batched(), (torch.randn(300, 4), torch.randint(0, 3, (300,))), "cut into .* has the loss"),
    "graph": (Graph(), (torch.randn(300, 4), torch.rand(300, 300), torch.randint(0, 3, (300,))), "shapes cannot be"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_what_does_not_fall_into_examples_is_not_cut_silently(name):
    model, data, words = COUPLED[name]
    with pytest.raises(cv.BadObjective, match=f"{words}.*batch_size=None"):
        cv.Objective.of(model, cv.CrossEntropy(axis=-1), data).check()
    whole = cv.Objective.of(model, cv.CrossEntropy(axis=-1), data, batch_size=None)
    whole.check()
    rows = torch.stack([torch.ones(whole.space.size)])
    logits = model(*data[:-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, -2), data[-1].flatten())
    params = list(model.parameters())
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    product = torch.autograd.grad(gradient, params, [torch.ones_like(p) for p in params], materialize_grads=True)
    expected = torch.cat([p.reshape(-1) for p in product])
    torch.testing.assert_close(cv.hessian(whole).apply(rows)[0], expected, rtol=1e-3, atol=1e-5)


class Once(torch.autograd.Function):
    """Its backward has no derivative."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


class OutOfMemory(Graph):
    def forward(self, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")


class NoSecond(Graph):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(self.last(x).tanh())


@pytest.mark.parametrize(
    "model, error, words",
    [
        (OutOfMemory(), cv.TooLarge, "does not fit into memory"),
        (NoSecond(), cv.BadObjective, "cannot be differentiated again"),
    ],
)
def test_other_failures_of_cut_data_are_explained_as_ever(model, error, words):
    with pytest.raises(error, match=words):
        cv.Objective.of(model, "cross-entropy", (torch.randn(300, 4), torch.randint(0, 3, (300,)))).check()


def test_sparse_tensors_are_batches_like_others():
    """A graph as a sparse matrix: never cut, hashed by what it holds."""
    adjacency = (torch.rand(20, 20) < 0.2).double().to_sparse()
    x, y = torch.randn(20, 4).double(), torch.randint(0, 3, (20,))

    class Sparse(Graph):
        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.last(torch.sparse.mm(adjacency, x))

    model, dense = Sparse().double(), Graph().double()
    dense.load_state_dict(model.state_dict())
    objective = cv.Objective.of(model, "cross-entropy", (x, adjacency, y))
    expected = cv.hessian(cv.Objective.of(dense, "cross-entropy", [(x, adjacency.to_dense(), y)]))
    torch.testing.assert_close(cv.hessian(objective).dense(), expected.dense())
    assert cv.eigsh(cv.hessian(objective), 2).converged.all()
    other = objective.on([(x, (2 * adjacency).coalesce(), y)])
    assert other.fingerprint["data"] != objective.fingerprint["data"]


def test_models_that_change_their_inputs_in_place_change_copies():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x.sub_(0.5).clamp_(0))

    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    before = x.clone()
    objective = cv.Objective.of(InPlace(), "cross-entropy", (x, y))
    value = objective.value()
    cv.eigsh(cv.hessian(objective), 1)
    assert torch.equal(x, before) and objective.value() == value


def test_arrays_are_data_like_tensors():
    x, y = torch.randn(7, 4), torch.randint(0, 3, (7,))
    tensors = cv.Objective.of(Graph().last, "cross-entropy", (x, y))
    arrays = tensors.on((x.numpy(), y.numpy()))
    assert arrays.value() == tensors.value()
    named = cv.Objective.of(Named(), "cross-entropy", {"x": x.numpy(), "labels": y.numpy()}, batch_size=3)
    assert len(list(named.batches)) == 3 and named.check()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


def test_a_packed_sequence_is_one_argument():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.GRU(2, 3), nn.Linear(3, 2)

        def forward(self, packed: nn.utils.rnn.PackedSequence) -> Tensor:
            return self.last(self.rnn(packed)[1][0])

    sequences = [torch.randn(length, 2) for length in (4, 2)]
    packed = nn.utils.rnn.pack_sequence(sequences)
    objective = cv.Objective.of(Packed(), "cross-entropy", [(packed, torch.tensor([0, 1]))])
    assert objective.check().unused == ()


@pytest.mark.parametrize(
    "data, words",
    [
        ([torch.zeros(4, 4), torch.zeros(4).long()], r"A batch is \(inputs, targets\), but a Tensor came. Give a list"),
        ({"x": torch.zeros(4, 4), "labels": "no"}, "A dict of x, labels is no data set: not all of it are tensors"),
    ],
)
def test_data_that_are_not_given_as_one_set(data, words):
    with pytest.raises(cv.BadObjective, match=words):
        cv.Objective.of(Named(), "cross-entropy", data).check()


def test_a_batch_size_for_what_has_batches_is_refused():
    batches = [(torch.zeros(4, 4), torch.zeros(4).long())]
    with pytest.raises(ValueError, match="batch_size=7 is for whole tensors, but a list has batches"):
        cv.Objective.of(Named(), "cross-entropy", batches, batch_size=7)


@pytest.mark.parametrize(
    "layer, inputs",
    [
        (nn.Linear(4, 3), torch.ones(6, 4, dtype=torch.uint8)),
        (nn.Linear(4, 3, bias=False), torch.ones(6, 4, dtype=torch.int64)),
        (nn.Conv1d(4, 3, 1), torch.ones(6, 4, 1, dtype=torch.uint8)),
        (nn.Conv1d(4, 3, 1, bias=False), torch.ones(6, 4, 1, dtype=torch.uint8)),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)), torch.ones(6, 4, dtype=torch.int64)),
        (nn.Sequential(nn.GELU(), nn.Linear(4, 3)), torch.ones(6, 4, dtype=torch.int64)),
        (nn.Embedding(2, 3), torch.ones(6)),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__,
)
def test_inputs_of_a_type_that_a_layer_does_not_take(layer, inputs):
    model = nn.Sequential(layer, nn.Flatten())
    with pytest.raises(
        cv.BadObjective, match=r"Give numbers as floating point, x\.float\(\), .* indices as y\.long\(\)"
    ):
        cv.Objective.of(model, "cross-entropy", (inputs, torch.arange(6) % 3)).check()


def test_what_batches_are_is_told_where_models_take_other_ones():
    """Also of scripted models, which take no hooks that could tell where it was."""
    net = nn.Linear(2, 3)
    named = {"image": torch.ones(4, 2), "labels": torch.arange(4) % 3}
    with pytest.raises(cv.BadObjective, match=r"unexpected keyword argument 'image'.*Call the entries of a dict as"):
        cv.Objective.of(net, "cross-entropy", [named]).check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(net)
    for model, batch in (
        (net, {"x": torch.ones(4, 2)}),
        (scripted, {"x": torch.ones(4, 2)}),
        (net, [torch.ones(4, 2)]),
    ):
        with pytest.raises(cv.BadObjective, match=f"The batch is a {type(batch).__name__}: take what it holds"):
            cv.Objective.from_loss(model, lambda m, b: m(b).mean(), [batch], terms=lambda b: 1).check()
