"""FISH masks: against the closed-form diagonal of softmax regression, and in a training loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from objectives import softmax_regression
from torch import nn

import curvature as cv


def closed_form(kind: str) -> torch.Tensor:
    """Of the weights (c, d) and biases (c,): the mean of the squared derivatives by the logits times those of inputs."""
    case = softmax_regression()
    p = case.module(case.inputs).softmax(-1).detach()
    y = F.one_hot(case.targets, 4)
    squares = p * (1 - p) if kind == "type-2" else (p - y).square()
    inputs = torch.cat([case.inputs, torch.ones(len(p), 1)], 1)
    diagonal = squares.T @ inputs.square() / len(p)
    return torch.cat([diagonal[:, :-1].flatten(), diagonal[:, -1]])


@pytest.mark.parametrize("kind", ["empirical", "type-2"])
@pytest.mark.parametrize("count", [1, 5, 15])
def test_the_largest_entries_of_the_closed_form_are_kept(kind, count):
    torch.manual_seed(3)
    expected = closed_form(kind)
    torch.manual_seed(3)
    found = cv.fish_mask(softmax_regression().objective((4, 5)), count / 16, fisher=kind)
    torch.testing.assert_close(found.fisher, expected, rtol=1e-10, atol=1e-13)
    assert set(found.mask.nonzero().flatten().tolist()) == set(expected.topk(count).indices.tolist())
    assert found.cost.passes > 0


def test_all_are_kept_where_all_are_asked_for():
    assert cv.fish_mask(softmax_regression().objective(), 1.0).mask.all()


def test_of_equal_entries_the_first_are_kept():
    net = nn.Linear(4, 3, bias=False).double()
    nn.init.zeros_(net.weight)
    x = torch.tensor([[1.0, 2.0, 1.0, 2.0]]).double()
    objective = cv.Objective.of(net, "cross-entropy", (x, torch.zeros(1, dtype=torch.long)))
    found = cv.fish_mask(objective, 3 / 12, fisher="type-2")  # the same for every class: all rows are equal
    assert found.mask.nonzero().flatten().tolist() == [1, 3, 5]


def network() -> tuple[nn.Sequential, cv.Objective]:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(30, 6).double(), torch.randint(0, 3, (30,))
    return net, cv.Objective.of(net, "cross-entropy", (x, y))


def test_what_is_always_kept_comes_first_and_counts():
    _, objective = network()
    found = cv.fish_mask(objective, 30 / 83, always="2")
    named = objective.space.named(found.mask)
    assert named["2.weight"].all() and named["2.bias"].all()
    assert int(found.mask.sum()) == 30 and found.always == 27
    rest = torch.cat([objective.space.named(found.fisher)[name].flatten() for name in ("0.weight", "0.bias")])
    chosen = torch.cat([named[name].flatten() for name in ("0.weight", "0.bias")])
    assert set(chosen.nonzero().flatten().tolist()) == set(rest.topk(3).indices.tolist())


def test_sampled_targets_follow_the_seed():
    _, objective = network()
    first, same, other = (cv.fish_mask(objective, 0.2, fisher="sampled", seed=s).fisher for s in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_training_through_hooks_moves_what_is_kept_and_nothing_else():
    net, objective = network()
    found = cv.fish_mask(objective, 0.1)
    for name, kept in objective.space.named(found.mask).items():
        net.get_parameter(name).register_hook(kept.mul)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x, y = next(iter(objective.batches))
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    before = objective.position
    after = objective.space.flatten(dict(net.named_parameters())[name].detach() for name in objective.space.names)
    assert torch.equal(before != after, found.mask)


def test_a_result_is_saved_loaded_and_shown(tmp_path):
    _, objective = network()
    found = cv.fish_mask(objective, 0.5, always=["2.bias"])
    loaded = cv.Mask.load(found.save(tmp_path))
    assert torch.equal(loaded.mask, found.mask) and torch.equal(loaded.fisher, found.fisher)
    assert "42 of 83 parameters" in str(loaded) and "3 always" in str(loaded)
    assert loaded.origin.options["always"] == ["2.bias"]


def test_bad_input_is_refused():
    _, objective = network()
    for keep in (0.0, 1.5):
        with pytest.raises(ValueError, match="keep is a share, above 0 and up to 1"):
            cv.fish_mask(objective, keep)
    with pytest.raises(ValueError, match=r"27 parameters are always kept, but a share of 0\.1 is 8 of 83"):
        cv.fish_mask(objective, 0.1, always="2")
    with pytest.raises(cv.BadObjective, match="No trainable parameter matches 'head'"):
        cv.fish_mask(objective, 0.1, always="head")
    with pytest.raises(TypeError, match="fish_mask takes an Objective"):
        cv.fish_mask(nn.Linear(2, 2))  # pyright: ignore
