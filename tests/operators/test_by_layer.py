"""One question to every layer: what the layer's own matrix answers, from shared passes."""

from __future__ import annotations

import pytest
import torch
from matrices import Stopping
from objectives import zoo

import curvature as cv

CASE = zoo()[1]


@pytest.fixture
def objective() -> cv.Objective:
    return CASE.objective()


def parts(objective: cv.Objective, by="layer") -> dict[str, torch.Tensor]:
    H = cv.hessian(objective).dense()
    return {name: H[place][:, place] for name, place in objective.space.places(by).items()}


@pytest.mark.parametrize("by", ["layer", "parameter", {"all": "*"}], ids=str)
def test_eigenvalues_are_those_of_the_dense_blocks(objective, by):
    result = cv.by_layer(cv.eigsh, cv.hessian(objective), by=by, rtol=1e-10)
    dense = parts(objective, by)
    assert list(result) == list(dense)
    for name, pairs in result.items():
        top = torch.linalg.eigvalsh(dense[name])[-1:]
        torch.testing.assert_close(pairs.values, top, rtol=1e-10, atol=1e-12)


def test_spectra_and_traces_are_those_of_the_dense_blocks(objective):
    H, dense = cv.hessian(objective), parts(objective)
    spectra = cv.by_layer(cv.spectral_density, H, probes=2, steps=max(len(block) for block in dense.values()))
    traces = cv.by_layer(cv.trace, H, products=1000)
    for name, block in dense.items():
        values = torch.linalg.eigvalsh(block)
        torch.testing.assert_close(spectra[name].nodes[-1], values[-1], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(
            spectra[name].cdf(values[-2:] - 1e-6).value,
            values.new_tensor([len(values) - 2, len(values) - 1]) / len(values),
        )
        assert float(traces[name]) == pytest.approx(float(block.trace()), rel=1e-10)


def test_passes_are_those_of_the_slowest_layer_and_products_those_of_all(objective):
    H = cv.hessian(objective)
    H.apply(torch.zeros(1, H.shape[1], dtype=H.dtype))
    before = objective.meter.passes
    result = cv.by_layer(cv.spectral_density, H, probes=2, steps=3)
    assert result.cost.passes == objective.meter.passes - before == 3
    assert result.cost.products == sum(density.cost.products for _, density in result.items()) == 6 * len(result)


def test_the_answers_do_not_depend_on_the_other_layers(objective):
    H = cv.hessian(objective)
    result = cv.by_layer(cv.eigsh, H, k=2, seed=3)
    for name, place in objective.space.places().items():
        block = cv.MatrixFree(
            lambda rows, place=place: embedded(H, rows, place), cv.Space(len(place), H.dtype), symmetric=True
        )
        torch.testing.assert_close(result[name].values, cv.eigsh(block, k=2, seed=3).values, rtol=1e-12, atol=1e-13)
    again = cv.by_layer(cv.eigsh, H, k=2, seed=3)
    assert all(torch.equal(result[name].vectors, again[name].vectors) for name in result)


def embedded(H: cv.LinearOperator, rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(len(rows), H.shape[1], dtype=H.dtype)
    whole[:, place] = rows
    return H.apply(whole)[:, place]


def test_block_traces_sum_to_the_trace_and_hold_those_of_the_blocks(objective):
    H, dense = cv.hessian(objective), parts(objective)
    places = objective.space.places()
    exact = cv.block_traces(H, places, products=H.shape[0])
    torch.testing.assert_close(exact.value, torch.stack([block.trace() for block in dense.values()]))
    assert exact.names == tuple(dense)
    for seed in range(5):
        estimate = cv.block_traces(H, places, products=H.shape[0] // 2, seed=seed)
        low, high = estimate.interval(0.9999)
        assert ((low <= exact.value) & (exact.value <= high)).all()


def test_a_failure_in_one_layer_is_raised_and_ends_the_others(objective):
    def question(block, *, run):
        if block.shape[0] == min(len(place) for place in objective.space.places().values()):
            raise ValueError("no answer here")
        return cv.trace(block, products=8, run=run)

    with pytest.raises(ValueError, match="no answer here"):
        cv.by_layer(question, cv.hessian(objective))


def test_a_failing_product_is_raised(objective):
    H = cv.hessian(objective)

    def broken(rows):
        raise RuntimeError("no product here")

    A = cv.MatrixFree(broken, H.domain, symmetric=True, source={"operator": "broken"})
    with pytest.raises(RuntimeError, match="no product here"):
        cv.by_layer(cv.eigsh, A)


def test_an_interrupt_returns_what_every_layer_has(objective):
    seen = []
    stop = Stopping(3, seen.append)
    with pytest.raises(cv.Interrupted) as caught:
        cv.by_layer(cv.spectral_density, cv.hessian(objective), probes=2, steps=30, run=cv.Run(progress=stop))
    result = caught.value.result
    assert not result.complete and len(result) == len(objective.space.places())
    assert all(density.steps >= 1 and not density.complete for _, density in result.items())
    assert seen[-1].question == "by_layer" and 0 < seen[-1].done < seen[-1].total


def test_an_interrupt_keeps_the_layers_that_have_something(objective):
    def ask(block, run):
        if block.shape[0] > 20:
            return cv.spectral_density(block, probes=2, steps=30, run=run)
        return cv.eigsh(block, 15, block=1, run=run)  # has nothing before there are as many directions

    def stop(progress):
        if progress.done > 4:
            raise KeyboardInterrupt

    large = {name for name, place in objective.space.places().items() if len(place) > 20}
    with pytest.raises(cv.Interrupted) as caught:
        cv.by_layer(ask, cv.hessian(objective), run=cv.Run(progress=stop))
    assert 0 < len(large) < len(objective.space.places()) and set(caught.value.result) == large


def test_a_run_that_was_killed_goes_on_with_the_same_bits(objective, tmp_path):
    H, left = cv.hessian(objective), 5

    class Killed(BaseException):
        pass

    def product(rows):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return H.apply(rows)

    A = cv.MatrixFree(product, H.domain, symmetric=True, source={"operator": "H"})
    run, options = cv.Run(checkpoint=tmp_path / "c"), {"probes": 2, "steps": 12}
    with pytest.raises(Killed):
        cv.by_layer(cv.spectral_density, A, run=run, **options)
    left = 8
    resumed = cv.by_layer(cv.spectral_density, A, run=run, **options)
    whole = cv.by_layer(cv.spectral_density, H, **options)
    assert all(torch.equal(resumed[name].nodes, whole[name].nodes) for name in whole)


def test_results_are_saved_and_loaded_whole(objective, tmp_path):
    result = cv.by_layer(cv.spectral_density, cv.hessian(objective), probes=2, steps=4)
    loaded = cv.Result.load(result.save(tmp_path))
    assert loaded.names == result.names and str(loaded) == str(result)
    for name in result:
        assert torch.equal(loaded[name].nodes, result[name].nodes)
        assert loaded[name].origin == result[name].origin


def test_what_is_no_matrix_of_a_model_is_refused():
    with pytest.raises(ValueError, match="over the parameters of a model"):
        cv.by_layer(cv.trace, cv.Diagonal(torch.ones(3)))


def test_groups_without_parameters_are_refused(objective):
    with pytest.raises(cv.BadObjective, match=r"No trainable parameter matches 'nothing\.\*'"):
        cv.by_layer(cv.trace, cv.hessian(objective), by={"a": "nothing.*"})
    with pytest.raises(ValueError, match="by names no group"):
        cv.by_layer(cv.trace, cv.hessian(objective), by={})
    with pytest.raises(ValueError, match="by is 'layer'"):
        objective.space.places("module")
