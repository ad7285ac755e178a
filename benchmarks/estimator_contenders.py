"""Traces, eigenvalues and densities by the libraries that `estimators.py` compares, each as its documentation says.

A library gets the Hessian of a network by its own operator, or a known matrix as `Columns`, which count products. The
libraries without operators of their own (skerch) multiply with ours; matfree, which is for JAX, with known matrices
only, and compiles what it does, which is part of its time. Two things are repaired in PyHessian: `density` calls
`torch.eig`, which torch no longer has; and `trace` stops when its mean changes little, after two products as a rule,
long before the accuracy that it names. Its Lanczos is orthogonalised again as it is, as is that of
hessian-eigenthings; curvlinops has no way to ask for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import scipy.sparse.linalg
import torch
from contenders import Lacks
from problems import Loader, MeanCrossEntropy, Problem
from torch import Tensor, nn

import curvature as cv

TOP = 10  # eigenvalues


class Columns:
    """A symmetric matrix that multiplies columns from either side, and counts them."""

    def __init__(self, apply: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype) -> None:
        self._apply, self.shape, self.dtype = apply, (size, size), dtype
        self.device = torch.device("cpu")
        self.products = 0

    def apply(self, rows: Tensor) -> Tensor:
        self.products += len(rows)
        return self._apply(rows)

    def __matmul__(self, columns: Tensor) -> Tensor:
        return self.apply(columns.T).T if columns.ndim == 2 else self.apply(columns[None])[0]

    def __rmatmul__(self, rows: Tensor) -> Tensor:
        return self.apply(rows) if rows.ndim == 2 else self.apply(rows[None])[0]

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        def matvec(vector: np.ndarray) -> np.ndarray:
            return (self @ torch.from_numpy(vector.ravel())).numpy()

        return scipy.sparse.linalg.LinearOperator(self.shape, matvec, dtype=np.float64)  # pyright: ignore


def extreme(A: scipy.sparse.linalg.LinearOperator, count: int, start: np.ndarray, *, tolerance: float) -> Tensor:
    """The largest eigenvalues by ARPACK."""
    options: dict[str, Any] = {"which": "LA", "tol": tolerance, "v0": start, "return_eigenvectors": False}
    return torch.from_numpy(np.array(scipy.sparse.linalg.eigsh(A, count, **options), dtype=np.float64))


class Known(NamedTuple):
    """A dense symmetric matrix in float64, as it is and to be counted, and what may serve as its control variate."""

    dense: Tensor
    columns: Columns
    control: cv.LinearOperator | None = None

    @classmethod
    def of(cls, dense: Tensor, control: cv.LinearOperator | None = None) -> Known:
        return cls(dense, Columns(lambda rows: rows @ dense, len(dense), dense.dtype), control)


class Trace(NamedTuple):
    """An estimate, and its 95 % interval where there is one."""

    value: float
    interval: tuple[float, float] | None = None


class Density(NamedTuple):
    """Nodes (d,), and the share of all eigenvalues at each of them (1, d)."""

    nodes: Tensor
    weights: Tensor

    @classmethod
    def of(cls, nodes: Any, weights: Any) -> Density:
        """From the nodes and weights of several probes."""
        nodes, weights = (torch.as_tensor(np.asarray(t), dtype=torch.float64).flatten() for t in (nodes, weights))
        return cls(nodes, (weights / weights.sum())[None])


@dataclass(frozen=True)
class Library:
    """How its operators are made."""

    package: str
    hessian: Callable[[Problem, Loader], Any]
    known: Callable[[Known], Any]


@dataclass(frozen=True)
class Way:
    """How a library answers: `answer(operator, setting, seed)`.

    Settings are the multiples of `step`, or those listed, the cheapest first. The error of an `average` of independent
    samples falls with the root of their number.
    """

    library: Library
    answer: Callable[[Any, Any, int], Any]
    step: int = 1
    settings: Sequence[Any] = ()
    average: bool = False


def seeded(answer: Callable[[Any, Any], Any]) -> Callable[[Any, Any, int], Any]:
    """For libraries that draw from torch's global generator."""

    def drawn(operator: Any, setting: Any, seed: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return answer(operator, setting)

    return drawn


# --- this library


class Ours(NamedTuple):
    operator: cv.LinearOperator
    control: Callable[[], cv.LinearOperator]


def _ours(problem: Problem, loader: Loader) -> Ours:
    objective = cv.Objective.of(problem.copied(), cv.CrossEntropy(axis=-1), loader)
    return Ours(cv.hessian(objective), partial(cv.kfac, objective))


def _ours_known(known: Known) -> Ours:
    space = cv.Space(len(known.dense), dtype=known.dense.dtype)

    def control() -> cv.LinearOperator:
        if known.control is None:
            raise Lacks("nothing resembles this matrix")
        return known.control

    return Ours(cv.MatrixFree(known.columns.apply, space, symmetric=True), control)


def _our_trace(ours: Ours, products: int, seed: int, *, controlled: bool = False, **options: Any) -> Trace:
    control = ours.control() if controlled else None
    estimate = cv.trace(ours.operator, products=products, control=control, seed=seed, **options)
    low, high = (float(bound) for bound in estimate.interval(0.95))
    return Trace(float(estimate.value), (low, high))


def _our_top(ours: Ours, rtol: float, seed: int, **options: Any) -> Tensor:
    return cv.eigsh(ours.operator, TOP, rtol=rtol, seed=seed, **options).values


def _our_density(ours: Ours, setting: tuple[int, int], seed: int) -> cv.SpectralDensity:
    return cv.spectral_density(ours.operator, probes=setting[0], steps=setting[1], seed=seed)


# --- curvlinops, with SciPy's ARPACK


def _curvlinops(problem: Problem, loader: Loader) -> Any:
    import curvlinops

    module = problem.copied()
    return curvlinops.HessianLinearOperator(module, nn.CrossEntropyLoss(), list(module.parameters()), loader)


def _curvlinops_trace(name: str) -> Callable[[Any, Any, int], Trace]:
    def estimate(A: Any, products: int) -> Trace:
        import curvlinops

        return Trace(float(getattr(curvlinops, name)(A, products)))

    return seeded(estimate)


def _arpack(A: Any, tolerance: float, seed: int) -> Tensor:
    start = np.random.default_rng(seed).standard_normal(A.shape[0])
    return extreme(A.to_scipy(), TOP, start, tolerance=tolerance)


def _curvlinops_density(A: Any, setting: tuple[int, int]) -> Density:
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

    points, density = lanczos_approximate_spectrum(A, ncv=setting[1], num_repeats=setting[0])
    return Density.of(points, density)  # at equal distances


# --- PyHessian


class _Product(torch.autograd.Function):
    """A v, whose derivative in the direction u is A u."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, columns: Columns) -> Tensor:
        ctx.columns = columns
        return columns @ vector

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.columns @ grads[0], None


class _Half(torch.autograd.Function):
    """v A v / 2, whose gradient is A v: one product for one with the Hessian."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, columns: Columns) -> Tensor:
        ctx.columns = columns
        ctx.save_for_backward(vector)
        return vector @ (columns @ vector) / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * _Product.apply(ctx.saved_tensors[0], ctx.columns), None


class _Vector(nn.Module):
    """A parameter, whatever the input is."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, _: Tensor) -> Tensor:
        return self.vector


def _pyhessian(problem: Problem, loader: Loader) -> Any:
    import pyhessian

    module = problem.copied()
    if len(loader) > 1:
        return pyhessian.hessian(module, MeanCrossEntropy(), dataloader=loader, cuda=False)
    (batch,) = loader
    return pyhessian.hessian(module, MeanCrossEntropy(), data=batch, cuda=False)


def _pyhessian_known(known: Known) -> Any:
    """Of a quadratic function with that Hessian."""
    import pyhessian

    def quadratic(vector: Tensor, _: Tensor) -> Any:
        return _Half.apply(vector, known.columns)

    nothing = torch.zeros(1)
    return pyhessian.hessian(_Vector(len(known.dense)), quadratic, data=(nothing, nothing), cuda=False)


def _pyhessian_trace(H: Any, products: int) -> Trace:
    return Trace(float(np.mean(H.trace(maxIter=products, tol=-math.inf))))


def _pyhessian_top(H: Any, setting: tuple[int, float]) -> Tensor:
    return torch.tensor(H.eigenvalues(maxIter=setting[0], tol=setting[1], top_n=TOP)[0], dtype=torch.float64)


def _pyhessian_density(H: Any, setting: tuple[int, int]) -> Density:
    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return values[:, None], vectors

    with patch.object(torch, "eig", eig):
        return Density.of(*H.density(iter=setting[1], n_v=setting[0]))


# --- hessian-eigenthings


def _eigenthings(problem: Problem, loader: Loader) -> Any:
    from hessian_eigenthings import loss_fns, operators

    return operators.HessianOperator(problem.copied(), loader, loss_fns.supervised_loss(MeanCrossEntropy()))


def _eigenthings_known(known: Known) -> Any:
    from hessian_eigenthings.operators.base import LambdaOperator

    return LambdaOperator(known.columns.__matmul__, len(known.dense), dtype=known.dense.dtype)


def _eigenthings_trace(A: Any, products: int, seed: int) -> Trace:
    from hessian_eigenthings.algorithms import trace

    return Trace(trace(A, num_matvecs=products, seed=seed).estimate)


def _eigenthings_lanczos(A: Any, steps: int, seed: int) -> Tensor:
    from hessian_eigenthings.algorithms import lanczos

    found = lanczos(A, k=TOP, max_iter=steps, which="LA", reorthogonalize=True, seed=seed)
    return found.eigenvalues.double()


def _eigenthings_power(A: Any, setting: tuple[int, float], seed: int) -> Tensor:
    from hessian_eigenthings.algorithms import deflated_power_iteration

    found = deflated_power_iteration(A, k=TOP, max_iter=setting[0], tol=setting[1], seed=seed)
    return found.eigenvalues.double()


def _eigenthings_density(A: Any, setting: tuple[int, int], seed: int) -> Density:
    from hessian_eigenthings.algorithms import spectral_density

    found = spectral_density(A, num_runs=setting[0], lanczos_steps=setting[1], seed=seed)
    return Density.of(found.raw_eigenvalues.nan_to_num(), found.raw_weights)


# --- skerch


def _skerch(problem: Problem, loader: Loader) -> Columns:
    A = _ours(problem, loader).operator
    return Columns(A.apply, A.shape[0], A.dtype)


def _skerch_trace(A: Columns, products: int, seed: int) -> Trace:
    from skerch.algorithms import xhutchpp

    found = xhutchpp(A, A.device, A.dtype, x_dims=products // 2, seed=seed, return_diag=False)
    return Trace(float(found["tr"]))


def _skerch_top(A: Columns, products: int, seed: int) -> Tensor:
    from skerch.algorithms import seigh

    return seigh(A, A.device, A.dtype, products // 2, seed=seed, by_mag=False)[0][:TOP].double()


# --- matfree


def _no_network(problem: Problem, loader: Loader) -> Any:
    raise Lacks("multiplies with JAX functions, and not with torch networks")


class _Compiled:
    """A dense matrix for JAX, and what has been compiled with it, by question and setting."""

    def __init__(self, known: Known) -> None:
        import jax

        jax.config.update("jax_enable_x64", True)
        self.dense, self.columns = jax.numpy.asarray(known.dense.numpy()), known.columns
        self.compiled: dict[Any, Callable[[Any], Any]] = {}

    def matvec(self, vector: Any) -> Any:
        return self.dense @ vector

    def __call__(self, what: Any, make: Callable[[], Callable[[Any], Any]], products: int, seed: int) -> Any:
        """The result for a key from that seed."""
        import jax

        self.columns.products += products
        if what not in self.compiled:
            self.compiled[what] = jax.jit(make())
        return self.compiled[what](jax.random.PRNGKey(seed))


def _matfree_trace(A: _Compiled, products: int, seed: int) -> Trace:
    from matfree import stochtrace

    def make() -> Callable[[Any], Any]:
        sampler = stochtrace.sampler_normal(A.dense[0], num=products // 2)
        estimate = stochtrace.estimator_leave_one_out(stochtrace.leave_one_out_xtrace(), sampler)
        return partial(estimate, A.matvec)

    return Trace(float(A(("trace", products), make, products, seed)))


def _matfree_top(A: _Compiled, steps: int, seed: int) -> Tensor:
    import jax
    from matfree import decomp, eig

    def make() -> Callable[[Any], Any]:
        eigh = eig.eigh_partial(decomp.tridiag_sym(steps))
        return lambda key: eigh(A.matvec, jax.random.normal(key, (len(A.dense),)))[0]

    return torch.from_numpy(np.array(A(("top", steps), make, steps, seed))).sort(descending=True).values[:TOP]


def _matfree_density(A: _Compiled, setting: tuple[int, int], seed: int) -> Density:
    import jax
    from matfree import decomp

    probes, steps = setting

    def make() -> Callable[[Any], Any]:
        lanczos = decomp.tridiag_sym(steps)

        def quadratures(key: Any) -> Any:
            starts = jax.random.normal(key, (probes, len(A.dense)))
            return jax.vmap(lambda start: lanczos(A.matvec, start).J_small)(starts)

        return quadratures

    nodes, vectors = np.linalg.eigh(np.array(A(("density", setting), make, probes * steps, seed)))
    return Density.of(nodes, vectors[:, 0] ** 2)


CURVATURE = Library("curvature", _ours, _ours_known)
CURVLINOPS = Library("curvlinops", _curvlinops, lambda known: known.columns)
PYHESSIAN = Library("pyhessian", _pyhessian, _pyhessian_known)
EIGENTHINGS = Library("hessian_eigenthings", _eigenthings, _eigenthings_known)
SKERCH = Library("skerch", _skerch, lambda known: known.columns)
MATFREE = Library("matfree", _no_network, _Compiled)

OURS = "curvature"
TRACES = {
    OURS: Way(CURVATURE, _our_trace, step=2),
    "curvature, xtrace": Way(CURVATURE, partial(_our_trace, method="xtrace"), step=2),
    "curvature, hutch++": Way(CURVATURE, partial(_our_trace, method="hutch++"), step=2),
    "curvature, hutchinson": Way(CURVATURE, partial(_our_trace, method="hutchinson"), average=True),
    "curvature, control": Way(CURVATURE, partial(_our_trace, controlled=True), step=2),
    "curvature, hutchinson, control": Way(
        CURVATURE, partial(_our_trace, controlled=True, method="hutchinson"), average=True
    ),
    "curvlinops, xtrace": Way(CURVLINOPS, _curvlinops_trace("xtrace"), step=2),
    "curvlinops, hutch++": Way(CURVLINOPS, _curvlinops_trace("hutchpp_trace"), step=3),
    "PyHessian, hutchinson": Way(PYHESSIAN, seeded(_pyhessian_trace), average=True),
    "hessian-eigenthings, hutch++": Way(EIGENTHINGS, _eigenthings_trace, step=3),
    "skerch, xtrace": Way(SKERCH, _skerch_trace, step=2),
    "matfree, xtrace": Way(MATFREE, _matfree_trace, step=2),
}
LOOSE = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)  # residuals over values: the error is about the square of that
LONG = range(12, 200, 2)
ROUGH = tuple(
    (1000, tolerance) for tolerance in (1e-3, 5e-4, 2e-4, 1e-4, 1e-5, 1e-6)
)  # most products for each, and its own tolerance
TOPS = {
    OURS: Way(CURVATURE, _our_top, settings=LOOSE),
    "curvature, block=1": Way(CURVATURE, partial(_our_top, block=1), settings=LOOSE),
    "curvature, rtol=1e-5": Way(CURVATURE, _our_top, settings=(1e-5,)),
    "curvlinops, ARPACK": Way(CURVLINOPS, _arpack, settings=(0.3, 0.1, 0.03, 0.01, 0.001)),
    "PyHessian, power iteration": Way(PYHESSIAN, seeded(_pyhessian_top), settings=ROUGH),
    "hessian-eigenthings, lanczos": Way(EIGENTHINGS, _eigenthings_lanczos, settings=LONG),
    "hessian-eigenthings, power": Way(EIGENTHINGS, _eigenthings_power, settings=((100, 1e-4), (1000, 1e-3))),
    "skerch, sketched eigh": Way(SKERCH, _skerch_top, settings=range(24, 800, 24)),
    "matfree, lanczos": Way(MATFREE, _matfree_top, settings=LONG),
}


def _no_density(operator: Any, setting: Any, seed: int) -> Any:
    raise Lacks("has no spectral density")


DENSITIES = {
    OURS: Way(CURVATURE, _our_density, step=2),
    "curvlinops": Way(CURVLINOPS, seeded(_curvlinops_density), step=2),
    "PyHessian": Way(PYHESSIAN, seeded(_pyhessian_density), step=2),
    "hessian-eigenthings": Way(EIGENTHINGS, _eigenthings_density, step=2),
    "skerch": Way(SKERCH, _no_density),
    "matfree": Way(MATFREE, _matfree_density, step=2),
}
