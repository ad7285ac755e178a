"""The options that commands share: one name and one meaning everywhere."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

TASK, NUMBERS, SAFETY, OUTPUT, GATES = (
    Group(name, sort_key=i) for i, name in enumerate(("Task", "Numbers", "Safety", "Output", "Gates"))
)

Positive = Annotated[int, Parameter(validator=Number(gte=1), group=NUMBERS)]
Count = Annotated[int, Parameter(name=("--k", "-k"), validator=Number(gte=1), group=NUMBERS)]
Seed = Annotated[int, Parameter(validator=Number(gte=0, lt=2**63), group=NUMBERS)]
Tolerance = Annotated[float, Parameter(validator=Number(gt=0, lt=1), group=NUMBERS)]

Damping = Annotated[float, Parameter(validator=Number(gte=0), group=NUMBERS)]
Test = Annotated[str | None, Parameter(group=TASK)]
Radius = Annotated[float, Parameter(validator=Number(gt=0), group=NUMBERS)]
Scale = Annotated[Literal["filter", "layer", "weight", "none"], Parameter(group=NUMBERS)]
Norm = Annotated[Literal["frozen", "recalibrated", "batch"], Parameter(group=NUMBERS)]
By = Annotated[Literal["layer", "parameter"] | None, Parameter(group=NUMBERS)]


class Misuse(Exception):
    """Options that cannot be met, or not together: cause and fix, as in curvature.errors."""

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause, fix)
        self.cause, self.fix = cause, fix


Many = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]
Format = Annotated[
    Literal["human", "json", "quiet"],
    Parameter(group=OUTPUT, help="What standard output gets: a table, JSON, or nothing."),
]
Config = Annotated[
    Path | None,
    Parameter(
        name=("--config", "-C"),
        group=OUTPUT,
        help="A TOML file of defaults, in place of ./curv.toml or [tool.curv] in ./pyproject.toml.",
    ),
]

SECONDS = {"s": 1, "m": 60, "h": 3600}


def parsed_budget(text: str) -> dict[str, float]:
    """A budget as 60s, 10m, 2h or 200hvp: the seconds or products that curvature.Budget takes."""
    parts = re.fullmatch(r"([0-9]+\.?[0-9]*)(s|m|h|hvp)", text)
    number = float(parts[1]) if parts else 0.0
    if parts is None or not number or (parts[2] == "hvp" and number % 1):
        raise ValueError(f"a budget is a time or a number of products, as 60s, 10m, 2h or 200hvp, but got {text}")
    return {"products": number} if parts[2] == "hvp" else {"seconds": number * SECONDS[parts[2]]}


def _checked_budget(type_: object, text: str | None) -> None:
    if text is not None:
        parsed_budget(text)


@Parameter(name="*", group=TASK)
@dataclass(frozen=True)
class Task:
    """What is analysed: how MODEL becomes a loss of its parameters on data."""

    objective: str | None = None
    "Code that returns a curvature.Objective: ./file.py:name or package.module:name. MODEL, if given, is its weights."
    arch: str | None = None
    "Code that makes the module whose weights MODEL holds."
    base: Path | None = None
    "The Hugging Face folder of the model that a PEFT adapter changes; by default the one that the adapter names."
    arch_arg: Many = ()
    "An argument for --arch, as name=value; may be repeated."
    loss: str | None = None
    "cross-entropy, bce, mse, kl, poisson-nll, gaussian-nll, or code: a function loss(model, batch)."
    data: str | None = None
    "A .npz, safetensors, torch or CSV file, demo:NAME, or code that returns data; texts for a Hugging Face folder."
    target: str | None = None
    "The column of a CSV file (or JSON lines) that is predicted; by default the last."
    block_size: Annotated[int | None, Parameter(validator=Number(gte=1))] = None
    "Tokens of a text at a time; by default 128, or what the model can take."
    batch_size: Annotated[int | None, Parameter(validator=Number(gte=1))] = None
    "Examples of whole arrays computed at a time: bounds memory. By default 256, and all at once for --loss code."
    max_examples: Annotated[int | None, Parameter(validator=Number(gte=1))] = None
    "Use only so many examples from the front of the data."
    params: Many = ()
    "Only trainable parameters whose name, or that of a layer around them, matches this glob; may be repeated."
    exclude: Many = ()
    "Not those that match this glob; may be repeated."
    mode: Literal["eval", "train"] | None = None
    "Whether batch normalisation and dropout act as in evaluation (the default) or in training (fixed masks)."
    dtype: Literal["float32", "float64"] | None = None
    "Precision of the computation; by default that of the weights."
    l2: Annotated[float, Parameter(validator=Number(gte=0))] = 0.0
    "The weight decay of training, as a part of the loss: l2/2 times the squared parameters."
    device: str = "auto"
    "cpu, cuda, cuda:1, ...; auto is cuda where there is one."
    trust: Annotated[bool, Parameter(negative=(), group=SAFETY)] = False
    "Run code that the model file brings along (pickled modules, TorchScript, .pt2)."
    allow_global: Annotated[tuple[str, ...], Parameter(group=SAFETY, negative=(), show_default=False)] = ()
    "A class that may be unpickled although it is not on torch's safe list; may be repeated."


@Parameter(name="*", group=TASK)
@dataclass(frozen=True)
class Matrix:
    """Which matrix of it."""

    operator: Literal[
        "hessian",
        "ggn",
        "fisher",
        "empirical-fisher",
        "gradient-covariance",
        "ggn-diagonal",
        "kfac",
        "ekfac",
        "egn",
        "gradient-window",
    ] = "hessian"
    "Which matrix. egn is the GGN of few data, gradient-window the Fisher matrix of some gradients (M-FAC)."
    window: Positive = 256
    "Examples of gradient-window, drawn at random."
    engine: Literal["auto", "retained", "batched", "recomputed", "linearized", "compiled", "forward"] = "auto"
    "How products are computed: changes time and memory, and no number. recomputed takes least memory. Not for kfac."


@Parameter(name="*", group=NUMBERS)
@dataclass(frozen=True)
class Look:
    """What is looked at, at every point of the parameter space."""

    accuracy: Annotated[bool, Parameter(negative=())] = False
    "The share of right answers, too."
    held_out: Annotated[str | None, Parameter(group=TASK)] = None
    "Other data, named and read as --data is: all that is asked for of them, too."


@Parameter(name="*", group=NUMBERS)
@dataclass(frozen=True)
class Goal:
    """When an estimate is good enough."""

    products: Positive = 32
    "Products with the matrix to spend: more make the error bars smaller."
    rtol: Tolerance | None = None
    "Go on until the half-width of the interval (the norm of all) is this small, relative to the result, instead."
    atol: Annotated[float | None, Parameter(validator=Number(gt=0))] = None
    "The same, absolutely."
    level: Tolerance = 0.95
    "Of the interval."

    def within(self, budget: str | None) -> dict[str, Any]:
        """The options of the library, where no more products are planned than the budget has: the last ones count."""
        most = {} if budget is None else parsed_budget(budget)
        if "products" not in most:
            return asdict(self)
        count = int(most["products"])
        return {**asdict(self), "products": min(self.products, count), "max_products": count}


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Written:
    """Where the result goes."""

    out: Path | None = None
    "A folder for result.json, arrays.safetensors, the picture, and rows as CSV. Without it nothing is written."
    format: Format = "human"
    overwrite: Annotated[bool, Parameter(negative=())] = False
    "Replace a result that is already in --out."
    threads: Annotated[int | None, Parameter(validator=Number(gte=1))] = None
    "CPU threads; bits may depend on them."
    debug: Annotated[bool, Parameter(negative=())] = False
    "Show the traceback of an error."
    config: Config = None
    fail_on: Annotated[tuple[str, ...], Parameter(group=GATES, negative=(), show_default=False)] = ()
    "End with exit code 10 where this, as 'lambda_max > 100' (>, >=, <, <=), holds or is not decided; may be repeated."


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Output(Written):
    """Where the result of work that may take long goes, and when it stops."""

    budget: Annotated[str | None, Parameter(group=NUMBERS, validator=_checked_budget)] = None
    "Stop after 60s, 10m, 2h or 200hvp (products), with what there is then. Products stop at the same place every time."
    resume: Annotated[bool, Parameter(negative=())] = False
    "Keep what is computed in --out as it comes, and go on from there when the same command is started again."
    progress: Literal["auto", "bar", "log", "none"] = "auto"
    "A bar on terminals, a line every 10 s elsewhere, on standard error."
