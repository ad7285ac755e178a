"""The two embedded data sets as tensors, read from beside this file without pickle and without the net."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

import numpy as np
import torch
from torch import Tensor

WINDOW = 64  # characters; the context of the embedded transformer


def digits() -> tuple[Tensor, Tensor]:
    """Pixels (1797, 64), float32 in [0, 1], and labels (1797,), int64, of handwritten digits.

    The embedded models were trained on the first 1,500 examples; the last 297 are held out.
    """
    with files("curvature.assets").joinpath("digits.npz").open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        pixels, labels = archive["pixels"], archive["labels"]
    return torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels).long()


def hamlet(split: Literal["train", "held-out"] = "train") -> tuple[Tensor, Tensor]:
    """Ids (N, 64) of consecutive windows of Hamlet and, in the same shape, the id after each, int64.

    "held-out" is the last tenth of the text. Windows do not overlap; the characters after the last whole one
    are dropped. Ids index `hamlet_vocabulary()`.
    """
    text = _hamlet_text()
    boundary = len(text) * 9 // 10
    parts = {"train": text[:boundary], "held-out": text[boundary:]}
    if split not in parts:
        raise ValueError(f'Hamlet has the splits "train" and "held-out", got {split!r}: pass one of the two.')
    index = {character: id for id, character in enumerate(hamlet_vocabulary())}
    stream = torch.tensor([index[character] for character in parts[split]])
    whole = (len(stream) - 1) // WINDOW * WINDOW
    return stream[:whole].view(-1, WINDOW), stream[1 : whole + 1].view(-1, WINDOW)


def hamlet_vocabulary() -> str:
    """The distinct characters of Hamlet in sorted order; a character's id is its place."""
    return "".join(sorted(set(_hamlet_text())))


def _hamlet_text() -> str:
    """The play, whichever line ends the checkout gave it."""
    return files("curvature.assets").joinpath("hamlet.txt").read_text(encoding="ascii")
