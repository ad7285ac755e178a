"""Extreme eigenpairs against torch.linalg.eigh, with residuals that are what they say."""

from __future__ import annotations

import pytest
import torch
from matrices import Stopping, free, linspace, rotated, scaling, tensor
from torch.overrides import TorchFunctionMode

import curvature as cv
from curvature.linalg import eigen, lobpcg
from curvature.linalg.krylov import Krylov

ENDS = ["largest", "smallest", "both", "magnitude"]
WHICH = pytest.mark.parametrize("which", ENDS)
METHODS = ["lanczos", "lobpcg", "krylov"]
METHOD = pytest.mark.parametrize("method", METHODS)


def zeros(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.float64)


SPECTRA = {
    "bulk": linspace(-1, 2, 150),
    "clustered pair": torch.cat([tensor(9, 8.9), linspace(0, 1, 148)]),
    "close pair": torch.cat([tensor(9, 9 - 1e-6), linspace(0, 1, 148)]),
    "double": torch.cat([tensor(9, 9), linspace(-0.9, 1, 148)]),
    "quadruple": torch.cat([tensor(9, 9, 9, 9), linspace(-0.9, 1, 146)]),
    "negative outlier": torch.cat([tensor(-20, 9, 8.9), linspace(0, 1, 147)]),
    "eight decades": 10 ** linspace(-8, 0, 150),
    "both signs": torch.cat([10 ** linspace(-8, 0, 75), -(10 ** linspace(-8, -0.1, 75))]),
    "polynomial": 1 / torch.arange(1, 151, dtype=torch.float64) ** 2,
}


SHAPES = {  # as the spectra of networks come; no eigenvalue is minus another, so that "magnitude" has one order
    "clustered": torch.cat([5 + 1e-3 * linspace(0, 1, 12), linspace(-0.93, 1, 148)]),
    "repeated": torch.cat([tensor(*[3.0] * 12, *[2.0] * 6, *[-1.7] * 3), linspace(-0.93, 1, 139)]),
    "low rank": torch.cat([linspace(1, 10, 20), zeros(140)]),
    "power law": 1 / torch.arange(1, 161, dtype=torch.float64),
    "indefinite": torch.cat([linspace(-8, -2.1, 15), linspace(2, 12, 20), linspace(-0.93, 1, 125)]),
    "exponential": 0.9 ** torch.arange(160, dtype=torch.float64),
}


def expected(values: torch.Tensor, k: int, which: str) -> torch.Tensor:
    """The k eigenvalues asked for, in the order asked for, the obvious way."""
    up = values.sort().values
    match which:
        case "largest":
            return up.flip(0)[:k]
        case "smallest":
            return up[:k]
        case "magnitude":
            return values[values.abs().argsort(descending=True)][:k]
        case "both":
            return torch.stack([up.flip(0), up], dim=1).flatten()[:k]


def check(A: cv.LinearOperator, matrix: torch.Tensor, pairs: cv.Eigenpairs, k: int, *, ulp: float = 1e-14) -> None:
    """What must be true of any answer: orthonormal vectors, true residuals, and an eigenvalue within each of them."""
    truth, scale = torch.linalg.eigvalsh(matrix.double()), float(matrix.double().norm())
    assert pairs.values.shape == pairs.residuals.shape == pairs.converged.shape == (k,)
    assert pairs.vectors.shape == (k, len(matrix))
    gram = pairs.vectors.double() @ pairs.vectors.double().T
    torch.testing.assert_close(gram, torch.eye(k).double(), rtol=0, atol=1e3 * ulp)
    images = pairs.vectors.double() @ matrix.double()
    residuals = (images - pairs.values.unsqueeze(1) * pairs.vectors.double()).norm(dim=1)
    torch.testing.assert_close(pairs.residuals, residuals, rtol=1e-6, atol=10 * ulp * scale)
    distance = (truth - pairs.values.unsqueeze(1)).abs().amin(1)
    assert (distance <= pairs.residuals + 10 * ulp * scale).all()
    assert (pairs.bounds <= pairs.residuals.clamp(min=1e5 * ulp * scale)).all()


