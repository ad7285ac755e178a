"""How what was learned depends on what it was learned with: derivatives through a minimum, by the implicit function
theorem, which needs the minimum and not the way to it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import BadObjective, listing
from curvature.linalg.memory import peak_bytes
from curvature.linalg.operator import LinearOperator
from curvature.linalg.solve import SolveMethod, solve
from curvature.linalg.systems import Solution
from curvature.objective.batches import digest
from curvature.objective.objective import Objective
from curvature.objective.params import ParamSpace
from curvature.objective.passes import Passes, Sums
from curvature.objective.products import gradient_graph, pulled
from curvature.operators.engine import need_objective
from curvature.operators.hessian import hessian
from curvature.operators.subsamples import Matrix
from curvature.progress import Run
from curvature.result import Quantity, Result

Hyper = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, repr=False)
class Hypergradient(Solution):
    """The `gradients` of `hypergradient`, and the Solution x of (A + damping I) x = (gradient of outer) in them.

    `gradients` are shaped like the tensors of hyper, by whose names they can be asked for; `flat` (h,) has all their
    entries. They are those at a minimum of inner: `stationarity` is the norm of its gradient g where they were taken, 0
    there; `excess` = g.x is by how much outer is larger than at the minimum, to first order.
    """

    flat: Float[Tensor, " h"]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    stationarity: float
    excess: float

    @property
    def gradients(self) -> tuple[Tensor, ...]:
        pieces = self.flat.split([math.prod(shape) for shape in self.shapes])
        return tuple(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(f"{name!r}: the names are {listing(list(self.names))}.")
        return self.gradients[self.names.index(name)]

    def summary(self) -> dict[str, str]:
        pairs = zip(self.names, self.gradients, strict=True)
        norms = {f"d outer / d {name}": f"norm {float(gradient.norm()):.4g}" for name, gradient in pairs}
        inner = {"gradient of inner": f"norm {self.stationarity:.1e}", "outer above the minimum": f"{self.excess:.1e}"}
        return {**norms, **inner, **super().summary()}

    def quantities(self) -> dict[str, Quantity]:
        pairs = zip(self.names, self.gradients, strict=True)
        norms = {f"{name}_norm": Quantity(float(gradient.norm())) for name, gradient in pairs}
        inner = {"stationarity": Quantity(self.stationarity), "excess": Quantity(self.excess)}
        return {**super().quantities(), **norms, **inner}

    __repr__ = Result.__str__


def hypergradient(
    inner: Objective,
    outer: Objective,
    hyper: Hyper,
    *,
    matrix: Matrix = hessian,
    damping: float = 0.0,
    method: SolveMethod = "auto",
    preconditioner: LinearOperator | None = None,
    rtol: float = 1e-5,
    max_steps: int = 500,
    run: Run | None = None,
) -> Hypergradient:
    """d outer(theta) / d hyper where theta minimises inner: the direct derivative, less that of (gradient of inner).x
    for x with (A + damping I) x = gradient of outer, A = `matrix(inner)`.

    Both objectives are at the same parameters, a minimum of inner. `hyper` is a tensor that requires grad, several, or
    several by name: whatever the loss of inner is computed from, such as penalties, weights of examples or the data
    themselves. It may be in the loss of outer too. A loss closes over it, as an objective copies the parameters and
    buffers of its model and would not see it there:

        inner = Objective.from_loss(net, lambda net, batch: fit(net, batch) + penalty(net, decay), train)
        outer = Objective.of(net, "cross-entropy", held_out)
        decay.grad = hypergradient(inner, outer, decay, damping=1e-3).gradients[0]

    The Hessian of a network is singular or indefinite where training stops, and what damping and truncation leave of
    its inverse decides about the result. `method` and what follows are those of `solve`: "cg" with `matrix=ggn`;
    "neumann" with rtol=0, which with `max_steps` of k differentiates through the last k steps of gradient descent.
    Raises BadObjective where nothing depends on a tensor of hyper.

    Lorraine, Vicol & Duvenaud 2020 (arXiv:1911.02590); Bengio 2000 (Neural Computation 12).

    >>> weight = torch.tensor(1.0, requires_grad=True)  # of the penalty of (w - 4)^2 + weight w^2, least at w = 2
    >>> model, data = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    >>> _ = torch.nn.init.constant_(model.weight, 2.0)
    >>> inner = Objective.from_loss(model, lambda m, x: ((m(x) - 4) ** 2 + weight * m.weight**2).mean(), data)
    >>> outer = Objective.from_loss(model, lambda m, x: m(x).mean(), data)
    >>> hypergradient(inner, outer, weight).gradients  # w = 4 / (1 + weight)
    (tensor(-1.),)
    """
    started = time.perf_counter()
    tensors = _by_name(hyper)
    _check(inner, outer)
    meters = {id(objective.meter): objective.meter for objective in (inner, outer)}.values()
    passes = -sum(meter.passes for meter in meters)
    held, direct = (_direct(objective, tensors) for objective in (inner, outer))
    if unseen := [name for name in tensors if name not in held and name not in direct]:
        raise _unseen(unseen, tensors, inner)
    g, v = inner.gradient(), outer.gradient()
    A = matrix(inner)
    options: dict[str, Any] = {"damping": damping, "method": method, "rtol": rtol, "max_steps": max_steps}
    solution = solve(A, v, preconditioner=preconditioner, run=run, **options)
    space, inputs, x = ParamSpace.of(tensors), list(tensors.values()), inner.space.unflatten(solution.x)
    mixed = inner.average(lambda batch: pulled(space, inputs, gradient_graph(inner, batch)[1], x))
    passes += sum(meter.passes for meter in meters)
    seconds, peak = time.perf_counter() - started, peak_bytes(A.device)
    asked = {**solution.origin.options, "hyper": digest(tensors)}
    found = {
        "flat": space.flatten(direct.get(name, torch.zeros_like(t)) for name, t in tensors.items()) - mixed,
        "names": space.names,
        "shapes": tuple(tuple(shape) for shape in space.shapes),
        "stationarity": float(A.domain.norms(g[None])[0]),
        "excess": float(A.domain.inner(g[None], solution.x[None])[0, 0]),
        "cost": replace(solution.cost, passes=passes, seconds=seconds, peak_bytes=peak),
        "origin": replace(solution.origin, question="hypergradient", options=asked),
    }
    return Hypergradient(**{**{f.name: getattr(solution, f.name) for f in fields(Solution)}, **found})


def _direct(objective: Objective, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The derivatives of the loss, at these parameters, in those of the tensors that it is computed from."""

    def term(batch: Any) -> Sums:
        total = objective.total(objective.params, batch)
        if not total.requires_grad:
            return Sums()
        slopes = torch.autograd.grad(total, list(tensors.values()), allow_unused=True, retain_graph=True)
        # copies: of two tensors that are added autograd gives the same, and sums are made in place
        return Sums({name: slope.clone() for name, slope in zip(tensors, slopes, strict=True) if slope is not None})

    return Passes(objective).average(term)


