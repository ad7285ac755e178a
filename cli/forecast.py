"""What a command line will take: the products, losses and vectors that `curv doctor --command` forecasts."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .compare import MEASURES
from .load import STRUCTURED
from .options import Misuse

Options = dict[str, Any]  # of a command line
Plan = dict[str, int]  # the arguments of `curvature.check`

GRADIENT = 3  # losses that take as long
USUAL = 10  # steps to eigenvalues that stand out, of trained and untrained models of all kinds; and one more for each
ENDS = 80  # to the largest and the smallest one, vector by vector: the latter is among many


def plan_of(command: str) -> Plan:
    """The products, losses and vectors of a command line; Misuse where there is no such command."""
    from .main import build

    name, *words = shlex.split(command) or [""]
    if name not in PLANS:
        raise Misuse(f"--command takes {', '.join(PLANS)}, but got {name!r}.", "Leave it out for the others.")
    _, bound, _ = build().parse_args([name, *words], exit_on_error=False, print_error=False)
    bound.apply_defaults()
    return PLANS[name](bound.arguments)


def _products(products: int, passes: int | None = None, *, vectors: int = 0) -> Plan:
    return {"products": products, "passes": products if passes is None else passes, "vectors": vectors}


def _eig(
    k: int, method: str = "lanczos", max_steps: int | None = None, block: int | None = None, which: str = "largest"
) -> Plan:
    """The steps that the largest usually take, and all that there may be for the smallest, which are among many; room
    for all in any case."""
    krylov = method == "krylov"
    most = max_steps or (30 if krylov else 200)
    steps = most if which in ("smallest", "both") else min(most, USUAL if krylov else USUAL + k)
    width = block or (k + 2 if krylov else 4)
    return _products(steps * width, steps, vectors=most * width if krylov else max(3 * k, 24) + 5 * width)


def _spectrum(options: Options) -> Plan:
    probes, steps = options["probes"], options["steps"]
    kept = probes * (steps + 1 if options["keep"] == "device" else 3)  # vectors of the Krylov bases
    return _products(probes * steps, steps, vectors=kept)


def _of_blocks(plan: Plan, by: str | None) -> Plan:
    """The same of each layer or parameter: in the same passes, and their vectors are no longer together."""
    return plan if by is None else {f"{by}_products": plan["products"], **plan, "products": 0}


def _together(*plans: Plan) -> Plan:
    """One after the other: what the vectors of all take is free again before the next."""
    total = Counter[str]()
    for plan in plans:
        total.update(plan)
    return {**total, "vectors": max(plan.get("vectors", 0) for plan in plans)}


def _measures(names: Sequence[str], options: Options) -> Plan:
    """Those of the table of sharpness, all of them if none is named."""
    from curvature.probes.measures import MEASURES as KNOWN
    from curvature.probes.measures import PROBES, STEPS

    samples = options.get("samples", 16)
    sums = _products(options["products"])
    plans = {
        "lambda_max": _eig(1),
        "trace": sums,
        "frobenius": sums,
        "filter": sums,
        "criteria": _products(PROBES * STEPS, STEPS, vectors=PROBES * (STEPS + 1)),
        "worst": {"losses": 2 * STEPS * GRADIENT},  # ascents from two starts
        "keskar": {"losses": STEPS * GRADIENT},
        "average": {"losses": 1 + samples},
        "pac_bayes": {"losses": 15 * samples},  # a search by halving
    }
    few = {"losses": 4 * GRADIENT}  # of sam, critical and fisher_rao
    return _together(*(plans.get(name.removeprefix("adaptive_"), few) for name in _checked(names, KNOWN)))


def _sharpness(options: Options) -> Plan:
    plan = _measures(options["measure"], options)
    return _together(plan, plan, plan) if options["invariance"] else plan


def _compare(options: Options) -> Plan:
    """Of two models like the one that is looked at."""
    plan = _measures(options["measure"] or MEASURES, options)
    return _together(plan, plan)


def _influence(options: Options) -> Plan:
    """Gradients of the tests, a structured matrix or the solve, and a pass over the examples."""
    if options["matrix"].operator in STRUCTURED:
        return {"losses": 5 * GRADIENT}
    if options["own"] or options["each"]:
        raise Misuse(
            "How long a solve for each example takes cannot be told before.",
            "Leave --self and --each out, or pass --operator ekfac.",
        )
    return _together({"losses": 2 * GRADIENT}, _products(options["max_steps"], vectors=5))


def _report(options: Options) -> Plan:
    """Of each question that it asks."""
    from curvature.reporting.report import QUESTIONS

    asked = _checked(options["question"], QUESTIONS)
    sums, eig, one = _products(options["products"]), _eig(options["k"]), _eig(1, block=1)
    plans = {
        "health": _products(10),
        "spectrum": _spectrum({**options, "keep": "device"}),
        "eigenvalues": eig,
        "layers": _of_blocks(one, "layer"),
        "traces": _of_blocks(sums, "layer"),
        "gradient": _together({} if "eigenvalues" in asked else eig, {"losses": 2 * GRADIENT}),
        "rates": _together(one, one, {"losses": 5 * GRADIENT}),  # errors and second moment take a pass each
        "sharpness": _measures((), options),
        "landscape": _together(_eig(2, which="both", max_steps=ENDS, block=1), {"losses": options["points"] ** 2}),
    }
    return _together(*(plans[name] for name in asked))


def _landscape(options: Options) -> Plan:
    """The points, and the directions where these are eigenvectors."""
    from curvature.probes.landscape import POINTS

    axes = int(options["axes"])
    losses = {"losses": (options["points"] or POINTS[axes]) ** axes}
    return _together(_eig(axes, which="both"), losses) if options["directions"] == "hessian" else losses


def _asked(options: Options, *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names}


def _checked(names: Sequence[str], known: Iterable[str]) -> Sequence[str]:
    """The names, all that there are if none is given; Misuse for one that there is not."""
    known = list(known)
    if unknown := [name for name in names if name not in known]:
        raise Misuse(f"There is no {unknown[0]!r} to forecast.", f"Take some of {', '.join(known)}.")
    return names or known


PLANS: dict[str, Callable[[Options], Plan]] = {  # by command
    "spectrum": lambda o: _of_blocks(_spectrum(o), o["by"]),
    "eig": lambda o: _of_blocks(_eig(**_asked(o, "k", "method", "max_steps", "block", "which")), o["by"]),
    "trace": lambda o: _of_blocks(_products(o["goal"].products, vectors=o["goal"].products), o["by"]),
    "diag": lambda o: _products(o["goal"].products, vectors=o["goal"].products),
    "ihvp": lambda o: _products(o["max_steps"], vectors=5),
    "landscape": _landscape,
    "roughness": lambda o: {"losses": o["directions"] * (o["steps"] + 1), "vectors": o["directions"]},
    "sharpness": _sharpness,
    "path": lambda o: {"losses": o["points"]},
    "influence": _influence,
    "compare": _compare,
    "report": _report,
}
