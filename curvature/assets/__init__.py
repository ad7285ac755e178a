"""Three embedded models with their data, for a first run, for tests and for comparisons."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

import torch
from torch import Tensor, nn

from curvature.assets import data, models
from curvature.assets.make import TRAINING_DIGITS
from curvature.errors import BadObjective
from curvature.objective.losses.classification import CrossEntropy
from curvature.objective.objective import Objective

WINDOWS = 64  # of 64 characters each: enough for a stable spectrum, few enough for seconds


def demo(name: str = "digits", *, dtype: torch.dtype | None = None) -> Objective:
    """An embedded objective: "digits" (MLP), "digits-cnn", or "hamlet" (character transformer), with training data."""
    if name not in _DEMOS:
        raise BadObjective(f"There is no demo called {name!r}.", f"The demos are {', '.join(_DEMOS)}.")
    return _DEMOS[name](dtype)


def _digits(build: Callable[[], nn.Module], file: str, dtype: torch.dtype | None) -> Objective:
    pixels, labels = data.digits()
    pair = pixels[:TRAINING_DIGITS], labels[:TRAINING_DIGITS]
    return Objective.of(_trained(build(), file), CrossEntropy(), pair, dtype=dtype, batch_size=TRAINING_DIGITS // 2)


def _hamlet(dtype: torch.dtype | None) -> Objective:
    ids, following = data.hamlet("train")
    module = _trained(models.char_gpt(len(data.hamlet_vocabulary())), "hamlet_gpt")
    pair = ids[:WINDOWS], following[:WINDOWS]
    return Objective.of(module, CrossEntropy(axis=-1), pair, dtype=dtype, batch_size=32)


def _trained(module: nn.Module, file: str) -> nn.Module:
    from safetensors.torch import load

    state: dict[str, Tensor] = load(files("curvature.assets").joinpath(f"{file}.safetensors").read_bytes())
    module.load_state_dict(state)
    return module


_DEMOS: dict[str, Callable[[torch.dtype | None], Objective]] = {
    "digits": lambda dtype: _digits(models.digits_mlp, "digits_mlp", dtype),
    "digits-cnn": lambda dtype: _digits(models.digits_cnn, "digits_cnn", dtype),
    "hamlet": _hamlet,
}
