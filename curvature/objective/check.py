"""The cheap check an objective passes before the first product is believed.

Stock torch returns silently wrong second derivatives in places (backwards that are not differentiable themselves but do
not say so), and noisy or non-finite objectives give spectra without meaning. On the first batch, at the cost of about
ten gradients, this finds them.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvature.errors import BadObjective, CurvatureError, NonFinite, TooLarge, one_line
from curvature.objective.batches import halves, leading, moved, shortened, stored_values
from curvature.objective.products import gradient_graph, gradient_of, hessian_product

if TYPE_CHECKING:
    from curvature.objective.objective import Objective

SYMMETRY = {torch.float32: 1e-3, torch.float64: 1e-8}  # healthy networks show 1e-5 and 1e-12
DIFFERENCE = 1e-2  # products against differences of float64 gradients: healthy ones agree to 1e-6, wrong ones to 0.2
STEPS = (1e-7, 1e-4, 1e-9, 1e-11, 1e-11)  # of these differences, relative to the norm of the parameters
BESIDE = 1e-2  # how far from the parameters they are taken, likewise: a bias of zero may lie exactly on a kink
EXAMPLES = 8  # of the first batch, for these differences
ROUNDING = 100  # units by which what is equal may differ
REFUSING = ("torch::autograd::Error", "torch::autograd::NotImplemented", "Error", "NotImplemented")
TWICE = ("derivative for", "differentiate twice", "double backward")


@dataclass(frozen=True)
class Health:
    """What the check found in a healthy objective.

    `rewrites` counts by name what was replaced to be twice differentiable; `unused` are selected parameters that the
    loss of the first batch does not depend on; `difference` is the relative difference between a Hessian product and
    a finite difference of gradients in float64, None when the model cannot be run in float64; `example_bytes` is the
    memory that the graph of a gradient holds for each example, and `example_tensor` that of its tensors, one with
    another: the mean over bytes of how many bytes the tensor has that they are in. `altered` are layers, with the
    reason, whose parameters turned out not to be known by what goes through them: whoever finds out adds them.
    """

    rewrites: Mapping[str, int] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    difference: float | None = None
    example_bytes: float = 0.0
    example_tensor: float = 0.0
    altered: dict[str, str] = field(default_factory=dict)

    def narrowed(self, names: Container[str]) -> Health:
        """The same of the parameters of these names alone."""
        return replace(self, unused=tuple(name for name in self.unused if name in names))


def examine(objective: Objective) -> Health:
    """The health of `objective`; raises BadObjective or NonFinite, with the fix, when it has none."""
    for name, tensor in {**objective.params, **objective.frozen, **objective.buffers}.items():
        values = stored_values(tensor)
        if tensor.is_floating_point() and not torch.isfinite(values).all() and "mask" not in name:
            count = int((~torch.isfinite(values)).sum())
            raise NonFinite(
                f"{name} has {count} of {tensor.numel()} entries that are not finite.",
                "Load an earlier checkpoint.",
            )
    batch = _first_batch(objective)
    try:
        with objective.context() as rewrites, objective.randomness():
            objective.function.check(objective.complete(objective.params), batch)
            _check_value(objective, batch)
            _check_cut(objective, batch)
            unused, asymmetry, held = _probe(objective, batch)
        difference = _difference(objective, batch)
        if asymmetry and not (difference is not None and asymmetry < SYMMETRY[torch.float32]):
            raise _asymmetric(asymmetry, verified=difference is not None)
    except Exception as error:  # models and losses can raise anything
        raise explained(error, 1, cut=objective.batches.cut) from error
    total, examples = sum(held), leading(batch) or 1
    tensor = sum(size**2 for size in held) / total if total else 0.0
    return Health(dict(rewrites), unused, difference, total / examples, tensor / examples)


def _first_batch(objective: Objective) -> Any:
    """The first batch; BadObjective when there is none, or when a second pass over the data differs from the first."""
    batches = objective.batches
    first, *more = [*islice(batches, 2)] or [None]
    if first is None:
        raise BadObjective("The data is empty: no batch came.", "Check the path and the filters of the data.")
    if more:
        objective.function.check_counted(first)
    if not batches.fixed and batches.digests != batches.digested():
        raise BadObjective(
            "A second pass over the data gave other batches than the first, so products would not be of one matrix.",
            "Use shuffle=False and fixed augmentation, or pass a list of batches: list(loader).",
        )
    return moved(first, objective.space.device, objective.space.dtype)


def _check_value(objective: Objective, batch: Any) -> None:
    """Raise unless the loss of the batch is finite and the same when computed again."""
    values = []
    for _ in range(2):
        with objective.randomness():
            values.append(float(objective.total(objective.params, batch).detach()))
    if not torch.isfinite(torch.tensor(values)).all():
        raise NonFinite(f"The loss of the first batch is {values[0]}.", "Check the data and the weights for overflow.")
    if abs(values[0] - values[1]) > ROUNDING * objective.space.eps * abs(values[0]):  # on GPUs sums may not repeat
        raise BadObjective(
            f"The loss is random: the first batch gave {values[0]:.6g}, then {values[1]:.6g}.",
            "Draw random numbers only from the global generators of torch, Python or NumPy, which are fixed here.",
        )


def _check_cut(objective: Objective, batch: Any) -> None:
    """Raise where tensors were cut into batches, and the loss of a batch is not the sum over those of its halves.

    Whether the first axis counts examples, and whether the model computes each by itself, is seen only in numbers. In
    training mode they may depend on the batch: batch normalisation does by design.
    """
    if not objective.batches.cut or objective.mode == "train" or (leading(batch) or 0) < 2:
        return
    together = float(objective.total(objective.params, batch).detach())
    try:
        apart = sum(float(objective.total(objective.params, half).detach()) for half in halves(batch))
    except Exception as error:
        raise _coupled(f"a half of the first batch fails ({one_line(error)})") from error
    rounding = ROUNDING * objective.space.eps * (abs(together) + float(objective.function.weight(batch)))
    if abs(together - apart) > rounding:
        raise _coupled(f"the first batch has the loss {together:.6g}, and its halves {apart:.6g} together")


def _coupled(how: str) -> BadObjective:
    return BadObjective(
        f"The tensors were cut into batches along their first axis, but do not fall into examples there: {how}.",
        "Pass batch_size=None to take them as one batch, or a list of batches.",
    )


def _probe(objective: Objective, batch: Any) -> tuple[tuple[str, ...], float, list[int]]:
    """The unused parameters; how far the Hessian of the batch is from symmetric, 0 where rounding explains it; and the
    bytes of each tensor that the graph of its gradient holds."""
    space = objective.space
    try:
        with objective.randomness(), _saved_bytes() as held:
            leaves, grads = gradient_graph(objective, batch)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        held = {}  # a loss that calls torch.func allows no such look at its graph
        with objective.randomness():
            leaves, grads = gradient_graph(objective, batch)
    if all(g is None for g in grads):
        raise BadObjective(
            "The loss does not depend on the selected parameters.",
            "Compute it from the model that is passed in, without no_grad, detach or argmax.",
        )
    for name, g in zip(leaves, grads, strict=True):
        if g is not None and not torch.isfinite(g).all():
            raise NonFinite(f"The gradient with respect to {name} is not finite.", "Check the loss for overflow.")
    _scan([g for g in grads if g is not None])
    rows = space.draw(2, seed=objective.seed, kind="normal")
    products = torch.stack([hessian_product(space, leaves, grads, row) for row in rows])
    forms = space.inner(rows, products)
    gap, size = float((forms[0, 1] - forms[1, 0]).abs()), float(space.norms(products).sum())
    noise = ROUNDING * space.eps * _norm(g.detach() for g in grads if g is not None) * space.size**0.5
    unused = tuple(name for name, g in zip(leaves, grads, strict=True) if g is None)
    asymmetry = gap / size if gap > SYMMETRY[space.dtype] * size + noise else 0.0
    return unused, asymmetry, list(held.values())


@contextmanager
def _saved_bytes() -> Iterator[dict[int, int]]:
    """Yields the bytes of every storage that graphs built inside save, by address."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        with suppress(NotImplementedError, RuntimeError):  # sparse tensors have no storage
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield held


