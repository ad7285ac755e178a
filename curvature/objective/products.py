"""Curvature products of one batch, reverse over reverse: the graph is built once and many vectors go through it.

Reverse over reverse needs only that every backward is differentiable, which holds for far more of torch than forward
derivatives or vmap do. Pearlmutter 1994; Schraudolph 2002 for the Gauss-Newton product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.objective.params import ParamSpace

if TYPE_CHECKING:
    from curvature.objective.objective import Objective


def gradient_graph(objective: Objective, batch: Any) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """Fresh leaves, and the gradients of the batch's total with the graph that made them (None where unused)."""
    leaves = objective.leaves()
    total = objective.total(leaves, batch)
    if not total.requires_grad:
        return leaves, [None] * len(leaves)
    grads = torch.autograd.grad(total, list(leaves.values()), create_graph=True, allow_unused=True)
    return leaves, list(grads)


def gradient_of(objective: Objective, batch: Any) -> Float[Tensor, " n"]:
    """The gradient of the batch's total, flat."""
    leaves = objective.leaves()
    total = objective.total(leaves, batch)
    return pulled(objective.space, list(leaves.values()), [total], [torch.ones_like(total)])


def hessian_product(
    space: ParamSpace, leaves: Mapping[str, Tensor], grads: Sequence[Tensor | None], row: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The Hessian times `row`, from what `gradient_graph` returned."""
    return pulled(space, list(leaves.values()), grads, space.unflatten(row))


def pulled(
    space: ParamSpace, inputs: list[Tensor], outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor]
) -> Float[Tensor, " n"]:
    """The vector-Jacobian product of `outputs`, flat; zero where nothing is connected."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o is not None and o.requires_grad]
    if not pairs:
        return torch.zeros(space.size, dtype=space.dtype, device=space.device)
    grads = torch.autograd.grad(
        [o for o, _ in pairs],
        inputs,
        [c for _, c in pairs],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return space.flatten(grads)


class Jacobian(NamedTuple):
    """J of a batch's outputs: `push` maps v (n,) to J v, shaped like the outputs, and `pull` maps such u to J^T u."""

    outputs: Tensor
    targets: Any
    push: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], Tensor]


def jacobian_graph(objective: Objective, batch: Any) -> Jacobian:
    """J of the batch, from one graph: J v is the derivative of the linear map u -> J^T u, by a second backward."""
    space, leaves = objective.space, objective.leaves()
    inputs = list(leaves.values())
    outputs, targets = objective.outputs(leaves, batch)
    cotangent = torch.ones_like(outputs, requires_grad=True)  # anywhere but at 0, which backwards may treat apart
    transposed: Sequence[Tensor | None] = [None] * len(inputs)
    if outputs.requires_grad:
        transposed = torch.autograd.grad(outputs, inputs, cotangent, create_graph=True, allow_unused=True)
    return Jacobian(
        outputs.detach(),
        targets,
        push=lambda row: _pushed(cotangent, transposed, space.unflatten(row)),
        pull=lambda tangent: pulled(space, inputs, [outputs], [tangent]),
    )


def _pushed(cotangent: Tensor, pulled: Sequence[Tensor | None], tangents: Sequence[Tensor]) -> Tensor:
    """The derivative of the pulled-back gradients with respect to their cotangent, along `tangents`."""
    pairs = [(p, t) for p, t in zip(pulled, tangents, strict=True) if p is not None and p.requires_grad]
    if not pairs:
        return torch.zeros_like(cotangent)
    (pushed,) = torch.autograd.grad([p for p, _ in pairs], cotangent, [t for _, t in pairs], retain_graph=True)
    return pushed
