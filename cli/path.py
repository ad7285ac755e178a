"""curv path: the loss between two models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from .load import load_objective, looking
from .options import NUMBERS, Look, Norm, Output, Positive, Seed, Task
from .output import deliver, prepare


def path(
    model: str,
    other: str,
    /,
    *,
    kind: Literal["line", "polygon", "bezier"] = "line",
    align: Annotated[bool, Parameter(negative=())] = False,
    points: Positive = 61,
    beyond: Annotated[float, Parameter(validator=Number(gte=0), group=NUMBERS)] = 0.0,
    refine: Annotated[int, Parameter(validator=Number(gte=0), group=NUMBERS)] = 0,
    bends: Positive = 1,
    steps: Positive = 3000,
    lr: Annotated[float, Parameter(validator=Number(gt=0), group=NUMBERS)] = 0.1,
    norm: Norm = "recalibrated",
    seed: Seed = 0,
    look: Look = Look(),
    task: Task = Task(),
    output: Output = Output(),
) -> None:
    """The loss on the way from one model to another: barriers, and a curve of low loss trained between them.

    Examples: `curv path first.pt last.pt --beyond 0.2`; `curv path a.pt b.pt --align --out aligned`;
    `curv path a.pt b.pt --kind bezier --steps 200 --accuracy --out curve`.

    Parameters
    ----------
    model
        Where the path begins: a file, a Hugging Face folder, or code, as for other commands.
    other
        Where it ends, named likewise: the same architecture, loss and data.
    kind
        The straight line, or a polygon or Bézier curve whose bends are trained to lie low.
    align
        Permute the hidden units of OTHER first, so that its weights are as near as can be.
    points
        At which the loss is computed.
    beyond
        How far to go on past both ends, as a share of the way.
    refine
        So many more points around the highest.
    bends
        Of a polygon or Bézier curve.
    steps
        Of training the bends, a mini-batch each.
    lr
        Of training the bends, by SGD with momentum 0.9.
    norm
        Batch normalisation: the model's own statistics, those of the data at every point, or those of each batch.
    seed
        Of training the bends, and of the alignment.
    """
    prepare(output, "path", products=False)
    import curvature as cv

    start, end = load_objective(model, task), load_objective(other, task)
    end = cv.align(start, end, seed=seed) if align else end
    along: Any = {
        "points": points,
        "beyond": beyond,
        "refine": refine,
        "norm": norm,
        **looking(look, start, model, task),
    }
    if kind == "line":
        deliver(lambda run: cv.interpolate(start, end, run=run, **along), output, "path")
    else:
        trained: Any = {"kind": kind, "bends": bends, "steps": steps, "lr": lr, "seed": seed}
        deliver(lambda run: cv.connect(start, end, run=run, **trained, **along), output, "path")