@WHICH
@pytest.mark.parametrize("k", [1, 4, 7])
@pytest.mark.parametrize("name", SPECTRA)
def test_finds_the_eigenvalues_of_eigh(name, k, which):
    matrix = rotated(SPECTRA[name])
    pairs = cv.eigsh(free(matrix), k, which=which, max_steps=400)
    check(free(matrix), matrix, pairs, k)
    wanted = expected(torch.linalg.eigvalsh(matrix), k, which)
    done = pairs.converged
    torch.testing.assert_close(pairs.values[done], wanted[done], rtol=1e-9, atol=1e-9 * float(matrix.norm()))
    assert (pairs.residuals <= 1e-5 * pairs.values.abs() + 1e-13 * float(matrix.norm()))[done].all()
    if which == "largest" or name not in ("eight decades", "both signs", "polynomial"):  # dense around zero
        assert done.all()


@WHICH
@METHOD
@pytest.mark.parametrize("k", [1, 10, 30, 100])
@pytest.mark.parametrize("name", SHAPES)
def test_every_method_finds_the_eigenvalues_of_eigh(name, k, which, method):
    """To the bounds, which hold as no eigenvalue was missed; what has not converged is marked."""
    matrix = rotated(SHAPES[name])
    steps = 400 if name == "repeated" else 40  # Lanczos finds twelve copies in rounds
    pairs = cv.eigsh(free(matrix), k, which=which, method=method, max_steps=steps)
    check(free(matrix), matrix, pairs, k)
    done = pairs.converged
    errors = (pairs.values - expected(torch.linalg.eigvalsh(matrix), k, which)).abs()
    assert (errors <= pairs.bounds)[done].all()
    assert (pairs.residuals <= 1e-5 * pairs.values.abs() + 1e-12 * float(matrix.norm()))[done].all()
    easy = "power law", "indefinite", "exponential"
    if (k > 1 and (method == "krylov" or name == "low rank")) or (which == "largest" and k != 30 and name in easy):
        assert done.all()


@WHICH
@METHOD
@pytest.mark.parametrize("name", SHAPES)
def test_every_method_works_in_float32(name, which, method):
    matrix = rotated(SHAPES[name]).float()
    pairs = cv.eigsh(free(matrix), 10, which=which, method=method, max_steps=40)
    check(free(matrix), matrix, pairs, 10, ulp=1e-7)
    done = pairs.converged
    errors = (pairs.values - expected(torch.linalg.eigvalsh(matrix.double()), 10, which)).abs()
    assert (errors <= pairs.bounds)[done].all()
    assert pairs.vectors.dtype == torch.float32
    if which in ("largest", "magnitude") or name == "low rank":
        assert done.all()


@METHOD
def test_a_hundred_pairs_of_a_large_matrix(method):
    values = 1 / torch.arange(1, 2001, dtype=torch.float64)
    pairs = cv.eigsh(scaling(values), 100, method=method)
    assert pairs.converged.all()
    assert ((pairs.values - values[:100]).abs() <= pairs.bounds).all()
    torch.testing.assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(100).double(), rtol=0, atol=1e-11)


