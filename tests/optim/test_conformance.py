"""What users of torch expect of an optimizer, of every one in the table."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from optimizers import CASES, OptimizerCase, awkward, batches
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DeviceMesh, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import curvature as cv
from curvature.errors import NonFinite
from curvature.optim import PSGD, Armijo, Fixed

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.fixture(params=CASES, ids=str)
def case(request) -> OptimizerCase:
    found: OptimizerCase = request.param
    for name, reason in found.skips.items():
        if request.node.originalname == name:
            pytest.skip(reason)
    return found


def bits(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def through_a_file(state):
    """What comes back from a file that is read without running code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_it_learns(case):
    net = awkward()
    losses = case.train(net, case.make(net.named_parameters()), batches(150))
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_saved_goes_on_bit_for_bit(case, dtype):
    net = awkward(dtype)
    optimizer = case.make(net.named_parameters())
    case.train(net, optimizer, batches(12))
    other = copy.deepcopy(net)
    resumed = case.make(other.named_parameters())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for batch in batches(12, seed=1):
        case.step(net, optimizer, batch)
        case.step(other, resumed, batch)
        assert same(bits(net), bits(other))


@pytest.mark.slow
def test_fifty_steps_later_too(case):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    optimizer = case.make(net.named_parameters())
    case.train(net, optimizer, batches(50))
    other = copy.deepcopy(net)
    resumed = case.make(other.named_parameters())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for batch in batches(4, seed=1):
        case.step(net, optimizer, batch)
        case.step(other, resumed, batch)
    assert same(bits(net), bits(other))


def test_what_is_loaded_goes_where_the_parameters_are(case):
    net = awkward()
    optimizer = case.make(net.named_parameters())
    case.train(net, optimizer, batches(1))
    bare = [(name, nn.Parameter(p.to("meta"))) for name, p in net.named_parameters()]  # a device that is everywhere
    elsewhere = case.make(bare)
    elsewhere.load_state_dict(through_a_file(optimizer.state_dict()))
    assert all(t.is_meta for state in elsewhere.state.values() for t in state.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_goes_on_on_a_gpu(case):
    net = awkward()
    optimizer = case.make(net.named_parameters())
    case.train(net, optimizer, batches(12))
    other = copy.deepcopy(net).cuda()
    resumed = case.make(other.named_parameters())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    batch = batches(1, seed=1)[0]
    case.step(net, optimizer, batch)
    case.step(other, resumed, (batch[0].cuda(), batch[1].cuda()))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-6, atol=1e-8)


def test_the_state_is_tensors_of_single_precision_at_least(case):
    net = awkward(torch.bfloat16)
    optimizer = case.make(net.named_parameters())
    case.train(net, optimizer, batches(3))
    saved = optimizer.state_dict()
    assert saved["state"]
    for state in saved["state"].values():
        for name, tensor in state.items():
            assert type(name) is str and isinstance(tensor, Tensor)
            assert tensor.dtype not in (torch.bfloat16, torch.float16), name
    other = case.make(awkward(torch.bfloat16).named_parameters())
    other.load_state_dict(saved)
    for state, loaded in zip(saved["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in state.items())


def test_runs_are_repeated_bit_for_bit_and_leave_random_generators_alone(case):
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        net = awkward()
        case.train(net, case.make(net.named_parameters()), batches(10))
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(bits(net))
    assert same(*ends)


def test_parameters_without_names_are_taken_and_gradients_are_left_as_they_are(case):
    net = awkward()
    optimizer = case.make(net.parameters())
    batch = batches(1)[0]
    case.step(net, optimizer, batch)
    fresh = awkward()
    nn.functional.cross_entropy(fresh(batch[0]), batch[1]).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), fresh.parameters(), strict=True))


def test_a_closure_is_called_with_gradients_and_its_loss_returned(case):
    net, twin = awkward(), awkward()
    optimizer, other = case.make(net.named_parameters()), case.make(twin.named_parameters())
    for batch in batches(4):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
            loss.backward()
            if case.objective:
                optimizer.observe(cv.Objective.of(net, "cross-entropy", [batch]))
            return loss

        with torch.no_grad():
            loss = optimizer.step(closure)
        assert loss.item() == case.step(twin, other, batch)
    assert same(bits(net), bits(twin))