def _by_name(hyper: Hyper) -> dict[str, Tensor]:
    """The tensors of hyper; by their place where they have no names."""
    if isinstance(hyper, Tensor):
        hyper = [hyper]
    named = dict(hyper) if isinstance(hyper, Mapping) else {str(place): tensor for place, tensor in enumerate(hyper)}
    if not named:
        raise ValueError("hyper holds no tensor. Pass those that the loss closes over.")
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            came = "does not" if isinstance(tensor, Tensor) else f"is a {type(tensor).__name__}"
            raise ValueError(
                f"hyper is of tensors that require grad, but {name!r} {came}. Call requires_grad_() on it before the "
                "loss is computed from it."
            )
    if len({(tensor.dtype, tensor.device) for tensor in named.values()}) != 1:
        raise ValueError(f"hyper is one tensor or several of one dtype on one device, but got {listing(list(named))}.")
    return named


def _check(inner: Objective, outer: Objective) -> None:
    for objective in (inner, outer):
        need_objective("hypergradient", objective)
    if inner.space != outer.space:
        raise ValueError(
            f"inner has {inner.space.size} parameters, {listing(inner.space.names)}, and outer {outer.space.size}, "
            f"{listing(outer.space.names)}. Give both the same model, select and dtype."
        )
    if moved := [name for name, p in inner.params.items() if not torch.equal(p, outer.params[name])]:
        raise ValueError(
            f"inner and outer are to be at the same parameters, but {listing(moved)} differ. Make both after training, "
            "or take outer.at(inner.params)."
        )
    inner.check()
    outer.check()


def _unseen(names: list[str], tensors: Mapping[str, Tensor], inner: Objective) -> BadObjective:
    """What to do about tensors that neither loss is computed from."""
    module = inner.function.module
    own = {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())}
    if kept := [own[id(tensors[name])] for name in names if id(tensors[name]) in own]:
        return BadObjective(
            f"{listing(kept)} is the model's own, and an objective computes with copies of its parameters and buffers.",
            "Keep the tensor outside of the model, in the function that Objective.from_loss takes.",
        )
    return BadObjective(
        f"Neither loss depends on {listing(names)} of hyper.",
        "Pass the very tensor that the loss closes over, and compute from it without detach(), item() or no_grad.",
    )
