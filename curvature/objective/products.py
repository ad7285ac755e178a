"""Curvature products of one batch, reverse over reverse: the graph is built once and many vectors go through it.

Reverse over reverse needs only that every backward is differentiable, which holds for far more of torch than forward
derivatives or vmap do. Pearlmutter 1994; Schraudolph 2002 for the Gauss-Newton product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import BadObjective
from curvature.objective.function import OutputLoss
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
    return _pulled(objective.space, list(leaves.values()), [total], [torch.ones_like(total)])


def hessian_rows(
    space: ParamSpace,
    leaves: Mapping[str, Tensor],
    grads: Sequence[Tensor | None],
    rows: Float[Tensor, "k n"],
) -> Float[Tensor, "k n"]:
    """The Hessian times each row, from the graph of the gradients."""
    return torch.stack([_pulled(space, list(leaves.values()), grads, space.unflatten(row)) for row in rows])


def ggn_rows(objective: Objective, batch: Any, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    """J^T M J times each row: J the Jacobian of the batch's outputs, M the loss Hessian at them.

    J v is the derivative of the linear map w -> J^T w, taken by a second backward through its graph.
    """
    space, function = objective.space, objective.function
    leaves = objective.leaves()
    outputs, targets = objective.outputs(leaves, batch)
    assert isinstance(function, OutputLoss)  # else objective.outputs has raised
    if "ggn" not in function.loss.offers:
        raise BadObjective(f"{function.name} has no Gauss-Newton matrix.", "Ask for the Hessian.")
    cotangent = torch.zeros_like(outputs, requires_grad=True)
    inputs = list(leaves.values())
    pulled = torch.autograd.grad(outputs, inputs, cotangent, create_graph=True, allow_unused=True)
    logits = outputs.detach()
    products = []
    for row in rows:
        pushed = _pulled_one(cotangent, pulled, space.unflatten(row))
        seed = function.loss.hessian_product(logits, targets, pushed)
        products.append(_pulled(space, inputs, [outputs], [seed]))
    return torch.stack(products)


def _pulled(
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


def _pulled_one(cotangent: Tensor, pulled: Sequence[Tensor | None], tangents: Sequence[Tensor]) -> Tensor:
    """The Jacobian-vector product: the derivative of the pulled-back gradients with respect to their cotangent."""
    pairs = [(p, t) for p, t in zip(pulled, tangents, strict=True) if p is not None and p.requires_grad]
    if not pairs:
        return torch.zeros_like(cotangent)
    (pushed,) = torch.autograd.grad([p for p, _ in pairs], cotangent, [t for _, t in pairs], retain_graph=True)
    return pushed