def test_what_has_no_gradient_stays_and_keeps_its_state(case):
    net = awkward()
    optimizer = case.make(net.named_parameters())
    case.train(net, optimizer, batches(3))
    frozen = (net.second.weight, net.norm.bias)
    kept = [p.detach().clone() for p in frozen]
    states = [{n: t.clone() for n, t in optimizer.state[p].items() if not n.startswith("block.")} for p in frozen]
    for p in frozen:
        p.requires_grad_(False)
    moved = net.first.weight.detach().clone()
    case.train(net, optimizer, batches(3, seed=1))
    assert same(kept, [p.detach() for p in frozen]) and not torch.equal(moved, net.first.weight)
    if not case.objective and optimizer.preconditioner.grain == "shape":
        for p, state in zip(frozen, states, strict=True):
            assert all(torch.equal(optimizer.state[p][name], t) for name, t in state.items())
    for p in frozen:
        p.requires_grad_(True)
    case.train(net, optimizer, batches(3, seed=2))
    assert not torch.equal(kept[0], net.second.weight)


def test_groups_have_hyperparameters_of_their_own(case):
    net = awkward()
    named = dict(net.named_parameters())
    still = ("first.weight", "shift")
    groups = [
        {"params": [(n, p) for n, p in named.items() if n not in still]},
        {"params": [(n, named[n]) for n in still], "lr": 0.0},
    ]
    optimizer = case.make(groups)
    before = {n: p.detach().clone() for n, p in named.items()}
    case.train(net, optimizer, batches(3))
    for n, p in named.items():
        assert torch.equal(p, before[n]) == (n in still), n


def test_groups_can_be_added(case):
    net = awkward()
    named = list(net.named_parameters())
    optimizer = case.make(named[:4])
    case.train(net, optimizer, batches(2))
    before = [p.detach().clone() for _, p in named[4:]]
    optimizer.add_param_group({"params": named[4:]})
    case.train(net, optimizer, batches(3))
    assert not any(torch.equal(p, q) for p, (_, q) in zip(before, named[4:], strict=True))


def test_schedulers_set_the_learning_rate(case):
    net = awkward()
    optimizer = case.make(net.named_parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else 0.0)
    for batch in batches(2):
        case.step(net, optimizer, batch)
        scheduler.step()
    before = bits(net)
    case.train(net, optimizer, batches(2, seed=1))
    assert same(before, bits(net))


@pytest.mark.parametrize("kind", ["one cycle", "plateau"])
def test_schedulers_are_those_of_torch(case, kind):
    net, twin = awkward(), awkward()
    optimizer, other = case.make(net.named_parameters()), case.make(twin.named_parameters())
    if kind == "one cycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=case.lr, total_steps=4)  # of momentum, too
    else:
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e3)
    rates = []
    for batch in batches(2):
        rates.append([optimizer.param_groups[0][name] for name in ("lr", "momentum")])
        other.param_groups[0] |= zip(("lr", "momentum"), rates[-1], strict=True)
        loss = case.step(net, optimizer, batch)
        case.step(twin, other, batch)
        scheduler.step(*([loss] if kind == "plateau" else []))
    assert all(len(set(some)) > 1 for some in list(zip(*rates, strict=True))[: 2 if kind == "one cycle" else 1])
    assert same(bits(net), bits(twin))


def test_weights_decay_apart_from_the_gradient(case):
    net, twin = awkward(), awkward()
    optimizer, other = (
        case.make(net.named_parameters(), weight_decay=0.0),
        case.make(twin.named_parameters(), weight_decay=0.1),
    )
    batch = batches(1)[0]
    case.step(net, optimizer, batch)
    case.step(twin, other, batch)
    for start, p, q in zip(awkward().parameters(), net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q, p - case.lr * 0.1 * start, rtol=1e-9, atol=1e-11)


