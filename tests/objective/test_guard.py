from __future__ import annotations

import random
import subprocess
import sys
import timeit

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from untouched import fingerprint, untouched

from curvature.objective.call import call_with
from curvature.objective.guard import frozen_randomness, in_mode


def draws() -> list[float]:
    """From every generator, an odd number of normals each: the second of a pair stays in the generator."""
    return [
        *(torch.rand(()).item(), *torch.randn(3).tolist(), torch.randperm(9)[0].item()),
        *(random.random(), random.gauss(0, 1)),
        *(np.random.rand(), np.random.randn()),
    ]


@pytest.mark.parametrize("seed", [0, 3, 2**32 + 1, -1])
def test_all_generators_start_from_the_seed(seed):
    with frozen_randomness(seed):
        first = draws()
    draws()
    with frozen_randomness(seed):
        assert draws() == first
    with frozen_randomness(seed + 1):
        assert all(a != b for a, b in zip(draws(), first, strict=True) if not float(b).is_integer())


def test_none_of_the_callers_random_numbers_are_used_up():
    draws()  # leaves half a pair of normals in each generator
    with untouched(nn.Identity()):
        with frozen_randomness(3):
            draws()
        with pytest.raises(KeyboardInterrupt), frozen_randomness(3):
            draws()
            raise KeyboardInterrupt
        with frozen_randomness(3), frozen_randomness(4):
            draws()


def test_an_inner_seed_does_not_disturb_the_outer_one():
    with frozen_randomness(3):
        expected = [draws(), draws()]
    with frozen_randomness(3):
        first = draws()
        with frozen_randomness(4):
            draws()
        assert [first, draws()] == expected


def test_dropout_masks_repeat():
    x = torch.ones(100)
    with frozen_randomness(3):
        first = nn.Dropout(0.5)(x)
    with frozen_randomness(3):
        assert torch.equal(nn.Dropout(0.5)(x), first)
    assert not torch.equal(nn.Dropout(0.5)(x), first)


def test_cuda_is_not_initialised():
    code = (
        "import torch\n"
        "from curvature.objective.guard import frozen_randomness\n"
        "queued = len(torch.cuda._queued_calls)\n"
        "with frozen_randomness(3):\n"
        "    torch.rand(1)\n"
        "assert not torch.cuda.is_initialized() and len(torch.cuda._queued_calls) == queued\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.gpu
def test_generators_on_cuda_start_from_the_seed_and_are_put_back():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.rand(1, device="cuda")
    with untouched(nn.Identity()):
        with frozen_randomness(3):
            first = torch.rand(5, device="cuda")
        with frozen_randomness(3):
            assert torch.equal(torch.rand(5, device="cuda"), first)


def test_freezing_costs_microseconds():
    def freeze() -> None:
        with frozen_randomness(3):
            pass

    assert min(timeit.repeat(freeze, number=100, repeat=10)) / 100 < 1e-3  # measured: 92e-6, 70e-6 of it numpy


class Fussy(nn.Sequential):
    """Its `train` and `eval` must not be called."""

    def train(self, mode: bool = True) -> nn.Module:
        raise NotImplementedError("a mode cannot be chosen")


def mixed() -> nn.Module:
    """Parts in different modes, as after freezing a backbone's BatchNorm."""
    module = Fussy(nn.Linear(3, 4), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4)))
    module[1][1].training = False
    return module


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wrap", [mixed, lambda: torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Dropout()))])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_every_part_is_in_the_mode_and_then_in_its_own(wrap, training):
    module = wrap()
    with untouched(module):
        with in_mode(module, training):
            assert [part.training for part in module.modules()] == [training] * len(list(module.modules()))
        with pytest.raises(ValueError), in_mode(module, training):
            module.training = not training
            raise ValueError


