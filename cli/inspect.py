"""curv inspect: what is in a model file. Never runs any of it."""

from __future__ import annotations

import json
from typing import Any

from .options import Config, Format
from .output import tell

SHOWN = 40  # tensors listed in the table; JSON has all


def inspect(model: str, /, *, format: Format = "human", config: Config = None) -> None:
    """What a model file is: its kind, tensors, parameters, non-finite values, and the code it would run.

    Examples: `curv inspect model.pt`; `curv inspect model.safetensors --format json`.

    Parameters
    ----------
    model
        A file, a folder, or demo:NAME.
    """
    facts = _facts(model)
    if format == "json":
        tell(json.dumps(facts))
    elif format == "human":
        tell(_table(model, facts))


def _facts(model: str) -> dict[str, Any]:
    from curvature.assets import weights
    from curvature.io.contents import contents

    return contents(weights(model.removeprefix("demo:")) if model.startswith("demo:") else model)


def _table(model: str, facts: dict[str, Any]) -> str:
    tensors = facts["tensors"]
    width = max((len(t["name"]) for t in tensors[:SHOWN]), default=0)
    size = f"{facts['parameters']:,} numbers, {facts['bytes'] / 2**20:.1f} MiB"
    lines = [
        f"file        {model}",
        f"kind        {facts['kind']}",
        f"tensors     {f'{len(tensors)}, {size}' if tensors else 'none that is read'}",
        f"not finite  {', '.join(facts['not_finite']) or ('none' if tensors else 'not known')}",
        f"runs code   {', '.join(facts['code']) or 'no'}",
        *(f"note        {note}" for note in facts["notes"]),
        "",
        *(f"  {t['name']:<{width}} {t['dtype']:<10} {tuple(t['shape'])}" for t in tensors[:SHOWN]),
    ]
    more = len(tensors) - SHOWN
    return "\n".join([*lines, f"  ... and {more} more (--format json)"] if more > 0 else lines)
