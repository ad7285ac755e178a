"""Train the three embedded models from fixed seeds: `python -m curvature.assets.make`.

Bytes are reproducible on one machine: one thread, every draw from a fixed seed, no metadata in the files.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from curvature.assets.data import digits, hamlet, hamlet_vocabulary
from curvature.assets.models import char_gpt, digits_cnn, digits_mlp

TRAINING_DIGITS = 1500  # in the order of the data set; the 297 after them are the harder ones (README.md)


def make_digits_mlp() -> tuple[nn.Module, str]:
    """The trained digits perceptron and its figures."""
    pixels, labels = digits()
    inputs = pixels[:TRAINING_DIGITS]
    return train_on_digits(digits_mlp, inputs, labels[:TRAINING_DIGITS], steps=1500, rate=3e-3)


def make_digits_cnn() -> tuple[nn.Module, str]:
    """The trained digits convolutional network and its figures; its training digits are also shifted."""
    pixels, labels = digits()
    inputs = shifted(pixels[:TRAINING_DIGITS])
    return train_on_digits(digits_cnn, inputs, labels[:TRAINING_DIGITS].repeat(9), steps=1000, rate=1e-2)


def train_on_digits(
    build: Callable[[], nn.Module], inputs: Tensor, labels: Tensor, *, steps: int, rate: float
) -> tuple[nn.Module, str]:
    """A model from `build` trained on `inputs`, and its figures on the held-out 297 digits."""
    model = initial(build, seed=0)
    fit_(model, inputs, labels, draw(len(inputs), steps=steps, batch=64, seed=0), rate=rate)
    pixels, truth = digits()
    loss, accuracy = evaluate(model, pixels[TRAINING_DIGITS:], truth[TRAINING_DIGITS:])
    return model, f"held-out accuracy {accuracy:.2%}, loss {loss:.4f}"


def shifted(pixels: Tensor) -> Tensor:
    """The images (N, 64) moved by -1, 0 and 1 pixels each way: nine copies (9 N, 64), zeros moving in."""
    padded = F.pad(pixels.view(-1, 8, 8), (1, 1, 1, 1))
    windows = padded.unfold(1, 8, 1).unfold(2, 8, 1)  # (N, 3, 3, 8, 8)
    return windows.permute(1, 2, 0, 3, 4).reshape(-1, 64)


def make_hamlet_gpt() -> tuple[nn.Module, str]:
    """The trained character transformer and its figures on the last tenth of the play."""
    inputs, targets = hamlet("train")
    stream = torch.cat([inputs.flatten(), targets[-1, -1:]])
    windows = stream.unfold(0, inputs.shape[1] + 1, 1)  # (characters - 64, 65): training may start anywhere
    model = initial(lambda: char_gpt(len(hamlet_vocabulary())), seed=0)
    order = draw(len(windows), steps=700, batch=32, seed=0)
    fit_(model, windows[:, :-1], windows[:, 1:], order, rate=3e-3)
    loss, accuracy = evaluate(model, *hamlet("held-out"))
    return model, f"held-out loss {loss:.4f} nats per character, accuracy {accuracy:.2%}"


def initial(build: Callable[[], nn.Module], *, seed: int) -> nn.Module:
    """A model from `build` as the global generator makes it at `seed`, that generator put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def draw(count: int, *, steps: int, batch: int, seed: int) -> Tensor:
    """Indices (steps, batch) of training examples, drawn from `count` with replacement."""
    return torch.randint(count, (steps, batch), generator=torch.Generator().manual_seed(seed))


def fit_(model: nn.Module, inputs: Tensor, targets: Tensor, order: Tensor, *, rate: float) -> None:
    """Train `model` in place on mean cross-entropy, one AdamW step a row of `order`, cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(order))
    for rows in order:
        loss = cross_entropy(model(inputs[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats and share of right first guesses."""
    logits = model(inputs)
    return cross_entropy(logits, targets).item(), (logits.argmax(-1) == targets).double().mean().item()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over every position of `targets`."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, so that sums are added in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    """Write the three checkpoints into `--out`, a line of figures for each."""
    parser = argparse.ArgumentParser(prog="python -m curvature.assets.make", description="Train the models.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for make in (make_digits_mlp, make_digits_cnn, make_hamlet_gpt):
        start = time.perf_counter()
        with one_thread():
            model, figures = make()
        name = make.__name__.removeprefix("make_")
        (folder / f"{name}.safetensors").write_bytes(save(model.state_dict()))
        size = sum(p.numel() for p in model.parameters())
        seconds = time.perf_counter() - start
        sys.stdout.write(f"{name}: {size:,} parameters, {figures}, {seconds:.0f} s\n")


if __name__ == "__main__":
    main()
