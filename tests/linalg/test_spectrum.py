"""The eigenvalue distribution: quadrature to its degree, masses without bias, error bars that hold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from matrices import Stopping, free, linspace, rotated, scaling, tensor

import curvature as cv
from curvature.linalg.krylov import Krylov
from curvature.linalg.measurement import Measurement
from curvature.linalg.spectrum import percent, signed_log
from curvature.result import student_quantile

FIGURES = Path(__file__).parents[2] / "benchmarks" / "results" / "density_coverage.json"


def copies(value: float, count: int) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.float64)


def power(values: torch.Tensor, p: int) -> torch.Tensor:
    return values.unsqueeze(0) ** torch.arange(p).unsqueeze(1)


# ---------------------------------------------------------------------------------------- the quadrature of every probe


def quadrature(A: cv.LinearOperator, starts: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ritz values, and the components (p, d) of the start vectors along the Ritz vectors: no mass is corrected."""
    krylov = Krylov(Measurement(A, "test", options={}), capacity=min(len(starts) * steps, A.shape[0]))
    krylov.start(starts)
    for step in range(steps):
        if not krylov.step() or step == steps - 1 or not krylov.extend():
            break
    values, vectors = torch.linalg.eigh(krylov.projected)
    width = min(len(starts), A.shape[0])
    return values, A.domain.inner(starts, krylov.basis[:width]) @ vectors[:width]