def lanczos_without_reorthogonalisation(values: torch.Tensor, steps: int) -> torch.Tensor:
    """The Ritz values of a diagonal matrix as a peer computes them, largest first."""
    v = torch.randn(len(values), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, v, beta = torch.zeros_like(v), v / v.norm(), torch.zeros(())
    diagonal, below = [], []
    for _ in range(steps):
        w = values * v - beta * before
        diagonal.append(w @ v)
        w -= diagonal[-1] * v
        beta = w.norm()
        below.append(beta)
        before, v = v, w / beta
    off = torch.diag(torch.stack(below[:-1]), 1)
    return torch.linalg.eigvalsh(torch.diag(torch.stack(diagonal)) + off + off.T).flip(0)


@METHOD
def test_where_a_peer_returns_ghosts_all_thirty_pairs_are_true(method):
    """hessian-eigenthings' lanczos(k=30) takes 60 steps, without reorthogonalisation where there are more than 50."""
    values = 60 * 0.5 ** torch.arange(500, dtype=torch.float64)
    ghosts = lanczos_without_reorthogonalisation(values, 60)[:30]
    assert int(((ghosts - values[:30].unsqueeze(1)).abs().amin(1) > 1e-3 * values[:30]).sum()) > 20  # missed for copies
    matrix = rotated(values)
    pairs = cv.eigsh(free(matrix), 30, method=method)
    check(free(matrix), matrix, pairs, 30)
    assert pairs.converged.all()
    assert ((pairs.values - values[:30]).abs() <= pairs.bounds).all()
    assert (pairs.values.diff() < 0).all()


@METHOD
@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("name", ["clustered", "power law", "indefinite"])
def test_a_start_from_a_nearby_matrix_saves_products(name, k, method):
    before = rotated(SHAPES[name])
    noise = rotated(linspace(-1, 1, 160), seed=5)
    matrix = before + 1e-4 * noise
    cold = cv.eigsh(free(matrix), k, method=method)
    warm = cv.eigsh(free(matrix), k, method=method, start=cv.eigsh(free(before), k).vectors)
    assert warm.converged.all() and warm.cost.products < cold.cost.products
    errors = (warm.values - torch.linalg.eigvalsh(matrix).flip(0)[:k]).abs()
    assert (errors <= warm.bounds).all()
    if method == "lobpcg" and k > 1:
        assert warm.cost.products < 0.75 * cold.cost.products


@METHOD
@pytest.mark.parametrize("n, k", [(60, 1), (300, 1), (300, 5), (3000, 5)])
def test_what_a_start_lacks_is_found_all_the_same(n, k, method):
    """The rows are exact eigenvectors, of all but the largest eigenvalue."""
    values = torch.cat([tensor(1.5), linspace(1, 0.8, k), linspace(-0.5, 0.5, n - k - 1)])
    for seed in range(5):
        start = torch.eye(k + 1, n, dtype=torch.float64)[1:]
        found = cv.eigsh(scaling(values), k, method=method, start=start, seed=seed)
        torch.testing.assert_close(found.values, values[:k], rtol=1e-8, atol=0)


@METHOD
@pytest.mark.parametrize("rows", [0, 1, 3, 12, 40])
def test_a_start_may_have_any_number_of_rows_and_repeat_them(rows, method):
    matrix = rotated(SHAPES["power law"])
    start = torch.linalg.eigh(matrix)[1].T[-3:].repeat(14, 1)[:rows]
    found = cv.eigsh(free(matrix), 3, method=method, start=start)
    torch.testing.assert_close(found.values, SHAPES["power law"][:3], rtol=1e-8, atol=0)
    assert found.origin.options["start"] == rows


@pytest.mark.parametrize("k", [1, 4])
def test_a_preconditioner_cuts_products(k):
    values = 10 ** linspace(-6, 0, 300)
    matrix = rotated(values)
    inverse = cv.Dense(torch.linalg.inv(matrix + 1e-6 * torch.eye(300).double()))
    asked = {"which": "smallest", "method": "lobpcg", "max_steps": 60}
    plain = cv.eigsh(free(matrix), k, **asked)
    found = cv.eigsh(free(matrix), k, **asked, preconditioner=inverse)
    assert found.converged.all() and not plain.converged.any()
    assert found.cost.products < plain.cost.products / 1.5
    torch.testing.assert_close(found.values, values[:k], rtol=1e-8, atol=0)
    assert found.origin.options["preconditioner"]["operator"] == "Dense"


def test_a_preconditioner_may_be_of_another_dtype_and_indefinite():
    matrix = rotated(SHAPES["clustered"])
    M = cv.Dense(rotated(linspace(-0.1, 1, 160), seed=3).float())
    found = cv.eigsh(free(matrix), 2, method="lobpcg", preconditioner=M, rtol=1e-3)
    check(free(matrix), matrix, found, 2)


def test_a_preconditioner_that_is_not_finite_is_refused():
    M = cv.MatrixFree(lambda rows: rows / 0, cv.Space(150, torch.float64), psd=True)
    with pytest.raises(cv.NonFinite, match=r"A product with the preconditioner <psd MatrixFree 150 x 150.* not finite"):
        cv.eigsh(free(rotated(SPECTRA["bulk"])), method="lobpcg", preconditioner=M)


def test_lobpcg_multiplies_what_has_not_converged_only():
    counts: list[int] = []
    matrix = rotated(SHAPES["power law"])
    A = free(matrix)
    A.function = lambda rows: counts.append(len(rows)) or rows @ matrix
    cv.eigsh(A, 10, method="lobpcg")
    assert counts[0] == 12 and min(counts[:-1]) < 8 and counts[-1] == 10  # the last confirms what was found


@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
def test_bounds_hold_for_all_seeds(which):
    """Over 400 starts and as many spectra. Residuals bound always; `bounds` when the pairs have converged, and else
    unless an eigenvalue hides in the gap."""
    signs = torch.tensor({"largest": [1, 1, 1], "smallest": [-1, -1, -1], "both": [1, -1, 1]}[which])
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(12, generator=generator, dtype=torch.float64) ** 3
        options = {"rtol": 10.0 ** -(seed % 8), "method": METHODS[seed % 3], "block": 3 + seed % 2, "seed": seed}
        pairs = cv.eigsh(free(rotated(values, seed=seed + 10**6)), 3, which=which, max_steps=3, **options)
        floor = 1e-12 * float(values.abs().max())
        nearest, next_nearest = (values - pairs.values.unsqueeze(1)).abs().sort(dim=1).values[:, :2].T
        assert (nearest <= pairs.residuals + floor).all()
        assert (signs * (expected(values, 3, which) - pairs.values) >= -floor).all()  # Courant and Fischer
        assert (pairs.bounds <= pairs.residuals + floor).all()
        hidden = next_nearest < pairs.residuals.square() / pairs.bounds
        assert ((nearest <= pairs.bounds) | hidden).all()
        assert (nearest <= pairs.bounds)[pairs.converged].all() or options["rtol"] > 1e-3


def test_bounds_are_quadratic_where_there_is_a_gap():
    pairs = cv.eigsh(free(rotated(SPECTRA["clustered pair"])), 2, rtol=1e-3)
    assert ((pairs.values - tensor(9, 8.9)).abs() <= pairs.bounds).all()
    assert (pairs.bounds < 0.1 * pairs.residuals).all()
    gap = 0.1 - pairs.residuals.flip(0)  # to the other's residual
    torch.testing.assert_close(pairs.bounds, pairs.residuals**2 / gap, rtol=1e-4, atol=0)


def test_bounds_are_the_residuals_where_no_gap_is_known():
    """Of copies of an eigenvalue, or where nothing is known beyond the pairs asked for."""
    double = cv.eigsh(free(rotated(SPECTRA["double"])), 2, rtol=1e-3)
    assert torch.equal(double.bounds, double.residuals)
    alone = cv.eigsh(free(rotated(SPECTRA["bulk"])), 3, method="lobpcg", block=3, max_steps=5)
    assert torch.equal(alone.bounds, alone.residuals)


@METHOD
def test_no_vector_leaves_the_device(method):
    """No tensor of n entries is read by the host; scalars and small matrices are, for decisions."""
    n = 500

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            if name in ("cpu", "numpy", "tolist", "item", "__array__", "__float__", "cuda", "__iter__"):
                assert name == "__iter__" or args[0].numel() < n, name
            if name == "to":
                assert "cpu" not in args[1:], args[1:]
            return function(*args, **(kwargs or {}))

    values = 1 / torch.arange(1, n + 1, dtype=torch.float64)
    start = torch.eye(4, n, dtype=torch.float64)
    with Watch():
        pairs = cv.eigsh(scaling(values), 4, method=method, start=start + 1e-3, max_steps=20)
    assert pairs.converged.all()


@pytest.mark.parametrize("block", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [20, 60])
def test_many_pairs_come_without_ghost_copies(k, block):
    """A peer returned 60, 60, 60, ... for k = 30: a lost orthogonality lets converged eigenvalues come back."""
    values = torch.cat([linspace(10, 60, 30), linspace(-1, 1, 470)])
    matrix = rotated(values)
    pairs = cv.eigsh(free(matrix), k, block=block, rtol=1e-8, max_steps=2000)
    assert pairs.converged.all()
    check(free(matrix), matrix, pairs, k)
    torch.testing.assert_close(pairs.values, expected(values, k, "largest"), rtol=1e-10, atol=0)
    assert (pairs.values.diff() < 0).all()


@WHICH
@pytest.mark.parametrize("n", [1, 2, 3, 10, 30])
def test_all_pairs_of_a_small_matrix_are_its_eigendecomposition(n, which):
    values = linspace(-1.1, 2, n)
    matrix = rotated(values)
    pairs = cv.eigsh(free(matrix), n, which=which)
    check(free(matrix), matrix, pairs, n)
    torch.testing.assert_close(pairs.values, expected(values, n, which), rtol=0, atol=1e-13)
    rebuilt = (pairs.vectors.T * pairs.values) @ pairs.vectors
    torch.testing.assert_close(rebuilt, matrix, rtol=0, atol=1e-13)


def test_one_by_one():
    pairs = cv.eigsh(free(tensor(-3).view(1, 1)))
    assert (float(pairs.values), float(pairs.vectors.abs()), float(pairs.residuals)) == (-3, 1, 0)
    assert pairs.converged.all()


@pytest.mark.parametrize("k", [1, 3, 10])
def test_rank_one(k):
    """The first block already spans an invariant subspace: what is missing comes from new random vectors."""
    matrix = rotated(torch.cat([tensor(3), zeros(39)]))
    pairs = cv.eigsh(free(matrix), k)
    check(free(matrix), matrix, pairs, k)
    torch.testing.assert_close(pairs.values, torch.cat([tensor(3), zeros(k - 1)]), rtol=0, atol=1e-14)
    assert pairs.converged.all()


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
@pytest.mark.parametrize("k", [1, 4, 5, 40])
def test_a_multiple_of_the_identity(value, k):
    A = scaling(torch.full((40,), value, dtype=torch.float64))
    pairs = cv.eigsh(A, k)
    check(A, A.dense(), pairs, k)
    torch.testing.assert_close(pairs.values, torch.full((k,), value, dtype=torch.float64), rtol=1e-14, atol=0)
    assert pairs.converged.all()


def test_few_distinct_eigenvalues_break_down_and_are_continued():
    """Two distinct eigenvalues fill 2 blocks; the other copies, and a third value, come with fresh random vectors."""
    values = torch.cat([torch.full((4,), 7.0), torch.full((30,), 2.0)]).double()
    pairs = cv.eigsh(scaling(values), 12, block=4)
    torch.testing.assert_close(pairs.values, expected(values, 12, "largest"), rtol=1e-12, atol=0)


@pytest.mark.parametrize("multiplicity", [2, 3, 4])
def test_multiplicities_up_to_the_block_are_found(multiplicity):
    values = torch.cat([torch.full((multiplicity,), 5.0), torch.full((multiplicity,), 4.0), linspace(-1, 1, 190)])
    for seed in range(5):
        pairs = cv.eigsh(scaling(values), 2 * multiplicity + 1, block=4, seed=seed)
        torch.testing.assert_close(pairs.values, expected(values, 2 * multiplicity + 1, "largest"), rtol=1e-9, atol=0)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("k", [3, 11, 15])
def test_multiplicities_beyond_the_block_are_found(k, block):
    values = torch.cat([torch.full((11,), 3.0), torch.full((6,), 2.0), linspace(-1, 1, 40)]).double()
    top = cv.eigsh(free(rotated(values)), k, block=block, max_steps=1000)
    torch.testing.assert_close(top.values, values[:k], rtol=1e-10, atol=0)
    assert top.converged.all()
    torch.testing.assert_close(top.vectors @ top.vectors.T, torch.eye(k).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("which", ["smallest", "both"])
def test_the_zeros_of_a_matrix_of_low_rank_are_its_smallest_eigenvalues(which):
    values = torch.cat([tensor(5, 4, 3, 2, 1), torch.zeros(95).double()])
    found = cv.eigsh(free(rotated(values)), 8, which=which)
    expected = torch.zeros(8).double() if which == "smallest" else tensor(5, 0, 4, 0, 3, 0, 2, 0)
    torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-12)
    assert found.converged.all()


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_the_scale_of_the_operator_does_not_matter(scale):
    matrix = rotated(SPECTRA["clustered pair"])
    one, other = cv.eigsh(free(matrix), 4), cv.eigsh(free(matrix * scale), 4)
    torch.testing.assert_close(other.values / scale, one.values, rtol=1e-12, atol=0)
    assert other.cost.products == one.cost.products and other.converged.all()


@WHICH
@pytest.mark.parametrize("name", ["clustered pair", "negative outlier", "polynomial", "double"])
def test_float32_reaches_relative_residuals_of_1e_4(name, which):
    matrix = rotated(SPECTRA[name]).float()
    pairs = cv.eigsh(free(matrix), 2, which=which, rtol=1e-4)
    check(free(matrix), matrix, pairs, 2, ulp=1e-7)
    assert pairs.vectors.dtype == torch.float32 and pairs.values.dtype == pairs.residuals.dtype == torch.float64
    top = float(matrix.double().norm())
    assert (pairs.residuals <= torch.maximum(1e-4 * pairs.values.abs(), torch.tensor(2e-6 * top)))[
        pairs.converged
    ].all()
    truth = expected(torch.linalg.eigvalsh(matrix.double()), 2, which)
    torch.testing.assert_close(pairs.values[pairs.converged], truth[pairs.converged], rtol=1e-6, atol=1e-6 * top)
    if which != "smallest":
        assert pairs.converged.all()


def test_float32_values_are_better_than_the_length_of_float32_vectors():
    """u.Au of a row u that is a unit vector to float32 only would be off by 1e-7; the quotient is off by less."""
    pairs = cv.eigsh(scaling(torch.full((1000,), 3.0)), 4)
    torch.testing.assert_close(pairs.values, torch.full((4,), 3.0).double(), rtol=1e-8, atol=0)


def test_bfloat16_operators_are_measured_with_float64_scalars():
    values = torch.cat([tensor(8), linspace(-1, 1, 99)]).bfloat16()
    pairs = cv.eigsh(scaling(values), 1, rtol=0.05)
    assert float(pairs.values[0]) == pytest.approx(8, rel=1e-3) and pairs.converged.all()


@WHICH
def test_few_steps_return_pairs_that_are_marked_as_not_converged(which):
    matrix = rotated(SPECTRA["bulk"])
    pairs = cv.eigsh(free(matrix), 5, which=which, max_steps=3, block=2)
    check(free(matrix), matrix, pairs, 5)
    assert not pairs.converged.any() and (pairs.residuals > 1e-3).all()
    assert "not converged" in str(pairs) and pairs.cost.products == 3 * 2 + 5
    assert pairs.complete


@pytest.mark.parametrize("max_steps, made", [(0, 0), (1, 4), (2, 8)])
def test_fewer_directions_than_pairs_is_an_error(max_steps, made):
    with pytest.raises(
        cv.NotConverged,
        match=f"{max_steps} steps made {made} directions, fewer than the k = 9 asked for. Raise max_steps",
    ):
        cv.eigsh(free(rotated(SPECTRA["bulk"])), 9, max_steps=max_steps)


@WHICH
@pytest.mark.parametrize("block", [1, 4])
def test_a_restarted_basis_gives_the_same_pairs_as_a_whole_one(block, which):
    matrix = rotated(torch.cat([tensor(1.05, 1.02, -1.15, -1.1), linspace(-1, 1, 296)]))
    restarted = cv.eigsh(free(matrix), 4, which=which, block=block, rtol=1e-10, max_steps=1000)
    assert restarted.cost.products > 2 * (24 + 5 * block)  # the capacity for k = 4
    values, vectors = torch.linalg.eigh(matrix)
    torch.testing.assert_close(restarted.values, expected(values, 4, which), rtol=1e-12, atol=0)
    overlap = (restarted.vectors @ vectors).abs().amax(1)
    torch.testing.assert_close(overlap, torch.ones(4).double(), rtol=0, atol=1e-12)


@METHOD
def test_a_seed_gives_the_same_bits(method):
    A = free(rotated(SPECTRA["clustered pair"]))
    first, again, other = (cv.eigsh(A, 3, seed=seed, method=method, max_steps=100) for seed in (1, 1, 2))
    assert torch.equal(first.vectors, again.vectors) and torch.equal(first.values, again.values)
    assert not torch.equal(first.vectors, other.vectors)
    torch.testing.assert_close(first.values, other.values, rtol=1e-9, atol=0)
    assert first.origin.seed == 1 and first.origin.options["k"] == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("asymmetry", [1.0, 0.1])
def test_an_operator_that_only_claims_to_be_symmetric_is_found_out(asymmetry, block, dtype):
    generator = torch.Generator().manual_seed(0)
    skew = torch.triu(torch.randn(100, 100, generator=generator, dtype=torch.float64)) / 10
    matrix = (rotated(linspace(-1, 1, 100)) + asymmetry * (skew - skew.T)).to(dtype)
    A = cv.MatrixFree(lambda rows: rows @ matrix.T, cv.Space(100, dtype), symmetric=True)
    with pytest.raises(ValueError, match=r"The operator is not symmetric: \|u.Av - v.Au\| reached .* with \|A\| about"):
        cv.eigsh(A, block=block)


@METHOD
def test_one_wrong_entry_is_found_out(method):
    matrix = rotated(linspace(-1, 1, 100))
    matrix[3, 70] += 1e-3
    A = cv.MatrixFree(lambda rows: rows @ matrix.T, cv.Space(100, torch.float64), symmetric=True)
    with pytest.raises(ValueError, match="not symmetric"):
        cv.eigsh(A, method=method)


def test_an_operator_that_changes_between_products_is_found_out():
    matrix, count = rotated(linspace(-1, 1, 100)), [0]

    def product(rows):
        count[0] += 1
        return (
            rows @ matrix + 1e-4 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(count[0])).double()
        )

    with pytest.raises(ValueError, match="not symmetric"):
        cv.eigsh(cv.MatrixFree(product, cv.Space(100, torch.float64), symmetric=True))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda A: cv.eigsh(A, 0), "k lies between 1 and the size of A, 150, but got 0."),
        (lambda A: cv.eigsh(A, 151), "k lies between 1 and the size of A, 150, but got 151."),
        (lambda A: cv.eigsh(A, which="top"), "which is 'largest', 'smallest', 'both' or 'magnitude', but got 'top'."),
        (lambda A: cv.eigsh(cv.Diagonal(tensor(1, 2)), 3), "k lies between 1 and the size of A, 2, but got 3."),
        (lambda A: cv.eigsh(cv.Diagonal(tensor(1, 2)), which="top"), "which is 'largest'"),
        (lambda A: cv.eigsh(A, method="arnoldi"), "method is 'lanczos', 'lobpcg' or 'krylov', but got 'arnoldi'."),
        (
            lambda A: cv.eigsh(A, 9, method="lobpcg", block=4),
            "all k = 9 vectors at once, but block is 4. Take more",
        ),
        (lambda A: cv.eigsh(A, start=zeros(150)), r"start holds rows of 150 entries, but has shape \(150,\)."),
        (lambda A: cv.eigsh(A, start=zeros(4).view(2, 2)), r"start holds rows of 150 entries, but has shape \(2, 2\)."),
        (lambda A: cv.eigsh(A, start=zeros(300).view(2, 150)), "start has a row that is zero or not finite."),
        (lambda A: cv.eigsh(A, start=zeros(150).view(1, 150) / 0), "start has a row that is zero or not finite."),
        (
            lambda A: cv.eigsh(A, preconditioner=A),
            "A preconditioner helps 'lobpcg' at one end, 'smallest' or 'largest', but got 'lanczos' and 'largest'.",
        ),
        (
            lambda A: cv.eigsh(A, method="lobpcg", which="both", preconditioner=A),
            "but got 'lobpcg' and 'both'. Take method='lobpcg' and one end at a time",
        ),
        (
            lambda A: cv.eigsh(A, method="lobpcg", preconditioner=cv.Diagonal(tensor(1, 2))),
            r"A preconditioner of shape \(2, 2\) does not fit A of shape \(150, 150\).",
        ),
        (
            lambda A: cv.eigsh(cv.Dense(torch.arange(9.0).view(3, 3))),
            r"eigsh needs a symmetric operator, but got <Dense 3 x 3.*Try A.adjoint\(\) @ A for singular values.",
        ),
    ],
)
def test_arguments_without_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(free(rotated(SPECTRA["bulk"])))


