"""Inner products and norms against plain float64, the laws of the random vectors, and orthonormal rows."""

from __future__ import annotations

import math

import pytest
import torch
from matrices import linspace

import curvature as cv
from curvature.linalg.space import CHUNK

KINDS = pytest.mark.parametrize("kind", ["signs", "normal", "sphere"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("size", [1, 7, CHUNK, 2 * CHUNK + 3])
def test_inner_and_norms_equal_plain_float64(dtype, size):
    space = cv.Space(size, dtype)
    u, v = torch.randn(3, size).to(dtype), torch.randn(2, size).to(dtype)
    inner = space.inner(u, v)
    assert inner.dtype == torch.float64
    torch.testing.assert_close(inner, u.double() @ v.double().T, rtol=1e-12, atol=1e-12 * size**0.5)
    torch.testing.assert_close(space.norms(u), u.double().square().sum(1).sqrt(), rtol=1e-13, atol=0)


def test_inner_of_float32_does_not_lose_what_float32_sums_lose():
    size = 1 << 20
    rows = torch.full((1, size), 0.1)
    exact = size * float(rows[0, 0]) ** 2
    assert abs(float(cv.Space(size).inner(rows, rows)) / exact - 1) < 1e-11
    assert abs(float(cv.Space(size).norms(rows)) / exact**0.5 - 1) < 1e-11  # 1e6 equal terms, one after the other


def test_norms_do_not_overflow_where_the_dtype_would():
    rows = torch.full((1, 4), 1e30)
    assert float(cv.Space(4).norms(rows)) == pytest.approx(2e30, rel=1e-6)


@DTYPES
def test_combine_is_the_matrix_product_in_the_dtype_of_the_rows(dtype):
    rows, coefficients = torch.randn(4, 50).to(dtype), torch.randn(3, 4, dtype=torch.float64)
    combined = cv.Space(50, dtype).combine(coefficients, rows)
    assert combined.dtype == dtype
    expected = coefficients @ rows.double()
    torch.testing.assert_close(combined.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_no_rows_are_a_block_too():
    space, none = cv.Space(5, torch.float64), torch.empty(0, 5, dtype=torch.float64)
    assert space.norms(none).shape == (0,)
    assert space.inner(none, torch.ones(2, 5, dtype=torch.float64)).shape == (0, 2)
    assert space.orthonormal(none).shape == (0, 5)
    assert space.draw(0, seed=0).shape == (0, 5)


@KINDS
def test_draws_have_mean_zero_and_the_identity_for_covariance(kind):
    size, count = 6, 40_000
    rows = cv.Space(size, torch.float64).draw(count, seed=1, kind=kind)
    assert rows.mean(0).abs().max() < 4.5 / count**0.5
    covariance = rows.T @ rows / count
    spread = {"signs": 1.0, "normal": 2**0.5, "sphere": 1.0}[kind]  # of a diagonal entry, at most
    assert (covariance - torch.eye(size)).abs().max() < 4.5 * spread / count**0.5


@KINDS
def test_fourth_moments_are_those_of_the_law(kind):
    """E z_1^4 and E z_1^2 z_2^2 tell the three laws apart; for the sphere both carry a factor size / (size + 2)."""
    size, count = 4, 60_000
    z = cv.Space(size, torch.float64).draw(count, seed=2, kind=kind)
    fourth, mixed = z[:, 0].pow(4).mean(), (z[:, 0] * z[:, 1]).square().mean()
    factor = {"signs": 1 / 3, "normal": 1.0, "sphere": size / (size + 2)}[kind]
    assert float(fourth) == pytest.approx(3 * factor, rel=0.05)
    assert float(mixed) == pytest.approx({"signs": 1.0, "normal": 1.0, "sphere": factor}[kind], rel=0.05)


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_sphere_has_radius_root_size(size):
    rows = cv.Space(size, torch.float64).draw(20, seed=3, kind="sphere")
    torch.testing.assert_close(rows.norm(dim=1), torch.full((20,), size**0.5, dtype=torch.float64), rtol=1e-14, atol=0)


def test_signs_are_plus_and_minus_one():
    rows = cv.Space(100, torch.float32).draw(9, seed=0)
    assert set(rows.flatten().tolist()) == {-1.0, 1.0}


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_fewer_draws_are_the_first_of_more(kind, dtype):
    space = cv.Space(33, dtype)
    assert torch.equal(space.draw(7, seed=5, kind=kind)[:3], space.draw(3, seed=5, kind=kind))


@KINDS
def test_a_seed_gives_the_same_bits_whatever_the_global_generator_does(kind):
    space = cv.Space(33, torch.float64)
    first = space.draw(4, seed=6, kind=kind)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, space.draw(4, seed=6, kind=kind))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, space.draw(4, seed=7, kind=kind))


@KINDS
def test_draws_in_another_dtype_are_the_same_vectors(kind):
    high, low = (cv.Space(50, dtype).draw(3, seed=8, kind=kind) for dtype in (torch.float64, torch.float32))
    assert torch.equal(high.float(), low)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size, rows, rank", [(50, 80, 50), (300, 300, 300), (5000, 40, 40), (40, 1, 1)])
def test_orthonormal_rows_are_orthonormal_with_the_span(dtype, size, rows, rank):
    given = torch.randn(rows, size, dtype=torch.float64).to(dtype)
    basis = cv.Space(size, dtype).orthonormal(given).double()
    assert len(basis) == rank
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(basis @ basis.T, torch.eye(rank).double(), rtol=0, atol=20 * eps)
    outside = given.double() - given.double() @ basis.T @ basis
    assert outside.norm(dim=1).max() < 100 * eps * given.double().norm(dim=1).max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dependent_rows_are_dropped(dtype):
    u, v = torch.randn(2, 30, dtype=torch.float64).to(dtype)
    rows = torch.stack([u, 2 * u, torch.zeros_like(u), v, -u, 4 * v])
    basis = cv.Space(30, dtype).orthonormal(rows)
    assert len(basis) == 2
    torch.testing.assert_close(basis[0], u / u.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decades", [1, 3, 5])
def test_nearly_dependent_rows_give_orthogonal_directions_to_rounding(dtype, decades):
    """Rows that agree to `decades` digits: one Gram-Schmidt pass would leave an angle of eps * 10^decades."""
    u, v, w = torch.randn(3, 400, dtype=torch.float64)
    e = 10.0**-decades
    basis = cv.Space(400, dtype).orthonormal(torch.stack([u, u + e * v, u + e * w]).to(dtype)).double()
    assert len(basis) == 3
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(basis @ basis.T, torch.eye(3).double(), rtol=0, atol=4 * eps)
    plane = torch.linalg.qr(torch.stack([u, v, w]).T)[0].T
    leak = basis - basis @ plane.T @ plane
    assert leak.norm(dim=1).max() < 30 * eps / e  # the rounding of the given rows, enlarged by the cancellation


@pytest.mark.parametrize("dtype, kept", [(torch.float64, 35), (torch.float32, 20)], ids=str)
def test_powers_of_a_grid_stay_orthonormal_when_their_condition_explodes(dtype, kept):
    rows = torch.stack([linspace(0, 1, 200) ** i for i in range(40)]).to(dtype)
    basis = cv.Space(200, dtype).orthonormal(rows).double()
    assert kept <= len(basis) <= 40
    torch.testing.assert_close(
        basis @ basis.T, torch.eye(len(basis)).double(), rtol=0, atol=20 * torch.finfo(dtype).eps
    )


def test_what_is_at_most_small_beyond_the_others_is_dropped():
    u, v = torch.eye(2, 30, dtype=torch.float64)
    space = cv.Space(30, torch.float64)
    assert len(space.orthonormal(torch.stack([u, u + 1e-3 * v]), small=2e-3)) == 1
    assert len(space.orthonormal(torch.stack([u, u + 1e-3 * v]), small=5e-4)) == 2


def test_spaces_are_equal_by_value():
    assert cv.Space(3, torch.float64) == cv.Space(3, torch.float64) != cv.Space(3)
    assert cv.Space(3).eps == pytest.approx(2**-23)
    assert math.log2(cv.Space(3, torch.float64).eps) == -52
