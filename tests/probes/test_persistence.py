"""Persistence diagrams: those of profiles whose minima and passes are known, and of grids that are flooded by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys

import pytest
import torch
from matrices import Stopping, linspace, tensor
from objectives import zoo
from torch import Tensor

import curvature as cv
from curvature.probes.persistence import Persistence, persistence

OBJECTIVE = next(case for case in zoo() if case.name == "regression").objective()
INF = math.inf


def landscape(loss: Tensor) -> cv.Landscape:
    """A landscape with these values."""
    ask = {1: cv.line, 2: cv.plane, 3: cv.volume}[loss.ndim]
    directions = cv.random_directions(OBJECTIVE, loss.ndim)
    return dataclasses.replace(ask(OBJECTIVE, directions[0] if loss.ndim == 1 else directions, points=3), loss=loss)


def found_in(loss: Tensor) -> Persistence:
    pytest.importorskip("gudhi")
    return persistence(landscape(loss))


def pairs(found: Persistence, dimension: int = 0) -> list[tuple[float, float]]:
    mine = found.dimensions == dimension
    return sorted(zip(found.births[mine].tolist(), found.deaths[mine].tolist(), strict=True))


def flooded(loss: Tensor) -> list[tuple[float, float]]:
    """Points under water one by one, lowest first: a lake that meets a deeper one is no more."""
    dry = loss.nan_to_num(nan=INF, posinf=INF, neginf=-INF)
    places = [place for place in itertools.product(*map(range, loss.shape)) if float(dry[place]) < INF]
    places.sort(key=lambda place: float(loss[place]))
    lake: dict[tuple[int, ...], tuple[int, ...]] = {}
    ended = []

    def deepest(place):
        while lake[place] != place:
            place = lake[place]
        return place

    for place in places:
        lake[place] = place
        for axis, step in itertools.product(range(loss.ndim), (-1, 1)):
            other = (*place[:axis], place[axis] + step, *place[axis + 1 :])
            if other in lake and deepest(other) != deepest(place):
                deep, shallow = sorted((deepest(other), deepest(place)), key=places.index)
                lake[shallow] = deep
                ended.append((float(loss[shallow]), float(loss[place])))
    endless = [(float(loss[place]), INF) for place in lake if lake[place] == place]
    return sorted([(birth, death) for birth, death in ended if death > birth] + endless)


def test_the_minima_of_a_profile_and_the_passes_between_them():
    found = found_in(tensor(5, 1, 3, 0, 4, 2, 6))
    assert pairs(found) == [(0, INF), (1, 3), (2, 4)]
    assert found.lifetimes.tolist() == [INF, 2, 2] and found.total() == 4
    assert [found.minima(threshold) for threshold in (0, 1.9, 2, 1e9)] == [3, 3, 1, 1]
    assert "2, 2; 4 in all" in str(found)


def test_one_valley_has_one_minimum_and_no_barrier():
    found = found_in(tensor(4, 3, 1, 0, 1, 2, 9))
    assert pairs(found) == [(0, INF)] and found.total() == 0 and found.minima(1e9) == 1
    edge = found_in(tensor(0, 3, 1))  # the edge of the grid is a minimum of the grid
    assert pairs(edge) == [(0, INF), (1, 3)]
    assert pairs(found_in(tensor(1, 1, 1))) == [(1, INF)]


@pytest.mark.parametrize("shape", [(41,), (9, 9), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("holes", [False, True], ids=["whole", "holes"])
def test_basins_are_those_of_a_flood(shape, holes):
    loss = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if holes:
        loss[loss > 0.8], loss[loss < -1.2] = math.nan, INF
    found = found_in(loss)
    assert pairs(found) == flooded(loss)
    assert found.outside == int((~loss.isfinite()).sum()) and (found.outside > 0) == holes
    assert ("not finite" in str(found)) == holes
    assert (found.lifetimes[:-1] >= found.lifetimes[1:]).all()


def test_a_wall_of_what_is_not_a_number_separates_for_good():
    found = found_in(tensor(2, 0, 2, math.nan, 2, 1, 2))
    assert pairs(found) == [(0, INF), (1, INF)] and found.outside == 1
    assert pairs(found_in(tensor(2, -INF, 3, 1, 5))) == [(-INF, INF), (1, 3)]
    nothing = found_in(torch.full((3, 3), math.nan).double())
    assert not len(nothing.births) and nothing.minima() == 0 and nothing.outside == 9


def test_a_ring_around_a_hill_is_a_loop_and_a_shell_a_void():
    x, y = torch.meshgrid(linspace(-2, 2, 41), linspace(-2, 2, 41), indexing="ij")
    found = found_in((x.square() + y.square() - 1).square())  # 1 on the hill in the middle
    (birth, death), *others = pairs(found, 1)
    assert death == pytest.approx(1) and birth < 0.02 and all(b < 0.03 for b, _ in others)
    assert float(found.lifetimes[(found.dimensions == 1) & (found.births < 0.02)].max()) > 0.98
    block = torch.zeros(5, 5, 5).double()
    block[2, 2, 2] = 3.0
    shell = found_in(block)
    assert pairs(shell, 2) == [(0, 3)] and pairs(shell) == [(0, INF)] and shell.total(2) == 3
    assert "loops and shells  1" in str(shell)


def test_small_errors_of_the_values_make_small_ones_of_barriers():
    loss = (linspace(-1, 1, 1001) * 12).cos() + linspace(-1, 1, 1001)
    noisy = loss + 0.01 * (2 * torch.rand(1001, generator=torch.Generator().manual_seed(1)).double() - 1)
    high, low = found_in(loss), found_in(noisy)
    assert low.minima() > low.minima(0.02) == high.minima(0.02)
    deep = slice(1, high.minima())
    torch.testing.assert_close(low.lifetimes[deep], high.lifetimes[deep], rtol=0, atol=0.02)


def test_an_interrupted_landscape_has_the_diagram_of_what_is_known():
    pytest.importorskip("gudhi")
    with pytest.raises(cv.Interrupted) as caught:
        directions = cv.random_directions(OBJECTIVE, 2)
        cv.plane(OBJECTIVE, directions, points=15, run=cv.Run(progress=Stopping(0)))
    part = caught.value.result
    found = persistence(part)
    assert not found.complete and found.outside == int(part.loss.isnan().sum()) > 0
    assert pairs(found) == flooded(part.loss)


def test_it_says_where_it_came_from_and_is_saved(tmp_path):
    found = found_in(tensor(5, 1, 3, 0, 4, 2, 6))
    assert found.origin.options["of"] == "line" and found.origin.operator["model"]
    loaded = Persistence.load(found.save(tmp_path))
    assert str(loaded) == str(found) and torch.equal(loaded.deaths, found.deaths)


def test_without_gudhi_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gudhi.cubical_complex", None)
    with pytest.raises(ImportError, match=r"pip install \"curvature-toolkit\[topology\]\""):
        persistence(landscape(tensor(1, 0, 1)))


def test_anything_but_a_landscape_is_refused():
    with pytest.raises(TypeError, match="takes a Landscape"):
        persistence(torch.zeros(3))  # pyright: ignore[reportArgumentType]
