"""One question to every layer: the diagonal blocks of a matrix, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from curvature.errors import Interrupted
from curvature.linalg.lockstep import Lockstep
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator
from curvature.objective.params import By, ParamSpace
from curvature.progress import Run
from curvature.result import Quantity, Result


@dataclass(frozen=True, kw_only=True, repr=False)
class ByLayer(Result):
    """The results of one question for each layer, by name, in the order of the parameters."""

    names: tuple[str, ...]
    results: tuple[Result, ...]

    def __getitem__(self, name: str) -> Any:
        return self.results[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Pairs of name and result."""
        yield from zip(self.names, self.results, strict=True)

    def summary(self) -> dict[str, str]:
        return {
            name if len(rows) == 1 else f"{name}: {label}": text
            for name, result in self.items()
            for rows in [result.summary()]
            for label, text in rows.items()
        }

    def quantities(self) -> dict[str, Quantity]:
        return {
            f"{name}.{label}": number for name, result in self.items() for label, number in result.quantities().items()
        }

    __repr__ = Result.__str__


def by_layer(
    question: Callable[..., Result],
    A: LinearOperator,
    *,
    by: By = "layer",
    run: Run | None = None,
    **options: Any,
) -> ByLayer:
    """`question` of the diagonal block of A for each layer: `by_layer(cv.eigsh, cv.hessian(objective), k=2)`.

    `question` is trace, diagonal, eigsh, spectral_density, ... and takes `options`; `by` is "layer", "parameter" or
    groups by name, as in {"attention": "*.attn"}. A block is what its layer's own matrix is while all others are held
    fixed. All blocks advance in lockstep: a product with each of them is one pass over the data, so the run takes as
    many passes as the slowest layer alone, and as many products as all of them. Traces only, at the products of one
    layer: `block_traces`.
    """
    if not isinstance(A.domain, ParamSpace):
        raise ValueError(f"by_layer needs a matrix over the parameters of a model, but got {A!r}.")
    places = A.domain.places(by)
    asked = {"of": getattr(question, "__name__", repr(question)), "by": by, **options}
    measurement = Measurement(A, "by_layer", options=asked, seed=options.get("seed", 0), run=run)

    def packed(results: dict[str, Result], *, complete: bool) -> ByLayer:
        return ByLayer(
            names=tuple(results),
            results=tuple(results.values()),
            complete=complete,
            cost=measurement.cost,
            origin=measurement.origin,
        )

    try:
        results = Lockstep(measurement, places).run(lambda block, run: question(block, run=run, **options))
    except Interrupted as stop:
        raise Interrupted(packed(stop.result, complete=False)) from stop
    return packed(results, complete=True)