def test_gradients_can_be_accumulated(case):
    net, twin = awkward(), awkward()
    optimizer, other = case.make(net.named_parameters()), case.make(twin.named_parameters())
    for x, y in batches(3):
        case.step(net, optimizer, (x, y))
        other.zero_grad()
        for part in range(2):
            half = slice(part * 8, part * 8 + 8)
            (nn.functional.cross_entropy(twin(x[half]), y[half]) / 2).backward()
        if case.objective:
            other.observe(cv.Objective.of(twin, "cross-entropy", [(x, y)]))
        other.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_gradients_can_be_clipped_and_are_zeroed(case):
    net, twin = awkward(), awkward()
    optimizer, other = case.make(net.named_parameters()), case.make(twin.named_parameters())
    for batch in batches(1):
        for model in (net, twin):
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1e-2)
        norm = torch.stack([p.grad.norm() for p in twin.parameters()]).norm()
        for model, opt in ((net, optimizer), (twin, other)):
            if model is twin:
                for p in model.parameters():
                    p.grad.mul_(1e-2 / (norm + 1e-6))
            if case.objective:
                opt.observe(cv.Objective.of(model, "cross-entropy", [batch]))
            opt.step()
        assert norm > 1e-2 and same(bits(net), bits(twin))
        optimizer.zero_grad()
        other.zero_grad(set_to_none=False)
        assert all(
            p.grad is None and not q.grad.any() for p, q in zip(net.parameters(), twin.parameters(), strict=True)
        )


def test_ascent_is_descent_of_the_negative(case):
    net, twin = awkward(), awkward()
    optimizer, other = case.make(net.named_parameters(), maximize=True), case.make(twin.named_parameters())
    for batch in batches(3):
        for model, opt, sign in ((net, optimizer, -1), (twin, other, 1)):
            opt.zero_grad()
            (sign * nn.functional.cross_entropy(model(batch[0]), batch[1])).backward()
            if case.objective:
                opt.observe(cv.Objective.of(model, "cross-entropy", [batch]))
            opt.step()
    assert same(bits(net), bits(twin))


def test_a_gradient_scaler_works_with_it(case):
    net, twin = awkward(torch.float32), awkward(torch.float32)
    optimizer, other = case.make(net.named_parameters()), case.make(twin.named_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for batch in batches(3):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(net(batch[0]), batch[1])).backward()
        if case.objective:
            optimizer.observe(cv.Objective.of(net, "cross-entropy", [batch]))
        scaler.step(optimizer)
        scaler.update()
        case.step(twin, other, batch)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_moves_nothing_of_its_parameter(case, bad):
    net = awkward()
    optimizer = case.make(net.named_parameters())
    case.train(net, optimizer, batches(3))
    whole = optimizer.preconditioner.grain == "model" and optimizer.routing.rows[1][2] != "AdamDiagonal"
    for count in range(2):
        batch = batches(1, seed=count)[0]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
        net.first.weight.grad[0, 0] = bad
        before = bits(net)
        if case.objective:
            optimizer.observe(cv.Objective.of(net, "cross-entropy", [batch]))
        optimizer.step()
        assert all(p.isfinite().all() for p in net.parameters())
        decay = 1 - optimizer.param_groups[0]["weight_decay"] * case.lr
        place = [n for n, _ in net.named_parameters()].index("first.weight")
        torch.testing.assert_close(net.first.weight.detach(), before[place] * decay, rtol=1e-12, atol=0)
        assert whole or not torch.equal(net.head.weight, before[-1])
    losses = case.train(net, optimizer, batches(40, seed=5))
    assert losses[-1] == losses[-1] and all(p.isfinite().all() for p in net.parameters())


def test_a_gradient_that_stays_infinite_ends_the_run(case):
    net = awkward()
    optimizer = case.make(net.named_parameters())
    case.train(net, optimizer, batches(3))
    with pytest.raises(NonFinite, match=r"The gradients of .* were not finite in \d+ steps in a row"):
        for batch in batches(200):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
            net.first.weight.grad[0, 0] = float("inf")
            if case.objective:
                optimizer.observe(cv.Objective.of(net, "cross-entropy", [batch]))
            optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_mini_batch_that_is_not_finite_moves_nothing_and_ends_the_run_if_it_stays(case):
    if not case.objective:
        pytest.skip("takes gradients alone")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = case.make(net.named_parameters())
    x, y = torch.eye(3).repeat(4, 1), torch.arange(12) % 3
    bad = x.clone()
    bad[0, 0] = float("inf")

    def step(inputs: Tensor) -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step(objective=cv.Objective.of(net, "cross-entropy", [(inputs, y)]))
        return loss.item()

    losses = [step(x)] + [step(bad) for _ in range(2)] + [step(x) for _ in range(20)]
    assert losses[-1] < losses[0] and all(p.isfinite().all() for p in net.parameters())
    if case.kind is PSGD:
        return  # Q stays as it is, and gradients lead on
    with pytest.raises(NonFinite, match=r"were not finite,? (in )?3 \w+"):
        for _ in range(30):
            step(bad)
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_mini_batch_without_terms_is_refused(case):
    if not case.objective:
        pytest.skip("takes gradients alone")
    net = awkward()
    (tokens, targets), before = batches(1)[0], bits(net)
    ignored = torch.full_like(targets, -100)
    objective = cv.Objective.of(net, "cross-entropy", [(tokens, ignored)])
    for backward in (False, True):
        if backward:
            nn.functional.cross_entropy(net(tokens), ignored, reduction="sum").backward()
        with pytest.raises(cv.BadObjective, match="The data has no terms: no batch came, or every target is ignored"):
            case.make(net.named_parameters(), **({"control": Fixed()} if backward else {})).step(objective=objective)
    assert same(bits(net), before)


