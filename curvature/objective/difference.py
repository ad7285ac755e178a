"""Whether derivatives are right: by symmetry, against differences of gradients in float64, and of losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvature.objective.batches import moved, shortened
from curvature.objective.params import ParamSpace
from curvature.objective.products import gradient_graph, gradient_of, hessian_product

if TYPE_CHECKING:
    from curvature.objective.objective import Objective

SYMMETRY = {torch.float32: 1e-3, torch.float64: 1e-8}  # healthy networks show 1e-5 and 1e-12
DIFFERENCE = 1e-2  # products against differences of float64 gradients: healthy ones agree to 1e-6, wrong ones to 0.2
NEAR = 1e-3  # what computes in float32 inside comes to 1e-4; above this something may be left out of derivatives
STEPS = (1e-7, 1e-4, 1e-9, 1e-11, 1e-11)  # of these differences, relative to the norm of the parameters
BESIDE = 1e-2  # how far from the parameters they are taken, likewise: a bias of zero may lie exactly on a kink
EXAMPLES = 8  # of the first batch, for these differences
ROUNDING = 100  # units by which what is equal may differ
STRIDES = (1.0, -1.0, 100.0, -100.0)  # in sizes of a parameter: both sides of a ReLU, and far, as argmax is flat
PARTS = 16  # of the parameters with which a loss may change, that are told apart, by two to eight losses each


def asymmetry(objective: Objective, leaves: Mapping[str, Tensor], grads: Sequence[Tensor | None]) -> float:
    """How far the Hessian is from symmetric, relative to two products with it; 0 where rounding explains it."""
    space = objective.space
    rows = space.draw(2, seed=objective.seed, kind="normal")
    products = torch.stack([hessian_product(space, leaves, grads, row) for row in rows])
    forms = space.inner(rows, products)
    gap, size = float((forms[0, 1] - forms[1, 0]).abs()), float(space.norms(products).sum())
    noise = ROUNDING * space.eps * norm(g.detach() for g in grads if g is not None) * space.size**0.5
    return gap / size if gap > SYMMETRY[space.dtype] * size + noise else 0.0


def difference(objective: Objective, batch: Any) -> tuple[float | None, int]:
    """How far a Hessian product is from the central difference of gradients, relative to its norm, all in float64; and
    how many products it took to tell.

    Of the first examples only, where the model takes them alone: float64 is slow. None when the model does not run in
    float64 (a float32 constant inside, say), or is finite nowhere beside the parameters: then less is known.
    """
    objective = objective.to(dtype=torch.float64)
    batch = moved(batch, objective.space.device, torch.float64)
    for part in (shortened(batch, EXAMPLES), batch):
        try:
            return _least_difference(objective, part)
        except Exception:
            continue
    return None, 0


def _least_difference(objective: Objective, batch: Any) -> tuple[float | None, int]:
    """The smallest such difference over a few steps, which end when one agrees.

    One step whose difference agrees is enough: a long one may cross kinks, a short one sees nothing but rounding where
    a model computes parts of itself in float32 whatever it is given, and a wrong product agrees with none.
    """
    space = objective.space
    center = objective.position
    scale = max(1.0, norm([center]))
    aside, *directions = space.draw(1 + len(STEPS), seed=objective.seed, kind="sphere") / space.size**0.5
    objective = objective.at(center + BESIDE * scale * aside)
    center = objective.position
    with objective.context(), objective.randomness():
        leaves, grads = gradient_graph(objective, batch)
    gradient = space.flatten(
        torch.zeros_like(leaf) if g is None else g.detach() for leaf, g in zip(leaves.values(), grads, strict=True)
    )
    still = gradient == 0  # padding_idx: rows that matter, and are held fixed
    least, products = math.inf, 0
    for step, direction in zip(STEPS, directions, strict=True):
        direction = direction.masked_fill(still, 0)
        with objective.context(), objective.randomness():
            product, h = hessian_product(space, leaves, grads, direction), step * scale
        products += 1
        ahead, behind = (_gradient(objective.at(center + s * direction), batch) for s in (h, -h))
        measured = (ahead - behind) / (2 * h)
        size = max(norm([measured]), norm([product])) + ROUNDING / DIFFERENCE * space.eps * norm([ahead]) / h
        least = min(least, norm([measured - product]) / size if size else 0.0)
        if least <= NEAR:
            break
    return None if math.isinf(least) else least, products


def _gradient(objective: Objective, batch: Any) -> Tensor:
    with objective.context(), objective.randomness():
        return gradient_of(objective, batch)


def changing(objective: Objective, batch: Any, value: float, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the parameters `names` with which the loss of the batch changes from `value`, whatever gradients say.

    Names are halved until each part is at most one of PARTS: of more names than that, neighbours count together. A
    loss that is not finite where the parameters are displaced, or cannot be computed there, has changed.
    """
    space = ParamSpace.of({name: objective.params[name] for name in names})
    away = space.named(space.draw(1, seed=objective.seed, kind="normal")[0])
    for name, direction in away.items():
        direction *= float(objective.params[name].square().mean().sqrt()) or 1.0
    least = math.ceil(len(names) / PARTS)
    noise = ROUNDING * space.eps * abs(value)

    def displaced(names: Sequence[str], stride: float) -> float:
        there = {name: objective.params[name] + stride * away[name] for name in names}
        try:
            return value_of(objective.at({**objective.params, **there}), batch)
        except Exception:  # no index of a table any more, say
            return math.nan

    def told(names: tuple[str, ...]) -> tuple[str, ...]:
        if all(abs(displaced(names, stride) - value) <= noise for stride in STRIDES):  # which NaN is not
            return ()
        if len(names) <= least:
            return names
        half = len(names) // 2
        return told(names[:half]) + told(names[half:]) or names  # a product of zeros changes with both alone

    return told(tuple(names))


def value_of(objective: Objective, batch: Any) -> float:
    """The total of a batch."""
    with objective.randomness():
        return float(objective.total(objective.params, batch).detach())


def norm(tensors: Iterable[Tensor]) -> float:
    """The norm of all entries together, in float64."""
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tensors))
