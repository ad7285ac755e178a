"""From MODEL and the task options to an Objective, and from that to the operator that was asked for."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from .code import import_from_here, is_spec, resolve
from .options import Look, Matrix, Misuse, Task
from .output import warn

if TYPE_CHECKING:
    import torch

    import curvature as cv


STRUCTURED = ("ggn-diagonal", "kfac", "ekfac", "egn", "gradient-window")  # which are held whole


def question_of(
    ask: Callable[..., Any], A: cv.LinearOperator, by: Literal["layer", "parameter"] | None
) -> Callable[..., Any]:
    """`ask` of the matrix, or of the block of each layer or parameter in it."""
    import curvature as cv

    return partial(ask, A) if by is None else partial(cv.by_layer, ask, A, by=by)


def load_operator(model: str | None, task: Task, matrix: Matrix) -> cv.LinearOperator:
    """The matrix that --operator names, of the objective; its health is checked now."""
    return operator_of(load_checked(model, task), matrix)


def operator_of(objective: cv.Objective, matrix: Matrix) -> cv.LinearOperator:
    """The matrix that --operator names."""
    import curvature as cv
    from curvature.errors import listing

    make: Any = getattr(cv, matrix.operator.replace("-", "_"))
    if matrix.operator not in STRUCTURED:
        return make(objective, engine=matrix.engine)
    if matrix.engine != "auto":
        raise Misuse(f"--engine is how products are computed, but {matrix.operator} is held whole.", "Leave it out.")
    A = make(objective) if matrix.operator != "gradient-window" else make(objective, matrix.window).fisher
    if apart := [f"{name} ({reason})" for name, reason in A.source.get("diagonal", {}).items()]:
        warn(f"{len(apart)} parameters have a diagonal block: {listing(apart, 3)}")
    return A


def load_checked(model: str | None, task: Task) -> cv.Objective:
    """The objective, of which the first derivatives are known to be right; what to know of it on stderr."""
    from curvature.errors import listing

    objective = load_objective(model, task)
    health = objective.check()
    if health.unused:
        unused = f"{len(health.unused)} parameters: {listing(health.unused, 3)}"
        warn(f"the loss of the first batch does not depend on {unused}")
    return objective


def test_of(objective: cv.Objective, name: str, task: Task) -> cv.Objective:
    """The loss alone, without a regulariser, of the data that --test names, at the same parameters."""
    return replace(objective.on(_data(name), **_cut(task)), l2=0.0)


def looking(look: Look) -> dict[str, Any]:
    """The options of what is looked at, as the library takes them."""
    return {"accuracy": look.accuracy, "held_out": _data(look.held_out)}


def load_objective(model: str | None, task: Task) -> cv.Objective:
    """The objective that MODEL and the options describe; demo:digits when they describe nothing."""
    if task.arch_arg and task.arch is None:
        raise Misuse("--arch-arg is for the code that --arch names.", "Pass --arch, or leave --arch-arg out.")
    if task.objective is not None:
        return _adjusted(_from_code(task.objective, model, task), task)
    model = "demo:digits" if model is None else model
    if model.startswith("demo:"):
        return _adjusted(_demo(model), task)
    if is_spec(model):
        if task.arch is not None:
            raise Misuse(
                f"{model} is code, which brings its own model.", "Leave --arch out, or give a file of weights."
            )
        return _from_made(_called(model), model, task)
    return _from_file(model, task)


def _demo(model: str) -> cv.Objective:
    import curvature as cv

    return cv.demo(model.removeprefix("demo:"))


def _from_code(spec: str, model: str | None, task: Task) -> cv.Objective:
    """What the code at `spec` returns, with the weights of the file MODEL if there is one."""
    import curvature as cv
    from curvature.io.weights import read_tensors, state_dict_of

    objective = _called(spec)
    if not isinstance(objective, cv.Objective):
        raise cv.BadObjective(f"{spec} returned a {type(objective).__name__}.", "It must return a curvature.Objective.")
    if model is None:
        return objective
    state, notes = state_dict_of(read_tensors(model, allow=task.allow_global))
    _say_all(notes)
    return objective.with_state(state)


def _from_file(path: str, task: Task) -> cv.Objective:
    import curvature as cv
    from curvature.io.models import read_module
    from curvature.io.recognise import FileKind, recognise

    if task.trust:
        import_from_here()
    arch = None if task.arch is None else partial(_made, task.arch, task.arch_arg)
    if recognise(path) is FileKind.OBJECTIVE:
        data = _data(task.data)
        objective = cv.Objective.load(path, trust=task.trust, arch=arch, data=data, **_cut(task))
        return _adjusted(objective, task, loaded=True)
    _need_loss_and_data(path, task)  # before the file is opened: it may be large
    module, notes = read_module(path, arch=arch, trust=task.trust, allow=task.allow_global)
    _say_all(notes)
    return _from_made(module, path, task)


def _from_made(made: Any, name: str, task: Task) -> cv.Objective:
    """An objective of what MODEL turned out to be: an objective already, or a module."""
    import torch

    import curvature as cv

    if isinstance(made, cv.Objective):
        return _adjusted(made, task)
    if not isinstance(made, torch.nn.Module):
        raise cv.BadObjective(f"{name} made a {type(made).__name__}.", "Return a torch.nn.Module or an Objective.")
    _need_loss_and_data(name, task)
    made = made.to(_device(task))
    options: dict[str, Any] = {
        "select": _select(task),
        "mode": task.mode or "eval",
        "dtype": _dtype(task),
        "l2": task.l2,
        **_cut(task),
    }
    assert task.loss is not None
    if is_spec(task.loss):
        return cv.Objective.from_loss(made, resolve(task.loss), _data(task.data), **options).first(task.max_examples)
    return cv.Objective.of(made, task.loss, _data(task.data), **options).first(task.max_examples)


def _adjusted(objective: cv.Objective, task: Task, *, loaded: bool = False) -> cv.Objective:
    """An objective that came whole, with what the options change of it."""
    if task.loss is not None or (task.arch is not None and not loaded):
        raise Misuse("MODEL brings its own model and loss.", "Leave --loss and --arch out.")
    if task.batch_size is not None and task.data is None:
        raise Misuse("MODEL brings its own batches.", "Give --batch-size together with --data.")
    if task.params or task.exclude:
        objective = objective.narrowed(_select(task))
    if task.data is not None and not loaded:
        objective = objective.on(_data(task.data), **_cut(task))
    if task.mode is not None and task.mode != objective.mode:
        objective = objective.in_mode(task.mode)
    if task.l2:
        objective = replace(objective, l2=task.l2)
    return objective.first(task.max_examples).to(dtype=_dtype(task), device=_device(task))


def _need_loss_and_data(name: str, task: Task) -> None:
    missing = [option for option, given in (("--loss", task.loss), ("--data", task.data)) if given is None]
    if missing:
        raise Misuse(
            f"{name} says nothing about {' and '.join(option[2:] for option in missing)}.",
            f"Pass {' and '.join(missing)}, or --objective ./file.py:NAME that returns a curvature.Objective.",
        )


def _data(name: str | None) -> Any:
    """What --data or --held-out name: arrays from a file, a demo's batches, or what code returns."""
    import curvature as cv
    from curvature.io.data import read_data

    if name is None:
        return None
    if name.startswith("demo:"):
        return _demo(name).batches
    if is_spec(name):
        made = _called(name)
        if made is None:
            raise cv.BadObjective(f"{name} returned nothing.", "Return a DataLoader, batches, or tensors.")
        return made
    return read_data(name)


