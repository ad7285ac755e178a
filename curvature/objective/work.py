"""Work that asks something of objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from curvature.linalg.work import Work
from curvature.objective.objective import Objective
from curvature.progress import Run


def work_on(
    objective: Objective,
    question: str,
    *,
    options: Mapping[str, Any],
    seed: int | None = None,
    run: Run | None = None,
    others: Sequence[Objective] = (),
) -> Work:
    """The answer to `question` about the objective, in pieces; `others` are objectives whose passes count, too."""
    space = objective.space
    return Work(
        question,
        options=options,
        seed=seed,
        run=run,
        described=lambda: {"operator": question, **objective.facts, "shape": [space.size, space.size]},
        meters=lambda: [asked.meter for asked in (objective, *others)],
        device=space.device,
    )
