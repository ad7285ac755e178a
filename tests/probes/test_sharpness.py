"""The table of all measures: what is in it, what is left out, and which of them other weights of a function change."""

from __future__ import annotations

import math

import pytest
import torch
from functions import made
from matrices import Stopping, rotated, tensor
from objectives import zoo
from torch import nn
from untouched import untouched

import curvature as cv
from curvature.probes.critical import critical_sharpness
from curvature.probes.flatness import average_sharpness, pac_bayes_flatness
from curvature.probes.invariants import filter_sharpness, fisher_rao_norm
from curvature.probes.measures import MEASURES
from curvature.probes.sharpness import Sharpness, sharpness
from curvature.probes.worst_case import adaptive_sharpness, keskar_sharpness, sam_sharpness

ROWS = [row for name, measure in MEASURES.items() for row in measure.rows or (name,)]
INVARIANT = {row for name, m in MEASURES.items() if m.invariant for row in m.rows or (name,)}
KINDS = (
    "regression",
    "tokens",
    "grouped-convolution",
    "convolution",
    "attention",
    "lstm",
    "tied-head",
    "binary",
    "frozen",
)
CASES = [case for case in zoo() if case.name in KINDS]
FAST = ("trace", "sam", "average", "fisher_rao", "adaptive_average")