def test_its_matrix_is_symmetric_positive_definite_and_what_momentum_is_multiplied_by(case):
    net = awkward()
    optimizer = case.make(net.named_parameters(), weight_decay=0.0)
    case.train(net, optimizer, batches(8))
    P = optimizer.operator(copy=True)
    dense = P.dense()
    assert P.psd and P.symmetric and P.shape[0] == sum(p.numel() for p in net.parameters())
    torch.testing.assert_close(dense, dense.T, rtol=1e-9, atol=1e-12 + 1e-15 * float(dense.abs().max()))
    assert float(torch.linalg.eigvalsh((dense + dense.T) / 2)[0]) > 0
    torch.testing.assert_close(float(cv.trace(P, products=P.shape[0]).value), float(dense.trace()), rtol=1e-8, atol=0)
    case.train(net, optimizer, batches(1, seed=9))
    torch.testing.assert_close(P.dense(), dense, rtol=0, atol=0)  # a copy does not change
    assert not torch.equal(optimizer.operator().dense(), dense)


def test_it_says_which_rule_takes_what(case):
    net = awkward()
    optimizer = case.make(net.named_parameters())
    rows = optimizer.routing.rows
    assert {name for name, *_ in rows} == {name for name, _ in net.named_parameters()}
    assert all(reason for *_, reason in rows) and "parameter" in str(optimizer.routing)


def test_parameters_without_entries_do_no_harm(case):
    class Hollow(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(4, 3))
            with pytest.warns(UserWarning, match="zero-element"):
                self.layer = nn.Linear(4, 0)
            self.none, self.rows, self.columns = (nn.Parameter(torch.empty(*s)) for s in ((0,), (0, 5), (5, 0)))

        def forward(self, tokens: Tensor) -> Tensor:
            x = self[1](self[0](tokens))
            nothing = (self.layer(x), self.none, self.rows, self.columns)
            return self[2](x) + sum(t.sum() for t in nothing)

    net, full = Hollow(), nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(4, 3))
    full.load_state_dict({name: t for name, t in net.state_dict().items() if name[0].isdigit()})
    optimizer, other = case.make(net.named_parameters()), case.make(full.named_parameters())
    for batch in batches(4):
        assert case.step(net, optimizer, batch) == case.step(full, other, batch)
    resumed = case.make(net.named_parameters())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert optimizer.operator().shape == other.operator().shape
    assert {row[2:] for row in optimizer.routing.rows[-5:]} == {("none", "no entries")}


def test_before_a_step_there_is_no_matrix(case):
    with pytest.raises(ValueError, match="took no step yet"):
        case.make(awkward().named_parameters()).operator()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_it_survives_a_copy(case, copied):
    net = awkward()
    optimizer = case.make(net.named_parameters())
    case.train(net, optimizer, batches(1))
    other, twin = copied((net, optimizer))
    batch = batches(1, seed=1)[0]
    case.step(net, optimizer, batch)
    case.step(other, twin, batch)
    assert same(bits(net), bits(other))


def test_hooks_are_called_around_each_step(case):
    net = awkward()
    optimizer = case.make(net.named_parameters())
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("before"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("after"))
    case.train(net, optimizer, batches(2))
    assert seen == ["before", "after"] * 2