def _cut(task: Task) -> dict[str, int]:
    return {} if task.batch_size is None else {"batch_size": task.batch_size}


def _select(task: Task) -> Callable[[str, Any], bool]:
    from curvature.objective.params import predicate

    wanted, unwanted = predicate(task.params or None), predicate(task.exclude)
    return lambda name, p: wanted(name, p) and not unwanted(name, p)


def _called(spec: str, arguments: tuple[str, ...] = ()) -> Any:
    """What the code at `spec` returns when called with name=value arguments; objects that are no code as they are."""
    import curvature as cv
    from curvature.errors import one_line

    made = resolve(spec)
    if not callable(made) or isinstance(made, cv.Objective) or _is_module(made):
        return made
    pairs = [argument.partition("=") for argument in arguments]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise Misuse(f"--arch-arg {name}{equals} is not of the form name=value.", "Write --arch-arg hidden=32.")
    try:
        return made(**{name: _literal(value) for name, _, value in pairs})
    except cv.CurvatureError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code can raise anything
        raise cv.BadObjective(
            f"Calling {spec} failed: {one_line(error)}.", "Run it with python to see where."
        ) from error


def _made(spec: str, arguments: tuple[str, ...]) -> torch.nn.Module:
    """The module that the code at `spec` makes."""
    import curvature as cv

    made = _called(spec, arguments)
    if not _is_module(made):
        raise cv.BadObjective(f"{spec} made a {type(made).__name__}.", "It must return a torch.nn.Module.")
    return made


def _is_module(made: Any) -> bool:
    import torch

    return isinstance(made, torch.nn.Module)


def _literal(text: str) -> Any:
    """A number, list or quoted text as Python writes it; anything else as plain text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _dtype(task: Task) -> torch.dtype | None:
    import torch

    return None if task.dtype is None else getattr(torch, task.dtype)


def _device(task: Task) -> torch.device:
    import torch

    if task.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=task.device).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise Misuse(
            f"--device {task.device} cannot be used: {first}.", "Use cpu, or install a torch for it."
        ) from error


def _say_all(notes: list[str]) -> None:
    for note in notes:
        warn(note)
