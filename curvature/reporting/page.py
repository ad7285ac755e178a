"""A report as one HTML page: nothing on it is loaded from elsewhere, and nothing in it runs."""

from __future__ import annotations

import html
import importlib.util
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from curvature.operators.by_layer import ByLayer
from curvature.result import Result

if TYPE_CHECKING:
    from curvature.reporting.report import Report

SECTIONS = {  # by question: the heading, and how to read what is below it
    "health": (
        "Whether this can be analysed",
        "What was tried before the first number: derivatives against finite differences, symmetry, which engines work.",
    ),
    "spectrum": (
        "All eigenvalues of the Hessian",
        "Most lie in a bulk around zero; the few outside carry the sharp directions. A negative share means that the "
        "parameters are no minimum. The band is the standard error over random vectors.",
    ),
    "eigenvalues": (
        "The largest eigenvalues",
        "The curvature along the sharpest directions. Each lies within its residual of a true eigenvalue.",
    ),
    "layers": (
        "The largest eigenvalue of each layer",
        "How sharp the loss is when one layer moves and all others are held fixed.",
    ),
    "traces": (
        "The trace of each layer",
        "The sum of all eigenvalues of a layer: its curvature over all directions. Bars are 95 % intervals.",
    ),
    "gradient": (
        "The gradient in the sharpest directions",
        "How much of the gradient's square lies in the span of the first eigenvectors. Near 1, gradient steps mostly "
        "go where the loss curves most, and little of them elsewhere (Gur-Ari, Roberts & Dyer 2018).",
    ),
    "rates": (
        "The largest stable learning rates",
        "Beyond these, full-batch steps move away along the sharpest direction (Cohen et al. 2021, 2022). The error is "
        "that which the choice of the data gives. The noise of small batches makes smaller rates unstable.",
    ),
    "sharpness": (
        "Sharpness",
        "Compare models by the invariant measures: the others change when weights are rescaled and the function is "
        "not.",
    ),
    "landscape": (
        "The loss around the parameters",
        "In the plane of the eigenvectors of the largest and the smallest eigenvalue.",
    ),
}
SHOWN = 40  # rows of a table: result.json has all
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 0.2rem; }
p { margin: 0.4rem 0; } .note { color: #555; } .warn { border-left: 4px solid #D55E00; padding-left: 0.8rem; }
table { border-collapse: collapse; margin: 0.8rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.15rem 1.2rem 0.15rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
th { font-weight: 500; white-space: nowrap; } svg { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; }
@media print { section { break-inside: avoid; } }
"""
# a browser that keeps to this loads nothing and runs nothing, whatever is on the page
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page_of(report: Report, made_by: str) -> str:
    """The page, in UTF-8."""
    facts = report.origin.operator
    title = f"Curvature of {facts['model']}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p class='note'>{_text(facts['loss'])}, {facts['parameters']:,} parameters, {facts['mode']} mode</p>",
        _warnings(report),
        _table({"loss": f"{report.loss:.6g}", **_at_a_glance(report)}),
        *(_section(name, result) for name, result in zip(report.names, report.results, strict=True)),
        _again(report, made_by),
    ]
    return (
        f"<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n<title>{_text(title)}</title>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<meta name='viewport' content='width=device-width'>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _at_a_glance(report: Report) -> dict[str, str]:
    """The few numbers that most readers came for."""
    said = {name: result.summary() for name, result in zip(report.names, report.results, strict=True)}
    wanted = {
        "eigenvalues": {"eigenvalue 1": "largest eigenvalue"},
        "spectrum": {"trace": "trace", "negative": "negative eigenvalues"},
        "rates": {name: f"stable learning rate, {name}" for name in said.get("rates", ()) if "eigen" not in name},
        "gradient": {"of the gradient": "gradient in the sharpest directions"},
    }
    return {
        label: said[question][name]
        for question, labels in wanted.items()
        for name, label in labels.items()
        if name in said.get(question, ())
    }


def _warnings(report: Report) -> str:
    """What a reader has to know before believing the numbers."""
    warnings = [f"Left out: {reason}" for reason in report.left_out]
    if "health" in report.names:
        diagnosis = report["health"]
        warnings += [f"{f.name}: {f.seen}. {f.fix}" for f in (*diagnosis.failures, *diagnosis.warnings)]
    if not report.complete:
        warnings.append("Interrupted: what follows is what was measured until then.")
    return "".join(f"<p class='warn'>{_text(warning)}</p>" for warning in warnings)


def _section(name: str, result: Result) -> str:
    heading, reading = SECTIONS[name]
    partial = "" if result.complete else "<p class='warn'>Interrupted.</p>"
    return (
        f"<section id='{_text(name)}'><h2>{_text(heading)}</h2><p class='note'>{_text(reading)}</p>{partial}"
        f"{_picture(name, result)}{_table(_rows(result))}<p class='note'>{_text(result.cost)}</p></section>"
    )


def _rows(result: Result) -> dict[str, str]:
    """What a table says: of layers a row each."""
    if not isinstance(result, ByLayer):
        return result.summary()
    return {name: next(iter(layer.summary().values())) for name, layer in result.items()}


def _table(rows: Mapping[str, str]) -> str:
    shown = list(rows.items())[:SHOWN]
    more = [("...", f"and {len(rows) - SHOWN} more rows in result.json")] if len(rows) > SHOWN else []
    cells = "".join(f"<tr><th>{_text(label)}</th><td>{_text(text)}</td></tr>" for label, text in [*shown, *more])
    return f"<table>{cells}</table>"


def _picture(name: str, result: Result) -> str:
    """The picture of a result as SVG with names of its own; nothing where there is none, or no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return ""
    from curvature.plots import drawable, svg

    if not drawable(result):
        return ""
    return re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg(result))


def _again(report: Report, made_by: str) -> str:
    """How to obtain this again: the command or the call, and what it depends on."""
    origin = report.origin
    options = ", ".join(f"{name}={value!r}" for name, value in {**origin.options, "seed": origin.seed}.items())
    call = f"curvature.report(objective, {options})"
    facts: dict[str, Any] = {**origin.operator, "threads": origin.threads, "versions": origin.versions}
    return (
        "<section id='again'><h2>How to obtain this again</h2>"
        + (f"<pre>{_text(made_by)}</pre>" if made_by else "")
        + f"<pre>{_text(call)}</pre><pre>{_text(json.dumps(facts, indent=1, default=str))}</pre>"
        f"<p class='note'>{_text(report.cost)}. All numbers are in result.json beside this page.</p></section>"
    )


def _text(value: object) -> str:
    """Safe on a page: names come from files. Control characters are shown as what they are."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(value)))
