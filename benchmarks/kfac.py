"""Building Kronecker factors, in this library and others: the rows of `operators.py` for K-FAC.

The time of building all factors over that of a gradient of the same data, in rounds in each of which every contender
builds once. What the others leave out (data or layers they refuse or skip) is said in the rows. laplace takes its
factors from BackPACK and curvlinops, which are here themselves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measure import Clock
from problems import Problem, gradient
from rich.table import Table
from torch import nn

import curvature as cv

Build = Callable[[], Any]


def _ours(make: Callable[..., Any], fisher: str, problem: Problem) -> Build:
    objective = cv.Objective.of(problem.copied(), cv.CrossEntropy(axis=-1), problem.loader("one batch"))
    objective.check()
    return lambda: make(objective, fisher=fisher)


def _curvlinops(name: str, fisher: str, problem: Problem) -> Build:
    import curvlinops

    module = problem.copied()
    params, data = list(module.parameters()), problem.loader("one batch")
    zero = torch.zeros(problem.size, device=problem.inputs.device)

    def build() -> Any:  # the factors are computed when they are first needed
        A = getattr(curvlinops, name)(
            module,
            nn.CrossEntropyLoss(),
            params,
            data,
            fisher_type=fisher,
            separate_weight_and_bias=False,
            check_deterministic=False,
        )
        return A @ zero

    return build


def _backpack(name: str, problem: Problem) -> Build:
    from backpack import backpack, extend, extensions

    module, loss = extend(problem.copied()), extend(nn.CrossEntropyLoss())

    def build() -> None:
        value = loss(module(problem.inputs), problem.targets)
        with backpack(getattr(extensions, name)()):
            value.backward()
        module.zero_grad()

    return build


def _kronfluence(strategy: str, problem: Problem) -> Build:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from kronfluence.utils.common.factor_arguments import default_factor_arguments

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
            inputs, targets = batch
            logits = model(inputs).flatten(0, -2)
            if sample:
                with torch.no_grad():
                    targets = torch.multinomial(logits.softmax(-1), 1)
            return F.cross_entropy(logits, targets.flatten(), reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

    folder = tempfile.TemporaryDirectory()
    task = Classification()
    model = prepare_model(problem.copied(), task)
    analyzer = Analyzer(
        "factors", model, task, cpu=problem.inputs.device.type == "cpu", disable_tqdm=True, output_dir=folder.name
    )
    data = torch.utils.data.TensorDataset(problem.inputs, problem.targets)
    options: FactorArguments = default_factor_arguments(strategy)
    fit = analyzer.fit_covariance_matrices if strategy == "kfac" else analyzer.fit_all_factors

    def build(folder: Any = folder) -> None:  # which is there as long as this
        fit("factors", data, per_device_batch_size=len(data), factor_args=options, overwrite_output_dir=True)

    return build


CONTENDERS: dict[str, dict[str, Callable[[Problem], Build]]] = {
    "sampled": {
        "curvature": partial(_ours, cv.kfac, "sampled"),
        "curvlinops": partial(_curvlinops, "KFACLinearOperator", "mc"),
        "BackPACK": partial(_backpack, "KFAC"),
        "kronfluence": partial(_kronfluence, "kfac"),
    },
    "type-2": {
        "curvature": partial(_ours, cv.kfac, "type-2"),
        "curvlinops": partial(_curvlinops, "KFACLinearOperator", "type-2"),
        "BackPACK": partial(_backpack, "KFLR"),
    },
    "EKFAC, sampled": {
        "curvature": partial(_ours, cv.ekfac, "sampled"),
        "curvlinops": partial(_curvlinops, "EKFACLinearOperator", "mc"),
        "kronfluence": partial(_kronfluence, "ekfac"),
    },
}


def rows_of(name: str, kind: str, problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """What every contender took, in each of the rounds."""
    clock = Clock(problem.inputs.device)
    builds: dict[str, Build] = {}
    notes = {
        "curvature": "with one gradient to see that the layers can be followed",
        "kronfluence": "Linear and Conv2d alone, written to disk",
    }
    for contender, prepare in CONTENDERS[kind].items():
        try:
            build = prepare(problem)
            build()
        except Exception as error:  # other libraries can raise anything
            notes[contender] = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else repr(error)
            )
        else:
            builds[contender] = build
    unit = partial(gradient, problem, problem.loader("one batch"))
    times: dict[str, list[float]] = {contender: [] for contender in builds}
    for _ in range(rounds):
        seconds, _ = clock(unit)
        for contender, build in builds.items():
            times[contender].append(clock.once(build)[0] / seconds)
    ours = times["curvature"]
    return [
        {
            "problem": name,
            "factors": kind,
            "contender": contender,
            "rounds": taken,
            "gradients": median(taken) if taken else None,
            "of_ours": median(t / o for t, o in zip(taken, ours, strict=True)) if taken else None,
            "note": notes.get(contender, ""),
        }
        for contender in CONTENDERS[kind]
        for taken in [times.get(contender, [])]
    ]


def measured(name: str, problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """The rows of a problem, for all kinds of factors."""
    kinds = [kind for kind in CONTENDERS if name != "gpt" or kind != "type-2"]  # a backward pass for each character
    return [row for kind in kinds for row in rows_of(name, kind, problem, rounds)]


def table(rows: list[dict[str, Any]]) -> Table:
    """All rows, in gradients and in our times."""
    shown = Table("problem", "factors", "contender", "gradients", "of ours", "note", title="Building Kronecker factors")
    for row in rows:
        figures = [f"{row[column]:.2f}" if row[column] else "" for column in ("gradients", "of_ours")]
        shown.add_row(row["problem"], row["factors"], row["contender"], *figures, row["note"])
    return shown
