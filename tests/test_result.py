"""Results: strict JSON, folders that come back bit for bit or are refused, and numbers with their errors in print."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from pathlib import Path

import pytest
import scipy.stats
import torch
from matrices import Stopping, free, linspace, rotated, tensor
from objectives import zoo

import curvature as cv
from curvature.result import LISTED, SCHEMA, Quantity, student_quantile, versions, with_error

MATRIX = rotated(torch.cat([tensor(9, 8.9, -4), linspace(-1, 1, 57)]))


def interrupted(question, *, after: int = 5, **options):
    A = free(MATRIX)
    A.function = Stopping(after, A.function)
    with pytest.raises(cv.Interrupted) as stop:
        question(A, **options)
    return stop.value.result


SMALL = next(case for case in zoo() if case.name == "regression").objective()


def hypergradient() -> cv.Hypergradient:
    """How the loss depends on the weight of a penalty."""
    module, decay = torch.nn.Linear(2, 1).double(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    data = torch.ones(4, 2, dtype=torch.float64)

    def penalised(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (module(x) - 1).square().mean() + decay * sum(p.square().sum() for p in module.parameters())

    inner = cv.Objective.from_loss(module, penalised, data)
    return cv.hypergradient(inner, cv.Objective.from_loss(module, lambda m, x: m(x).mean(), data), decay)


KINDS = {
    "diagnosis": lambda: cv.check(SMALL, products=3, vectors=2),
    "exact estimate": lambda: cv.trace(cv.Diagonal(tensor(1, 2))),
    "estimate": lambda: cv.trace(free(MATRIX), products=20, seed=5),
    "estimates": lambda: cv.spectral_density(free(MATRIX), steps=4).cdf(tensor(-1, 0, 1)),
    "interrupted estimate": lambda: interrupted(cv.trace, after=15, products=59),
    "pairs": lambda: cv.eigsh(free(MATRIX), 3),
    "large pairs": lambda: cv.eigsh(free(MATRIX), 20),
    "float32 pairs": lambda: cv.eigsh(free(MATRIX.float()), 2),
    "interrupted pairs": lambda: interrupted(cv.eigsh, k=3, rtol=1e-15),
    "density": lambda: cv.spectral_density(free(MATRIX), probes=3, steps=6),
    "complete density": lambda: cv.spectral_density(free(MATRIX), probes=3, steps=60),
    "subsampled": lambda: cv.subsampled(cv.trace, cv.hessian, zoo()[1].objective((4, 5)), products=8),
    "by layer": lambda: cv.by_layer(cv.spectral_density, cv.hessian(zoo()[1].objective()), probes=2, steps=4),
    "estimates by layer": lambda: cv.by_layer(cv.trace, cv.hessian(zoo()[1].objective()), products=8),
    "solution": lambda: cv.solve(free(MATRIX), torch.ones(60, 2, dtype=torch.float64), damping=9.0),
    "interrupted solution": lambda: interrupted(cv.solve, b=torch.ones(60, dtype=torch.float64)),
    "interrupted density": lambda: interrupted(cv.spectral_density, probes=3),
    "influence": lambda: cv.influence(SMALL, SMALL, cv.identity(SMALL.space)),
    "hypergradient": lambda: hypergradient(),
    "plane": lambda: cv.plane(SMALL, cv.random_directions(SMALL, 2), points=3),
    "Hessian plane": lambda: cv.plane(SMALL, cv.eigsh(cv.hessian(SMALL), 2), points=3),
    "path": lambda: cv.interpolate(SMALL, 0 * SMALL.position, points=3),
    "roughness": lambda: cv.roughness(SMALL, directions=3, steps=4),
    "lipschitz": lambda: cv.gradient_lipschitz(SMALL, radius=0.1, pairs=2, steps=2),
    "persistence": lambda: cv.persistence(cv.line(SMALL, SMALL.position, points=5)),
    "worst case": lambda: cv.sam_sharpness(SMALL),
    "flatness": lambda: cv.pac_bayes_flatness(SMALL, samples=3),
    "critical sharpness": lambda: cv.critical_sharpness(SMALL),
    "report": lambda: cv.report(SMALL, questions=("eigenvalues", "layers", "gradient"), k=2),
    "stable rates": lambda: cv.stable_learning_rates(SMALL),
    "gradient share": lambda: cv.gradient_share(SMALL, cv.eigsh(cv.hessian(SMALL), 2)),
    "sharpness": lambda: cv.sharpness(SMALL, measures=("trace", "sam", "filter"), invariance=True),
    "trajectory": lambda: cv.trajectory(SMALL, torch.eye(SMALL.space.size).double()[:4].cumsum(0)),
    "comparison": lambda: cv.compare(*(cv.trace(free(MATRIX), products=20, seed=seed) for seed in (1, 2))),
    "benchmark": lambda: cv.optim.benchmark(SMALL, ["sgd"], lrs=[0.01], steps=2, repeats=1),
    "pruning": lambda: cv.prune(SMALL, cv.identity(SMALL.space), sparsity=0.5),
    "mask": lambda: cv.fish_mask(SMALL, 0.2),
    "recycled solution": lambda: cv.solve(
        cv.Dense(MATRIX @ MATRIX, psd=True), torch.ones(60).double(), damping=9.0, recycle=5
    ),
    "predictive": lambda: cv.laplace_predictive(SMALL, torch.ones(3, 3).double(), cv.ggn_diagonal(SMALL), prior=1.0),
}
EVERY = pytest.mark.parametrize("make", KINDS.values(), ids=list(KINDS))


def bits(value):
    """What decides about equality to the last bit, NaN included."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().flatten().clone(memory_format=torch.contiguous_format)
        raw = raw.view(torch.uint8).tolist() if value.numel() else []
        return str(value.dtype), tuple(value.shape), raw
    if isinstance(value, cv.Result):
        return [bits(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [bits(item) for item in value] if isinstance(value, tuple) else value


def finite(value):
    """Lists of numbers, None for those that JSON does not have."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def refuse_constants(name):
    raise AssertionError(f"{name} is not JSON")


def estimate(value: float, stderr: float, dof: float = 9, **more) -> cv.Estimate:
    origin = cv.Origin(question="trace", options={}, seed=0, operator={"operator": "test"})
    value, stderr = (torch.as_tensor(x, dtype=torch.float64) for x in (value, stderr))
    return cv.Estimate(value=value, stderr=stderr, samples=10, dof=dof, cost=cv.Cost(), origin=origin, **more)


def every_kind(kind: type) -> set[type]:
    return {kind, *(c for child in kind.__subclasses__() for c in every_kind(child))}


def test_every_kind_of_result_is_tested_here():
    ours = {kind for kind in every_kind(cv.Result) if kind.__module__.startswith("curvature.")}
    assert {type(make()) for make in KINDS.values()} == ours - {cv.Result}


# --------------------------------------------------------------------------------------------- JSON


@EVERY
def test_a_dictionary_of_it_is_strict_json(make):
    result = make()
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False), parse_constant=refuse_constants)
    assert written["kind"] == type(result).__name__ and written["schema"] == SCHEMA == 1
    assert set(written) == {"kind", "schema"} | {field.name for field in dataclasses.fields(result)}
    assert written["cost"]["products"] == result.cost.products
    assert written["origin"]["versions"]["torch"] == torch.__version__
    assert written["origin"]["operator"]["shape"] == list(result.origin.operator["shape"])
    for name, value in result.arrays().items():
        found = written
        for step in name.split("."):
            found = found[int(step) if isinstance(found, list) else step]
        if value.numel() <= LISTED:
            assert found == finite(value.tolist())
        else:
            dtype = str(value.dtype).removeprefix("torch.")
            assert found == {"array": name, "shape": list(value.shape), "dtype": dtype}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_number_for_is_null(bad):
    written = estimate(bad, bad, floor=bad).to_dict()
    assert (written["value"], written["stderr"], written["floor"]) == (None, None, None)
    assert json.dumps(written, allow_nan=False)
    assert estimate(0, 0).to_dict()["value"] == 0.0


def test_what_is_neither_number_nor_text_is_written_as_text():
    origin = cv.Origin(
        question="trace",
        options={"dtype": torch.float32, "path": Path("a"), 3: (1, {"x": math.inf})},
        seed=None,
        operator={},
    )
    result = dataclasses.replace(estimate(1, 1), origin=origin)
    assert result.to_dict()["origin"]["options"] == {"dtype": "torch.float32", "path": "a", "3": [1, {"x": None}]}
    assert result.to_dict()["origin"]["seed"] is None


def test_a_tensor_of_just_so_many_entries_is_listed():
    for size, listed in ((LISTED, True), (LISTED + 1, False)):
        value = dataclasses.replace(estimate(0, 0), value=torch.zeros(size)).to_dict()["value"]
        assert isinstance(value, list) == listed


# --------------------------------------------------------------------------------------------- folders


@EVERY
def test_a_saved_result_comes_back_bit_for_bit(make, tmp_path):
    result = make()
    folder = result.save(tmp_path / "deep" / "folder")
    assert sorted(path.name for path in folder.iterdir()) == ["arrays.safetensors", "result.json"]
    json.loads((folder / "result.json").read_text(), parse_constant=refuse_constants)
    for kind in (cv.Result, type(result)):
        loaded = kind.load(folder)
        assert type(loaded) is type(result)
        for field in dataclasses.fields(result):
            assert bits(getattr(loaded, field.name)) == bits(getattr(result, field.name)), field.name
        assert str(loaded) == str(result) and loaded._repr_html_() == result._repr_html_()
    assert result.save(folder) == folder and str(cv.Result.load(folder)) == str(result)  # over the old one


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1 / 3, 1e308])
def test_every_float_comes_back_bit_for_bit(value, tmp_path):
    loaded = cv.Estimate.load(estimate(value, 1).save(tmp_path))
    assert struct.pack("d", float(loaded.value)) == struct.pack("d", value)


def test_tensors_that_are_views_or_require_gradients_are_saved_too(tmp_path):
    table = torch.arange(12.0, requires_grad=True).view(3, 4)
    result = dataclasses.replace(estimate(0, 0), value=table.T[1:], stderr=table[:, 0])
    loaded = cv.Estimate.load(result.save(tmp_path))
    assert torch.equal(loaded.value, table.T[1:]) and torch.equal(loaded.stderr, table[:, 0])
    assert not loaded.value.requires_grad


def test_a_loaded_density_answers_like_the_one_that_was_saved(tmp_path):
    density = KINDS["density"]()
    loaded = cv.SpectralDensity.load(density.save(tmp_path))
    assert torch.equal(loaded.outliers, density.outliers) and loaded.quantile(0.3) == density.quantile(0.3)
    assert torch.equal(loaded.cdf(tensor(0.1)).value, density.cdf(tensor(0.1)).value)


def saved(tmp_path) -> tuple[Path, dict]:
    KINDS["estimate"]().save(tmp_path)
    path = tmp_path / "result.json"
    return path, json.loads(path.read_text())


@pytest.mark.parametrize("position", [0, 8, 60, -1])
def test_one_changed_byte_of_the_arrays_is_refused(position, tmp_path):
    saved(tmp_path)
    path = tmp_path / "arrays.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(cv.BadFile, match=r"are not those it was saved with\. Measure again\."):
        cv.Result.load(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 50])
def test_truncated_arrays_are_refused(size, tmp_path):
    saved(tmp_path)
    path = tmp_path / "arrays.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(cv.BadFile, match="are not those it was saved with"):
        cv.Estimate.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"3", b"null", b'"text"', b"{}", b'{"arrays": 3}', b"\xff\xfe", b"[" * 100_000, b'{"arrays": {}}'],
    ids=["empty", "cut", "list", "number", "null", "text", "bare", "arrays", "not-utf8", "deep", "no-file"],
)  # fmt: skip
def test_json_that_is_not_a_result_is_refused(text, tmp_path):
    path, _ = saved(tmp_path)
    path.write_bytes(text)
    with pytest.raises(cv.BadFile, match=r"is not a saved result: .*Give the folder that `save` wrote."):
        cv.Result.load(tmp_path)


def test_cut_json_is_refused(tmp_path):
    path, _ = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(cv.BadFile, match="is not a saved result"):
        cv.Result.load(tmp_path)


@pytest.mark.parametrize("missing", ["cost", "origin", "samples", "dof", "floor", "complete"])
def test_json_that_lacks_a_field_is_refused(missing, tmp_path):
    path, written = saved(tmp_path)
    del written[missing]
    path.write_text(json.dumps(written))
    with pytest.raises(cv.BadFile, match=r"lacks what a Estimate is made of: .*Measure again\."):
        cv.Result.load(tmp_path)


@pytest.mark.parametrize("part, value", [("cost", {"products": 1, "euros": 2}), ("cost", 3), ("origin", {"seed": 1})])
def test_json_with_parts_of_another_shape_is_refused(part, value, tmp_path):
    path, written = saved(tmp_path)
    path.write_text(json.dumps({**written, part: value}))
    with pytest.raises(cv.BadFile, match="lacks what a Estimate is made of"):
        cv.Result.load(tmp_path)


def test_arrays_that_are_no_safetensors_are_refused_even_with_their_own_digest(tmp_path):
    path, written = saved(tmp_path)
    (tmp_path / "arrays.safetensors").write_bytes(b"nonsense")
    written["arrays"]["sha256"] = hashlib.sha256(b"nonsense").hexdigest()
    path.write_text(json.dumps(written))
    with pytest.raises(cv.BadFile, match="lacks what a Estimate is made of"):
        cv.Result.load(tmp_path)


@pytest.mark.parametrize("schema", [0, 2, None, "1"])
def test_another_schema_is_refused(schema, tmp_path):
    path, written = saved(tmp_path)
    path.write_text(json.dumps({**written, "schema": schema}))
    with pytest.raises(cv.BadFile, match=f"has schema {schema}, not 1. Use the version of curvature that wrote it."):
        cv.Result.load(tmp_path)


def test_another_kind_is_refused(tmp_path):
    path, written = saved(tmp_path)
    with pytest.raises(cv.BadFile, match=r"holds a Estimate, not a Eigenpairs. Use Result.load\(folder\)."):
        cv.Eigenpairs.load(tmp_path)
    for kind in ("Objective", "Cost", "", 3):
        path.write_text(json.dumps({**written, "kind": kind}))
        with pytest.raises(cv.BadFile, match=f"holds a {kind}, not a Result"):
            cv.Result.load(tmp_path)


def test_a_folder_without_a_result_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere", str(tmp_path)):
        with pytest.raises(cv.BadFile, match=r"result.json is not a saved result: there is no file "):
            cv.Result.load(folder)
    saved(tmp_path)
    (tmp_path / "arrays.safetensors").unlink()
    with pytest.raises(cv.BadFile, match=r"is not a saved result: .*arrays.safetensors"):
        cv.Result.load(tmp_path)


# --------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("dof", [1, 2, 7, 31, 1000])
def test_intervals_are_those_of_student_and_the_floor_is_added(level, dof):
    low, high = estimate(10, 2, dof=dof, floor=0.25).interval(level)
    half = 2 * float(scipy.stats.t.ppf(0.5 + level / 2, dof)) + 0.25
    assert (float(low), float(high)) == pytest.approx((10 - half, 10 + half), rel=1e-12)


def test_an_exact_value_has_its_floor_for_an_interval():
    assert [float(x) for x in estimate(10, 0, dof=0).interval()] == [10, 10]
    assert [float(x) for x in estimate(10, 0, dof=0, floor=0.5).interval()] == [9.5, 10.5]
    assert student_quantile(0.95, 0) == 0 and student_quantile(0.95, 0.5) == math.inf


def test_a_floor_for_every_entry():
    result = estimate([1, 2], [0.5, 0], floor=tensor(0.1, 0.2))
    low, high = result.interval()
    half = 0.5 * student_quantile(0.95, 9) + 0.1
    torch.testing.assert_close(torch.stack([low, high]), torch.tensor([[1 - half, 1.8], [1 + half, 2.2]]).double())


@pytest.mark.parametrize("level", [0, 1, -0.1, 95, math.nan])
def test_a_level_that_is_not_between_zero_and_one_is_refused(level):
    with pytest.raises(ValueError, match=f"A confidence level lies between 0 and 1, but got {level}."):
        estimate(1, 1).interval(level)


# --------------------------------------------------------------------------------------------- quantities


@EVERY
def test_quantities_are_numbers_with_errors_by_name(make):
    for name, quantity in make().quantities().items():
        assert name and quantity.stderr >= 0 and quantity.bound >= 0 and quantity.dof >= 0, name
        low, high = quantity.interval()
        assert low <= quantity.value <= high, name


def numbers(kind: str) -> dict[str, float]:
    return {name: quantity.value for name, quantity in KINDS[kind]().quantities().items()}


def test_quantities_of_the_spectrum_are_those_of_the_matrix():
    spectrum = torch.linalg.eigvalsh(MATRIX)
    found = KINDS["complete density"]().quantities()
    assert found["lambda_max"].value == pytest.approx(float(spectrum[-1]), rel=1e-12)
    assert found["lambda_min"].value == pytest.approx(float(spectrum[0]), rel=1e-12)
    assert found["trace"].value == pytest.approx(float(spectrum.sum()), rel=1e-12) and found["trace"].stderr == 0
    assert found["negative_share"].value == pytest.approx(float((spectrum < -1e-12).double().mean()))
    found = KINDS["pairs"]().quantities()
    for place, name in ((-1, "lambda_max"), (-1, "eigenvalue_1"), (-2, "eigenvalue_2"), (-3, "eigenvalue_3")):
        low, high = found[name].interval()
        assert low - 1e-12 <= float(spectrum[place]) <= high + 1e-12
    both = cv.eigsh(free(MATRIX), 2, which="both").quantities()
    assert both["lambda_max"].value == pytest.approx(9) and both["lambda_min"].value == pytest.approx(-4)
    assert cv.eigsh(free(MATRIX), which="smallest").quantities()["lambda_min"].value == pytest.approx(-4)


def test_quantities_of_an_estimate_are_its_value_its_error_and_its_interval():
    result = estimate(10, 2, dof=3, floor=0.5)
    quantity = result.quantities()["trace"]
    assert (quantity.value, quantity.stderr, quantity.dof, quantity.bound) == (10, 2, 3, 0.5)
    assert quantity.interval(0.9) == pytest.approx([float(bound) for bound in result.interval(0.9)], rel=1e-12)
    assert str(quantity) == "10 ± 2 (within 0.5)" and str(Quantity(2.5)) == "2.5"
    named = estimate([1, 2], [0.1, 0.2], names=("first", "last")).quantities()
    assert [(name, q.value, q.stderr) for name, q in named.items()] == [("first", 1, 0.1), ("last", 2, 0.2)]
    assert estimate([1, 2], [0, 0]).quantities() == {}  # entries without names


def test_quantities_without_degrees_of_freedom_have_the_normal_interval():
    assert Quantity(1.0, 0.5).interval(0.95) == pytest.approx((1 - 0.5 * 1.959964, 1 + 0.5 * 1.959964), rel=1e-6)


def test_nothing_is_known_of_the_error_of_what_has_not_converged():
    moving = Quantity(3.0, bound=0.1, converged=False)
    assert str(moving) == "3 (not converged)" and moving.interval() == (-math.inf, math.inf)


def test_quantities_of_other_kinds_are_what_their_summary_says():
    plane, path, table = KINDS["plane"](), KINDS["path"](), KINDS["sharpness"]()
    assert numbers("plane") == {"loss": plane.centre, "loss_min": plane.loss.min(), "loss_max": plane.loss.max()}
    assert numbers("path")["barrier"] == path.barrier and numbers("path")["climb"] == path.climb
    assert numbers("sharpness") == {name: table[name] for name in ("trace", "sam", "filter")}
    assert numbers("subsampled")["trace"] == float(KINDS["subsampled"]().value)
    layers = KINDS["estimates by layer"]()
    assert numbers("estimates by layer") == {f"{name}.trace": float(layer.value) for name, layer in layers.items()}
    assert numbers("critical sharpness")["critical_sharpness"] == float(KINDS["critical sharpness"]().value)
    assert numbers("pruning")["sparsity"] == KINDS["pruning"]().sparsity


# --------------------------------------------------------------------------------------------- print


@pytest.mark.parametrize(
    "dof, text", [(1, "10 ± 15 (95 %)"), (2.5, "10 ± 4.3 (95 %)"), (3, "10 ± 1.2"), (0.5, "10 ± inf (95 %)")]
)
def test_of_few_samples_half_the_interval_is_printed(dof, text):
    assert with_error(10, 1.2, dof) == text
    if dof < 3:
        assert text == f"{with_error(10, 1.2 * student_quantile(0.95, dof))} (95 %)"


@pytest.mark.parametrize(
    "value, stderr, text",
    [
        (12.3456, 0.5612, "12.35 ± 0.56"),
        (12.3456, 5.612, "12.3 ± 5.6"),
        (12.3456, 56.12, "12 ± 56"),
        (-12.3456, 0.5612, "-12.35 ± 0.56"),
        (0.00123456, 0.000056, "0.001235 ± 5.6e-05"),
        (1234567.0, 20.0, "1234567 ± 20"),
        (1234567.0, 1234.0, "1.2346e+06 ± 1.2e+03"),
        (999.96, 0.5, "999.96 ± 0.5"),
        (0.0, 0.5, "0 ± 0.5"),
        (1e-20, 1e-3, "1e-20 ± 0.001"),
        (3.0, 0.0, "3 ± 0"),
        (1 / 3, 0.0, "0.333333 ± 0"),
        (1 / 3, 1e-30, "0.3333333333333 ± 1e-30"),
        (math.nan, 1.0, "nan ± 1"),
        (1.0, math.nan, "1 ± nan"),
        (math.inf, 1.0, "inf ± 1"),
        (1.0, math.inf, "1 ± inf"),
    ],
)
def test_a_value_is_printed_to_the_second_digit_of_its_error(value, stderr, text):
    assert with_error(value, stderr) == text
    shown, _, error = text.partition(" ± ")
    if math.isfinite(value) and 0 < stderr < math.inf:
        assert abs(float(shown) - value) <= 0.1 * stderr + 1e-13 * abs(value)
        assert float(error) == pytest.approx(stderr, rel=0.05)


@EVERY
def test_the_summary_is_text_and_the_cost_is_its_last_line(make):
    result = make()
    assert all(isinstance(label, str) and isinstance(text, str) for label, text in result.summary().items())
    lines = str(result).splitlines()
    assert len(lines) == len(result.summary()) + 1 and repr(result) == str(result)
    assert lines[-1].startswith(f"[{result.cost.products} products, ") and lines[-1].endswith(" MiB]")


def test_the_cost_is_printed_in_units():
    cost = cv.Cost(products=12, passes=3, seconds=1.26, peak_bytes=5 << 20)
    assert str(cost) == "12 products, 3 passes over the data, 1.3 s, peak 5 MiB"
    assert str(cv.Cost()) == "0 products, 0.0 s, peak 0 MiB"


@EVERY
def test_the_notebook_view_is_a_table_of_the_summary(make):
    result = make()
    view = result._repr_html_()
    assert view.count("<tr>") == view.count("</tr>") == len(result.summary())
    assert f"<b>{type(result).__name__} of " in view


def test_the_notebook_view_escapes_what_comes_from_outside():
    evil = "<script>alert('x')</script>"
    origin = cv.Origin(question=evil, options={}, seed=0, operator={"operator": evil})
    view = dataclasses.replace(estimate(1, 1), origin=origin)._repr_html_()
    assert "<script" not in view
    assert view.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") == 2


def test_results_are_frozen_and_their_origin_is_complete():
    result = KINDS["estimate"]()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.value = tensor(0)
    assert set(versions()) == {"curvature", "torch", "numpy", "python"} and all(versions().values())
    assert result.origin.threads == torch.get_num_threads() and result.origin.seed == 5
    assert result.origin.operator == {
        "operator": "MatrixFree",
        "shape": [60, 60],
        "dtype": "float64",
        "device": "cpu",
    }
    assert result.cost.peak_bytes > 10 << 20 and result.cost.seconds > 0
