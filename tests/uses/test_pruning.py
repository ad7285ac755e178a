"""Optimal brain surgery against least squares without the removed columns, which is what it is for a quadratic loss."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from matrices import free, linspace, rotated, tensor
from torch import nn

import curvature as cv
from curvature.linalg.outer import OuterBlocks
from curvature.uses.pruning import principal

N = 8


def regression(dtype: torch.dtype = torch.float64) -> tuple[cv.Objective, torch.Tensor, torch.Tensor]:
    """Least squares at its minimum, its inputs and its targets."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, N, generator=generator, dtype=torch.float64) @ rotated(linspace(0.3, 2, N))
    targets = inputs @ torch.randn(N, 1, generator=generator, dtype=torch.float64) + torch.randn(
        40, 1, generator=generator, dtype=torch.float64
    )
    net = nn.Linear(N, 1, bias=False, dtype=dtype)
    net.load_state_dict({"weight": refitted(inputs, targets, torch.ones(N, dtype=torch.bool)).unsqueeze(0)})
    return cv.Objective.of(net, cv.SquaredError(scale=1), (inputs.to(dtype), targets.to(dtype))), inputs, targets


def refitted(inputs: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The least squares solution with the weights that are kept."""
    weights = torch.zeros(len(kept), dtype=torch.float64)
    weights[kept] = torch.linalg.lstsq(inputs[:, kept], targets, driver="gelsd").solution.flatten()
    return weights


def without(index: int) -> torch.Tensor:
    return torch.arange(N) != index


def hessian_inverse(objective: cv.Objective) -> cv.LinearOperator:
    return cv.inverse(cv.Dense(cv.hessian(objective).dense(), psd=True))


def excess(objective: cv.Objective, params: torch.Tensor) -> float:
    return objective.at(params).value() - objective.value()


def test_the_saliency_is_what_the_loss_rises_by_without_the_weight():
    objective, inputs, targets = regression()
    found = cv.saliency(objective, hessian_inverse(objective))
    risen = [excess(objective, refitted(inputs, targets, without(a))) for a in range(N)]
    torch.testing.assert_close(found.value, tensor(*risen), rtol=1e-12, atol=1e-12)
    assert found.dof == 0


@pytest.mark.parametrize("method", ["joint", "separate"])
def test_one_weight_goes_at_the_price_of_its_saliency(method):
    objective, inputs, targets = regression()
    pruned = cv.prune(objective, hessian_inverse(objective), sparsity=1 / N, method=method)
    least = int(pruned.saliency.argmin())
    assert not pruned.mask[least] and pruned.params[least] == 0 and pruned.sparsity == 1 / N
    torch.testing.assert_close(pruned.params, refitted(inputs, targets, without(least)), rtol=1e-12, atol=1e-12)
    assert excess(objective, pruned.params) == pytest.approx(float(pruned.saliency[least]), abs=1e-12)
    assert pruned.increase == pytest.approx(float(pruned.saliency[least]), abs=1e-12)


@pytest.mark.parametrize("count", [0, 2, 5, N])
def test_of_many_the_rest_is_refitted_and_the_increase_predicted(count):
    objective, inputs, targets = regression()
    pruned = cv.prune(objective, hessian_inverse(objective), sparsity=count / N)
    assert int((~pruned.mask).sum()) == count and torch.equal(pruned.params != 0, pruned.mask)
    torch.testing.assert_close(pruned.params, refitted(inputs, targets, pruned.mask), rtol=1e-11, atol=1e-12)
    assert excess(objective, pruned.params) == pytest.approx(pruned.increase, abs=1e-12)


def test_separate_removals_add_up_their_steps_and_know_nothing_of_each_other():
    objective, *_ = regression()
    H, w = hessian_inverse(objective), objective.position
    joint, separate = (cv.prune(objective, H, sparsity=0.5, method=m) for m in ("joint", "separate"))
    dense = H.dense()
    steps = [-w[a] * dense[:, a] / dense[a, a] for a in (~separate.mask).nonzero().flatten()]
    torch.testing.assert_close(separate.params, (w + sum(steps)) * separate.mask, rtol=1e-12, atol=1e-12)
    assert torch.equal(joint.mask, separate.mask)
    assert excess(objective, separate.params) == pytest.approx(separate.increase, abs=1e-12)
    assert joint.increase < separate.increase


def test_rounds_keep_what_was_pruned_and_judge_the_rest_by_itself():
    objective, inputs, targets = regression()
    H = hessian_inverse(objective)
    first = cv.prune(objective, H, sparsity=3 / N)
    there = objective.at(first.params)
    for a in first.mask.nonzero().flatten().tolist():
        risen = excess(there, refitted(inputs, targets, first.mask & without(a)))
        assert float(cv.saliency(there, H).value[a]) == pytest.approx(risen, abs=1e-12)
    second = cv.prune(there, H, sparsity=6 / N)
    assert not (second.mask & ~first.mask).any() and second.sparsity == 6 / N
    assert (second.saliency[~first.mask] == 0).all()
    torch.testing.assert_close(second.params, refitted(inputs, targets, second.mask), rtol=1e-11, atol=1e-12)
    assert excess(there, second.params) == pytest.approx(second.increase, abs=1e-12)


def structures() -> dict[str, cv.LinearOperator]:
    """Positive definite matrices, each held in its own way."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, N, generator=generator, dtype=torch.float64)
    core = rotated(linspace(1, 2, 3))
    outer = cv.Outer(rows, core, shift=0.5, psd=True)
    places = {"a": torch.tensor([6, 1, 3]), "b": slice(4, 6), "c": torch.tensor([0, 2, 7])}
    parts = {
        "a": cv.Outer(rows[:, :3].contiguous(), core, shift=0.3, psd=True),
        "b": cv.Dense(rotated(tensor(1, 3)), psd=True),
        "c": cv.Diagonal(tensor(1, 2, 5)),
    }
    factors = rotated(tensor(1, 2)), rotated(linspace(0.5, 3, 4), seed=7)
    stack = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)
    stack[-1, :, -1] = 0  # eight coordinates in blocks of three
    cores = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    vectors = torch.linalg.qr(rows.T).Q.T.contiguous()
    return {
        "dense": cv.Dense(rotated(linspace(0.2, 3, N)), psd=True),
        "diagonal": cv.Diagonal(linspace(0.2, 3, N)),
        "outer": outer,
        "low-rank": cv.LowRank(tensor(3, 2, 1), vectors, shift=0.2),
        "outer-blocks": OuterBlocks(stack, cores, shift=0.4, space=cv.Space(N, torch.float64), psd=True),
        "blocks": cv.BlockDiagonal(parts, places, cv.Space(N, torch.float64)),
        "kronecker": cv.Kronecker(*factors, psd=True),
        "identity": cv.identity(cv.Space(N, torch.float64)),
    }


