"""The oracle of "nothing was touched": a bit-exact account of a module and of torch's global state.

`untouched(module)` is a context; it raises AssertionError on leaving, with what differs, also when the body raised.
"""

from __future__ import annotations

import hashlib
import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Asserts on leaving that the body changed nothing that `fingerprint` sees."""
    before = fingerprint(module)
    try:
        yield
    finally:
        after = fingerprint(module)
        changed = [key for key in before | after if before.get(key, "absent") != after.get(key, "absent")]
        lines = [f"  {key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}" for key in changed]
        assert not changed, "\n".join(["touched:", *lines])


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """What is true of the module and of torch, by name; tensors by identity and by a digest of their bits."""
    return {**_of_module(module), **_of_randomness(), **_of_flags()}


def _of_module(module: nn.Module) -> dict[str, Any]:
    account: dict[str, Any] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        account[f"parameter {name}"] = _tensor(parameter)
        account[f"grad of {name}"] = None if parameter.grad is None else _tensor(parameter.grad)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        account[f"buffer {name}"] = _tensor(buffer)
    for name, part in module.named_modules():
        account[f"training of {name or 'the module'}"] = getattr(part, "training", None)
        if isinstance(part, torch.jit.ScriptModule):
            continue
        account[f"attributes of {name or 'the module'}"] = sorted(vars(part))
        account[f"hooks of {name or 'the module'}"] = [
            len(hooks) for key, hooks in sorted(vars(part).items()) if key.endswith("_hooks")
        ]
        if isinstance(part, nn.RNNBase):
            account[f"flat weights of {name or 'the module'}"] = [id(weight) for weight in part._flat_weights]
    return account


def _of_randomness() -> dict[str, Any]:
    account = {
        "torch generator": _digest(torch.default_generator.get_state().numpy().tobytes()),
        "torch seed": torch.initial_seed(),
        "Python generator": _digest(pickle.dumps(random.getstate())),
        "numpy generator": _digest(pickle.dumps(np.random.get_state(legacy=False))),
    }
    if torch.cuda.is_initialized():
        states = (generator.get_state() for generator in torch.cuda.default_generators)
        account["CUDA generators"] = [_digest(state.numpy().tobytes()) for state in states]
    else:
        account["queued for CUDA"] = len(torch.cuda._queued_calls)
    return account


def _of_flags() -> dict[str, Any]:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "attention": {
            name: getattr(torch._C, f"_get_{name}_sdp_enabled")()
            for name in ("cudnn", "flash", "math", "mem_efficient", "overrideable")
        },
        "cudnn": {
            name: getattr(torch._C, f"_get_cudnn_{name}")()
            for name in ("enabled", "benchmark", "deterministic", "allow_tf32")
        },
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "matrix product precision": torch.get_float32_matmul_precision(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        "function modes": torch._C._len_torch_function_stack(),
        "compiler stance": "default" if dynamo is None else dynamo._stance.stance,
    }


def _tensor(tensor: Tensor) -> str:
    tensor_bits = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
    digest = _digest(b"".join(_bytes(part) for part in tensor_bits))
    return f"{id(tensor):x} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad} {digest}"


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