def _asymmetric(asymmetry: float, *, verified: bool) -> BadObjective:
    """The refusal of a Hessian that is not symmetric; `verified` when its formulas are right in float64.

    In float64 a verified one may be as asymmetric as float32 makes it, in which many models compute their norms.
    """
    if not verified:
        return BadObjective(
            f"Second derivatives are wrong: the Hessian of the first batch is not symmetric, by {asymmetry:.1%}.",
            "Some backward is not differentiable itself: look for custom autograd Functions.",
        )
    # A loss near zero, say: its curvature drowns in the rounding of the probabilities.
    return BadObjective(
        f"float32 is too coarse here: rounding makes the Hessian of the first batch asymmetric by {asymmetry:.1%}.",
        "Compute in float64: dtype=torch.float64, or --dtype float64 on the command line.",
    )


def _scan(grads: Sequence[Tensor]) -> None:
    """Raise BadObjective when a node in the graph of the gradients refuses to be differentiated.

    Such nodes may hang on detached leaves that the second pass never visits: it then returns wrong numbers silently.
    """
    seen: set[Any] = set()
    stack = [g.grad_fn for g in grads]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in REFUSING:
            raise BadObjective(
                "A backward in the model cannot be differentiated again (once_differentiable, or no derivative known).",
                "Replace the custom autograd Function or fused kernel by plain torch operations.",
            )
        if node.name() == "WeightNormInterfaceBackward0":  # what compat rewrites, out of its reach
            raise BadObjective(
                "weight_norm inside TorchScript has wrong second derivatives in torch.",
                "Export the eager model, or remove the weight norm before scripting.",
            )
        stack.extend(following for following, _ in node.next_functions)


