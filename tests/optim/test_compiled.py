"""No step between refreshes waits for the device: of optimizers that take gradients alone, nothing of it depends on
values that the host would have to read."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property

import pytest
import torch
from optimizers import CASES, OptimizerCase, awkward, batches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvature.linalg.tensors import Tiling
from curvature.optim.block import Block
from curvature.optim.evidence import Evidence
from curvature.optim.optimizer import PreconditionedOptimizer, Slab
from curvature.optim.rules import shampoo, soap
from curvature.optim.rules.adam import AdamDiagonal

LATE = 100_001  # steps taken: PSGD fits rarely by then

ALONE = [case for case in CASES if not case.objective]


@pytest.fixture(params=ALONE, ids=str)
def case(request) -> OptimizerCase:
    found: OptimizerCase = request.param
    for name, reason in found.skips.items():
        if request.node.originalname == name:
            pytest.skip(reason)
    return found


class NoCopiesBetweenDevices(TorchDispatchMode):
    """Such a copy waits for the device, unless memory is pinned."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {t.device for t in (*args, result) if isinstance(t, Tensor) and t.ndim}
        assert len(devices) < 2 or "meta" not in {d.type for d in devices}, func
        return result


def hollow(optimizer: PreconditionedOptimizer) -> list[Tensor]:
    """Take the values from everything that the optimizer has, with gradients; returns its parameters."""
    bare = {p: nn.Parameter(p.detach().to("meta")) for group in optimizer.param_groups for p in group["params"]}
    for slab in optimizer.slabs:
        slab.block = replace(slab.block, params=tuple(bare[p] for p in slab.block.params))
        slab.state = {name: t.to("meta") for name, t in slab.state.items()}
    for p, q in bare.items():
        q.grad = torch.empty_like(q)
        optimizer.state[q] = {name: t.to("meta") for name, t in optimizer.state.pop(p).items()}
    for group in optimizer.param_groups:
        group["params"] = [bare[p] for p in group["params"]]
    return list(bare.values())


def begun(case: OptimizerCase, device: str = "cpu") -> tuple[nn.Module, PreconditionedOptimizer]:
    """A network and its optimizer after a step, the next one between refreshes."""
    net = awkward(torch.float32).to(device)
    optimizer = case.make(net.named_parameters())
    case.train(net, optimizer, [(x.to(device), y.to(device)) for x, y in batches(1)])
    return net, optimizer


def test_a_step_between_refreshes_reads_no_value(case, monkeypatch):
    _, optimizer = begun(case)
    params = hollow(optimizer)
    host = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: host())  # there is none of the device without values
    with NoCopiesBetweenDevices():
        optimizer.step()
    assert all(p.is_meta for p in params) and optimizer.param_groups[0]["taken"] == 2


def test_values_that_are_read_would_be_noticed():
    _, optimizer = begun(ALONE[0])
    p = hollow(optimizer)[0]
    with pytest.raises(RuntimeError, match="meta"):
        bool(p.sum() > 0)
    with pytest.raises(AssertionError), NoCopiesBetweenDevices():
        p.detach().copy_(torch.zeros(p.shape))


def updated(slab: Slab, state: dict[str, Tensor], grad: Tensor, steps: Tensor) -> Tensor:
    """The direction of a step between refreshes; updates the state."""
    evidence = Evidence(grad, grad, steps, taken=LATE)
    kept = slab.rule.update(state, slab.block, evidence, False)
    return slab.rule.operator(state, slab.block, evidence, None).apply((grad if kept is None else kept)[None])[0]


def check_compiled(slab: Slab) -> None:
    grad = torch.randn(slab.block.space.size, dtype=slab.block.dtype)
    steps = torch.full((slab.block.stack if slab.block.grain == "shape" else 1, 1), 2.0, dtype=torch.float64)
    state = {name: t.clone() for name, t in slab.state.items()}
    torch.compiler.reset()
    whole = torch.compile(lambda *args: updated(slab, *args), fullgraph=True, backend="eager")  # or it raises
    compiled = whole(state, grad, steps)
    torch.testing.assert_close(compiled, updated(slab, slab.state, grad, steps), rtol=1e-5, atol=1e-7)
    for name, tensor in slab.state.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.fixture
def traceable(monkeypatch):
    """What Python does on the host alone in ways that torch.compile cannot follow: flags that are set, locks."""
    for module in (shampoo, soap):
        monkeypatch.setattr(module, "whole_products", nullcontext)
    for kind in (Block, Tiling):
        for name, value in vars(kind).copy().items():
            if isinstance(value, cached_property):
                monkeypatch.setattr(kind, name, property(value.func))


def test_an_update_between_refreshes_is_one_graph(case, traceable):
    _, optimizer = begun(case)
    check_compiled(max((s for s in optimizer.slabs if s.covered), key=lambda slab: slab.block.space.size))


def test_so_is_that_of_the_fallback(traceable):
    _, optimizer = begun(ALONE[0])
    check_compiled(next(s for s in optimizer.slabs if isinstance(s.rule, AdamDiagonal)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_between_refreshes_does_not_wait_for_the_gpu(case):
    net, optimizer = begun(case, "cuda")
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in net.parameters())
