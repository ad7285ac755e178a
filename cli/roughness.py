"""curv roughness: how much the loss goes up and down around the parameters."""

from __future__ import annotations

from .load import load_objective
from .options import Norm, Output, Positive, Radius, Scale, Seed, Task
from .output import deliver, prepare


def roughness(
    model: str | None = None,
    /,
    *,
    directions: Positive = 50,
    radius: Radius = 0.01,
    steps: Positive = 10,
    scale: Scale = "filter",
    norm: Norm = "frozen",
    seed: Seed = 0,
    task: Task = Task(),
    output: Output = Output(),
) -> None:
    """The Roughness Index along random lines through the parameters, with its standard error.

    Examples: `curv roughness --dtype float64`; `curv roughness model.pt --radius 0.1 --steps 40 --out run1`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    directions
        How many lines: more make the error bar smaller.
    radius
        How far they go to either side, in lengths of the directions.
    steps
        Even steps on each line: what is finer is not seen.
    scale
        Directions have the norms of the parameters by filter, by layer, entry by entry, or as drawn.
    norm
        Batch normalisation: the model's own statistics, those of the data at every point, or those of each batch.
    seed
        Of the random directions.
    """
    prepare(output, "roughness", products=False)
    import curvature as cv

    objective = load_objective(model, task)
    deliver(
        lambda run: cv.roughness(
            objective,
            directions=directions,
            radius=radius,
            steps=steps,
            scale=None if scale == "none" else scale,
            norm=norm,
            seed=seed,
            run=run,
        ),
        output,
        "roughness",
    )