def _difference(objective: Objective, batch: Any) -> float | None:
    """How far a Hessian product is from the central difference of gradients, relative to its norm, all in float64.

    Of the first examples only, where the model takes them alone: float64 is slow. None when the model does not run in
    float64 (a float32 constant inside, say): then less is known.
    """
    objective = objective.to(dtype=torch.float64)
    batch = moved(batch, objective.space.device, torch.float64)
    for part in (shortened(batch, EXAMPLES), batch):
        try:
            return _least_difference(objective, part)
        except BadObjective:
            raise
        except Exception:
            continue
    return None


def _least_difference(objective: Objective, batch: Any) -> float | None:
    """The smallest such difference over a few steps; BadObjective when none agrees, None where nothing is finite.

    One step whose difference agrees is enough: a long one may cross kinks, a short one sees nothing but rounding where
    a model computes parts of itself in float32 whatever it is given, and a wrong product agrees with none.
    """
    space = objective.space
    center = objective.position
    scale = max(1.0, _norm([center]))
    aside, *directions = space.draw(1 + len(STEPS), seed=objective.seed, kind="sphere") / space.size**0.5
    center = center + BESIDE * scale * aside
    least = math.inf
    still = _gradient(objective.at(center), batch) == 0  # padding_idx: rows that matter, and are held fixed
    for step, direction in zip(STEPS, directions, strict=True):
        direction = direction.masked_fill(still, 0)
        product, h = _product(objective.at(center), batch, direction), step * scale
        ahead, behind = (_gradient(objective.at(center + s * direction), batch) for s in (h, -h))
        measured = (ahead - behind) / (2 * h)
        size = max(_norm([measured]), _norm([product])) + ROUNDING / DIFFERENCE * space.eps * _norm([ahead]) / h
        least = min(least, _norm([measured - product]) / size if size else 0.0)
        if least <= DIFFERENCE:
            return least
    if math.isinf(least):  # nowhere finite beside the parameters
        return None
    raise BadObjective(
        f"Second derivatives are wrong: a Hessian product of the first batch is {least:.1%} off the finite difference "
        "of gradients.",
        "Look for custom autograd Functions and detach().",
    )


def _product(objective: Objective, batch: Any, row: Tensor) -> Tensor:
    with objective.context(), objective.randomness():
        return hessian_product(objective.space, *gradient_graph(objective, batch), row)


def _gradient(objective: Objective, batch: Any) -> Tensor:
    with objective.context(), objective.randomness():
        return gradient_of(objective, batch)


def _norm(tensors: Iterable[Tensor]) -> float:
    """The norm of all entries together, in float64."""
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tensors))


def explained(error: Exception, number: int, *, cut: bool = False) -> CurvatureError:
    """An error of the user's model or loss in batch `number`, or of torch about it, in our words.

    Shapes may not fit because the batch was `cut` along an axis that counts no examples.
    """
    if isinstance(error, CurvatureError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return TooLarge(
            f"Batch {number} does not fit into memory.", "Use smaller batches, fewer vectors, or a larger machine."
        )
    if any(words in str(error) for words in TWICE):
        return BadObjective(
            f"The model has no second derivatives: {one_line(error)}.",
            "Replace that layer or loss by plain torch operations (attention: the math or eager implementation).",
        )
    if cut and isinstance(error, RuntimeError | IndexError | ValueError):
        return _coupled(f"the model or the loss fails on the first batch ({one_line(error)})")
    return BadObjective(
        f"The model or the loss failed on batch {number}: {one_line(error)}.",
        "Check that inputs and targets have the shapes and dtypes they expect.",
    )