def test_the_mode_decides_what_dropout_does():
    module, x = nn.Dropout(), torch.ones(100)
    with in_mode(module, False):
        assert torch.equal(module(x), x)
    with in_mode(module, True):
        assert not torch.equal(module(x), x)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_mode_decides_what_dropout_does_in_torchscript():
    module, x = torch.jit.script(nn.Sequential(nn.Dropout())), torch.ones(100)
    with in_mode(module, False):
        assert torch.equal(module(x), x)
    assert not torch.equal(module(x), x)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_frozen_torchscript_without_a_mode_can_be_a_part():
    module = nn.Sequential(torch.jit.freeze(torch.jit.script(nn.Linear(3, 3).eval())), nn.Dropout())
    with untouched(module), in_mode(module, False):
        assert not module[1].training


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_exported_programs_keep_the_mode_of_their_export():
    x = torch.ones(100)
    module = torch.export.export(nn.Sequential(nn.Dropout()), (x,)).module()
    with pytest.raises(NotImplementedError, match="Calling eval\\(\\) is not supported yet"):
        module.eval()
    with untouched(module), frozen_randomness(3), in_mode(module, False):
        assert not module.training
        assert not torch.equal(module(x), x)


@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_move_only_in_the_copies(training):
    module, x = nn.BatchNorm1d(4), torch.randn(5, 4)
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    with untouched(module), in_mode(module, training):
        call_with(module, buffers, (x,))
    assert buffers["num_batches_tracked"] == int(training)
    assert torch.equal(buffers["running_mean"], module.running_mean) != training


def touch_parameter(module: nn.Module) -> None:
    with torch.no_grad():
        module[0].weight[0, 0] += 1e-7


def replace_gradient(module: nn.Module) -> None:
    module[0].weight.grad = module[0].weight.grad.clone()


def change_gradient(module: nn.Module) -> None:
    module[0].weight.grad[0, 0] = -0.0


def drop_gradient(module: nn.Module) -> None:
    module[0].weight.grad = None


def touch_buffer(module: nn.Module) -> None:
    module[1].running_mean += 1


def freeze_parameter(module: nn.Module) -> None:
    module[0].bias.requires_grad_(False)


def attach(module: nn.Module) -> None:
    module[0].curvature = Tensor()


TOUCHES = [
    (touch_parameter, "parameter 0.weight"),
    (replace_gradient, "grad of 0.weight"),
    (change_gradient, "grad of 0.weight"),
    (drop_gradient, "grad of 0.weight"),
    (touch_buffer, "buffer 1.running_mean"),
    (freeze_parameter, "parameter 0.bias"),
    (attach, "attributes of 0"),
    (lambda module: module[1].eval(), "training of 1"),
    (lambda module: module[0].register_forward_hook(print), "hooks of 0"),
    (lambda _: torch.rand(1), "torch generator"),
    (lambda _: random.random(), "Python generator"),
    (lambda _: np.random.rand(), "numpy generator"),
    (lambda _: torch.set_default_dtype(torch.float64), "default dtype"),
    (lambda _: torch.set_num_threads(3), "threads"),
    (lambda _: torch.backends.cuda.enable_flash_sdp(False), "attention"),
    (lambda _: torch._C._set_cudnn_enabled(False), "cudnn"),
    (lambda _: torch._C._set_mkldnn_enabled(False), "mkldnn"),
    (lambda _: torch.set_float32_matmul_precision("high"), "matrix product precision"),
    (lambda _: torch.use_deterministic_algorithms(True), "deterministic"),
    (lambda _: torch.set_grad_enabled(False), "grad mode"),
]


@pytest.fixture
def put_back():
    """Global flags as they were, after a test that changes them."""
    dtype, threads, precision = (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
    )
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_flash_sdp(True)
    torch._C._set_cudnn_enabled(True)
    torch._C._set_mkldnn_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)


@pytest.mark.usefixtures("put_back")
@pytest.mark.parametrize(("touch", "place"), TOUCHES, ids=[place for _, place in TOUCHES])
def test_the_oracle_notices(touch, place):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module[0].weight.grad = torch.zeros(4, 3)
    with pytest.raises(AssertionError, match=f"touched:\n  {place}: "), untouched(module):
        touch(module)


def test_the_oracle_notices_also_when_the_body_raises():
    with pytest.raises(AssertionError, match="torch generator") as caught, untouched(nn.Identity()):
        torch.rand(1)
        raise ValueError
    assert isinstance(caught.value.__context__, ValueError)


def test_taking_fingerprints_touches_nothing():
    module = nn.LSTM(3, 4)
    assert fingerprint(module) == fingerprint(module)