def net(**options) -> cv.Objective:
    """A trained network of one layer of ReLU units."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(30, 4).double(), torch.randint(0, 3, (30,))
    objective = cv.Objective.of(model, "cross-entropy", [(x[:20], y[:20]), (x[20:], y[20:])], **options)
    for _ in range(100):
        objective = objective.at(objective.position - 0.3 * objective.gradient())
    return objective


def test_scaled_weights_change_what_is_not_invariant_and_nothing_else():
    objective = net()
    with untouched(objective.function.module):
        table = sharpness(objective, samples=8, products=24, invariance=True)
    assert list(table.names) == ROWS and not table.left_out
    assert table.changes is not None
    for name, invariant, change in zip(table.names, table.invariant, table.changes.tolist(), strict=True):
        assert invariant == (name in INVARIANT)
        assert change <= 1e-10 if invariant else change > 0.05, name


def test_by_a_factor_that_rounds_as_well():
    """F10 by hand, at alpha = 3."""
    objective = net()
    factors = {"0.weight": 3.0, "0.bias": 3.0, "2.weight": 1 / 3}
    other = objective.at({name: t * factors.get(name, 1.0) for name, t in objective.params.items()})
    assert other.value() == pytest.approx(objective.value(), rel=1e-14)
    first, second = (sharpness(o, samples=64, products=24) for o in (objective, other))
    for name, value in zip(first.names, first.values.tolist(), strict=True):
        change = abs(second[name] / value - 1)
        assert change <= 1e-10 if name in INVARIANT else change > 0.05, name


def test_every_row_is_what_the_measure_alone_returns():
    objective = net()
    table = sharpness(objective, rho=0.1, sigma=0.02, samples=8, products=16, seed=3)
    H = cv.hessian(objective)
    alone = {
        "lambda_max": cv.eigsh(H, seed=3).values[0],
        "trace": cv.trace(H, products=16, seed=3).value,
        "frobenius": cv.frobenius_norm(H, products=16, seed=3).value,
        "sam": sam_sharpness(objective, rho=0.1).value,
        "worst": sam_sharpness(objective, rho=0.1, steps=20, restarts=1, seed=3).value,
        "keskar": keskar_sharpness(objective).value,
        "average": average_sharpness(objective, 0.02, samples=8, seed=3).value,
        "pac_bayes": pac_bayes_flatness(objective, samples=8, seed=3).value ** -2,
        "critical": critical_sharpness(objective).value,
        "adaptive_sam": adaptive_sharpness(objective, rho=0.1).value,
        "adaptive_average": average_sharpness(objective, 0.02, relative=True, samples=8, seed=3).value,
        "filter": filter_sharpness(objective, products=16, seed=3).value,
        "fisher_rao": fisher_rao_norm(objective).value,
    }
    for name, value in alone.items():
        assert table[name] == pytest.approx(float(value), rel=1e-9), name
    stderr = dict(zip(table.names, table.stderrs.tolist(), strict=True))
    assert stderr["average"] == pytest.approx(float(average_sharpness(objective, 0.02, samples=8, seed=3).stderr))
    assert math.isnan(stderr["sam"]) and math.isnan(stderr["fisher_rao"]) and stderr["trace"] > 0
    assert table.cost.products > 100 and table.cost.passes > 200


def test_of_a_quadratic_they_are_what_is_known():
    matrix, theta = rotated(tensor(5, 3, 1, 0.5)), tensor(0.4, -0.3, 0.2, 0.9)
    objective = made(lambda t: t @ (matrix @ t) / 2, theta)
    table = sharpness(objective, products=64)
    assert table["lambda_max"] == pytest.approx(5, rel=1e-6) and table["trace"] == pytest.approx(9.5)
    assert table["frobenius"] == pytest.approx(float(matrix.norm()))
    assert (table["r_e"], table["K_H"], table["K_1"]) == (0, 0, 0)
    g = matrix @ theta
    assert table["critical"] == pytest.approx(float(g @ (matrix @ g) / (g @ g)), rel=0.05)
    d = theta.abs()
    top = torch.linalg.eigvalsh(d * matrix * d[:, None])[-1]
    assert table["adaptive_lambda_max"] == pytest.approx(float(top), rel=1e-6)
    assert len(table.left_out) == 1 and table.left_out[0].startswith("fisher_rao: ")
    assert "scalar" in table.left_out[0] and "left out" in str(table)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_model_has_a_table(case):
    table = sharpness(case.objective(), samples=4, products=8, invariance=True)
    assert set(ROWS) - set(table.names) <= {"r_e", "K_H", "K_1"}
    if case.name == "grouped-convolution":  # its last two layers have nothing between them
        assert float(table.changes[torch.tensor(table.invariant)].max()) <= 1e-10
    else:
        assert any(reason.startswith("invariance: No two layers") for reason in table.left_out)
        assert table.changes is None and "changed" not in str(table)
    assert all(math.isfinite(table[name]) for name in ("lambda_max", "worst", "keskar", "average", "filter"))


def test_networks_with_batch_normalisation_have_one_and_it_is_saved(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(12, 1, 4, 4).double(), torch.randint(0, 3, (12,))
    for mode in ("eval", "train"):
        objective = cv.Objective.of(model, "cross-entropy", [(x, y)], mode=mode)
        with untouched(model):
            table = sharpness(objective, samples=4, products=8)
        loaded = Sharpness.load(table.save(tmp_path / mode))
        assert str(loaded) == str(table) and loaded.names == table.names and loaded.invariant == table.invariant
    compared = sharpness(net(), measures=FAST, samples=4, products=8, invariance=True)
    loaded = Sharpness.load(compared.save(tmp_path / "compared"))
    assert str(loaded) == str(compared) and torch.equal(loaded.changes, compared.changes)


def test_the_table_says_which_are_invariant():
    lines = sharpness(net(), measures=FAST, samples=4, products=8, invariance=True).summary()
    assert "not invariant (changed by" in lines["sam"] and "±" in lines["average"]
    assert lines["fisher_rao"].partition("invariant")[0].strip() and "not" not in lines["fisher_rao"]


def test_it_goes_on_where_it_was_and_returns_what_it_has(tmp_path):
    objective, options = net(), {"measures": FAST, "samples": 4, "products": 8, "invariance": True}
    whole, path = sharpness(objective, **options), tmp_path / "sharpness.ckpt"
    seen = []

    def progress(report):
        seen.append(report.question)
        if seen.count("sharpness") == 3:
            raise KeyboardInterrupt

    with pytest.raises(cv.Interrupted) as caught:
        sharpness(objective, **options, run=cv.Run(progress=progress, checkpoint=path))
    part = caught.value.result
    assert not part.complete and part.names == FAST[:3] and torch.equal(part.values, whole.values[:3])
    assert part.changes.isnan().all()
    resumed = sharpness(objective, **options, run=cv.Run(checkpoint=path))
    assert torch.equal(resumed.values, whole.values) and torch.equal(resumed.changes, whole.changes)
    assert str(resumed).splitlines()[:-1] == str(whole).splitlines()[:-1] and resumed.complete
    with pytest.raises(KeyboardInterrupt) as nothing:
        sharpness(objective, measures=("average",), run=cv.Run(progress=Stopping(0)))
    assert not isinstance(nothing.value, cv.Interrupted)


def test_an_eigenvalue_that_has_not_converged_is_left_out(monkeypatch):
    few = MEASURES["lambda_max"]._replace(ask=lambda s: cv.eigsh(s.hessian, max_steps=1, seed=s.seed))
    monkeypatch.setitem(MEASURES, "lambda_max", few)
    table = sharpness(zoo()[1].objective(), measures=["lambda_max", "sam"])
    assert table.names == ("sam",)
    assert "lambda_max: after" in table.left_out[0] and "the residual of" in table.left_out[0]


def test_bad_input_is_refused():
    objective = zoo()[1].objective()
    with pytest.raises(ValueError, match=r"measures are some of lambda_max, .* but got flat"):
        sharpness(objective, measures=("flat",))
    with pytest.raises(ValueError, match="but got none"):
        sharpness(objective, measures=())
    for options in ({"rho": 0.0}, {"sigma": -1.0}, {"samples": 1}, {"products": 3}, {"rho": math.nan}):
        with pytest.raises(ValueError, match="Expected positive rho and sigma"):
            sharpness(objective, **options)
    with pytest.raises(KeyError, match="There is no 'flat' among trace"):
        sharpness(objective, measures=("trace",))["flat"]
    with pytest.raises(TypeError, match="takes an Objective"):
        sharpness(nn.Linear(2, 1))  # pyright: ignore[reportArgumentType]
    bare = made(lambda t: t.square().sum(), tensor(1, 2))
    empty = sharpness(bare, measures=("fisher_rao",))
    assert empty.names == () and len(empty.left_out) == 1
