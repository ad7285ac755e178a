"""curv optim: which optimizer trains a model best."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cyclopts import Parameter

from .load import load_checked, other_data
from .options import NUMBERS, Many, Misuse, Output, Positive, Seed, Task, Test
from .output import deliver, prepare


def optim(
    model: str | None = None,
    /,
    *,
    optimizer: Many = (),
    lr: Annotated[str, Parameter(group=NUMBERS)] = "0.001,0.01,0.1,1",
    steps: Positive = 200,
    minibatch: Positive = 64,
    repeats: Positive = 3,
    start: Literal["fresh", "given"] = "fresh",
    over: Literal["steps", "seconds"] = "steps",
    test: Test = None,
    seed: Seed = 0,
    task: Task = Task(),
    output: Output = Output(),
) -> None:
    """Train a model with several optimizers, from the same start, with the same learning rates to choose from.

    Each takes every rate once, and then --repeats trainings with its best, over the data in other orders: losses at the
    end, with their errors, the time of a step, memory, and with how many rates it diverged. There is no weight decay
    and no schedule.

    Examples: `curv optim --steps 20 --repeats 2 --lr 0.01,0.1`;
    `curv optim model.pt --optimizer adamw --optimizer soap --out run1`; `curv optim ./task.py:make --start given`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    optimizer
        sgd, adamw, soap, muon, kfac, ...; may be repeated. A wrong name is answered with the list of all.
    lr
        The learning rates that each may choose from, with commas.
    steps
        Of each training.
    minibatch
        Examples of a step, at most: those of MODEL's batches where they have fewer.
    repeats
        Trainings with the best rate.
    start
        fresh parameters, drawn by each layer as torch does, or those of MODEL, such as one before its training.
    over
        The picture has the loss over steps or over seconds.
    test
        Other data, named as --data is, the loss of which is measured, too.
    seed
        Of the fresh parameters, the order of the data, and the optimizers.
    """
    prepare(output, "optim", products=False)
    import curvature as cv

    rates = _rates(lr)
    objective = load_checked(model, task)
    objective = cv.optim.restarted(objective, seed=seed) if start == "fresh" else objective
    others = other_data(test, objective, model, task)
    options: Any = {"lrs": rates, "steps": steps, "minibatch": minibatch, "repeats": repeats, "held_out": others}
    options |= {"optimizers": optimizer} if optimizer else {}
    deliver(lambda run: cv.optim.benchmark(objective, seed=seed, run=run, **options), output, "optim", over=over)


def _rates(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise Misuse(f"--lr takes numbers with commas, but got {text}.", "Write --lr 0.001,0.01.") from error