@pytest.fixture(scope="module")
def alone():
    """A group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # pyright: ignore


@pytest.mark.parametrize("wrap", [compiled, DistributedDataParallel], ids=["compiled", "parallel"])
def test_models_may_be_wrapped(case, wrap: Callable[[nn.Module], nn.Module], alone):
    net, twin = awkward(), awkward()
    wrapped = wrap(twin)
    optimizer, other = case.make(net.named_parameters()), case.make(wrapped.named_parameters())
    for batch in batches(1):
        case.step(net, optimizer, batch)
        case.step(wrapped, other, batch)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-8, atol=1e-10)
    named, renamed = optimizer.routing.rows, other.routing.rows
    assert [row[1:] for row in named] == [row[1:] for row in renamed]
    assert all(b.endswith("." + a) for (a, *_), (b, *_) in zip(named, renamed, strict=True))


def test_shards_are_refused(case, alone):
    mesh = DeviceMesh("cpu", [0])
    shard = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh))
    with pytest.raises(ValueError, match=r"one of \(4, 4\) is a DTensor"):
        case.make([("weight", shard)])


def test_sparse_gradients_are_refused(case):
    net = nn.Sequential(nn.Embedding(7, 2, sparse=True), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"is sparse, but expected a dense one. Use Embedding\(..., sparse=False\)"):
        case.step(net, case.make(net.named_parameters()), batches(1)[0])


@pytest.mark.parametrize(
    ("case", "kwargs", "message"),
    [(case, kwargs, message) for case in CASES for kwargs, message in case.invalid],
    ids=lambda value: str(value)[:40],
)
def test_what_it_cannot_do_it_refuses(case, kwargs, message):
    with pytest.raises(ValueError, match=message):
        case.make(awkward().named_parameters(), **kwargs)


def test_an_objective_that_is_not_asked_for_is_not_made(case, monkeypatch):
    if not case.objective:
        pytest.skip("takes gradients alone")
    net, asked, made = awkward(), [], []
    optimizer = case.make(net.named_parameters())
    case.step(net, optimizer, batches(1)[0])
    placed = type(optimizer)._placed
    monkeypatch.setattr(type(optimizer), "_placed", lambda *args: made.append(1) or placed(*args))
    for batch in batches(3, seed=1):
        asked.append(optimizer._asked() or case.kind is PSGD)
        made.clear()
        case.step(net, optimizer, batch)
        assert bool(made) == asked[-1]


WRONG = (  # of every optimizer
    ({"lr": "x"}, TypeError, "lr is a number, but got 'x'"),
    ({"lr": None}, TypeError, "lr is a number, but got None"),
    ({"lr": -1.0}, ValueError, "lr is 0 or more, and finite, but got -1.0"),
    ({"lr": float("nan")}, ValueError, "lr is 0 or more, and finite, but got nan"),
    ({"lr": torch.ones(2)}, ValueError, r"lr is one number, but got a tensor of \(2,\)"),
    ({"weight_decay": "x"}, TypeError, "weight_decay is a number, but got 'x'"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay is 0 or more, and finite, but got -0.1"),
    ({"seed": "x"}, TypeError, "seed is a number, but got 'x'"),
    ({"control": "armijo"}, TypeError, r"control is a StepControl, such as Fixed\(\) or Armijo\(\), but got 'armijo'"),
    ({"control": Armijo}, TypeError, "control is a StepControl"),
    ({"fallback": "adam"}, TypeError, r"fallback is a Preconditioner, such as AdamDiagonal\(\), but got 'adam'"),
    ({"roles": "head"}, TypeError, "roles are a dict of roles by globs of names, .* but got 'head'"),
    ({"params": nn.Linear(1, 1)}, TypeError, r"but got a Linear. Give model.named_parameters\(\)"),
    ({"params": {"a": nn.Parameter(torch.ones(1))}}, TypeError, r"but got a dict. Give model.named_parameters\(\)"),
    ({"params": None}, TypeError, r"but got a NoneType. Give model.named_parameters\(\)"),
    ({"params": []}, ValueError, "empty parameter list: .* this iterator was gone through before"),
    ({"params": ["a"]}, TypeError, "can only optimize Tensors, but one of the params is str"),
    ({"params": torch.ones(2)}, TypeError, "should be an iterable of Tensors or dicts, but got"),
    ({"params": [("a", nn.Parameter(torch.ones(i + 1))) for i in range(2)]}, ValueError, "parameters are called a"),
    ({"params": [torch.arange(3)]}, ValueError, "Expected real parameters, but got one of torch.int64"),
)


def test_arguments_are_checked_and_the_error_says_what_came(case):
    named = list(awkward().named_parameters())
    for wrong, error, words in WRONG:
        with pytest.raises(error, match=words):
            case.make(**{"params": named, **wrong})
    with pytest.raises(TypeError, match="decrease is a number, but got 'x'"):
        case.make(named, control=Armijo(decrease="x"))  # pyright: ignore
    arguments = inspect.signature(case.kind).parameters
    for name in {"momentum", "damping", "every", "eps", "rate", "window"} & set(arguments):
        with pytest.raises(TypeError, match="is a number, but got 'x'"):
            case.make(named, **{name: "x"})
    if "betas" in arguments:
        for betas in ((0.9,), (0.9, 0.9, 0.9), 0.9, "xy"):
            with pytest.raises(ValueError, match=r"betas are two numbers, .* but got"):
                case.make(named, betas=betas)
        with pytest.raises(TypeError, match="Each of betas is a number, but got 'x'"):
            case.make(named, betas=("x", 0.9))


def test_groups_that_it_cannot_take_leave_it_as_it_was(case):
    net = awkward()
    named = list(net.named_parameters())
    optimizer = case.make(named[:4])
    wrong = [
        ({"lr": "x"}, TypeError, "lr is a number, but got 'x'"),
        ({"momentum": 1.0}, ValueError, "less than 1, but got 1.0"),
        ({"fallback_beta2": 1.0}, ValueError, "Expected 0 <= beta2 < 1 and eps >= 0, but got 1.0"),
        ({"roles": {}}, ValueError, "A group has no roles of its own. It may have .*lr, "),
    ]
    for more, error, words in wrong:
        with pytest.raises(error, match=words):
            optimizer.add_param_group({"params": named[4:], **more})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": named[4:]})
    losses = case.train(net, optimizer, batches(2))
    assert losses[0] != losses[1]


def test_states_of_others_are_refused(case):
    net, larger = (nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(4, n)) for n in (3, 5))
    optimizer, other = case.make(net.named_parameters()), torch.optim.AdamW(net.named_parameters())
    with pytest.raises(ValueError, match=r"but got one of another optimizer, without .*momentum"):
        optimizer.load_state_dict(other.state_dict())
    case.train(net, optimizer, batches(1))
    if any(not name.startswith("block.") for name in optimizer.state[net[2].weight]):
        wrong = case.make(larger.named_parameters())
        wrong.load_state_dict(optimizer.state_dict())
        with pytest.raises(ValueError, match=r"saved .*, but here it is .*\. Load it into the same"):
            _ = wrong.slabs
    changed = optimizer.state_dict()
    for tensors in changed["state"].values():
        if tensors:
            tensors["preconditioned"] = torch.ones(1)
    optimizer.load_state_dict(changed)
    with pytest.raises(ValueError, match=r"saved of [02]\.\w+ is .*preconditioned.*, but here it is .*step"):
        _ = optimizer.slabs


def test_what_is_no_mini_batch_or_closure_is_refused(case):
    net = awkward()
    optimizer, objective = case.make(net.named_parameters()), cv.Objective.of(net, "cross-entropy", batches(1))
    for give in (lambda: optimizer.observe("x"), lambda: optimizer.step(objective="x")):  # pyright: ignore
        with pytest.raises(TypeError, match=r"as a curvature.Objective, but got 'x'. Give Objective.of\(model, loss"):
            give()
    with pytest.raises(TypeError, match=r"a function that returns the loss, .*Call step\(objective=\.\.\.\)"):
        optimizer.step(objective)  # pyright: ignore
    with pytest.raises(TypeError, match=r"a function that returns the loss, but got 3.0. Call step\(\)"):
        optimizer.step(3.0)  # pyright: ignore


def test_without_the_objective_it_says_what_to_pass(case):
    if not case.objective:
        pytest.skip("takes gradients alone")
    net = awkward()
    optimizer = case.make(net.named_parameters())
    nn.functional.cross_entropy(net(batches(1)[0][0]), batches(1)[0][1]).backward()
    with pytest.raises(cv.NeedsEvidence, match="needs the mini-batch as a function of the parameters"):
        optimizer.step()
