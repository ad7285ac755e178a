"""The trace of an operator: exact where structure allows, else estimated with an honest standard error."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curvature.errors import Interrupted
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import Identity, LinearOperator, Scaled, Sum, as_operator
from curvature.linalg.structured import BlockDiagonal, Dense, Diagonal, Kronecker, Spectral
from curvature.progress import Run
from curvature.result import Estimate

TraceMethod = Literal["auto", "hutchinson", "hutch++"]

BLOCK = 16  # vectors multiplied at once: one pass over the data for all of them


def trace(
    A: LinearOperator,
    *,
    products: int = 32,
    method: TraceMethod = "auto",
    seed: int = 0,
    run: Run | None = None,
) -> Estimate:
    """Trace of A, exact where its structure allows, else estimated from `products` products with A.

    "hutchinson" averages z.Az over random signs z: stderr falls with the square root of `products`, from
    sqrt(2) |A| in the Frobenius norm for one. "hutch++" (the "auto") spends two thirds of the products on taking the
    trace over the range of A times a few random vectors exactly, and averages only over the rest: far better when few
    eigenvalues carry the trace, as in trained networks; somewhat worse on a flat spectrum. With `products` >= size the
    trace is exact. `stderr` is that of the averaged part, with one degree of freedom less than it has samples.

    Hutchinson 1990; Meyer, Musco, Musco & Woodruff 2021 (arXiv:2010.09649).

    >>> trace(Diagonal(torch.tensor([1.0, 2.0]))).value
    tensor(3., dtype=torch.float64)
    """
    A = as_operator(A)
    options = {"products": products, "method": method}
    measurement = Measurement(A, "trace", options=options, seed=seed, run=run)
    if products < 2:
        raise ValueError(f"An error bar needs at least 2 products, but got products={products}.")
    if method not in ("auto", "hutchinson", "hutch++"):
        raise ValueError(f"method is 'auto', 'hutchinson' or 'hutch++', but got {method!r}.")
    if (known := _known(A)) is not None:
        return measurement.exact(known)
    if products >= A.shape[0]:
        return _summed(measurement)
    draws = A.domain.draws(seed=seed)
    if method == "hutchinson":
        return _averaged(measurement, products, A.domain.empty, draws)
    return _deflated(measurement, products, draws)


def _known(A: LinearOperator) -> Tensor | None:
    """The trace where the structure of A tells it."""
    match A:
        case Diagonal():
            return A.entries.double().sum()
        case Dense():
            return A.matrix.diagonal().double().sum()
        case Identity():
            return torch.tensor(float(A.shape[0]), dtype=torch.float64)
        case Kronecker():
            return (_traces(A.left) * _traces(A.right)).sum()
        case Spectral():
            return A.values.double().sum()
        case BlockDiagonal() | Sum():
            traces = [_known(part) for part in A.parts]
            return sum((t for t in traces if t is not None), torch.zeros(())) if None not in traces else None
        case Scaled():
            return None if (known := _known(A.parts[0])) is None else A.scale * known
        case _:
            return None


def _traces(factor: Tensor) -> Tensor:
    """The trace of a factor of a Kronecker product, or of each in a stack."""
    return factor.double().sum() if factor.ndim == 1 else factor.double().diagonal(dim1=-2, dim2=-1).sum(-1)


def _summed(measurement: Measurement) -> Estimate:
    """The sum of the diagonal, from one product with each vector of the standard basis."""
    A = measurement.operator
    n = A.shape[0]
    total, square = torch.zeros((), dtype=torch.float64, device=A.device), 0.0
    for start in range(0, n, BLOCK):
        index = torch.arange(start, min(start + BLOCK, n), device=A.device)
        rows = torch.zeros(len(index), n, dtype=A.dtype, device=A.device)
        rows[index - start, index] = 1
        columns = measurement.apply(rows)
        total += columns[index - start, index].double().sum()
        square += float(A.domain.norms(columns).square().sum())
        measurement.report(int(index[-1]) + 1, n, f"trace {float(total):.5g}", unit="products")
    return measurement.exact(total, floor=10 * A.domain.eps * square**0.5)


def _deflated(measurement: Measurement, products: int, draws: Iterator[Tensor]) -> Estimate:
    """Hutch++: the trace on an orthonormal sketch of the range, and Hutchinson's average on its complement."""
    space = measurement.operator.domain
    third = min(products // 3, (products - 2) // 2)  # at least two samples are left for an error bar
    images = [space.empty]
    for rows in _blocks(draws, third):
        images.append(measurement.apply(rows))
        measurement.report(measurement.products, products, "sketching the range", unit="products")
    return _averaged(measurement, products, space.orthonormal(torch.cat(images)), draws)


def _averaged(
    measurement: Measurement, products: int, sketch: Float[Tensor, "q n"], draws: Iterator[Tensor]
) -> Estimate:
    """tr(Q A Q^T), exactly, plus the mean of z.Az over random z with the rows Q of `sketch` projected out.

    `products` in all, with those that the measurement has made already.
    """
    space = measurement.operator.domain
    head, square = 0.0, 0.0
    for start in range(0, len(sketch), BLOCK):
        forms, norms = _forms(measurement, sketch[start : start + BLOCK])
        head, square = head + float(forms.sum()), square + float(norms.square().sum())
        measurement.report(measurement.products, products, f"{head:.5g} on the sketch", unit="products")
    samples = torch.empty(0, dtype=torch.float64)
    try:
        for rows in _blocks(draws, products - measurement.products):
            rows -= space.combine(space.inner(rows, sketch), sketch)
            forms, norms = _forms(measurement, rows)
            samples = torch.cat([samples, forms.cpu()])
            square += float(norms.square().mean())
            note = f"trace {head + float(samples.mean()):.5g}"
            measurement.report(measurement.products, products, note, unit="products")
    except KeyboardInterrupt as stop:
        if len(samples) < 2:
            raise
        raise Interrupted(_mean(measurement, head, samples, square, complete=False)) from stop
    return _mean(measurement, head, samples, square)


def _mean(measurement: Measurement, head: float, samples: Tensor, square: float, *, complete: bool = True) -> Estimate:
    return Estimate(
        value=head + samples.mean(),
        stderr=samples.std() / len(samples) ** 0.5,
        samples=len(samples),
        dof=len(samples) - 1,
        floor=10 * measurement.operator.domain.eps * square**0.5,
        complete=complete,
        cost=measurement.cost,
        origin=measurement.origin,
    )


def _blocks(draws: Iterator[Tensor], count: int) -> Iterator[Float[Tensor, "k n"]]:
    """The next `count` vectors, as rows, up to BLOCK at a time."""
    for start in range(0, count, BLOCK):
        yield torch.stack(list(islice(draws, min(BLOCK, count - start))))


def _forms(measurement: Measurement, rows: Float[Tensor, "k n"]) -> tuple[Tensor, Tensor]:
    """z.Az and |Az| for each row z."""
    space = measurement.operator.domain
    products = measurement.apply(rows)
    forms = [space.inner(u[None], v[None])[0, 0] for u, v in zip(rows, products, strict=True)]
    return torch.stack(forms), space.norms(products)
