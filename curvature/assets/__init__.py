"""Three embedded models with their data, for a first run, for tests and for comparisons."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

from curvature.assets import data, models
from curvature.assets.make import TRAINING_DIGITS
from curvature.objective.losses.classification import CrossEntropy
from curvature.objective.objective import Objective

WEIGHTS = {"digits": "digits_mlp", "digits-cnn": "digits_cnn", "hamlet": "hamlet_gpt"}
WINDOWS = 64  # of 64 characters each: enough for a stable spectrum, few enough for seconds


def demo(name: str = "digits", *, dtype: torch.dtype | None = None) -> Objective:
    """An embedded objective: "digits" (MLP), "digits-cnn", or "hamlet" (character transformer), with training data."""
    file = weights(name)
    if name == "hamlet":
        return _hamlet(file, dtype)
    return _digits(models.digits_mlp() if name == "digits" else models.digits_cnn(), file, dtype)


def weights(name: str) -> Path:
    """The safetensors file with the trained weights of a demo."""
    if name not in WEIGHTS:
        raise ValueError(f"There is no demo called {name!r}. The demos are {', '.join(WEIGHTS)}.")
    return Path(str(files("curvature.assets"))) / f"{WEIGHTS[name]}.safetensors"


def _digits(module: nn.Module, file: Path, dtype: torch.dtype | None) -> Objective:
    pixels, labels = data.digits()
    pair = pixels[:TRAINING_DIGITS], labels[:TRAINING_DIGITS]
    return Objective.of(_trained(module, file), CrossEntropy(), pair, dtype=dtype, batch_size=TRAINING_DIGITS // 2)


def _hamlet(file: Path, dtype: torch.dtype | None) -> Objective:
    ids, following = data.hamlet("train")
    module = _trained(models.char_gpt(len(data.hamlet_vocabulary())), file)
    pair = ids[:WINDOWS], following[:WINDOWS]
    return Objective.of(module, CrossEntropy(axis=-1), pair, dtype=dtype, batch_size=32)


def _trained(module: nn.Module, file: Path) -> nn.Module:
    from safetensors.torch import load_file

    module.load_state_dict(load_file(file))
    return module
