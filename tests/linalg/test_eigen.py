"""Extreme eigenpairs against torch.linalg.eigh, with residuals that are what they say."""

from __future__ import annotations

import pytest
import torch
from matrices import Stopping, free, linspace, rotated, scaling, tensor

import curvature as cv
from curvature.linalg import eigen
from curvature.linalg.krylov import Krylov

ENDS = ["largest", "smallest", "both", "magnitude"]
WHICH = pytest.mark.parametrize("which", ENDS)


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


def test_a_seed_gives_the_same_bits():
    A = free(rotated(SPECTRA["bulk"]))
    first, again, other = (cv.eigsh(A, 3, seed=seed) for seed in (1, 1, 2))
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


def test_one_wrong_entry_is_found_out():
    matrix = rotated(linspace(-1, 1, 100))
    matrix[3, 70] += 1e-3
    A = cv.MatrixFree(lambda rows: rows @ matrix.T, cv.Space(100, torch.float64), symmetric=True)
    with pytest.raises(ValueError, match="not symmetric"):
        cv.eigsh(A)


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
