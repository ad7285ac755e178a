"""What a measurement sets for its own duration: where random numbers start, and the training flags.

Parameters and buffers need no guard: models are called with copies of both (`curvature.objective.call`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np  # torch has imported it already
import torch
from torch import nn


@contextmanager
def frozen_randomness(seed: int) -> Iterator[None]:
    """Context in which torch's, Python's and numpy's random numbers start from `seed`, and use none up.

    Two passes over a batch draw the same dropout masks. Covers the CPU and, if CUDA is in use, all of its
    devices. Generators that a model made for itself go on as they would.
    """
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    states = [generator.get_state() for generator in generators]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        for generator in generators:  # torch.manual_seed would also seed a CUDA that is yet to be initialised
            generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Context in which every part of `module` has this training flag; afterwards each has its own again.

    The flags are set directly: `train` and `eval` may be overridden, and raise on exported programs. What was
    traced or exported has the mode of that moment built in, whatever its flags say.
    """
    parts = (part for part in module.modules() if hasattr(part, "training"))  # frozen TorchScript has lost it
    flags = [(part, part.training) for part in parts]
    try:
        for part, _ in flags:
            part.training = training
        yield
    finally:
        for part, flag in flags:
            part.training = flag
