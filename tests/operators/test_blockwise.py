"""Blocks by layer, parameter and group are those of the dense matrix."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from objectives import Case, zoo

import curvature as cv

ZOO = pytest.mark.parametrize("case", zoo(), ids=str)
MATRICES = [cv.hessian, cv.ggn, cv.empirical_fisher, partial(cv.kfac, fisher="type-2"), cv.ggn_diagonal]


def indices(objective: cv.Objective, names: list[str]) -> torch.Tensor:
    index = objective.space.named(torch.arange(objective.space.size))
    return torch.cat([index[name].reshape(-1) for name in names])


@ZOO
@pytest.mark.parametrize("by", ["layer", "parameter"])
def test_blocks_are_those_of_the_dense_matrix(case: Case, by):
    objective = case.objective((1, 5, len(case.inputs) - 6))
    A, H = cv.blockwise(cv.hessian, objective, by=by), cv.hessian(objective).dense()
    expected = torch.zeros_like(H)
    covered = []
    for name, block in A.blocks.items():
        root = type(case.module).__name__
        own = [n for n in objective.space.names if name == (n if by == "parameter" else n.rpartition(".")[0] or root)]
        at = indices(objective, own)
        covered += own
        expected[at[:, None], at] = H[at[:, None], at]
        torch.testing.assert_close(block.dense(), H[at[:, None], at], rtol=1e-10, atol=1e-12)
    assert sorted(covered) == sorted(objective.space.names)
    torch.testing.assert_close(A.dense(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("matrix", MATRICES)
def test_blocks_of_every_matrix(matrix):
    objective = zoo()[1].objective((4, 5))
    dense = matrix(objective).dense()
    for name, block in cv.blockwise(matrix, objective).blocks.items():
        at = indices(objective, [n for n in objective.space.names if n.startswith(name)])
        torch.testing.assert_close(block.dense(), dense[at[:, None], at], rtol=1e-10, atol=1e-12)


def test_groups_of_parameters_and_layers():
    objective = next(case for case in zoo() if case.name == "tied-head").objective()
    A = cv.blockwise(cv.ggn, objective, by={"embedding": "embedding", "rest": ["middle.*", "norm"], "none": "head"})
    assert list(A.blocks) == ["embedding", "rest"]  # what is empty has no block
    at = indices(objective, ["middle.weight", "middle.bias", "norm.weight", "norm.bias"])
    dense = cv.ggn(objective).dense()
    torch.testing.assert_close(A.blocks["rest"].dense(), dense[at[:, None], at], rtol=1e-10, atol=1e-12)


def test_the_model_is_checked_once():
    objective = zoo()[1].objective()
    A = cv.blockwise(cv.hessian, objective)
    passes = objective.meter.passes
    A.apply(A.domain.draw(1, seed=0))
    assert objective.meter.passes - passes == len(A.blocks)
    assert all(block.objective.check() == objective.check() for block in A.blocks.values())


@pytest.mark.parametrize(
    "by, error, words",
    [
        ({"some": "0.*"}, cv.BadObjective, "belongs to one group, but 2.weight is in 0, 2.bias is in 0"),
        ({"all": "*", "first": "0"}, cv.BadObjective, "0.weight is in 2"),
        ("tensor", ValueError, "by is 'layer', 'parameter' or a mapping"),
    ],
)
def test_groups_that_do_not_fit_are_refused(by, error, words):
    with pytest.raises(error, match=words):
        cv.blockwise(cv.hessian, zoo()[1].objective(), by=by)


def test_a_glob_may_name_a_layer():
    module = torch.nn.ModuleDict({"a": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))})
    module.forward = lambda x: module["a"](x)
    data = torch.randn(3, 2), torch.randn(3, 2)
    for select, expected in {
        "a.1": ["a.1.weight", "a.1.bias"],
        "a": 4,
        "*.0": ["a.0.weight", "a.0.bias"],
        "a.0.weight": ["a.0.weight"],
        "*.bias": ["a.0.bias", "a.1.bias"],
    }.items():
        names = cv.Objective.of(module, "mse", data, select=select).space.names
        assert len(names) == expected if isinstance(expected, int) else list(names) == expected
    with pytest.raises(cv.BadObjective, match=r"No trainable parameter matches 'a\.2'"):
        cv.Objective.of(module, "mse", data, select="a.2")
