"""Exact Gauss-Newton: the GGN of few data by the inner products of its rows, which tell its inverse.

With J the Jacobian of all outputs and R R^T the Hessian of the loss in them, the GGN is K^T K / T for K = R^T J, one
row for each output of each of T terms. The Gram matrix K K^T is summed layer by layer, and K never held.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import TooLarge
from curvature.linalg.memory import short_of
from curvature.linalg.operator import LinearOperator, MatrixFree, Product
from curvature.linalg.outer import Outer
from curvature.linalg.space import Space
from curvature.linalg.structured import Dense
from curvature.objective.losses import Likelihood, lacking
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes
from curvature.operators.alone import Alone
from curvature.operators.engine import Memory, budget_of, need_objective
from curvature.operators.followed import Recorded, collected, number_of
from curvature.operators.gauss_newton import ggn
from curvature.operators.jacobian import jacobian
from curvature.operators.layers import Inputs, Layer
from curvature.operators.layers.positions import Rows
from curvature.operators.layerwise import Batch, Layerwise
from curvature.operators.residuals import Residuals, likelihood, one_term_each, residuals_of

BLOCK = 1 << 21  # entries of gradients whose inner products are taken at a time: 8 MiB in float32
LONG = 2e11  # multiplications of which a user should know: about ten seconds of one core
REST = ""  # the name of the share of parameters without a layer: none is called so


def egn(objective: Objective, *, memory: Memory = "auto") -> Outer | Dense:
    """The GGN of few data, (n, n), psd, in a form with an exact inverse: `inverse(egn(objective), damping=mu)`.

    With m outputs of all terms together it is known by an m x m matrix, the inner products of its rows, from as many
    backward passes as an example has outputs. Where what they send back to all layers does not fit into `memory` bytes
    they are made again, for some layers at a time; the Jacobian is never held. A product, with the matrix or its
    inverse, is one with the Jacobian and one with its transpose; trace, eigenvalues and log-determinant are exact. What
    a vector has outside of the rows, its rounding included, the inverse divides by the damping: where that is small,
    measure in float64. Where m is not below n the matrix is made in parameter space, and held whole. TooLarge where
    neither fits; where it fits, and takes more than 2e11 multiplications, a UserWarning says how many.

    It is the matrix of `ggn`, regulariser included, for all the data of the objective: as a rule one batch,
    `objective.on([batch])`. Korbit, Adeoye, Bemporad & Zanon 2024 (arXiv:2405.14402).

    >>> from curvature import inverse
    >>> plane, x = torch.nn.Linear(3, 1, bias=False), torch.tensor([[1.0, 1.0, 0.0]])
    >>> objective = Objective.of(plane, "mse", (x, torch.ones(1, 1)), dtype=torch.float64)
    >>> step = inverse(egn(objective), damping=1e-6) @ objective.gradient()  # to the nearest weights that fit
    >>> (x.double() @ (objective.params["weight"][0] - step)).round(decimals=4)
    tensor([1.], dtype=torch.float64)
    """
    need_objective("egn", objective)
    loss, space = likelihood(objective, "egn"), objective.space
    if "ggn" not in loss.offers:
        raise lacking(loss, "egn")
    m, terms = _sizes(objective)
    _need_square(min(m, space.size), space)
    _warn_of(m, space.size)
    if m >= space.size:
        matrix = ggn(objective, memory=memory)
        return Dense(matrix.dense(limit=space.size), psd=True, source={**matrix.source, "operator": "egn"})
    residuals = residuals_of(objective, "egn", "type-2")
    seen = Layerwise("egn", objective, residuals, apart=loss, exact=True)
    roots = Roots(Passes(objective, Batch).each(partial(_stacked, objective, residuals, loss)), space)
    gram = _gram(seen, [len(root) * len(root[0]) for root in roots.stacks], budget_of(memory, space.device))
    core = torch.eye(m, dtype=torch.float64, device=space.device) / terms
    rows = Product(roots, jacobian(objective, memory=memory))
    return Outer(rows, core, shift=objective.l2, gram=gram, psd=True, source=seen.source)


class Roots(LinearOperator):
    """R^T, (m, m): the inner products of the outputs of each example with its residuals, which are stacked by batch."""

    def __init__(self, stacks: Sequence[Float[Tensor, "j b e"]], space: Space) -> None:
        self.stacks = stacks
        self.outputs = [stack.shape[1] * stack.shape[2] for stack in stacks]
        self.rows = [stack.shape[0] * stack.shape[1] for stack in stacks]
        self.domain = Space(sum(self.outputs), space.dtype, space.device)
        self.codomain = Space(sum(self.rows), torch.float64, space.device)
        self.source = {"operator": "roots"}

    def apply(self, rows: Float[Tensor, "k m"]) -> Float[Tensor, "k m"]:
        pieces = zip(rows.to(self.domain.dtype).split(self.outputs, dim=1), self.stacks, strict=True)
        found = [torch.einsum("jbe,kbe->kjb", s, u.view(-1, *s.shape[1:])).flatten(1) for u, s in pieces]
        return torch.cat(found, dim=1).double()

    def adjoint(self) -> LinearOperator:
        return MatrixFree(self._transposed, self.codomain, self.domain, adjoint=self.apply)

    def _transposed(self, rows: Float[Tensor, "k m"]) -> Float[Tensor, "k m"]:
        pieces = zip(rows.to(self.domain.dtype).split(self.rows, dim=1), self.stacks, strict=True)
        found = [torch.einsum("jbe,kjb->kbe", s, c.view(-1, *s.shape[:2])).flatten(1) for c, s in pieces]
        return torch.cat(found, dim=1)


@dataclass(frozen=True)
class Share:
    """What comes back from a batch to some parameters, for each residual: the gradients of examples (b, p), or, with
    the `inputs` of a layer, the cotangents (b, r, g, o) that these are made of."""

    inputs: Inputs | None
    tensors: list[Tensor] = field(default_factory=list)

    @property
    def factored(self) -> bool:
        """Whether a gradient is a single outer product in each group, so that inner products are those of factors."""
        return isinstance(self.inputs, Rows) and self.inputs.values.shape[1] == 1

    def columns(self, some: slice) -> Float[Tensor, "m p"]:
        """The gradients, as rows, that belong to some of the last axis."""
        if self.inputs is None:
            return torch.cat([gradients[:, some] for gradients in self.tensors])
        return torch.cat([self.inputs.gradients(cotangents[..., some]) for cotangents in self.tensors])


class Keeping:
    """Keeps what comes back from a batch, of the `compact` layers the cotangents: a Visitor of Layerwise."""

    def __init__(self, compact: Container[str]) -> None:
        self.compact = compact
        self.shares: dict[str, Share] = {}

    def layer(self, layer: Layer, inputs: Inputs) -> Callable[[Tensor], None]:
        share = self.shares[layer.name] = Share(inputs if layer.name in self.compact else None)
        gradients = inputs.gradients if share.inputs is None else lambda cotangents: cotangents
        return lambda cotangents: share.tensors.append(gradients(cotangents))

    def others(self, alone: Alone, residuals: list[Tensor]) -> None:
        self.shares.setdefault(REST, Share(None)).tensors.extend(alone.gradients(residuals))


def _gram(seen: Layerwise, rows: list[int], budget: float) -> Float[Tensor, "m m"]:
    """K K^T, from as many passes as it takes for what is kept in each to fit into `budget` bytes."""
    space, m = seen.objective.space, sum(rows)
    total = torch.zeros(m, m, dtype=torch.float64, device=space.device)
    entry = torch.empty(0, dtype=space.dtype).element_size()
    sizes, compact = _kept(seen, m)

    def add(group: set[str]) -> None:
        see = Passes(seen.objective, Batch).each
        kept = see(lambda batch: seen.shown(batch, partial(Keeping, compact), group)[0].shares)
        layers = {layer.name for layer in seen.layers}  # what was found out to be none is with the others
        for name in (group & layers) | {REST}:
            _add_inner(total, [shares.get(name) for shares in kept], rows, space)

    for group in _groups(sizes, budget / entry):
        add(group)
    sizes = {name: m * seen.objective.params[name].numel() for name in seen.others}
    _need(entry * max(sizes.values(), default=0), "The gradients of a parameter without a layer of its own", space)
    for group in _groups(sizes, budget / entry):
        add(group)
    return total


def _kept(seen: Layerwise, m: int) -> tuple[dict[str, int], set[str]]:
    """How many entries will be kept of each layer; the layers of which it is fewer to keep inputs and cotangents."""

    def sizes(batch: Batch) -> dict[str, tuple[int, int]]:
        recorded = Recorded(seen.objective, seen.layers, batch.content)
        found = {}
        for layer in seen.layers:
            with collected({}):  # what cannot be followed will be found out
                if (inputs := recorded.inputs(layer)) is not None:
                    found[layer.name] = (inputs.values.numel(), inputs.values.shape[1])
        return found

    found = Passes(seen.objective, Batch).each(sizes) if seen.layers else []
    kept, compact = {}, set()
    for layer in seen.layers:
        groups, out, inner = layer.arranged(seen.objective.params).shape
        inputs = sum(of.get(layer.name, (0, 0))[0] for of in found)
        positions = max((of.get(layer.name, (0, 0))[1] for of in found), default=0)
        if positions < inner:
            compact.add(layer.name)
        kept[layer.name] = inputs + m * groups * out * min(positions, inner)
    return kept, compact


def _groups(sizes: Mapping[str, int], room: float) -> Iterator[set[str]]:
    """The names in groups whose sizes together fit into the room, or of one."""
    group: set[str] = set()
    left = room
    for name, size in sizes.items():
        if group and size > left:
            yield group
            group, left = set(), room
        group.add(name)
        left -= size
    if group:
        yield group


def _add_inner(total: Float[Tensor, "m m"], shares: Sequence[Share | None], rows: Sequence[int], space: Space) -> None:
    """Add the inner products of the gradients in all shares to `total`; a share that is not there is zero."""
    there = [share for share in shares if share is not None]
    if not there:
        return
    if len(there) == len(shares) and all(share.factored for share in there):
        total += _inner_of_factors(there)
        return
    last = there[0].tensors[0].shape[-1]
    step = max(1, BLOCK // (len(total) * max(1, there[0].columns(slice(0, 1)).shape[1])))
    for start in range(0, last, step):
        some = slice(start, start + step)
        blocks = [None if share is None else share.columns(some) for share in shares]
        width = next(block.shape[1] for block in blocks if block is not None)
        filled = [space.empty.new_zeros(n, width) if b is None else b for b, n in zip(blocks, rows, strict=True)]
        block = filled[0] if len(filled) == 1 else torch.cat(filled)
        total += Space(width, space.dtype, space.device).inner(block, block)


def _inner_of_factors(shares: Sequence[Share]) -> Float[Tensor, "m m"]:
    """Inner products of outer products d a^T: (d . d') (a . a'), summed over groups."""
    cotangents = torch.cat([cotangents[:, 0] for share in shares for cotangents in share.tensors])  # (m, g, o)
    inputs = [share.inputs.vectors[:, 0] for share in shares if isinstance(share.inputs, Rows)]  # (b, g, i)
    starts = accumulate((len(values) for values in inputs), initial=0)
    places = [torch.arange(len(values)) + start for values, start in zip(inputs, starts, strict=False)]
    place = torch.cat([p.repeat(len(share.tensors)) for p, share in zip(places, shares, strict=True)])
    total = torch.zeros((), dtype=torch.float64)
    for d, a in zip(cotangents.unbind(1), torch.cat(inputs).unbind(1), strict=True):
        outer, inner = (Space(x.shape[1], x.dtype, x.device).inner(x, x) for x in (d, a))
        total = total + outer * inner[place][:, place]
    return total


def _sizes(objective: Objective) -> tuple[int, float]:
    """How many outputs the data have, and how many terms."""
    m, terms = Passes(objective).total(
        lambda batch: torch.tensor(float(objective.outputs(objective.params, batch)[0].numel()), dtype=torch.float64)
    )
    return int(m), terms


def _stacked(objective: Objective, residuals: Residuals, loss: Likelihood, batch: Batch) -> Float[Tensor, "j b e"]:
    """The residuals of a batch, of one term of each example at a time."""
    outputs, targets = objective.outputs(objective.params, batch.content)
    examples = number_of(batch.content, outputs)
    each = one_term_each(residuals(batch.index, outputs, targets), loss, outputs, targets, examples)
    return torch.stack([residual.reshape(examples, -1).to(objective.space.dtype) for residual in each])


def _need_square(size: int, space: Space) -> None:
    """TooLarge when the inverse of a square matrix would not fit into the memory that is free now."""
    _need(4 * 8 * size**2, f"A matrix of {size:,} x {size:,} with its inverse", space)  # and what is between them


def _warn_of(m: int, n: int) -> None:
    """UserWarning where inner products and an inverse take long."""
    rank = min(m, n)
    if (work := float(rank) ** 2 * (n + rank)) > LONG:
        warnings.warn(
            f"The exact Gauss-Newton matrix of {m:,} outputs and {n:,} parameters takes about {work:.0e} "
            "multiplications. Give fewer examples, or take products alone (ggn, NewtonCG) or Kronecker factors (kfac, "
            "KFAC).",
            stacklevel=3,
        )


def _need(needed: int, what: str, space: Space) -> None:
    if (free := short_of(needed, space.device)) is not None:
        raise TooLarge(
            f"{what} takes {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free.",
            "Give fewer examples, or solve with the matrix-free ggn.",
        )
