"""curv landscape: the loss around the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from .load import load_objective, looking
from .options import NUMBERS, Look, Many, Misuse, Norm, Output, Positive, Radius, Scale, Seed, Task
from .output import deliver, prepare

RTOL = 1e-3  # of the eigenvectors that are directions

if TYPE_CHECKING:
    import torch

    import curvature as cv


def landscape(
    model: str | None = None,
    /,
    *,
    axes: Literal["1", "2"] = "2",
    directions: Literal["random", "hessian", "gradient", "trajectory"] = "random",
    toward: Many = (),
    trajectory: Many = (),
    scale: Scale = "filter",
    radius: Radius = 1.0,
    norm: Norm = "frozen",
    points: Positive | None = None,
    crowd: Annotated[float | Literal["adaptive"], Parameter(group=NUMBERS)] = 1.0,
    surface: Annotated[bool, Parameter(negative=())] = False,
    seed: Seed = 0,
    look: Look = Look(),
    task: Task = Task(),
    output: Output = Output(),
) -> None:
    """The loss on a line or in a plane through the parameters.

    Examples: `curv landscape --points 11 --out digits`;
    `curv landscape model.pt --directions hessian --radius 3 --out run1`;
    `curv landscape last.pt --trajectory first.pt --trajectory second.pt --directions trajectory --out run2`.

    Parameters
    ----------
    model
        demo:NAME, a file, a Hugging Face folder, or code; demo:digits when left out.
    axes
        A line or a plane.
    directions
        random ones, the eigenvectors of the largest and smallest eigenvalue of the Hessian, the gradient and a random
        one, or the principal components of --trajectory.
    toward
        Another model, as MODEL is named: the first directions lead to such ones. May be repeated.
    trajectory
        A checkpoint of the training run of MODEL, earliest first: the run is drawn in the plane. May be repeated.
    scale
        Random directions have the norms of the parameters by filter, by layer, entry by entry, or as drawn.
    radius
        The largest coordinate, in lengths of the directions: those of hessian and trajectory are 1.
    points
        Along each axis, an odd number: 101 on a line, 51 x 51 when left out.
    crowd
        Points are evenly spaced at 1, and crowd at the centre for more; adaptive crowds them where the loss rises.
    surface
        Draw a plane as a surface instead of contours.
    norm
        Batch normalisation: the model's own statistics, those of the data at every point, or those of each batch.
    seed
        Of the random directions.
    """
    prepare(output, "landscape", products=directions == "hessian")
    import curvature as cv

    objective = load_objective(model, task)
    options: dict[str, Any] = {"radius": radius, "crowd": crowd, "norm": norm, **looking(look, objective, model, task)}
    options |= {} if points is None else {"points": points}
    steps = cv.positions(objective, [*(load_objective(name, task) for name in trajectory), objective])
    others = cv.positions(objective, [load_objective(name, task) for name in toward])
    style = ({"surface": True} if surface else {}) | ({"trajectory": steps} if trajectory else {})
    ask = {"1": cv.line, "2": cv.plane}[axes]

    def measure(run: cv.Run) -> cv.Landscape:
        ways = _ways(objective, directions, int(axes), others - objective.position, steps, scale, seed, run)
        return ask(objective, ways, run=run, **options)

    deliver(measure, output, "landscape", **style)


def _ways(
    objective: cv.Objective,
    directions: str,
    count: int,
    given: torch.Tensor,
    steps: torch.Tensor,
    scale: Scale,
    seed: int,
    run: cv.Run,
) -> torch.Tensor | cv.Eigenpairs:
    """So many directions: those that are given, then those that --directions names, then random ones."""
    import torch

    import curvature as cv

    left = count - len(given)
    if left < 0:
        raise Misuse(f"--toward is given {len(given)} times, for {count} axes.", "Leave some out.")
    if directions == "trajectory" and len(steps) < 3:
        raise Misuse("--directions trajectory is for the checkpoints of a run.", "Pass --trajectory twice or more.")
    if left == 0:
        return given
    match directions:
        case "hessian":
            pairs = _pairs(objective, left, seed, run)
            if left == count:
                return pairs  # they name the axes
            found = pairs.vectors
        case "gradient":
            found = objective.gradient()[None]
        case "trajectory":
            found = cv.trajectory(objective, steps, count=left).directions
        case _:
            found = objective.space.empty
    drawn = cv.random_directions(objective, count, scale=None if scale == "none" else scale, seed=seed)
    return torch.cat([given, found, drawn])[:count]


def _pairs(objective: cv.Objective, count: int, seed: int, run: cv.Run) -> cv.Eigenpairs:
    """Those at the ends of the spectrum, all or none."""
    import curvature as cv

    try:
        part = run.part("directions")
        return cv.eigsh(cv.hessian(objective), count, which="both", rtol=RTOL, seed=seed, run=part)
    except cv.Interrupted as stop:
        raise KeyboardInterrupt from stop
