"""The basis is orthonormal and T is the matrix on it, though most blocks are not cleaned of those far back."""

from __future__ import annotations

import pytest
import torch
from matrices import free, linspace, rotated, tensor

from curvature.linalg.krylov import SPARED, Krylov
from curvature.linalg.measurement import Measurement

SPECTRA = {
    "bulk": linspace(-1, 2, 500),
    "outliers": torch.cat([tensor(100, 50, 20, 10, 9, -30), linspace(-1, 1, 494)]),
    "far outliers": torch.cat([tensor(1e4, 1e3, 1e2), linspace(-1, 1, 497)]),
    "power law": 1 / torch.arange(1, 501, dtype=torch.float64),
    "repeated": torch.cat([tensor(*[3.0] * 12, *[2.0] * 6), linspace(-0.9, 1, 482)]),
    "low rank": torch.cat([linspace(1, 10, 20), torch.zeros(480, dtype=torch.float64)]),
}


def grown(matrix: torch.Tensor, block: int, steps: int) -> Krylov:
    A = free(matrix)
    krylov = Krylov(Measurement(A, "test", options={}), block * steps, sparing=True)
    krylov.start(A.domain.draw(block, seed=3, kind="sphere"))
    while krylov.step() and krylov.size < krylov.capacity and krylov.extend():
        pass
    return krylov


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("block", [1, 2, 8])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_basis_stays_orthonormal_and_t_is_the_matrix_on_it(name, block, dtype):
    matrix = rotated(SPECTRA[name]).to(dtype)
    krylov = grown(matrix, block, 240 // block)
    eps, scale = torch.finfo(dtype).eps, float(SPECTRA[name].abs().max())
    basis = krylov.basis.double()
    assert (basis @ basis.T - torch.eye(len(basis))).abs().max() <= SPARED * eps
    nearest = torch.linalg.solve_triangular(torch.linalg.cholesky(basis @ basis.T), basis, upper=False)
    image = nearest @ matrix.double() @ nearest.T
    torch.testing.assert_close(krylov.projected, image, rtol=0, atol=50 * eps * scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_overlaps_are_not_thought_to_be_smaller_than_they_are(dtype):
    krylov = grown(rotated(SPECTRA["bulk"]).to(dtype), 2, 100)
    basis, known = krylov.basis.double(), krylov.overlaps.gram[: krylov.multiplied, : krylov.multiplied]
    actual, thought = (float((g - torch.eye(len(g))).abs().max()) for g in (basis @ basis.T, known))
    assert actual <= thought <= 2 * SPARED * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_most_blocks_are_not_cleaned(dtype, monkeypatch):
    cleaned, project_out = [], Krylov._project_out
    monkeypatch.setattr(Krylov, "_project_out", lambda *arguments: cleaned.append(0) or project_out(*arguments))
    krylov = grown(rotated(linspace(-1, 2, 2000)).to(dtype), 8, 40)
    assert krylov.multiplied == 320
    assert len(cleaned) < 20
