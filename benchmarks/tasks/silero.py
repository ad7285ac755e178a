"""Silero VAD, a TorchScript recurrent network that keeps its state between calls, on sounds that are not speech.

`python benchmarks/tasks/silero.py sounds.safetensors` writes the data file; the loss is
`--loss benchmarks/tasks/silero.py:false_alarm`, and the model `silero_vad.jit` of the wheel silero-vad (MIT), which
holds code and so needs `--trust`. Only its recurrent half is trainable, and of that only the 16 kHz branch is used.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

RATE, WINDOW = 16_000, 512  # samples a second, and samples a call, as the model demands


def false_alarm(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean over clips and windows of -log(1 - p), p the probability of speech. `sound` is (clips, windows, 512)."""
    model.reset_states()
    speech = torch.stack([model(window, RATE) for window in batch["sound"].unbind(1)])
    return -torch.log1p(-speech).mean()


def file() -> Path:
    """Where the wheel keeps the TorchScript model."""
    from importlib.resources import files

    return Path(str(files("silero_vad") / "data" / "silero_vad.jit"))


def write_sounds(path: str | Path, *, windows: int = 4) -> Path:
    """Write `sound`, (clips, windows, 512): white noise and gliding tones with overtones; returns the path."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    seconds = torch.arange(windows * WINDOW) / RATE
    noise = 0.05 * torch.randn(4, len(seconds), generator=generator)
    pitches = torch.tensor([110.0, 150.0, 210.0, 300.0]).unsqueeze(1)
    phases = 2 * torch.pi * pitches * (seconds + seconds.square())
    tones = sum(torch.sin(n * phases) / n for n in (1, 2, 3, 4, 5)) / 4
    save_file({"sound": torch.cat([noise, tones]).view(8, windows, WINDOW)}, str(path))
    return Path(path)


if __name__ == "__main__":
    print(write_sounds(sys.argv[1]))
