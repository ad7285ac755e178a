"""How close estimates come to the dense float64 matrix on the embedded networks.

    python benchmarks/demo_accuracy.py digits
    python benchmarks/demo_accuracy.py digits-cnn --examples 100     # 38,570 parameters: an hour, and 13 GiB

Writes benchmarks/results/demo_accuracy_NAME.json. Distances between spectra: Kolmogorov's, as it is and with all
eigenvalues within a share of the largest merged into zero (no method resolves them, and in float32 they are noise), and
Wasserstein's on the signed logarithmic axis, beside that of the best single point mass.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.functional import cross_entropy

import curvature as cv

RESULTS = Path(__file__).parent / "results"
MERGED = (0.0, 1e-7, 1e-6, 1e-5, 1e-4)  # of the largest eigenvalue


class Masses(Protocol):
    """Where the eigenvalues are thought to be (d,), and how many of them, as a share of all, by each probe (p, d)."""

    @property
    def nodes(self) -> Tensor: ...

    @property
    def weights(self) -> Tensor: ...


def kolmogorov(density: Masses, exact: Tensor, merged: float) -> float:
    """The largest difference between the two staircases, eigenvalues below `merged` of the largest counted as zero."""
    limit = merged * float(exact.abs().max())
    nodes, truth = (torch.where(t.abs() <= limit, 0.0, t).sort() for t in (density.nodes, exact))
    steps = density.weights.mean(0)[nodes.indices].cumsum(0)
    points = torch.cat([nodes.values, truth.values]).unique()
    above = torch.searchsorted(nodes.values, points, right=True)
    ours = torch.cat([torch.zeros(1, dtype=steps.dtype), steps])[above]
    theirs = torch.searchsorted(truth.values, points, right=True) / len(truth.values)
    return float((ours - theirs).abs().max())


def wasserstein(density: cv.SpectralDensity, exact: Tensor) -> tuple[float, float]:
    """(distance of the estimate, distance of the best point mass) to the exact spectrum, in decades."""
    unit = 1e-4 * float(exact.abs().max())
    nodes, truth = (t.sign() * torch.log10(1 + t.abs() / unit) for t in (density.nodes, exact))
    points = torch.cat([nodes, truth]).sort().values
    nodes_sorted = nodes.sort()
    steps = torch.cat([torch.zeros(1, dtype=torch.float64), density.weights.mean(0)[nodes_sorted.indices].cumsum(0)])
    ours = steps[torch.searchsorted(nodes_sorted.values, points[:-1], right=True)]
    theirs = torch.searchsorted(truth.sort().values, points[:-1], right=True) / len(truth)
    return float(((ours - theirs).abs() * points.diff()).sum()), float((truth - truth.median()).abs().mean())


def exact_hessian(objective: cv.Objective) -> np.ndarray:
    """All eigenvalues of the dense Hessian, from plain torch; 38,570 rows are 12 GB, so it is used up in place."""
    module, inputs, targets, flat, named = plain(objective)

    def loss(vector: Tensor) -> Tensor:
        return cross_entropy(functional_call(module, named(vector), (inputs,)), targets)

    def product(vector: Tensor) -> Tensor:
        return jvp(grad(loss), (flat,), (vector,))[1]

    n = len(flat)
    matrix = np.empty((n, n))
    for start in range(0, n, 32):
        unit = torch.zeros(min(32, n - start), n, dtype=torch.float64)
        unit[:, start:].fill_diagonal_(1)
        matrix[start : start + 32] = vmap(product)(unit).numpy()
    # Fortran order, so that LAPACK works in place
    return scipy.linalg.eigh(matrix.T, eigvals_only=True, overwrite_a=True, check_finite=False, driver="evd")


def exact_ggn(objective: cv.Objective) -> np.ndarray:
    """All eigenvalues of the dense GGN: of F F^T or F^T F, whichever is smaller, where GGN = F^T F / examples."""
    module, inputs, _, flat, named = plain(objective)
    factors = []
    for example in inputs:

        def outputs(vector: Tensor, example: Tensor = example) -> Tensor:
            return functional_call(module, named(vector), (example[None],))[0]

        root = outputs(flat).softmax(-1).sqrt()  # diag(p) - p p^T = R R^T with R = diag(root) - p root^T
        factors.append((root.diag() - torch.outer(root, root**2)) @ jacrev(outputs)(flat))
    factor = torch.cat(factors) / len(inputs) ** 0.5
    rows, columns = factor.shape
    values = torch.linalg.eigvalsh(factor @ factor.T if rows < columns else factor.T @ factor)
    return np.sort(np.concatenate([values.numpy(), np.zeros(columns - len(values))]))


def plain(objective: cv.Objective) -> tuple[nn.Module, Tensor, Tensor, Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """(module, inputs, targets, flat parameters, by name) of a demo, for the oracles, which use nothing of ours."""
    params = objective.params
    sizes = [p.numel() for p in params.values()]

    def named(vector: Tensor) -> dict[str, Tensor]:
        return {name: part.view(params[name].shape) for name, part in zip(params, vector.split(sizes), strict=True)}

    batches = list(objective.batches)
    inputs, targets = torch.cat([x for x, _ in batches]).double(), torch.cat([y for _, y in batches])
    return objective.function.module, inputs, targets, torch.cat([p.flatten() for p in params.values()]), named


def exact_spectrum(oracle: Callable[[cv.Objective], np.ndarray], objective: cv.Objective, cache: Path | None) -> Tensor:
    """All eigenvalues, ascending, kept in the file `cache`."""
    if cache is not None and cache.exists():
        return torch.from_numpy(np.load(cache))
    values = oracle(objective)
    if cache is not None:
        np.save(cache, values)
    return torch.from_numpy(values)


def compare(A: cv.LinearOperator, exact: Tensor, runs: list[tuple[int, int]]) -> dict[str, Any]:
    """Errors of eigsh, trace and spectral_density against the exact eigenvalues."""
    top, truth = cv.eigsh(A, 10), exact.flip(0)[:10]
    estimate = cv.trace(A, products=99)
    rows = []
    for probes, steps in runs:
        density = cv.spectral_density(A, probes=probes, steps=steps)
        distance, single = wasserstein(density, exact)
        rows.append(
            {
                "probes": probes,
                "steps": steps,
                "passes": density.cost.passes,
                "seconds": density.cost.seconds,
                "kolmogorov": {f"merged below {m:g}": kolmogorov(density, exact, m) for m in MERGED},
                "wasserstein": distance,
                "wasserstein of best point mass": single,
            }
        )
    return {
        "largest eigenvalues": truth.tolist(),
        "smallest eigenvalue": float(exact[0]),
        "worst relative error of the top 10": float(((top.values - truth) / truth).abs().max()),
        "worst residual over value": float((top.residuals / top.values).max()),
        "trace": float(exact.sum()),
        "trace estimate": float(estimate.value),
        "trace stderr": float(estimate.stderr),
        "trace error in standard errors": float((estimate.value - exact.sum()) / estimate.stderr),
        "densities": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["digits", "digits-cnn"])
    parser.add_argument("--examples", type=int, default=None)
    parser.add_argument("--cache", type=Path, default=None, help="a folder to keep exact eigenvalues in")
    parser.add_argument("--runs", default="8x80,8x160", help="probes x steps, several separated by commas")
    args = parser.parse_args()
    objective = cv.demo(args.name, dtype=torch.float64).first(args.examples)
    runs = [(int(p), int(s)) for p, s in (run.split("x") for run in args.runs.split(","))]
    figures: dict[str, Any] = {
        "demo": args.name,
        "parameters": objective.space.size,
        "examples": args.examples or "all",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for make, oracle in ((cv.ggn, exact_ggn), (cv.hessian, exact_hessian)):
        started = time.perf_counter()
        cache = args.cache and args.cache / f"{args.name}_{make.__name__}_{args.examples}.npy"
        exact = exact_spectrum(oracle, objective, cache)
        print(f"{make.__name__}: exact in {time.perf_counter() - started:.0f} s", flush=True)
        figures[make.__name__] = compare(make(objective), exact, runs)
    path = RESULTS / f"demo_accuracy_{args.name}.json"
    path.write_text(json.dumps(figures, indent=1) + os.linesep)
    print(path.read_text())


if __name__ == "__main__":
    main()