@pytest.mark.parametrize("name", structures())
@pytest.mark.parametrize("method", ["joint", "separate"])
@pytest.mark.parametrize("zeros", [[], [2, 4, 6]])
def test_it_does_not_matter_how_the_inverse_is_held(name, method, zeros):
    objective, *_ = regression()
    start = objective.position.clone()
    start[zeros] = 0
    objective, H = objective.at(start), structures()[name]
    found = cv.prune(objective, H, sparsity=0.75, method=method)
    expected = cv.prune(objective, cv.Dense(H.dense(), psd=True), sparsity=0.75, method=method)
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.params, expected.params, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.saliency, expected.saliency, rtol=1e-10, atol=1e-12)
    assert found.increase == pytest.approx(expected.increase, rel=1e-9)


@pytest.mark.parametrize("name", structures())
def test_a_principal_submatrix_is_that_of_the_dense_matrix(name):
    A = structures()[name]
    for kept in ([0, 3, 4, 7], [4, 5], list(range(N)), []):
        mask = torch.zeros(N, dtype=torch.bool)
        mask[kept] = True
        torch.testing.assert_close(principal(A, mask).dense(), A.dense()[mask][:, mask])


def test_the_identity_is_pruning_by_magnitude_and_ties_go_by_index():
    net = nn.Linear(4, 1, bias=False).double()
    net.load_state_dict({"weight": tensor(0.5, -1, -0.5, 0.5).unsqueeze(0)})
    objective = cv.Objective.of(net, "mse", (torch.eye(4).double(), torch.zeros(4, 1).double()))
    pruned = cv.prune(objective, cv.identity(objective.space), sparsity=0.5)
    assert pruned.params.tolist() == [0, -1, 0, 0.5]
    assert pruned.increase == 0.25  # half the squares of what is gone


def weights_of_the_demo() -> cv.Objective:
    return cv.demo("digits").narrowed(lambda name, p: p.ndim > 1)