@pytest.mark.parametrize("probes", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_moments_are_exact_to_degree_twice_the_steps_minus_one(steps, probes):
    """u.A^p v for all pairs of start vectors, and not one degree more."""
    matrix = rotated(linspace(-1, 1, 80))
    starts = cv.Space(80, torch.float64).draw(probes, seed=3, kind="sphere")
    nodes, components = quadrature(free(matrix), starts, steps)
    assert len(nodes) == probes * steps
    image = starts.clone()
    for p in range(2 * steps + 1):
        found, true = (components * nodes**p) @ components.T, starts @ image.T
        if p < 2 * steps:
            torch.testing.assert_close(found, true, rtol=0, atol=1e-12 * 80)
        else:
            assert float((found - true).diagonal().abs().min()) > 1e-8 * 80
        image = image @ matrix


def test_block_multiplicities_of_the_method_sheet():
    """n = 40, eigenvalues 1, 2, 5, 7 ten times each, 3 probes: each value three times, exp(-A) exact (sheet, A9)."""
    values = torch.cat([copies(v, 10) for v in (1, 2, 5, 7)])
    A = scaling(values)
    starts = A.domain.draw(3, seed=0, kind="sphere")
    nodes, components = quadrature(A, starts, 10)
    torch.testing.assert_close(nodes, tensor(1, 2, 5, 7).repeat_interleave(3), rtol=1e-12, atol=0)
    exact = (starts * torch.exp(-values)) @ starts.T
    torch.testing.assert_close((components * torch.exp(-nodes)) @ components.T, exact, rtol=0, atol=1e-12)
    density = cv.spectral_density(A, probes=3, steps=10)
    assert density.steps == 4 and not density.single.any() and density.cost.products == 12


@pytest.mark.parametrize("probes", [2, 3, 8])
def test_a_breakdown_ends_the_run_with_the_exact_eigenvalues(probes):
    """Seven distinct eigenvalues, twenty copies each: seven steps (sheet, A9)."""
    values = tensor(0, 1, 5, 6, 7, 8, 9)
    for seed in range(5):
        density = cv.spectral_density(scaling(values.repeat_interleave(20)), probes=probes, steps=30, seed=seed)
        seen = density.weights.mean(0) > 1e-12  # rounding may bring in directions that no probe has
        torch.testing.assert_close(density.nodes[seen], values.repeat_interleave(probes), rtol=0, atol=1e-11)
        shares = density.cdf(values + 0.5)
        low, high = shares.interval(0.9999)
        truth = torch.arange(1, 8, dtype=torch.float64) / 7
        assert ((low <= truth) & (truth <= high)).all()
        if density.cost.products == 7 * probes:
            assert density.steps == 7 and density.complete


# --------------------------------------------------------------------------------------------- known distributions


@pytest.fixture(scope="module")
def wigner() -> torch.Tensor:
    n = 900
    entries = torch.randn(n, n, generator=torch.Generator().manual_seed(987_654_321), dtype=torch.float64)
    return (entries + entries.T) / (2 * n) ** 0.5


def semicircle(x: torch.Tensor, radius: float = 2.0) -> torch.Tensor:
    x = x.clamp(-radius, radius)
    return 0.5 + x * (radius**2 - x**2).sqrt() / (math.pi * radius**2) + (x / radius).asin() / math.pi


def test_wigner_matrix_has_the_moments_and_the_law_of_the_semicircle(wigner):
    density = cv.spectral_density(free(wigner), probes=8, steps=40)
    moments = density.mean(lambda t: torch.stack([t**2, t**4, t**6]))
    exact = torch.stack([torch.linalg.eigvalsh(wigner) ** p for p in (2, 4, 6)]).mean(1)
    torch.testing.assert_close(exact, tensor(1, 2, 5), rtol=0.02, atol=0)
    low, high = moments.interval(0.9999)
    assert ((low <= exact) & (exact <= high)).all() and (moments.stderr / exact < 0.03).all()
    grid = linspace(-2.5, 2.5, 2001)
    assert float((density.cdf(grid).value - semicircle(grid)).abs().max()) < 0.03
    assert len(density.outliers) == 0
    assert float(density.negative.value) == pytest.approx(0.5, abs=0.03)


def test_low_rank_has_its_zero_mass_exactly():
    """All 20 other eigenvalues converge and are counted: what is left is 0.9, without an error bar."""
    density = cv.spectral_density(free(rotated(torch.cat([torch.zeros(180).double(), linspace(1, 3, 20)]))), steps=10)
    share = density.cdf(tensor(0.5))
    assert float(share.value[0]) == pytest.approx(0.9, abs=1e-14) and float(share.stderr[0]) < 1e-15
    assert int(density.single.sum()) == 20
    torch.testing.assert_close(density.nodes[density.single], linspace(1, 3, 20), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("steps", [5, 20, 60])
def test_a_positive_semidefinite_operator_has_no_negative_share(steps, dtype):
    """Its zero eigenvalues come out as rounding of either sign, within the noise floor."""
    values = torch.cat([torch.zeros(150, dtype=torch.float64), 10 ** linspace(-3, 2, 50)])
    matrix = rotated(values).to(dtype)
    factor = (rotated(values.sqrt())).to(dtype)
    gram = cv.MatrixFree(lambda rows: (rows @ factor) @ factor, cv.Space(200, dtype), symmetric=True)
    for seed in range(6):
        for A in (free(matrix), gram):
            density = cv.spectral_density(A, steps=steps, seed=seed)
            assert float(density.negative.value) == 0
            assert percent(density.negative).startswith("none")


@pytest.mark.parametrize("probes, steps", [(2, 50), (8, 13), (8, 80), (50, 2), (150, 1), (99, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_complete_basis_gives_the_exact_spectrum(probes, steps, dtype):
    values = linspace(-1, 2, 100)
    density = cv.spectral_density(free(rotated(values).to(dtype)), probes=probes, steps=steps)
    eps = torch.finfo(dtype).eps
    assert density.single.all() and len(density.nodes) == density.size == 100
    torch.testing.assert_close(density.nodes, values, rtol=0, atol=20 * eps)
    assert torch.equal(density.weights, torch.full((probes, 100), 0.01, dtype=torch.float64))
    trace = density.mean(lambda t: 100 * t)
    assert float(trace.value) == pytest.approx(float(values.sum()), abs=2000 * eps)
    assert (float(trace.stderr), trace.samples, trace.dof) == (0, 0, 0) and "(exact)" in str(trace)
    assert float(density.negative.value) == pytest.approx(float((values < 0).double().mean()), abs=1e-12)
    quantiles = [density.quantile(share) for share in (0, 0.005, 0.01, 0.5, 0.505, 1)]
    torch.testing.assert_close(tensor(*quantiles), values[[0, 0, 0, 49, 50, 99]], rtol=0, atol=20 * eps)


def test_one_by_one_and_zero():
    one = cv.spectral_density(scaling(tensor(-3)))
    assert (one.nodes.tolist(), one.single.tolist(), one.steps) == ([-3.0], [True], 1)
    assert float(one.mean(lambda t: t).value) == -3 and float(one.negative.value) == 1
    zero = cv.spectral_density(scaling(torch.zeros(40, dtype=torch.float64)), probes=3)
    assert float(zero.nodes.abs().max()) == 0 and zero.cost.products == 3 and zero.steps == 1
    assert torch.isfinite(zero.density(linspace(-1, 1, 5)).value).all()
    assert float(zero.negative.value) == 0 and len(zero.outliers) == 0 and "none" in str(zero)


# --------------------------------------------------------------------------------------------- masses without bias

BIAS = {
    "bulk": linspace(1, 3, 120),
    "spikes": torch.cat([tensor(50, 20, 10, 5), linspace(0.001, 1, 116)]),
    "twice": torch.cat([copies(5, 2), linspace(0, 1, 118)]),
    "three times": torch.cat([copies(5, 3), linspace(0, 1, 117)]),
    "three times, often": torch.cat([copies(v, 3) for v in (3, 4, 5, 6)] + [linspace(-1, 1, 108)]),
    "eight times": torch.cat([copies(5, 8), copies(-2, 8), linspace(0, 1, 104)]),
    "twenty times": torch.cat([copies(5, 20), copies(3, 20), linspace(0, 1, 80)]),
    "tight cluster": torch.cat([5 + 1e-8 * torch.arange(20), linspace(0, 1, 100)]),
    "cluster": torch.cat([5 + 1e-3 * torch.arange(20), linspace(0, 1, 100)]),
    "polynomial": 1 / torch.arange(1, 121, dtype=torch.float64) ** 2,
    "exponential": 10 ** linspace(-8, 2, 120),
    "low rank": torch.cat([torch.zeros(70, dtype=torch.float64), linspace(1, 3, 50)]),
}


def gaps(values: torch.Tensor) -> torch.Tensor:
    """The middles of the gaps that four steps and more resolve: wider than a fifth of the whole range."""
    values = values.sort().values
    wide = values.diff() > 0.2 * float(values[-1] - values[0])
    return ((values[1:] + values[:-1]) / 2)[wide]


def bias(values: torch.Tensor, *, probes: int, steps: int, seeds: int) -> torch.Tensor:
    """Mean minus truth, in standard errors of the mean over seeds, of t, t^2 and the shares below wide gaps."""
    A, points = scaling(values), gaps(values.double())

    def figures(cdf, mean):
        moments = [mean(lambda t: t).reshape(1), mean(lambda t: t**2).reshape(1)]
        return torch.cat([*moments, cdf(points)] if len(points) else moments)

    truth = figures(lambda p: (values.double() <= p.unsqueeze(1)).double().mean(1), lambda f: f(values.double()).mean())
    densities = (cv.spectral_density(A, probes=probes, steps=steps, seed=seed) for seed in range(seeds))
    found = torch.stack([figures(lambda p, d=d: d.cdf(p).value, lambda f, d=d: d.mean(f).value) for d in densities])
    rounding = max(1e-9, 10 * torch.finfo(values.dtype).eps)  # by which a figure that is exact is off
    error = found.std(0) / seeds**0.5 + rounding * truth.abs()
    return (found.mean(0) - truth) / error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["twice", "three times", "eight times", "twenty times", "cluster", "polynomial"])
def test_counting_eigenvalues_does_not_bias_anything(name):
    """In the steps where eigenvalues begin to be counted: judged by their residual alone, this was off by 18."""
    assert float(bias(BIAS[name], probes=4, steps=7, seeds=200).abs().max()) < 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("probes, steps", [(2, 12), (4, 7), (4, 20), (8, 6), (8, 12)])
def test_counting_eigenvalues_does_not_bias_anything_at_length(probes, steps, dtype):
    table = {name: bias(v.to(dtype), probes=probes, steps=steps, seeds=300).abs().max() for name, v in BIAS.items()}
    print(probes, steps, dtype, {name: round(float(worst), 1) for name, worst in table.items()})  # noqa: T201
    worst = max(float(z) for z in table.values())
    assert worst < 4.2, table  # of some 40 figures; float32 cannot have the tails of polynomial spectra to more


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "multiplicity, counted", [(1, True), (2, True), (3, True), (4, False), (5, False), (20, False)]
)
def test_eigenvalues_are_counted_when_the_block_is_wider_than_their_multiplicity(multiplicity, counted, dtype):
    values = torch.cat([copies(5, multiplicity), linspace(0, 1, 200)]).to(dtype)
    for seed in range(5):
        density = cv.spectral_density(scaling(values), probes=4, steps=14, seed=seed)
        near = (density.nodes - 5).abs() < 1e-3
        assert bool(density.single[near].all()) == bool(density.single[near].any()) == counted
        if counted:
            assert int(near.sum()) == multiplicity
            share = density.cdf(tensor(3))
            assert float(share.value[0]) == pytest.approx(1 - multiplicity / len(values), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("probes, steps", [(2, 150), (4, 75)])
def test_the_edge_of_a_dense_bulk_is_not_counted(probes, steps, dtype):
    """Spaced closer than residuals resolve, many eigenvalues look like one; its mass is not 1/size."""
    values = linspace(1, 3, 4000).to(dtype)
    density = cv.spectral_density(scaling(values), probes=probes, steps=steps)
    assert not density.single.any() and len(density.outliers) == 0


# --------------------------------------------------------------------------------------------- error bars that hold


def covered(values: torch.Tensor, points: torch.Tensor, *, probes: int, steps: int, seeds: int):
    """How often the truth is in the 95 % interval of the shares below `points`, and in that of probes alone."""
    truth = (values <= points.unsqueeze(1)).double().mean(1)
    whole, alone = torch.zeros(len(points)), torch.zeros(len(points))
    for seed in range(seeds):
        share = cv.spectral_density(scaling(values), probes=probes, steps=steps, seed=seed).cdf(points)
        low, high = share.interval()
        whole += (low <= truth) & (truth <= high)
        alone += (share.value - truth).abs() <= share.stderr * student_quantile(0.95, share.dof) + 1e-12
    return whole / seeds, alone / seeds


def test_the_error_bar_of_a_resolved_share_is_that_of_the_probes():
    """Groups of eigenvalues with gaps between: no node stands for both sides, `floor` is nothing."""
    values = torch.cat([linspace(0, 0.3, 100), linspace(1, 1.3, 60), linspace(2, 2.3, 40)])
    points = tensor(0.65, 1.65)
    whole, alone = covered(values, points, probes=8, steps=12, seeds=300)
    assert ((alone >= 0.90) & (alone <= 0.99)).all()
    assert ((whole >= 0.90) & (whole <= 0.99)).all()
    assert float(cv.spectral_density(scaling(values), steps=12).cdf(points).floor.max()) < 1e-2


def test_the_error_bar_of_a_mean_holds():
    values = BIAS["spikes"]
    hits = torch.zeros(2)
    truth = torch.stack([values.mean(), values.square().mean()])
    for seed in range(300):
        density = cv.spectral_density(scaling(values), probes=8, steps=8, seed=seed)
        low, high = density.mean(lambda t: torch.stack([t, t**2])).interval()
        hits += (low <= truth) & (truth <= high)
    assert (hits / 300 >= 0.90).all() and (hits / 300 <= 0.99).all()


BULKS = {
    "uniform": linspace(1, 3, 3000),
    "cubes": linspace(-1, 2, 3000) ** 3,  # dense around zero
    "semicircle": 2 * torch.sin(linspace(-1, 1, 3000) * math.pi / 2),  # arcsine: dense at the ends
    "network": torch.cat([linspace(1, 10, 10), 0.02 * torch.erfinv(linspace(-0.9995, 0.9995, 2990)) * 2**0.5]),
    "exponential": 10 ** linspace(-8, 2, 300),
}


def inner_points(values: torch.Tensor) -> torch.Tensor:
    values = values.sort().values
    place = (tensor(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95) * len(values)).long()
    return (values[place] + values[place + 1]) / 2


@pytest.mark.parametrize("probes, steps", [(4, 10), (8, 20)])
@pytest.mark.parametrize("name", BULKS)
def test_the_interval_of_a_share_in_the_bulk_counts_in_the_resolution(name, probes, steps):
    """With few steps the staircase is off by more than probes show; then `floor` has to cover it."""
    whole, alone = covered(BULKS[name], inner_points(BULKS[name]), probes=probes, steps=steps, seeds=20)
    assert float(whole.mean()) >= 0.97 and float(whole.min()) >= 0.85
    if name in ("uniform", "cubes", "exponential"):
        assert float(alone.mean()) < 0.6  # by itself it would not do


@pytest.mark.slow
def test_coverage_table_of_shares():
    table = {}
    for name, values in BULKS.items():
        for probes, steps in ((4, 10), (8, 20), (8, 40)):
            if probes * steps >= len(values):
                continue
            whole, alone = covered(values, inner_points(values), probes=probes, steps=steps, seeds=100)
            table[f"{name}, {probes} x {steps}"] = {
                "interval, mean": round(float(whole.mean()), 3),
                "interval, worst point": round(float(whole.min()), 3),
                "probes alone, mean": round(float(alone.mean()), 3),
                "probes alone, worst point": round(float(alone.min()), 3),
            }
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    FIGURES.write_text(json.dumps({"level": 0.95, "seeds": 100, "coverage": table}, indent=1))
    print(json.dumps(table, indent=1))  # noqa: T201
    assert min(row["interval, worst point"] for row in table.values()) >= 0.88


# --------------------------------------------------------------------------------------------- what is read off


def test_quantiles_are_those_of_the_eigenvalues():
    values = linspace(0, 1, 1000) ** 2
    density = cv.spectral_density(scaling(values), probes=8, steps=40)
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert density.quantile(share) == pytest.approx(share**2, abs=0.03)
    assert density.quantile(0) == float(density.nodes[0]) and density.quantile(1) == float(density.nodes[-1])
    with pytest.raises(ValueError, match=r"A share lies between 0 and 1, but got 1.5"):
        density.quantile(1.5)


def test_the_negative_share_is_that_of_the_eigenvalues():
    values = torch.cat([linspace(-3, -1, 60), linspace(0.5, 2, 140)])
    negative = cv.spectral_density(scaling(values), steps=20).negative
    low, high = negative.interval(0.9999)
    assert low <= 0.3 <= high and float(negative.stderr) < 0.03 and float(negative.floor) < 1e-3
    assert percent(negative) == f"{100 * float(negative.value):.3g} % ± {100 * float(negative.stderr):.2g} %"


@pytest.mark.parametrize(
    "outliers",
    [
        (),
        (9.0,),
        (9.0, 8.9),
        (9.0, 9.0),
        (9.0, 9.0, 9.0, 4.0),
        (-9.0,),
        (9.0, 8.9, -5.0, -4.95),
        (100.0, 50.0, 20.0, 10.0, 5.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_outliers_are_the_counted_eigenvalues_beyond_the_bulk(outliers, dtype):
    values = torch.cat([torch.tensor(outliers, dtype=torch.float64), linspace(-1, 1, 400)]).to(dtype)
    density = cv.spectral_density(scaling(values), steps=30)
    torch.testing.assert_close(density.outliers, tensor(*sorted(outliers)), rtol=1e-6, atol=0)
    assert (density.weights[:, density.alone] == 1 / len(values)).all()


def test_the_density_integrates_to_the_share_of_the_bulk():
    values = torch.cat([tensor(100, 50, -60), linspace(-1, 1, 300)])
    density = cv.spectral_density(scaling(values), probes=4, steps=20)
    unit = density.unit
    assert unit == pytest.approx(1e-4 * 100)
    s = linspace(-6, 6, 40_001)
    points = s.sign() * unit * (10 ** s.abs() - 1)
    torch.testing.assert_close(signed_log(points, unit), s, rtol=0, atol=1e-12)
    estimate = density.density(points)
    mass = torch.trapezoid(estimate.value, s)
    assert float(mass) == pytest.approx(300 / 303, abs=1e-6)
    assert (estimate.value >= 0).all() and (estimate.stderr >= 0).all()


@pytest.mark.parametrize("scale", [1e6, 1e-6, -1.0])
def test_the_scale_of_the_operator_does_not_matter(scale):
    values = torch.cat([tensor(10, 5, 5), linspace(-1, 1, 200)])
    matrix = rotated(values)
    one, other = (cv.spectral_density(free(m), probes=4, steps=16) for m in (matrix, matrix * scale))
    if scale < 0:
        nodes, weights, single = other.nodes.flip(0), other.weights.flip(1), other.single.flip(0)
    else:
        nodes, weights, single = other.nodes, other.weights, other.single
    torch.testing.assert_close(nodes / scale, one.nodes, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights, one.weights, rtol=1e-6, atol=1e-10)
    assert torch.equal(single, one.single) and int(single.sum()) >= 3
    torch.testing.assert_close(
        other.negative.value, one.cdf(tensor(0)).value[0] if scale > 0 else 1 - one.cdf(tensor(0)).value[0]
    )


def test_float32_products_give_the_float64_spectrum_to_their_floor():
    values = torch.cat([tensor(100, 50, 20), linspace(0, 1, 297)])
    matrix = rotated(values)
    high, low = (cv.spectral_density(free(matrix.to(d)), steps=12, seed=2) for d in (torch.float64, torch.float32))
    assert low.nodes.dtype == low.weights.dtype == torch.float64
    assert 99 * 2**-23 <= low.floor < 1e-3 and high.floor < 1e-11
    torch.testing.assert_close(low.outliers, high.outliers, rtol=1e-6, atol=0)
    for function in (lambda t: t, lambda t: t**2, lambda t: torch.exp(-t)):
        assert float(low.mean(function).value) == pytest.approx(float(high.mean(function).value), rel=1e-4)


def test_a_seed_gives_the_same_bits_and_fewer_steps_the_same_moments():
    A = free(rotated(linspace(-1, 2, 200)))
    first, again, other = (cv.spectral_density(A, probes=3, steps=10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.nodes, again.nodes) and torch.equal(first.weights, again.weights)
    assert not torch.equal(first.nodes, other.nodes)
    fewer = cv.spectral_density(A, probes=3, steps=5, seed=1)
    moments = [d.mean(lambda t: power(t, 10)).value for d in (first, fewer)]
    torch.testing.assert_close(*moments, rtol=1e-10, atol=1e-12)
    assert first.origin.options == {"probes": 3, "steps": 10, "keep": "device"} and first.origin.seed == 1


def test_weights_of_every_probe_sum_to_one():
    for name, values in BIAS.items():
        weights = cv.spectral_density(scaling(values), probes=3, steps=9).weights
        torch.testing.assert_close(weights.sum(1), torch.ones(3).double(), rtol=1e-12, atol=0, msg=name)
        assert (weights >= 0).all()


# --------------------------------------------------------------------------------------------- interrupts and refusals


@pytest.mark.parametrize("after", [1, 2, 7])
def test_an_interrupt_returns_the_density_so_far(after):
    values = linspace(-1, 2, 200)
    A = free(rotated(values))
    whole = cv.spectral_density(A, probes=4, steps=after)
    A.function = Stopping(after, A.function)
    with pytest.raises(cv.Interrupted) as stop:
        cv.spectral_density(A, probes=4, steps=30)
    part = stop.value.result
    assert not part.complete and whole.complete and part.steps == after and "(interrupted)" in str(part)
    assert torch.equal(part.nodes, whole.nodes) and torch.equal(part.weights, whole.weights)


@pytest.mark.parametrize("top", [50.0, 1.3])  # apart from the bulk; not
def test_the_ends_are_called_converged_where_they_are_the_extreme_eigenvalues(top):
    values = torch.cat([linspace(-1, 1, 300), tensor(top)])
    seen = set()
    for steps in range(1, 30):
        found = cv.spectral_density(free(rotated(values)), probes=2, steps=steps)
        for end, truth, name in zip(found.ends, (-1, top), ("lambda_min", "lambda_max"), strict=True):
            seen.add(end.converged)
            assert not end.converged or abs(end.value - truth) <= 0.02 * top
            assert found.quantities()[name] == end
        told = found.summary()["eigenvalues"]
        assert told.count("(not converged)") == sum(not end.converged for end in found.ends)
    assert seen == {True, False}


def test_an_interrupt_before_the_first_product_has_nothing_to_return():
    A = free(rotated(linspace(-1, 2, 50)))
    A.function = Stopping(0, A.function)
    with pytest.raises(KeyboardInterrupt) as stop:
        cv.spectral_density(A)
    assert not isinstance(stop.value, cv.Interrupted)


def test_progress_counts_the_steps_and_never_tells_a_made_up_eigenvalue():
    seen: list[cv.Progress] = []
    cv.spectral_density(free(rotated(linspace(5, 6, 300))), probes=2, steps=25, run=cv.Run(progress=seen.append))
    assert [p.done for p in seen] == list(range(1, 26))
    assert {(p.question, p.total, p.unit) for p in seen} == {("spectral_density", 25, "steps")}
    assert all(5 <= float(p.note.removeprefix("largest ")) <= 6 for p in seen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_operator_that_only_claims_to_be_symmetric_is_found_out(dtype):
    matrix = rotated(linspace(-1, 1, 100)).to(dtype)
    matrix[3, 70] += 0.1
    A = cv.MatrixFree(lambda rows: rows @ matrix.T, cv.Space(100, dtype), symmetric=True)
    for probes, steps in ((2, 1), (2, 3), (8, 80)):
        with pytest.raises(ValueError, match="The operator is not symmetric"):
            cv.spectral_density(A, probes=probes, steps=steps)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"probes": 1}, r"Expected probes >= 2 \(for an error bar\) and steps >= 1, but got 1 and 80"),
        ({"steps": 0}, r"Expected probes >= 2 \(for an error bar\) and steps >= 1, but got 8 and 0"),
    ],
)
def test_options_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cv.spectral_density(free(rotated(linspace(-1, 1, 20))), **options)


def test_an_operator_that_is_not_symmetric_is_refused():
    with pytest.raises(ValueError, match="spectral_density needs a symmetric operator, but got <Dense 3 x 3"):
        cv.spectral_density(cv.Dense(torch.arange(9.0).view(3, 3)))


# ------------------------------------------------------------------------------------- without a basis, or elsewhere


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["spikes", "bulk"])
def test_without_a_basis_the_distribution_is_the_same_and_nothing_is_counted(name, dtype):
    bulk = linspace(-1, 2, 392)
    values = torch.cat([bulk, linspace(10, 100, 8) if name == "spikes" else linspace(-1, 2, 8)])
    A = free(rotated(values).to(dtype))
    kept, left = (cv.spectral_density(A, probes=4, steps=60, keep=where) for where in ("device", "nowhere"))
    assert kept.reorthogonalised and not left.reorthogonalised
    points = linspace(-0.9, 1.9, 30)
    truth = (values[:, None] <= points).double().mean(0)
    assert float((left.cdf(points).value - truth).abs().max()) < 0.04
    assert float((left.cdf(points).value - kept.cdf(points).value).abs().max()) < 0.03
    assert not left.single.any() and len(left.outliers) == 0 and "not counted" in str(left)
    mean = left.mean(lambda t: t)
    assert abs(float(mean.value) - float(values.mean())) < 4 * float(mean.stderr) + 1e-5
    assert left.cost.products == kept.cost.products == 240


def test_without_a_basis_copies_appear_that_share_their_weight():
    values = torch.cat([linspace(0, 1, 299), torch.tensor([50.0], dtype=torch.float64)])
    left = cv.spectral_density(free(rotated(values)), probes=2, steps=120, keep="nowhere")
    ghosts = (left.nodes - 50).abs() < 1e-6
    assert int(ghosts.sum()) > 1  # of which one alone is an eigenvalue
    assert float(left.weights[:, ghosts].sum(1).mean()) < 10 / 300


def test_without_a_basis_few_distinct_eigenvalues_end_the_run():
    values = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).repeat(40)
    left = cv.spectral_density(free(rotated(values)), probes=3, steps=50, keep="nowhere")
    assert left.steps == 3
    torch.testing.assert_close(left.nodes, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).repeat_interleave(3))


def test_a_basis_in_main_memory_gives_the_same_bits():
    A = free(rotated(linspace(0, 1, 80)))
    here, there = (cv.spectral_density(A, probes=3, steps=10, keep=where) for where in ("device", "main"))
    assert torch.equal(here.nodes, there.nodes) and torch.equal(here.weights, there.weights)
    with pytest.raises(ValueError, match="keep is 'device', 'main' or 'nowhere', but got 'disk'"):
        cv.spectral_density(A, keep="disk")


def test_only_four_blocks_are_held_without_a_basis(monkeypatch):
    import curvature.linalg.memory

    monkeypatch.setattr(curvature.linalg.memory, "free_bytes", lambda device: 20 * 80 * 8)
    A = free(rotated(linspace(0, 1, 80)))
    with pytest.raises(cv.TooLarge):
        cv.spectral_density(A, probes=4, steps=20)
    assert cv.spectral_density(A, probes=4, steps=20, keep="nowhere").steps == 20


# ------------------------------------------------------------------------------------------------- axes and quantiles


def test_the_density_on_the_linear_axis_integrates_to_the_share_of_the_bulk():
    values = torch.cat([linspace(0, 1, 396), linspace(20, 50, 4)])
    density = cv.spectral_density(free(rotated(values)), probes=4, steps=40)
    points = linspace(-1, 2, 4000)
    estimate = density.density(points, axis="linear")
    assert float(torch.trapezoid(estimate.value, points)) == pytest.approx(0.99, abs=0.002)
    inner = (points > 0.2) & (points < 0.8)
    torch.testing.assert_close(estimate.value[inner], torch.full_like(points[inner], 0.99), rtol=0.25, atol=0)
    with pytest.raises(ValueError, match="axis is 'log' or 'linear'"):
        density.density(points, axis="cubic")


@pytest.mark.parametrize("name", ["uniform", "power", "negative"])
def test_intervals_of_quantiles_hold_them(name):
    values = {"uniform": linspace(0, 1, 300), "power": 1 / linspace(1, 300, 300), "negative": linspace(-3, 1, 300)}[
        name
    ]
    A, ordered = scaling(values), values.sort().values
    for share in (0.05, 0.25, 0.5, 0.9):
        truth, held = float(ordered[math.ceil(share * 300) - 1]), 0
        for seed in range(60):
            density = cv.spectral_density(A, probes=4, steps=20, seed=seed)
            low, high = density.quantile_interval(share)
            held += low - 1e-12 <= truth <= high + 1e-12
            assert low <= density.quantile(share) <= high
        assert held >= 54
