"""Traces: exact where they are said to be, else with the variance of the theory and an error bar that holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matrices import Stopping, free, linspace, rotated, tensor

import curvature as cv
from curvature.linalg.deflation import controlled, derived
from curvature.result import with_error

METHODS = pytest.mark.parametrize("method", ["hutchinson", "hutch++", "krylov", "xtrace"])

N = 120
SPECTRA = {
    "flat": linspace(1, 3, N),
    "polynomial": 1 / torch.arange(1, N + 1, dtype=torch.float64) ** 2,
    "exponential": 10 ** linspace(0, -8, N),
    "one spike": torch.cat([tensor(100), linspace(0, 1, N - 1)]),
    "near-cancelling": torch.cat([linspace(-2, -1, N // 2), linspace(1, 2.02, N // 2)]),
}


def exact(matrix: torch.Tensor) -> float:
    return float(matrix.double().diagonal().sum())


def inside(estimate: cv.Estimate, truth: float, level: float = 0.95) -> bool:
    low, high = estimate.interval(level)
    return bool(low <= truth <= high)


@pytest.mark.parametrize(
    "A, value",
    [
        (cv.Diagonal(tensor(1, -2, 4)), 3.0),
        (cv.Diagonal(torch.tensor([1e8, 1.0, -1e8])), 1.0),  # float32 entries, added in float64
        (cv.Dense(torch.arange(9.0).view(3, 3)), 12.0),  # not symmetric
        (cv.Identity(cv.Space(1000)), 1000.0),
    ],
    ids=["diagonal", "diagonal-float32", "dense", "identity"],
)
def test_structure_makes_the_trace_exact_and_free(A, value):
    estimate = cv.trace(A)
    assert float(estimate) == value and float(estimate.stderr) == 0
    assert (estimate.samples, estimate.dof, estimate.cost.products) == (0, 0, 0)
    assert [float(bound) for bound in estimate.interval()] == [value, value]


@pytest.mark.parametrize("products", [40, 41, 1000])
@METHODS
def test_as_many_products_as_rows_give_the_exact_trace(method, products):
    matrix = rotated(linspace(-1, 3, 40))
    estimate = cv.trace(free(matrix), products=products, method=method)
    assert float(estimate) == pytest.approx(exact(matrix), rel=1e-13)
    assert (estimate.cost.products, estimate.dof, estimate.samples, float(estimate.stderr)) == (40, 0, 0, 0)
    assert "(exact)" in str(estimate)


@METHODS
@pytest.mark.parametrize("name", SPECTRA)
def test_the_truth_is_in_the_wide_interval_and_the_interval_is_not_absurd(name, method):
    matrix = rotated(SPECTRA[name])
    frobenius = float(matrix.norm())
    for seed in range(10):
        estimate = cv.trace(free(matrix), products=33, method=method, seed=seed)
        assert inside(estimate, exact(matrix), 0.9999)
        assert float(estimate.stderr) < 3 * (2 / estimate.samples) ** 0.5 * frobenius
        assert estimate.cost.products == (32 if method == "xtrace" else 33)


def test_hutchinson_has_the_variance_of_the_formula():
    """One sample has variance 2 (|A|^2 - sum of squared diagonal entries); mean of 400 x 32 of them to 2 %."""
    matrix = rotated(torch.cat([tensor(5, -4), linspace(-1, 1, 38)]))
    variance = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())
    estimates = [cv.trace(free(matrix), products=32, method="hutchinson", seed=seed) for seed in range(400)]
    reported = torch.stack([e.stderr.square() for e in estimates]).mean() * 32
    assert float(reported) == pytest.approx(variance, rel=0.06)
    errors = torch.stack([e.value for e in estimates]) - exact(matrix)
    assert float(errors.square().mean()) * 32 == pytest.approx(variance, rel=0.2)
    assert abs(float(errors.mean())) < 4 * (variance / 32 / 400) ** 0.5


def test_hutchinson_is_exact_for_a_diagonal_matrix():
    entries = torch.randn(50, dtype=torch.float64)
    A = cv.MatrixFree(lambda rows: rows * entries, cv.Space(50, torch.float64))
    estimate = cv.trace(A, products=4, method="hutchinson")
    assert float(estimate) == pytest.approx(float(entries.sum()), abs=1e-13)
    assert float(estimate.stderr) < 1e-14


def test_hutchinson_halves_its_error_for_four_times_the_products():
    matrix = rotated(SPECTRA["near-cancelling"])
    few, many = (
        torch.tensor([float(cv.trace(free(matrix), products=k, method="hutchinson", seed=s).stderr) for s in range(40)])
        for k in (20, 80)
    )
    assert float(few.mean() / many.mean()) == pytest.approx(2, rel=0.1)


def coverage(name: str, method: str, *, products: int, seeds: int) -> float:
    matrix = rotated(SPECTRA[name])
    A = free(matrix)
    A.psd = method == "xnystrace"
    estimates = (cv.trace(A, products=products, method=method, seed=seed) for seed in range(seeds))
    return sum(inside(estimate, exact(matrix)) for estimate in estimates) / seeds


@METHODS
def test_the_95_percent_interval_holds_the_truth_as_often_as_it_says(method):
    assert 0.91 <= coverage("polynomial", method, products=32, seeds=200) <= 1


def test_hutch_plus_plus_is_far_better_when_few_eigenvalues_carry_the_trace():
    matrix = rotated(torch.cat([tensor(100, 50, 20, 10, -30), linspace(0, 1, N - 5)]))
    plain, deflated = (
        cv.trace(free(matrix), products=48, method=method, seed=1) for method in ("hutchinson", "hutch++")
    )
    assert float(deflated.stderr) < float(plain.stderr) / 10
    default = cv.trace(free(matrix), products=48, seed=1)
    assert default.stderr < deflated.stderr
    assert default.value == cv.trace(free(matrix), products=48, seed=1, method="krylov").value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("values", [(1,), (5, 3, -2, 0.1)], ids=["rank-one", "rank-four"])
def test_a_low_rank_operator_is_summed_to_rounding(values, dtype):
    """The sketch has the whole range: what is left is rounding, and `floor` covers that."""
    matrix = rotated(torch.cat([tensor(*values), torch.zeros(N - len(values), dtype=torch.float64)])).to(dtype)
    for seed in range(30):
        estimate = cv.trace(free(matrix), products=24, seed=seed)
        assert inside(estimate, exact(matrix))
        assert float(estimate.stderr) + estimate.floor < 100 * torch.finfo(dtype).eps * sum(map(abs, values))
        assert estimate.cost.products == 24  # what the sketch did not need went into samples


def test_the_zero_operator_has_trace_zero():
    estimate = cv.trace(free(torch.zeros(50, 50, dtype=torch.float64)), products=12)
    assert [float(x) for x in (estimate.value, estimate.stderr, estimate.floor)] == [0, 0, 0]


@METHODS
@pytest.mark.parametrize("products, deflated", [(2, 2), (3, 3), (4, 2), (5, 3), (6, 2)])
def test_few_products_leave_at_least_two_samples(method, products, deflated):
    matrix = rotated(SPECTRA["flat"])
    estimate = cv.trace(free(matrix), products=products, method=method)
    if method in ("hutchinson", "hutch++"):
        assert estimate.samples == (deflated if method == "hutch++" else products)
    assert estimate.samples >= 2 and 1 <= estimate.dof < estimate.samples
    assert estimate.cost.products == (max(4, products // 2 * 2) if method == "xtrace" else products)
    assert inside(estimate, exact(matrix), 0.9999)


@pytest.mark.parametrize("products", [6, 20, 33, 100])
def test_hutch_plus_plus_uses_all_its_products(products):
    estimate = cv.trace(free(rotated(SPECTRA["flat"])), products=products, method="hutch++")
    third = min(products // 3, (products - 2) // 2)
    assert (estimate.cost.products, estimate.samples) == (products, products - 2 * third)


@METHODS
def test_float32_agrees_with_float64_within_the_error_bar(method):
    matrix = rotated(SPECTRA["one spike"])
    low, high = (
        cv.trace(free(matrix.to(dtype)), products=30, method=method, seed=4) for dtype in (torch.float32, torch.float64)
    )
    assert low.value.dtype == low.stderr.dtype == torch.float64
    assert abs(float(low) - float(high)) < low.floor < 1e-3
    assert inside(low, exact(matrix), 0.9999)


def test_an_operator_that_is_not_symmetric_has_a_trace():
    matrix = rotated(SPECTRA["flat"])
    matrix = matrix + torch.triu(torch.randn(N, N, dtype=torch.float64))
    for method in ("hutchinson", "hutch++"):
        estimate = cv.trace(cv.MatrixFree(lambda rows: rows @ matrix.T, cv.Space(N, torch.float64)), method=method)
        assert inside(estimate, exact(matrix), 0.9999)


@METHODS
def test_the_estimate_scales_with_the_operator(method):
    matrix = rotated(SPECTRA["near-cancelling"])
    one = cv.trace(free(matrix), method=method)
    for scale in (2.0**40, 2.0**-40):
        other = cv.trace(free(matrix * scale), method=method)
        assert float(other) == pytest.approx(scale * float(one), rel=1e-12)
        assert float(other.stderr) == pytest.approx(scale * float(one.stderr), rel=1e-9)


@METHODS
def test_a_seed_gives_the_same_bits(method):
    A = free(rotated(SPECTRA["flat"]))
    first, again, other = (cv.trace(A, method=method, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.value, again.value) and torch.equal(first.stderr, again.stderr)
    assert not torch.equal(first.value, other.value)
    assert first.origin.seed == 3 and first.origin.options == {"products": 32, "method": method}


@METHODS
def test_an_interrupt_returns_the_mean_so_far(method):
    matrix = rotated(SPECTRA["flat"])
    A = free(matrix)
    A.function = Stopping({"hutch++": 8, "krylov": 31}.get(method, 3), A.function)
    with pytest.raises(cv.Interrupted) as stop:
        cv.trace(A, products=118, method=method)
    estimate = stop.value.result
    assert isinstance(stop.value, KeyboardInterrupt) and not estimate.complete
    assert 2 <= estimate.samples < 118 and 1 <= estimate.dof < estimate.samples
    assert inside(estimate, exact(matrix), 0.9999)


@METHODS
def test_an_interrupt_before_the_second_sample_has_nothing_to_return(method):
    A = free(rotated(SPECTRA["flat"]))
    A.function = Stopping(0, A.function)
    with pytest.raises(KeyboardInterrupt) as stop:
        cv.trace(A, products=60, method=method)
    assert not isinstance(stop.value, cv.Interrupted)


@pytest.mark.parametrize("after", [0, 1, 2])
@METHODS
def test_nan_is_refused_whenever_it_comes(method, after):
    matrix, calls = rotated(SPECTRA["flat"]), []

    def product(rows):
        calls.append(len(rows))
        return rows @ matrix * (float("nan") if len(calls) > after else 1.0)

    A = cv.MatrixFree(product, cv.Space(N, torch.float64), symmetric=True)
    with pytest.raises(cv.NonFinite, match="entries that are not finite"):
        cv.trace(A, products=100, method=method)


@pytest.mark.parametrize("products", [32, 1000])
@METHODS
def test_progress_counts_every_product_up_to_the_last(method, products):
    seen: list[cv.Progress] = []
    estimate = cv.trace(
        free(rotated(SPECTRA["flat"])), products=products, method=method, run=cv.Run(progress=seen.append)
    )
    done = [progress.done for progress in seen]
    assert done == sorted(done) and done[0] <= 32
    assert done[-1] == seen[-1].total == estimate.cost.products == min(products, N)
    assert {(progress.question, progress.unit) for progress in seen} == {("trace", "products")}
    assert seen[-1].left == 0 and all(progress.left > 0 for progress in seen[:-1])
    if estimate.dof:
        assert seen[-1].note == f"trace {with_error(float(estimate), float(estimate.stderr), estimate.dof)}"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"products": 1}, "An error bar needs at least 2 products, but got products=1."),
        ({"products": 0}, "An error bar needs at least 2 products, but got products=0."),
        ({"method": "lanczos"}, r"method is one of auto, krylov, .*, but got 'lanczos'."),
    ],
)
def test_options_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cv.trace(free(rotated(SPECTRA["flat"])), **options)


def test_xnystrace_is_for_psd_matrices():
    matrix = rotated(SPECTRA["polynomial"])
    A = free(matrix)
    with pytest.raises(ValueError, match="xnystrace is for positive semidefinite matrices"):
        cv.trace(A, method="xnystrace")
    A.psd = True
    for seed in range(10):
        estimate = cv.trace(A, products=24, method="xnystrace", seed=seed)
        assert inside(estimate, exact(matrix), 0.9999) and estimate.cost.products == estimate.samples == 24
    liar = free(rotated(SPECTRA["near-cancelling"]))
    liar.psd = True
    with pytest.raises(ValueError, match="says that it is psd, but is not"):
        cv.trace(liar, method="xnystrace")


@pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
def test_exchangeable_estimates_are_those_of_their_definition(method):
    """Each vector left out of the sketch in turn, the obvious way."""
    matrix = rotated(SPECTRA["exponential"])
    A = free(matrix)
    A.psd, n = True, N
    count = 8
    probes = A.domain.draw(count, seed=5, kind="sphere")
    values = []
    for left in range(count):
        rest = torch.cat([probes[:left], probes[left + 1 :]])
        z = probes[left]
        if method == "xtrace":
            Q = torch.linalg.qr((rest @ matrix).T)[0]
            outside = z - Q @ (Q.T @ z)
            scale = (n - count + 1) / (outside @ outside)
            values.append((Q.T @ matrix @ Q).trace() + scale * (outside @ matrix @ outside))
        else:
            Y = rest @ matrix
            nystrom = Y.T @ torch.linalg.solve(rest @ Y.T, Y)
            along = z - rest.T @ torch.linalg.lstsq(rest.T, z).solution
            scale = (n - count + 1) / (along @ along)
            values.append(nystrom.trace() + scale * (z @ (matrix - nystrom) @ z))
    estimate = cv.trace(A, products=count * (2 if method == "xtrace" else 1), method=method, seed=5)
    expected = torch.stack(values)
    inflation = 2.0 if method == "xtrace" else 1.85 + 1.7 * count / n
    assert float(estimate) == pytest.approx(float(expected.mean()), rel=1e-6)
    assert float(estimate.stderr) == pytest.approx(inflation * float(expected.std()) / count**0.5, rel=1e-4)


def test_krylov_is_the_trace_on_its_space_and_a_mean_over_the_rest():
    matrix = rotated(SPECTRA["exponential"])
    estimate = cv.trace(free(matrix), products=24, seed=3, method="krylov")
    space = cv.Space(N, torch.float64)
    rows = space.draw(2, seed=derived(3), kind="sphere")
    Q = torch.zeros(N, 0, dtype=torch.float64)
    for _ in range(6):
        Q = torch.linalg.qr(torch.cat([Q, rows.T], dim=1))[0]
        rows = Q[:, -2:].T @ matrix
    probes = space.draw(12, seed=3)
    probes = probes - probes @ Q @ Q.T
    forms = ((probes @ matrix) * probes).sum(1)
    assert float(estimate) == pytest.approx(float((Q.T @ matrix @ Q).trace() + forms.mean()), rel=1e-9)
    assert float(estimate.stderr) == pytest.approx(float(forms.std()) / 12**0.5, rel=1e-6)
    assert (estimate.samples, estimate.dof) == (12, pytest.approx(11 / 3))


@pytest.mark.parametrize("method", ["krylov", "hutch++", "hutchinson", "xtrace"])
def test_a_tolerance_is_reached_and_said_to_be(method):
    matrix = rotated(SPECTRA["polynomial"])
    truth = exact(matrix)
    estimate = cv.trace(free(matrix), rtol=0.2, method=method, seed=2)
    low, high = (float(bound) for bound in estimate.interval())
    assert estimate.converged and (high - low) / 2 <= 0.2 * truth * 1.05 and abs(float(estimate) - truth) < 0.2 * truth
    assert estimate.cost.products >= 24 and ("reached" in str(estimate) or estimate.dof == 0)
    tight = cv.trace(free(matrix), atol=1e-3, method=method, max_products=60, seed=2)
    low, high = (float(bound) for bound in tight.interval())
    assert tight.cost.products <= 60 and tight.converged is ((high - low) / 2 <= 1e-3)
    assert cv.trace(free(matrix), products=30, method=method).converged is None


def test_a_tolerance_that_needs_all_products_gives_the_exact_trace():
    matrix = rotated(SPECTRA["flat"])
    estimate = cv.trace(free(matrix), rtol=1e-9)
    assert estimate.converged and estimate.dof == 0 and float(estimate) == pytest.approx(exact(matrix), rel=1e-12)


def test_time_is_a_limit_too():
    estimate = cv.trace(free(rotated(SPECTRA["near-cancelling"])), rtol=1e-3, max_seconds=1e-9)
    assert estimate.converged is False and estimate.cost.products == 24


@pytest.mark.parametrize("method", ["krylov", "hutch++"])
def test_what_grows_with_the_budget_costs_no_product_twice(method):
    """An estimate that was looked at on the way is the one of its last look."""
    matrix = rotated(SPECTRA["exponential"])
    grown = cv.trace(free(matrix), atol=1e-12, max_products=54, method=method, seed=1)
    assert grown.cost.products == 54
    assert inside(grown, exact(matrix), 0.999)
    fixed = cv.trace(free(matrix), products=54, method=method, seed=1)
    if method == "krylov":  # the same space and the same vectors, projected in another order
        assert float(grown) == pytest.approx(float(fixed), rel=1e-6)


def test_a_control_variate_takes_away_what_it_has_in_common():
    matrix = rotated(torch.cat([linspace(5, 20, 60), linspace(0, 1, 60)]))
    control = cv.Dense(matrix + 0.05 * rotated(linspace(-1, 1, N), seed=7), psd=True)
    truth = exact(matrix)
    for method in ("hutchinson", "krylov", "hutch++"):
        plain = cv.trace(free(matrix), products=40, method=method, seed=4)
        helped = cv.trace(free(matrix), products=40, method=method, seed=4, control=control)
        assert float(helped.stderr) < float(plain.stderr) / 20
        assert inside(helped, truth, 0.9999) and helped.cost.products == 40
    hits = sum(
        inside(cv.trace(free(matrix), products=24, seed=s, method="hutchinson", control=control), truth)
        for s in range(200)
    )
    assert hits / 200 >= 0.91
    useless = cv.Dense(torch.eye(N, dtype=torch.float64), psd=True)
    assert inside(cv.trace(free(matrix), control=useless), truth, 0.9999)


def test_the_mean_of_controlled_samples_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    control = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    samples = 3 + control.exp() - torch.e**0.5  # a nonlinear relation: any slope from all samples would be biased
    means = torch.stack([controlled(s, c).mean() for s, c in zip(samples, control, strict=True)])
    assert abs(float(means.mean()) - 3) < 4 * float(means.std()) / 4000**0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"control": free(torch.eye(N, dtype=torch.float64))}, "A control variate needs an exact trace"),
        ({"control": cv.Identity(cv.Space(N, torch.float64)), "method": "xtrace"}, "xtrace takes no control variate"),
        ({"rtol": -1.0}, "rtol is a positive number, but got -1.0"),
        ({"rtol": 0.1, "level": 2}, "A confidence level lies between 0 and 1"),
        ({"rtol": 0.1, "max_products": 1}, "An error bar needs at least 2 products, but got max_products=1"),
        ({"rtol": 0.1, "max_seconds": 0}, "max_seconds is a positive number"),
    ],
)
def test_goals_and_controls_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cv.trace(free(rotated(SPECTRA["flat"])), **options)


def test_the_vectors_of_basis_and_probes_have_nothing_in_common():
    """torch's generators read 32 bits of a seed: an offset beyond them would give the same numbers."""
    space = cv.Space(1000, torch.float64)
    for seed in (0, 1, 2**40):
        first, second = space.draw(1, seed=seed), space.draw(1, seed=derived(seed))
        assert abs(float(space.inner(first, second))) < 5 * 1000**0.5