def test_on_a_trained_network_the_whole_matrix_beats_its_diagonal_and_that_magnitude():
    objective = weights_of_the_demo()
    fisher = cv.gradient_window(objective, 512).fisher
    diagonal = cv.ggn_diagonal(objective, fisher="empirical")
    inverses = cv.inverse(fisher, damping=1e-4), cv.inverse(diagonal, damping=1e-4), cv.identity(objective.space)
    losses = [objective.at(cv.prune(objective, H, sparsity=0.7).params).value() for H in inverses]
    assert all(1.1 * better < worse for better, worse in pairwise(losses))


def test_in_rounds_it_goes_further_and_biases_are_as_they_were():
    whole, objective = cv.demo("digits"), weights_of_the_demo()
    H = cv.inverse(cv.gradient_window(objective, 256).fisher, damping=1e-4)
    once = objective.at(cv.prune(objective, H, sparsity=0.9).params)
    kept = torch.ones(objective.space.size, dtype=torch.bool)
    for k in range(1, 5):
        window = cv.gradient_window(objective, 256, seed=k)
        pruned = cv.prune(objective, cv.inverse(window.fisher, damping=1e-4), sparsity=1 - 0.1 ** (k / 4))
        assert not (pruned.mask & ~kept).any() and torch.equal(pruned.params != 0, pruned.mask)
        moved = pruned.params != objective.position
        assert moved[pruned.mask].double().mean() > 0.95  # those of pixels that are always dark have no say
        objective, kept = objective.at(pruned.params), pruned.mask
    assert pruned.sparsity == pytest.approx(0.9, abs=1e-4)
    assert objective.value() < once.value() / 2
    for name, p in objective.complete(objective.params).items():
        assert name in objective.params or torch.equal(p, whole.params[name])


def test_float32_prunes_as_float64_does():
    results = []
    for dtype in (torch.float64, torch.float32):
        objective, *_ = regression(dtype)
        window = cv.gradient_window(objective, 40)
        results.append(cv.prune(objective, cv.inverse(window.fisher, damping=1e-3), sparsity=0.5))
    fine, coarse = results
    assert torch.equal(fine.mask, coarse.mask) and coarse.params.dtype == torch.float32
    torch.testing.assert_close(coarse.params.double(), fine.params, rtol=1e-4, atol=1e-5)


def test_a_result_is_saved_loaded_and_shown(tmp_path):
    objective, *_ = regression()
    pruned = cv.prune(objective, hessian_inverse(objective), sparsity=0.5)
    loaded = cv.Pruning.load(pruned.save(tmp_path))
    assert torch.equal(loaded.mask, pruned.mask) and loaded.increase == pruned.increase
    assert "4 of 8 weights" in str(loaded) and loaded.cost.products == 1
    assert loaded.origin.options["weights"] == objective.fingerprint["model"]


def test_bad_input_is_refused():
    objective, *_ = regression()
    H = hessian_inverse(objective)
    with pytest.raises(ValueError, match="The inverse is 3 x 3, but the objective has 8 parameters"):
        cv.prune(objective, cv.Diagonal(tensor(1, 2, 3)), sparsity=0.5)
    with pytest.raises(ValueError, match="between 0 and 1, but got 90"):
        cv.prune(objective, H, sparsity=90)
    with pytest.raises(ValueError, match="method is 'joint' or 'separate', but got 'greedy'"):
        cv.prune(objective, H, sparsity=0.5, method="greedy")  # pyright: ignore
    there = objective.at(cv.prune(objective, H, sparsity=0.5).params)
    with pytest.raises(ValueError, match=r"0\.25 was asked for, but 0\.5 of all weights are zero"):
        cv.prune(there, H, sparsity=0.25)
    with pytest.raises(ValueError, match="All weights are zero"):
        cv.prune(objective.at(torch.zeros(N)), H, sparsity=0.5)
    with pytest.raises(TypeError, match="does not tell its diagonal"):
        cv.saliency(objective, free(rotated(linspace(1, 2, N))))
    with pytest.raises(ValueError, match=r"positive definite, but one entry of its diagonal is -1\. Give"):
        cv.saliency(objective, cv.Diagonal(torch.cat([tensor(-1), linspace(1, 2, N - 1)])))
    with pytest.raises(TypeError, match="prune takes an Objective, but got a Linear"):
        cv.prune(nn.Linear(N, 1), H, sparsity=0.5)  # pyright: ignore
