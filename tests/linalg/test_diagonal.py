"""Diagonals: exact where they are said to be, else with error bars that hold."""

from __future__ import annotations

import pytest
import torch
from matrices import Stopping, free, linspace, rotated, tensor

import curvature as cv

METHODS = pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
N = 120
SPECTRA = {
    "flat": linspace(1, 3, N),
    "polynomial": 1 / torch.arange(1, N + 1, dtype=torch.float64) ** 2,
    "exponential": 10 ** linspace(0, -8, N),
    "spiked": torch.cat([tensor(100, 50, -30), linspace(0, 1, N - 3)]),
    "indefinite": torch.cat([linspace(-2, -1, N // 2), linspace(1, 2.02, N // 2)]),
}


def psd(*shape: int) -> torch.Tensor:
    root = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return root @ root.mT


def structured() -> dict[str, cv.LinearOperator]:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    blocks = {"a": cv.Kronecker(psd(2), psd(3), psd=True), "b": cv.Diagonal(tensor(1, -2, 4))}
    return {
        "diagonal": cv.Diagonal(tensor(1, -2, 4)),
        "dense": cv.Dense(torch.arange(9.0).view(3, 3).double()),
        "identity": cv.Identity(cv.Space(5, torch.float64)),
        "kronecker": cv.Kronecker(psd(2), psd(3), psd=True),
        "stack": cv.Kronecker(psd(4, 2), psd(4, 3), psd=True),
        "half diagonal": cv.Kronecker(tensor(1, 2), psd(3), psd=True),
        "spectral": cv.inverse(cv.Kronecker(psd(2), psd(3), psd=True), damping=0.1),
        "blocks": cv.BlockDiagonal(blocks, {"a": order[:6], "b": order[6:]}, cv.Space(9, torch.float64)),
        "sum": 2.0 * cv.Dense(psd(4)) + cv.Diagonal(tensor(1, 2, 3, 4)),
    }


@pytest.mark.parametrize("A", structured().values(), ids=structured())
def test_structure_makes_the_diagonal_exact_and_free(A):
    estimate = cv.diagonal(A)
    torch.testing.assert_close(estimate.value, A.dense().diagonal(), rtol=1e-12, atol=1e-14)
    assert estimate.dof == 0 and not estimate.stderr.any() and estimate.cost.products == 0


@METHODS
def test_as_many_products_as_rows_give_the_exact_diagonal(method):
    matrix = rotated(linspace(-1, 3, 40))
    estimate = cv.diagonal(free(matrix), products=40, method=method)
    torch.testing.assert_close(estimate.value, matrix.diagonal(), rtol=1e-12, atol=1e-14)
    assert (estimate.cost.products, estimate.dof) == (40, 0)


def test_xdiag_is_its_definition():
    """Each vector left out of the sketch in turn, the obvious way."""
    matrix = rotated(SPECTRA["exponential"])
    count = 8
    probes = cv.Space(N, torch.float64).draw(count, seed=5)
    values = []
    for left in range(count):
        Q = torch.linalg.qr((torch.cat([probes[:left], probes[left + 1 :]]) @ matrix).T)[0]
        z = probes[left]
        inside = (Q * (matrix @ Q)).sum(1)
        outside = z * (matrix @ z - Q @ (Q.T @ (matrix @ z)))
        values.append(inside + outside)
    expected = torch.stack(values)
    estimate = cv.diagonal(free(matrix), products=2 * count, method="xdiag", seed=5)
    torch.testing.assert_close(estimate.value, expected.mean(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(estimate.stderr, 2 * expected.std(0) / count**0.5, rtol=1e-5, atol=1e-9)


def test_hutchinson_has_the_variance_of_the_formula():
    matrix = rotated(SPECTRA["spiked"])
    variance = matrix.square().sum(1) - matrix.diagonal().square()
    estimates = [cv.diagonal(free(matrix), products=32, method="hutchinson", seed=seed) for seed in range(200)]
    errors = torch.stack([e.value for e in estimates]) - matrix.diagonal()
    assert float((errors.square().mean(0) * 32 / variance).mean()) == pytest.approx(1, rel=0.05)
    reported = torch.stack([e.stderr.square() for e in estimates]).mean(0) * 32
    assert float((reported / variance).mean()) == pytest.approx(1, rel=0.05)


@METHODS
@pytest.mark.parametrize("name", SPECTRA)
def test_intervals_hold_entries_as_often_as_they_say(name, method):
    matrix = rotated(SPECTRA[name])
    inside = torch.zeros(N, dtype=torch.float64)
    for seed in range(40):
        low, high = cv.diagonal(free(matrix), products=32, method=method, seed=seed).interval()
        inside += ((low <= matrix.diagonal()) & (matrix.diagonal() <= high)).double()
    assert float(inside.mean()) / 40 >= 0.93


def test_xdiag_is_far_better_where_few_eigenvalues_are_large():
    matrix = rotated(SPECTRA["spiked"])
    plain, sketched = (cv.diagonal(free(matrix), products=48, method=m) for m in ("hutchinson", "xdiag"))
    error = [float((e.value - matrix.diagonal()).norm()) for e in (plain, sketched)]
    assert error[1] < error[0] / 5
    assert torch.equal(cv.diagonal(free(matrix), products=48).value, sketched.value)  # and it is the default


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_low_rank_operator_is_known_to_rounding(dtype):
    matrix = rotated(torch.cat([tensor(5, 3, -2), torch.zeros(N - 3, dtype=torch.float64)])).to(dtype)
    estimate = cv.diagonal(free(matrix), products=24)
    assert estimate.dof == 0
    low, high = estimate.interval()
    assert bool(((low <= matrix.diagonal().double()) & (matrix.diagonal().double() <= high)).all())


def test_an_operator_that_is_not_symmetric_has_a_diagonal():
    matrix = rotated(SPECTRA["flat"]) + torch.triu(torch.randn(N, N, dtype=torch.float64))
    A = cv.MatrixFree(lambda rows: rows @ matrix.T, cv.Space(N, torch.float64))
    estimate = cv.diagonal(A, products=100)
    assert float(((estimate.value - matrix.diagonal()) / estimate.stderr).square().mean()) == pytest.approx(1, rel=0.5)
    with pytest.raises(ValueError, match="xdiag is for symmetric matrices"):
        cv.diagonal(A, method="xdiag")


@METHODS
def test_a_seed_gives_the_same_bits(method):
    A = free(rotated(SPECTRA["flat"]))
    first, again, other = (cv.diagonal(A, method=method, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.value, again.value) and torch.equal(first.stderr, again.stderr)
    assert not torch.equal(first.value, other.value)


def test_an_interrupt_returns_the_mean_so_far():
    A = free(rotated(SPECTRA["flat"]))
    A.function = Stopping(2, A.function)
    with pytest.raises(cv.Interrupted) as stop:
        cv.diagonal(A, products=100, method="hutchinson")
    assert stop.value.result.samples == 32 and not stop.value.result.complete


def test_a_result_is_saved_and_loaded(tmp_path):
    estimate = cv.diagonal(free(rotated(SPECTRA["flat"])))
    again = cv.Result.load(estimate.save(tmp_path / "d"))
    assert torch.equal(again.value, estimate.value) and "120" in str(again)


@pytest.mark.parametrize(
    "options, message",
    [({"products": 1}, "at least 2 products"), ({"method": "exact"}, "method is 'auto', 'hutchinson' or 'xdiag'")],
)
def test_options_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cv.diagonal(free(rotated(SPECTRA["flat"])), **options)


def test_rounding_that_no_repetition_shows_is_in_the_interval():
    values = linspace(1, 2, 200)
    A = cv.MatrixFree(lambda rows: (rows.double() * values).float(), cv.Space(200), symmetric=True)
    low, high = cv.diagonal(A, products=8, method="hutchinson").interval(0.95)
    assert ((low <= values) & (values <= high)).all()