@WHICH
def test_a_diagonal_matrix_is_sorted(which):
    values = tensor(3, -7, 5, 1, 0)
    pairs = cv.eigsh(cv.Diagonal(values), 3, which=which)
    assert torch.equal(pairs.values, expected(values, 3, which))
    assert torch.equal(pairs.vectors @ torch.diag(values), pairs.values.unsqueeze(1) * pairs.vectors)
    assert pairs.cost.products == 0 and pairs.converged.all() and float(pairs.residuals.max()) == 0


@pytest.mark.parametrize("after", [3, 12, 25, 40])
def test_an_interrupt_returns_the_pairs_so_far(after):
    """Also after restarts (the 12th step): their residuals follow from what is kept, without a product."""
    matrix = rotated(linspace(-1, 2, 150))
    A = free(matrix)
    A.function = Stopping(after, A.function)
    with pytest.raises(cv.Interrupted) as stop:
        cv.eigsh(A, 6, rtol=1e-14, max_steps=1000)
    pairs = stop.value.result
    assert not pairs.complete and pairs.cost.products == 4 * (after + 1)
    check(A, matrix, pairs, 6)
    exact = expected(torch.linalg.eigvalsh(matrix), 6, "largest")
    assert ((pairs.values - exact).abs() < (1.5 if after == 3 else 0.2)).all()
    assert not (pairs.converged & (pairs.residuals > 1e-9)).any()


