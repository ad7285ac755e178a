"""Influence against what happens when examples are left out, and what it is for: finding wrong labels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matrices import Stopping
from objectives import zoo
from scipy.stats import spearmanr
from torch import Tensor, nn

import curvature as cv
from curvature.assets.data import digits

L2 = 0.02


def newton(objective: cv.Objective, steps: int = 30) -> cv.Objective:
    """The objective at its minimum, which is the only one."""
    for _ in range(steps):
        gradient = objective.gradient()
        if float(gradient.norm()) < 1e-13:
            break
        matrix = cv.hessian(objective).dense()
        flat = objective.position
        objective = objective.at(flat - torch.linalg.solve(matrix, gradient))
    return objective


def logistic(count: int = 60) -> tuple[cv.Objective, cv.Objective]:
    """Softmax regression with a regulariser, at its minimum, and a test set."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count + 40, 5, generator=generator).double()
    y = (x[:, :3] + torch.randn(count + 40, 3, generator=generator)).argmax(1)
    module = nn.Linear(5, 3).double()
    train = newton(cv.Objective.of(module, "cross-entropy", (x[:count], y[:count]), batch_size=25, l2=L2))
    return train, replace(train.on((x[count:], y[count:])), l2=0.0)


def without(train: cv.Objective, index: int) -> cv.Objective:
    """The objective without an example, a mean over as many terms as before, at its minimum."""
    batches = list(train.batches)
    x, y = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    keep = torch.arange(len(x)) != index
    count = len(x)
    # a mean over one term fewer: l2 in proportion, which scales the whole by count / (count - 1)
    module = nn.Linear(5, 3).double()
    objective = cv.Objective.of(module, "cross-entropy", [(x[keep], y[keep])], l2=L2 * count / (count - 1))
    return newton(objective.at(dict(train.params)))


