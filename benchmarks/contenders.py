"""The libraries that `operators.py` compares, each as its documentation says to use it.

Fused attention has no second derivative, and only this library does something about it: the others run inside torch's
plain attention, or they would fail on the transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from problems import Batch, Loader, MeanCrossEntropy, Problem
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvature as cv

MATRICES = ("hessian", "ggn", "empirical_fisher")


class Lacks(Exception):
    """The library does not have this matrix, or not for these data."""


class Operator(NamedTuple):
    """A product in the layout of its library: `take` makes its argument of rows (k, n), `give` rows of its result."""

    product: Callable[[Any], Any]
    take: Callable[[Tensor], Any] = lambda rows: rows
    give: Callable[[Any], Tensor] = lambda rows: rows


@dataclass(frozen=True)
class Contender:
    """A way to multiply with a matrix. `settles` after that many products, which are not timed."""

    package: str
    build: Callable[[Problem, Loader, str], Operator]
    settles: int = 1

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None


def _ours(engine: Any, problem: Problem, loader: Loader, matrix: str) -> Operator:
    objective = cv.Objective.of(problem.copied(), cv.CrossEntropy(axis=-1), loader)
    makers: dict[str, Callable[..., cv.LinearOperator]] = {
        "hessian": cv.hessian,
        "ggn": cv.ggn,
        "empirical_fisher": cv.empirical_fisher,
    }
    return Operator(makers[matrix](objective, engine=engine).apply)


def _curvlinops(problem: Problem, loader: Loader, matrix: str) -> Operator:
    import curvlinops

    makers = {
        "hessian": curvlinops.HessianLinearOperator,
        "ggn": curvlinops.GGNLinearOperator,
        "empirical_fisher": curvlinops.EFLinearOperator,
    }
    module = nn.Sequential(problem.copied(), _ClassesSecond())
    with _attention():
        A = makers[matrix](module, nn.CrossEntropyLoss(), list(module.parameters()), loader)
    return Operator(_attending(A.__matmul__), take=lambda rows: rows.T.contiguous(), give=lambda columns: columns.T)


def _eigenthings(problem: Problem, loader: Loader, matrix: str) -> Operator:
    from hessian_eigenthings import loss_fns, operators

    module, criterion = problem.copied(), MeanCrossEntropy()
    if matrix == "hessian":
        A = operators.HessianOperator(module, loader, loss_fns.supervised_loss(criterion))
    elif matrix == "ggn":
        of_outputs = loss_fns.supervised_loss_of_output(criterion)
        A = operators.GGNOperator(module, loader, loss_fns.supervised_forward, of_outputs)
    elif problem.targets.ndim > 1:
        raise Lacks("its Fisher matrix is of whole examples, not of tokens")
    else:
        # its loss for this purpose hands cross-entropy a vector, and MeanCrossEntropy would take that for a batch
        A = operators.EmpiricalFisherOperator(
            module, loader, loss_fns.supervised_per_sample_loss(nn.CrossEntropyLoss())
        )  # fmt: skip
    return _one_by_one(A.matvec)


def _pyhessian(problem: Problem, loader: Loader, matrix: str) -> Operator:
    if matrix != "hessian":
        raise Lacks("has the Hessian only")
    import pyhessian

    module, criterion, cuda = problem.copied(), MeanCrossEntropy(), problem.inputs.is_cuda
    if len(loader) > 1:
        H = pyhessian.hessian(module, criterion, dataloader=loader, cuda=cuda)
        return _listed(module, lambda vector: H.dataloader_hv_product(vector)[1])
    with _attention():
        H = pyhessian.hessian(module, criterion, data=_only(loader), cuda=cuda)
    return _listed(module, partial(pyhessian.utils.hessian_vector_product, H.gradsH, H.params))


def _backpack(problem: Problem, loader: Loader, matrix: str) -> Operator:
    if len(loader) > 1:
        raise Lacks("multiplies with one batch only")
    if matrix == "empirical_fisher":
        raise Lacks("does not multiply with Fisher matrices")
    from backpack.hessianfree.ggnvp import ggn_vector_product
    from backpack.hessianfree.hvp import hessian_vector_product

    module, (inputs, targets) = problem.copied(), _only(loader)
    params = list(module.parameters())
    with _attention():
        outputs = module(inputs)
        loss = MeanCrossEntropy()(outputs, targets)
        if matrix == "ggn":
            return _listed(module, partial(ggn_vector_product, loss, outputs, module))
        grads = torch.autograd.grad(loss, params, create_graph=True)
    return _listed(module, lambda v: hessian_vector_product(loss, params, v, grad_params=grads))


OURS = "curvature, auto"
CONTENDERS: dict[str, Contender] = {
    OURS: Contender("curvature", partial(_ours, "auto"), settles=64),
    "curvature, retained": Contender("curvature", partial(_ours, "retained")),
    "curvature, recomputed": Contender("curvature", partial(_ours, "recomputed")),
    "curvature, linearized": Contender("curvature", partial(_ours, "linearized")),
    "curvlinops": Contender("curvlinops", _curvlinops),
    "hessian-eigenthings": Contender("hessian_eigenthings", _eigenthings),
    "PyHessian": Contender("pyhessian", _pyhessian),
    "BackPACK": Contender("backpack", _backpack),
}


class _ClassesSecond(nn.Module):
    """Logits with their classes along the second axis, where `nn.CrossEntropyLoss` has them; a view."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.movedim(-1, 1)


def _listed(module: nn.Module, matvec: Callable[[list[Tensor]], Any]) -> Operator:
    """Of a product of one vector at a time, given and returned as a list of tensors shaped like the parameters."""
    shapes = [p.shape for p in module.parameters()]

    def take(rows: Tensor) -> list[list[Tensor]]:
        sizes = [shape.numel() for shape in shapes]
        return [[part.view(s) for part, s in zip(row.split(sizes), shapes, strict=True)] for row in rows]

    def give(products: list[Any]) -> Tensor:
        return torch.stack([torch.cat([t.detach().reshape(-1) for t in product]) for product in products])

    return Operator(_attending(lambda vectors: [matvec(vector) for vector in vectors]), take, give)


def _one_by_one(matvec: Callable[[Tensor], Tensor]) -> Operator:
    # detached, as some hold on to the graph that made them: gigabytes
    return Operator(_attending(lambda rows: [matvec(row).detach() for row in rows]), give=torch.stack)


def _attending(product: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def inside(argument: Any) -> Any:
        with _attention():
            return product(argument)

    return inside


def _attention() -> Any:
    return sdpa_kernel(SDPBackend.MATH)


def _only(loader: Loader) -> Batch:
    (batch,) = loader
    return batch
