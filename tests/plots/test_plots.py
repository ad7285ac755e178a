"""Pictures: what is drawn is what the result holds, on the axes that were given, and no global state is touched."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import curvature as cv
from curvature.plots import compare, interactive
from curvature.plots.spectrum import _backward, _forward


@pytest.fixture(scope="module")
def density() -> cv.SpectralDensity:
    torch.manual_seed(0)
    eigenvalues = torch.cat([torch.tensor([-40.0, 30.0, 100.0]), torch.randn(197)]).double()
    return cv.spectral_density(cv.Diagonal(eigenvalues), probes=4, steps=30)


def axes():
    return Figure().add_subplot()


def test_the_density_is_drawn_on_the_given_axes_with_units_and_legend(density):
    ax = axes()
    assert density.plot(ax) is ax
    assert ax.get_xlabel() and ax.get_ylabel()
    assert "200 eigenvalues" in ax.get_title() and "negative" in ax.get_title()
    labels = " ".join(text.get_text() for text in ax.get_legend().get_texts())
    for word in ("95 % band", "bulk", "outliers", "noise floor"):
        assert word in labels


def test_the_curve_is_the_density_of_the_result(density):
    ax = axes()
    density.plot(ax)
    line = max(ax.get_lines(), key=lambda line: len(line.get_xdata()))
    t = torch.from_numpy(np.array(line.get_xdata()))
    expected = density.density(t).value.numpy()
    shown = expected > 0.5 / density.size
    np.testing.assert_allclose(np.array(line.get_ydata())[shown], expected[shown])


def test_the_density_and_the_outliers_hold_all_mass(density):
    unit = density.unit
    ends = 3 * density.nodes[0].item(), 3 * density.nodes[-1].item()
    low, high = (float(_forward(np.array(t), unit)) for t in ends)
    s = torch.linspace(low, high, 20001, dtype=torch.float64)
    points = torch.from_numpy(_backward(s.numpy(), unit))
    mass = torch.trapezoid(density.density(points).value, s)
    torch.testing.assert_close(mass, torch.tensor(1 - len(density.outliers) / density.size).double(), atol=1e-3, rtol=0)


def test_outliers_stand_where_their_eigenvalues_are(density):
    assert density.outliers.tolist() == pytest.approx([-40.0, 30.0, 100.0], rel=1e-9)
    ax = axes()
    density.plot(ax)
    texts = {text.get_text() for text in ax.texts}
    assert {"100", "30", "-40"} <= texts


def test_the_axis_maps_back_and_forth():
    t = np.array([-7.0, -1e-5, 0.0, 1e-9, 2.5])
    np.testing.assert_allclose(_backward(_forward(t, 1e-4), 1e-4), t, rtol=1e-12, atol=1e-18)


def test_eigenpairs_and_estimates_have_pictures():
    A = cv.Diagonal(torch.arange(1.0, 40.0).double())
    pairs = cv.eigsh(A, 3)
    ax = pairs.plot(axes())
    assert len(ax.containers) == 1
    estimate = cv.trace(cv.Dense(torch.diag(torch.arange(1.0, 40.0))))
    assert "95%" in estimate.plot(axes()).get_ylabel()


def test_a_picture_is_written_to_a_file_without_a_figure_left_open(density, tmp_path):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    for name in ("a.png", "a.svg", "a.pdf"):
        assert density.save_picture(tmp_path / name).stat().st_size > 1000
    assert pyplot.get_fignums() == before


def test_new_axes_belong_to_pyplot(density):
    from matplotlib import pyplot

    ax = density.plot()
    assert ax.figure.number in pyplot.get_fignums()
    pyplot.close(ax.figure)


def test_an_interrupted_density_says_so(density):
    import dataclasses

    ax = axes()
    dataclasses.replace(density, complete=False).plot(ax)
    assert "interrupted" in ax.get_title()


@pytest.mark.parametrize("eigenvalues", [[1.0] * 5, [0.0] * 5, [-3.0, -2.0, -1.0, 0.0], [1e-30, 2e-30, 1e30]])
def test_degenerate_spectra_can_be_drawn(eigenvalues, tmp_path):
    density = cv.spectral_density(cv.Diagonal(torch.tensor(eigenvalues).double()), probes=2, steps=5)
    assert density.save_picture(tmp_path / "a.png").exists()


def test_landscapes_have_pictures():
    objective = cv.demo("digits").first(60)
    directions = cv.random_directions(objective, 3)
    ax = cv.line(objective, directions[0], points=5, accuracy=True, held_out=list(objective.first(20).batches)).plot(
        axes()
    )
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert labels == {"loss", "held-out loss", "accuracy", "held-out accuracy"}
    found = cv.plane(objective, directions[:2], points=5)
    ax = found.plot(axes(), lowest=0.0, highest=4.0)
    assert ax.get_xlabel() and ax.get_aspect() == 1.0
    with pytest.raises(TypeError, match="no flat picture"):
        cv.volume(objective, directions, points=3).plot(axes())


def test_a_surface_has_the_losses_as_heights():
    objective = cv.demo("digits").first(60)
    found = cv.plane(objective, cv.random_directions(objective, 2), points=5)
    ax = Figure().add_subplot(projection="3d")
    assert found.plot(ax) is ax
    assert ax.get_zlabel() == "loss"
    low, high = ax.get_zlim()
    assert low <= float(found.loss.min()) and high >= float(found.loss.max())
    cut = found.plot(Figure().add_subplot(projection="3d"), highest=found.centre + 0.1)
    assert cut.get_zlim()[1] < high
    assert found.plot(surface=True).name == "3d"


def test_runs_are_drawn_in_planes_and_by_themselves():
    objective = cv.demo("digits").first(60)
    steps = torch.randn(6, objective.space.size, generator=torch.Generator().manual_seed(0))
    rows = objective.position + 0.1 * steps.cumsum(0)
    run = cv.trajectory(objective, rows)
    ax = run.plot(axes())
    np.testing.assert_array_equal(ax.get_lines()[0].get_xydata(), run.coordinates.numpy())
    assert "a random walk: 8" in ax.get_xlabel()
    ground = cv.plane(objective.at(run.centre), run.directions, points=5, radius=9.0)
    drawn = ground.plot(axes(), trajectory=rows).get_lines()[0].get_xydata()
    np.testing.assert_allclose(drawn, run.coordinates.numpy(), atol=1e-4)
    with pytest.raises(TypeError, match="one component has no picture"):
        cv.trajectory(objective, objective.position + steps, count=1).plot(axes())


def test_landscapes_are_compared_on_one_scale():
    objective = cv.demo("digits").first(60)
    directions = cv.random_directions(objective, 2)
    lines = {name: cv.line(objective, row, points=5) for name, row in zip("ab", directions, strict=True)}
    figure = compare(lines)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b"]
    planes = {
        "near": cv.plane(objective, directions, points=5, radius=0.2),
        "far": cv.plane(objective, directions, points=5),
    }
    figure = compare(planes)
    assert [ax.get_title() for ax in figure.axes[:2]] == ["near", "far"]
    bounds = [ax.collections[0].get_clim() for ax in figure.axes[:2]]
    assert bounds[0] == bounds[1] and len(figure.axes) == 3  # one bar for both
    with pytest.raises(ValueError, match="all lines or all planes"):
        compare({**lines, **planes})


def test_landscapes_can_be_turned_in_a_browser():
    pytest.importorskip("plotly")
    objective = cv.demo("digits").first(60)
    directions = cv.random_directions(objective, 3)
    line = cv.line(objective, directions[0], points=5)
    np.testing.assert_array_equal(interactive(line).data[0].y, line.loss.numpy())
    plane = cv.plane(objective, directions[:2], points=5)
    drawn = interactive(plane).data[0]
    np.testing.assert_array_equal(drawn.z, plane.loss.numpy().T)  # plotly has a row for every y
    volume = cv.volume(objective, directions, points=3)
    drawn = interactive(volume).data[0]
    assert drawn.text[1] == f"{float(volume.loss[0, 0, 1]):.4g}" and drawn.z[1] == 0.0


def test_without_plotly_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    objective = cv.demo("digits").first(60)
    with pytest.raises(ImportError, match=r"curvature-toolkit\[interactive\]"):
        interactive(cv.line(objective, cv.random_directions(objective, 1)[0], points=3))
