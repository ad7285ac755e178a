"""One question put to one operator: its products are counted, timed, checked and kept here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import BadFile, NonFinite
from curvature.linalg.operator import LinearOperator, Scaled
from curvature.linalg.work import SPENT, Record, Work
from curvature.progress import Run
from curvature.result import Estimate

# beside the tensors of a record: the sums of the rows that were asked; of a state a row and its product
ASKED, WITNESS = "_asked", "_witness"


class Measurement(Work):
    """What a question has asked of an operator so far. Every product of a measurement goes through `apply` or
    `apply_transposed`. `square` says whether the question is only for operators that are.

    With a checkpoint what was computed is read from there as long as there is some. All questions are functions of the
    products and their options alone, so that the rest comes out as it would have.
    """

    def __init__(
        self,
        A: LinearOperator,
        question: str,
        *,
        options: Mapping[str, Any],
        seed: int | None = None,
        run: Run | None = None,
        square: bool = True,
    ) -> None:
        if square and A.shape[0] != A.shape[1]:
            raise ValueError(f"{question} needs a square operator, but got {A.shape}.")
        if 0 in A.shape:
            raise ValueError(f"{question} needs an operator with at least one row and one column, but got {A.shape}.")
        self.operator = A
        super().__init__(
            question,
            options=options,
            seed=seed,
            run=run,
            described=lambda: describe(A),
            meters=lambda: (leaf.meter for leaf in A.leaves() if leaf.meter),
            device=A.device,
        )
        self._trusted = False  # that the operator gives the products in it
        self._inside = False  # of `once`
        self._witness: Tensor | None = None  # (n + m,) a row and its product

    def apply(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        """A times each row; NonFinite when a product is not finite, which would poison all that follows."""
        return self.once(lambda: {"products": self._multiplied(rows)}, rows)["products"]

    def apply_transposed(self, rows: Float[Tensor, "k m"]) -> Float[Tensor, "k n"]:
        """A^T times each row, likewise."""
        return self.once(lambda: {"products": self._checked(self._transpose, rows)}, rows)["products"]

    def once(self, compute: Callable[[], Record], rows: Float[Tensor, "k n"]) -> Record:
        """What `compute` makes of the products with `rows`; where the checkpoint holds that, what it says."""
        if self._inside or self.run.checkpoint is None:
            return compute()
        asked = rows.sum(1, dtype=torch.float64).cpu()
        if (record := self._peek()) is None:
            record = self._computed(compute)
            self._append({**record, ASKED: asked})
            return record
        self._compare(record, {ASKED: asked})
        if not self._trusted:
            self._compare(record, self._computed(compute))
        return self._believed()

    def resume(self) -> Record | None:
        """The state that was kept, where the checkpoint begins with one; the matrix is asked whether it is the same."""
        record = None if self.run.checkpoint is None else self._peek()
        if record is None or WITNESS not in record:
            return None
        witness = record.pop(WITNESS).to(self.operator.device, self.operator.dtype)
        row, product = witness.split(self.operator.shape[::-1])
        spent = self.products
        self._compare({WITNESS: product.cpu()}, {WITNESS: self._multiplied(row[None])[0]})
        self.products = spent
        self._witness = witness
        return self._believed()

    def keep(self, state: Record) -> None:
        """Put the whole state of the question in the place of what led to it in the checkpoint, where that takes more
        than twice the room: it does not grow without end."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        if self.run.checkpoint is None or self._peek() is not None or self._journal.size <= 2 * size:
            return
        if self._witness is None:  # all products until now were read
            row = self.operator.domain.draw(1, seed=0)[0]
            spent = self.products
            self._witness = torch.cat([row, self._multiplied(row[None])[0]])
            self.products = spent
        self._journal.replace({**state, WITNESS: self._witness, SPENT: self._spent})

    def exact(self, value: Tensor, floor: float | Tensor = 0.0) -> Estimate:
        """The result of a measurement that took no samples; `floor` bounds its rounding."""
        return self.estimate(value, torch.zeros(()), samples=0, dof=0, floor=floor)

    def estimate(self, value: Tensor, stderr: Tensor, *, samples: int, dof: float, floor: float | Tensor) -> Estimate:
        """The result that so many samples amount to."""
        return Estimate(
            value=value.cpu(),
            stderr=stderr.double().cpu(),
            samples=samples,
            dof=dof,
            floor=floor.cpu() if isinstance(floor, Tensor) else floor,
            cost=self.cost,
            origin=self.origin,
        )

    def _multiplied(self, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        product = self._checked(self.operator, rows)
        if self.run.checkpoint is not None and self._witness is None and len(rows):
            self._witness = torch.cat([rows[0], product[0]])
        return product

    def _checked(self, A: LinearOperator, rows: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
        if self.products == 0:
            describe(self.operator)  # hashes model and data: should that fail, then before the work
        self.run.spend(len(rows))
        self.products += len(rows)
        product = A.apply(rows).detach()  # of a matrix that is a parameter, say
        if not torch.isfinite(product).all():
            raise NonFinite(
                f"A product with {self.operator!r} has entries that are not finite.",
                "Check the weights and the loss for NaN and overflow, or measure in float64.",
            )
        return product

    @cached_property
    def _transpose(self) -> LinearOperator:
        return self.operator.adjoint()

    def _computed(self, compute: Callable[[], Record]) -> Record:
        self._inside = True
        try:
            return compute()
        finally:
            self._inside = False

    def _believed(self) -> Record:
        """The next record, and from then on those after it."""
        self._trusted = True
        record = self._taken()
        record.pop(ASKED, None)
        return record

    def _compare(self, record: Record, fresh: Record) -> None:
        """Refuse a checkpoint of another matrix or question, of which nothing but its numbers may tell."""
        for name, tensor in fresh.items():
            kept, tensor = record.get(name), tensor.cpu()
            near = self.operator.domain.eps**0.5 * float(tensor.abs().max()) if tensor.numel() else 0.0
            if kept is None or kept.shape != tensor.shape or not float((kept - tensor).abs().max()) <= near:
                other = f"are not those of {self.operator!r}" if name != ASKED else "are with other vectors than asked"
                raise BadFile(
                    f"The products in {self.run.checkpoint} {other}.",
                    "Ask the same question about the same matrix to go on with it, or give another path.",
                )


def describe(A: LinearOperator) -> dict[str, Any]:
    """What A was made from, JSON-ready; a composition describes its parts."""
    facts = {"shape": list(A.shape), "dtype": str(A.dtype).removeprefix("torch."), "device": str(A.device)}
    if A.source or not A.parts:
        return {**A.source, **facts}
    scale = {"scale": A.scale} if isinstance(A, Scaled) else {}
    return {"operator": type(A).__name__, **scale, **facts, "parts": [describe(part) for part in A.parts]}
