"""Hessian and Gauss-Newton products against dense matrices computed the obvious way."""

from __future__ import annotations

import pytest
import torch
from objectives import Case, zoo
from torch import nn

import curvature as cv

ZOO = pytest.mark.parametrize("case", zoo(), ids=str)
UNEVEN = (1, 5)


def uneven(case: Case) -> tuple[int, ...]:
    return (*UNEVEN, len(case.inputs) - sum(UNEVEN))


def dense(case: Case, matrix: str) -> torch.Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return case.dense_hessian() if matrix == "hessian" else case.dense_ggn()


@ZOO
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_equals_dense_matrix(case, matrix):
    A = getattr(cv, matrix)(case.objective(uneven(case)))
    torch.testing.assert_close(A.dense(), dense(case, matrix), rtol=1e-10, atol=1e-12)


@ZOO
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_does_not_depend_on_batching_order_or_chunking(case, matrix):
    make = getattr(cv, matrix)
    whole = make(case.objective())
    order = torch.randperm(len(case.inputs))
    shuffled = Case(case.name, case.module, case.loss, case.mean_loss, case.inputs[order], case.targets[order])
    parts = make(shuffled.objective((3, 1, len(order) - 4)))
    rows = whole.domain.draw(5, seed=3)
    one_by_one = torch.stack([parts @ row for row in rows])
    torch.testing.assert_close(whole.apply(rows), one_by_one, rtol=1e-10, atol=1e-13)


@ZOO
def test_gradient_and_value_equal_torch(case):
    objective = case.objective(uneven(case))
    flat = case.flat.requires_grad_()
    value = case.value(flat)
    torch.testing.assert_close(objective.value(), value.item(), rtol=1e-12, atol=0)
    torch.testing.assert_close(objective.gradient(), torch.autograd.grad(value, flat)[0], rtol=1e-10, atol=1e-13)


@ZOO
def test_ggn_is_psd_and_both_are_symmetric(case):
    H, G = cv.hessian(case.objective()).dense(), cv.ggn(case.objective()).dense()
    assert torch.linalg.eigvalsh(G)[0] > -1e-12
    for A in (H, G):
        torch.testing.assert_close(A, A.T, rtol=0, atol=1e-12)


def test_a_product_with_a_block_is_one_pass():
    objective = zoo()[1].objective((4, 5))
    H = cv.hessian(objective)
    objective.check()
    H.apply(H.domain.draw(7, seed=0))
    assert objective.meter.passes == 1


def test_any_scalar_loss_has_the_same_hessian():
    case = zoo()[1]
    batches = list(zip(case.inputs.split([2, 7]), case.targets.split([2, 7]), strict=True))
    bare = cv.Objective.from_loss(
        case.module, lambda model, batch: nn.CrossEntropyLoss()(model(batch[0]), batch[1]), batches
    )
    torch.testing.assert_close(cv.hessian(bare).dense(), case.dense_hessian(), rtol=1e-10, atol=1e-12)
    with pytest.raises(cv.BadObjective, match="needs the model's outputs"):
        cv.ggn(bare) @ bare.gradient()


def test_a_loss_with_input_derivatives():
    """A physics-informed loss: it differentiates the model itself, and couples nothing across the batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.linspace(0, 1, 7).double().unsqueeze(1)

    def residual(model, points):
        points = points.detach().requires_grad_()
        u = model(points)
        (du,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        return (du + u).square().mean()

    def value(flat):
        params, start = {}, 0
        for name, p in net.named_parameters():
            params[name], start = flat[start : start + p.numel()].view(p.shape), start + p.numel()
        points = x.clone().requires_grad_()
        u = torch.func.functional_call(net, params, (points,))
        (du,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        return (du + u).square().mean()

    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    expected = torch.autograd.functional.hessian(value, flat)
    objective = cv.Objective.from_loss(net, residual, [x[:3], x[3:]])
    torch.testing.assert_close(cv.hessian(objective).dense(), expected, rtol=1e-10, atol=1e-12)


def test_selected_parameters_give_the_block_of_the_whole():
    case = zoo()[1]
    whole = case.dense_hessian()
    block = cv.hessian(case.objective(select="2.*")).dense()
    first = sum(p.numel() for name, p in case.module.named_parameters() if name.startswith("0."))
    torch.testing.assert_close(block, whole[first:, first:], rtol=1e-10, atol=1e-12)


def test_unused_parameters_have_zero_curvature():
    case = zoo()[1]
    case.module.register_parameter("extra", nn.Parameter(torch.ones(2).double()))
    objective = case.objective()
    assert objective.check().unused == ("extra",)
    row = cv.hessian(objective) @ torch.ones(objective.space.size).double()
    assert objective.space.named(row)["extra"].abs().max() == 0


def test_the_regulariser_of_training_is_part_of_the_function():
    case = zoo()[1]
    plain, decayed = case.objective(), case.objective(l2=0.3)
    flat = case.flat.requires_grad_()
    value = case.value(flat) + 0.15 * flat.square().sum()
    assert decayed.value() == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(decayed.gradient(), torch.autograd.grad(value, flat)[0], rtol=1e-10, atol=1e-13)
    shift = 0.3 * torch.eye(plain.space.size).double()
    for matrix in (cv.hessian, cv.ggn):
        torch.testing.assert_close(matrix(decayed).dense(), matrix(plain).dense() + shift, rtol=1e-10, atol=1e-12)
    fisher = (cv.empirical_fisher(objective).dense() for objective in (plain, decayed))
    torch.testing.assert_close(*fisher, rtol=0, atol=0)  # of the likelihood alone
    assert cv.eigsh(cv.hessian(decayed), 1).origin.operator["l2"] == 0.3
    with pytest.raises(ValueError, match=r"l2 is a finite number, 0 or more, but got -1"):
        case.objective(l2=-1)