@pytest.mark.parametrize("method", ["krylov", "hutch++"])
def test_where_memory_ends_the_rest_is_averaged(monkeypatch, method):
    """The basis stops growing, what was found stays, and the estimate goes on with what needs no memory."""
    matrix = rotated(SPECTRA["exponential"])
    bytes_of_row = N * 8
    free_rows = 60
    monkeypatch.setattr("curvature.linalg.memory.free_bytes", lambda device: free_rows * bytes_of_row)
    estimate = cv.trace(free(matrix), atol=1e-9, max_products=110, method=method, seed=1)
    assert estimate.cost.products == 110 and inside(estimate, exact(matrix), 0.999)
    assert estimate.samples > 110 * (1 / 3 if method == "hutch++" else 1 / 2) + 5
    monkeypatch.setattr("curvature.linalg.memory.free_bytes", lambda device: 3 * bytes_of_row)
    with pytest.raises(cv.TooLarge):
        cv.trace(free(matrix), atol=1e-9, method=method)


SPIKED = torch.cat([linspace(20, 100, 8), linspace(0.1, 1, 192)])


@pytest.mark.parametrize("max_steps", [3, 200], ids=["rough", "converged"])
def test_known_eigenpairs_take_their_share_of_the_variance_and_leave_the_mean(max_steps):
    A, truth = free(rotated(SPIKED)), float(SPIKED.sum())
    pairs = cv.eigsh(A, 8, max_steps=max_steps)
    deflated = [cv.trace(A, products=24, seed=seed, deflate=pairs) for seed in range(150)]
    plain = [cv.trace(A, products=24, seed=seed, method="hutchinson") for seed in range(150)]
    errors, others = (torch.tensor([float(e) - truth for e in some]) for some in (deflated, plain))
    assert errors.std() < others.std() / 5
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / 150**0.5
    assert sum(inside(e, truth) for e in deflated) / 150 >= 0.9
    assert all((e.cost.products, e.samples) == (24, 23) for e in deflated)  # one tells that they are its pairs
    assert cv.trace(A, rtol=0.02, deflate=pairs).converged


def test_pairs_of_another_matrix_are_found_out_and_do_no_harm():
    pairs, A, truth = cv.eigsh(free(rotated(SPIKED)), 5), free(3 * rotated(SPIKED)), 3 * float(SPIKED.sum())
    estimates = [cv.trace(A, products=40, seed=seed, deflate=pairs) for seed in range(20)]
    assert all(inside(e, truth, 0.9999) for e in estimates)
    assert all((e.cost.products, e.samples) == (40, 34) for e in estimates)


def test_pairs_that_cannot_be_those_of_the_matrix_are_refused():
    A = free(rotated(SPIKED))
    pairs = cv.eigsh(A, 2)
    with pytest.raises(ValueError, match="Eigenvectors of 200 entries do not fit"):
        cv.trace(free(rotated(SPIKED[:50])), products=8, deflate=pairs)
    with pytest.raises(ValueError, match="not orthonormal"):
        cv.trace(A, deflate=replace(pairs, vectors=pairs.vectors * 2))
    with pytest.raises(ValueError, match=r"xtrace of .* takes no eigenpairs. Take 'auto'"):
        cv.trace(A, deflate=pairs, method="xtrace")