def test_scores_are_the_products_they_name():
    for name in ("classifier", "convolution", "tokens", "attention"):
        case = next(case for case in zoo() if case.name == name)
        train = case.objective((3, len(case.inputs) - 3))
        rows = cv.example_gradients(train)
        A = cv.ggn(train).dense() + 0.1 * torch.eye(rows.shape[1]).double()
        terms = float(rows.sum(0).norm() / train.gradient().norm())
        exact = rows @ torch.linalg.solve(A, rows.T) / terms
        inverse = cv.inverse(cv.ggn(train), damping=0.1, rtol=1e-12)
        torch.testing.assert_close(cv.influence(train, train, inverse).scores, exact, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(cv.self_influence(train, inverse).scores, exact.diagonal(), rtol=1e-8, atol=1e-10)
        total = cv.influence(train, train.gradient(), inverse).scores
        torch.testing.assert_close(total, exact.sum(1) / terms, rtol=1e-8, atol=1e-10)


def test_it_predicts_what_leaving_out_does_to_a_convex_model():
    train, test = logistic(200)
    scores = cv.influence(train, test.gradient(), cv.inverse(cv.hessian(train))).scores
    some, before = range(0, 200, 5), test.value()
    actual = torch.tensor([test.at(dict(without(train, i).params)).value() - before for i in some])
    predicted = scores[list(some)]
    assert spearmanr(predicted, actual).statistic > 0.99
    assert float((predicted - actual).norm() / actual.norm()) < 0.15


def test_linear_regression_differs_from_leaving_out_by_the_leverage():
    """theta without i - theta = -(X^T X)^-1 x_i r_i / (1 - h_i): the estimate lacks the denominator, and nothing else."""
    torch.manual_seed(0)
    x = torch.randn(20, 3).double()
    y = x @ torch.tensor([1.0, -2.0, 0.5]).double() + 0.3 * torch.randn(20).double()
    w = torch.linalg.lstsq(x, y.unsqueeze(1)).solution[:, 0]
    objective = cv.Objective.of(nn.Linear(3, 1, bias=False).double(), "mse", [(x, y.unsqueeze(1))]).at(
        {"weight": w[None]}
    )
    directions = torch.eye(3).double()
    moved = cv.influence(objective, directions, cv.inverse(cv.Dense(cv.ggn(objective).dense()))).scores
    leverage = (x @ torch.linalg.inv(x.T @ x) * x).sum(1)
    for i in range(20):
        keep = torch.arange(20) != i
        alone = torch.linalg.lstsq(x[keep], y[keep].unsqueeze(1)).solution[:, 0]
        torch.testing.assert_close(moved[i], (alone - w) * (1 - leverage[i]), rtol=1e-9, atol=1e-12)


def flipped(share: float = 0.05) -> tuple[cv.Objective, Tensor]:
    """A network trained on digits of which some have a wrong label; which ones."""
    pixels, labels = digits()
    x, y = pixels[:1000].flatten(1), labels[:1000].clone()
    generator = torch.Generator().manual_seed(1)
    wrong = torch.randperm(1000, generator=generator)[: int(1000 * share)]
    y[wrong] = (y[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3, weight_decay=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return cv.Objective.of(net, "cross-entropy", (x, y), batch_size=200), wrong


def test_wrong_labels_have_the_largest_self_influence():
    objective, wrong = flipped()
    window = cv.GradientWindow(512, objective.space)
    window.add(cv.example_gradients(objective)[:512])
    inverses = {
        "kfac": cv.inverse(cv.kfac(objective, fisher="type-2"), damping=1e-2),
        "ekfac": cv.inverse(cv.ekfac(objective, fisher="type-2"), damping=1e-2),
        "m-fac": cv.inverse(window.fisher, damping=1e-2),
    }
    for name, inverse in inverses.items():
        found = set(cv.self_influence(objective, inverse).top(100).tolist())
        share = len(found & set(wrong.tolist())) / len(wrong)
        assert share >= 0.7, (name, share)


def test_it_goes_on_where_it_was_and_returns_what_it_has(tmp_path):
    train, test = logistic()
    inverse = cv.inverse(cv.ggn(train), damping=0.1)
    whole = cv.influence(train, test, inverse)
    assert whole.scores.shape == (60, 40) and whole.cost.passes >= 1
    path = tmp_path / "scores.ckpt"
    with pytest.raises(cv.Interrupted) as caught:
        cv.influence(train, test, inverse, run=cv.Run(progress=Stopping(1), checkpoint=path))
    part = caught.value.result
    assert not part.complete and torch.equal(part.scores, whole.scores[:50])
    products = []
    resumed = cv.influence(train, test, inverse, run=cv.Run(checkpoint=path, progress=products.append))
    assert torch.equal(resumed.scores, whole.scores) and resumed.complete
    other = train.at(train.space.draw(1, seed=0)[0])
    with pytest.raises(cv.BadFile):
        cv.influence(other, other.on(list(test.batches)), inverse, run=cv.Run(checkpoint=path))


@pytest.mark.parametrize("ask", [cv.influence, lambda train, test, *a, **k: cv.self_influence(train, *a, **k)])
def test_a_checkpoint_of_another_inverse_is_refused(ask, tmp_path):
    """Of matrices that say nothing of what they hold only products can tell."""
    train, test = logistic()
    ones = torch.ones(train.space.size, dtype=torch.float64)
    ask(train, test, cv.Diagonal(ones), run=cv.Run(checkpoint=tmp_path / "a"))
    with pytest.raises(cv.BadFile):
        ask(train, test, cv.Diagonal(2 * ones), run=cv.Run(checkpoint=tmp_path / "a"))


def test_an_interrupt_keeps_the_shape_of_a_single_test():
    train, test = logistic()
    with pytest.raises(cv.Interrupted) as caught:
        cv.influence(train, test.gradient(), cv.identity(train.space), run=cv.Run(progress=Stopping(0)))
    assert caught.value.result.scores.shape == (25,)


def test_summary_and_top():
    train, test = logistic()
    scores = cv.influence(train, test.gradient(), cv.identity(train.space), top=2)
    order = scores.scores.argsort(descending=True)
    assert scores.top(2).tolist() == order[:2].tolist()
    assert scores.ranked.tolist() == order[[0, 1, -2, -1]].tolist()
    assert torch.equal(scores.ranked_scores, scores.scores[scores.ranked])
    assert "60" in str(scores) and [row for row in str(scores).splitlines() if f"example {order[-1]} " in row]
    each = cv.influence(train, test, cv.identity(train.space), top=1)
    assert each.ranked.shape == (2, 40) and "40" in str(each)
    assert each.ranked[0].tolist() == each.scores.argmax(0).tolist()
    assert f"({int(each.scores[:, 1].argmin())})" in each.summary()["test 1"]
    own = cv.self_influence(train, cv.identity(train.space), top=100)
    assert own.ranked.tolist() == own.scores.argsort(descending=True).tolist()


def test_bad_input_is_refused():
    train, test = logistic()
    with pytest.raises(ValueError, match="18 parameters"):
        cv.influence(train, test, cv.identity(cv.Space(3, torch.float64)))
    with pytest.raises(ValueError, match=r"\(m, 18\)"):
        cv.influence(train, torch.ones(3).double(), cv.identity(train.space))
    with pytest.raises(ValueError, match="other parameters"):
        cv.influence(train, test.at(3 * torch.ones(18).double()), cv.identity(train.space))
    with pytest.raises(ValueError, match="top is a number of examples, 1 or more, but got 0"):
        cv.self_influence(train, cv.identity(train.space), top=0)
    with pytest.raises(TypeError, match="takes an Objective"):
        cv.influence(nn.Linear(2, 1), test, cv.identity(train.space))  # pyright: ignore[reportArgumentType]