def test_an_interrupt_of_the_last_product_still_returns_pairs():
    matrix = rotated(SPECTRA["clustered pair"])
    steps = cv.eigsh(free(matrix), 2).cost.products // 4
    A = free(matrix)
    A.function = Stopping(steps, A.function)
    with pytest.raises(cv.Interrupted) as stop:
        cv.eigsh(A, 2)
    torch.testing.assert_close(stop.value.result.values, tensor(9, 8.9), rtol=1e-9, atol=0)
    assert stop.value.result.converged.all()


@pytest.mark.parametrize("after", [1, 2, 5, 9])
@pytest.mark.parametrize("method", ["lobpcg", "krylov"])
def test_an_interrupt_of_other_methods_returns_the_pairs_so_far(method, after):
    matrix = rotated(linspace(-1, 2, 150))
    A = free(matrix)
    A.function = Stopping(after, A.function)
    with pytest.raises(cv.Interrupted) as stop:
        cv.eigsh(A, 6, rtol=1e-14, method=method)
    pairs = stop.value.result
    assert not pairs.complete and not pairs.converged.any() and pairs.cost.products == 8 * (after + 1)
    check(A, matrix, pairs, 6)


def test_an_interrupt_between_two_blocks_of_vectors_has_nothing_to_return(monkeypatch):
    """Half of what LOBPCG combines in place is new then, and half is old."""
    combine = cv.Space.combine
    stopping = Stopping(20, lambda arguments: combine(*arguments))

    def of_columns(space: cv.Space, coefficients: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        arguments = (space, coefficients, rows)
        return stopping(arguments) if rows.shape[1] == 50 else combine(*arguments)

    monkeypatch.setattr(cv.Space, "combine", of_columns)
    monkeypatch.setattr(lobpcg, "CHUNK", 50)
    with pytest.raises(KeyboardInterrupt) as stop:
        cv.eigsh(free(rotated(SPECTRA["bulk"])), 6, method="lobpcg")
    assert not isinstance(stop.value, cv.Interrupted)


def test_an_interrupt_from_the_listener_is_an_interrupt_too():
    with pytest.raises(cv.Interrupted) as stop:
        cv.eigsh(free(rotated(SPECTRA["bulk"])), 2, rtol=1e-14, run=cv.Run(progress=Stopping(5)))
    assert stop.value.result.cost.products == 6 * 4


def test_an_interrupt_before_there_are_k_directions_has_nothing_to_return():
    A = free(rotated(SPECTRA["bulk"]))
    A.function = Stopping(1, A.function)
    with pytest.raises(KeyboardInterrupt) as stop:
        cv.eigsh(A, 6)
    assert not isinstance(stop.value, cv.Interrupted)


def test_progress_counts_the_steps():
    seen: list[cv.Progress] = []
    pairs = cv.eigsh(free(rotated(SPECTRA["clustered pair"])), 2, max_steps=50, run=cv.Run(progress=seen.append))
    assert [p.done for p in seen] == list(range(1, len(seen) + 1))
    assert {(p.question, p.total, p.unit) for p in seen} == {("eigsh", 50, "steps")}
    assert seen[-1].note == "2 of 2 converged, first 9"
    assert pairs.cost.products == 4 * len(seen) + 2


def test_memory_is_bounded_by_restarts(monkeypatch):
    """The basis holds max(3 k, 24) + 5 blocks of rows, however many steps are taken."""
    made: list[Krylov] = []
    monkeypatch.setattr(eigen, "Krylov", lambda *args, **more: made.append(Krylov(*args, **more)) or made[0])
    pairs = cv.eigsh(free(rotated(linspace(-1, 1, 300))), 2, rtol=1e-12, max_steps=120)
    assert pairs.cost.products > 3 * (24 + 20)
    assert [krylov.capacity for krylov in made] == [24 + 20]


@pytest.mark.parametrize("question", [cv.eigsh, cv.spectral_density], ids=["eigsh", "spectral_density"])
def test_a_basis_that_does_not_fit_into_memory_is_refused_before_anything_is_drawn(question):
    A = cv.MatrixFree(lambda rows: rows, cv.Space(10**12), symmetric=True)
    with pytest.raises(cv.TooLarge, match=r"A basis of \d+ vectors of 1,000,000,000,000 entries takes .* GiB are free"):
        question(A)
