"""From MODEL and the task options to an Objective, and from that to the operator that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .code import as_script, called, import_from_here, is_spec, made_by, resolve
from .data import data_of, data_of_folder, parts_of_folder, say_all, whole_batches
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
    from curvature.objective.difference import NEAR

    objective = load_objective(model, task)
    health = objective.check()
    if health.detached:
        detached = f"{len(health.detached)} parameters that no gradient reaches: {listing(health.detached, 3)}"
        warn(f"the loss of the first batch changes with {detached}; see curv doctor")
    if health.idle:
        warn(f"the loss of the first batch does not depend on {len(health.idle)} parameters: {listing(health.idle, 3)}")
    if health.difference is not None and health.difference > NEAR:
        warn(f"second derivatives are {health.difference:.1g} off differences of gradients: see curv doctor")
    return objective


def on_test(objective: cv.Objective, name: str, model: str | None, task: Task) -> cv.Objective:
    """The loss alone, without a regulariser, of the data that --test names, at the same parameters."""
    return replace(objective.on(other_data(name, objective, model, task)), l2=0.0)


def looking(look: Look, objective: cv.Objective, model: str | None, task: Task) -> dict[str, Any]:
    """The options of what is looked at, as the library takes them."""
    return {"accuracy": look.accuracy, "held_out": other_data(look.held_out, objective, model, task)}


def other_data(name: str | None, objective: cv.Objective, model: str | None, task: Task) -> Any:
    """What --held-out or --test name, read and cut as --data is for the objective of MODEL; None for no name."""
    from curvature.io.models import fixed_batch
    from curvature.io.recognise import is_text
    from curvature.objective.batches import Batches, whole

    if name is None:
        return None
    module = objective.function.module
    if model is not None and _is_folder(model, task):
        data = data_of_folder(name, Path(model), module, task)
    else:
        data = data_of(name, task if Path(name).is_file() and is_text(name) else replace(task, target=None))
    if (size := fixed_batch(module)) is not None:
        return whole_batches(data, size, None, model or name)
    if isinstance(data, Batches):
        return data
    return objective.on(data, **(_cut(task) if whole(data) else {})).batches


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
        return _from_made(called(model), model, task, data_of(task.data, task))
    return _from_file(model, task)


def _demo(model: str) -> cv.Objective:
    import curvature as cv

    return cv.demo(model.removeprefix("demo:"))


def _from_code(spec: str, model: str | None, task: Task) -> cv.Objective:
    """What the code at `spec` returns, with the weights of the file MODEL if there is one."""
    import curvature as cv
    from curvature.io.models import read_weights
    from curvature.io.state_dicts import fitted

    objective = called(spec)
    if not isinstance(objective, cv.Objective):
        raise cv.BadObjective(f"{spec} returned a {type(objective).__name__}.", "It must return a curvature.Objective.")
    if model is None:
        return objective
    held = read_weights(model, trust=task.trust, allow=task.allow_global)
    state, notes = fitted(objective.function.module, held.state_dict, model)
    say_all([*held.notes, *notes])
    return objective.with_state(state)


def _from_file(path: str, task: Task) -> cv.Objective:
    import curvature as cv
    from curvature.io.models import WEIGHTS, read_module
    from curvature.io.recognise import FileKind, recognise

    if task.trust:
        import_from_here()
    arch = None if task.arch is None else partial(made_by, task.arch, task.arch_arg)
    kind = recognise(path)
    if task.base is not None and kind is not FileKind.ADAPTER:
        raise Misuse(f"--base is for PEFT adapters, but {path} is {kind.value}.", "Leave it out.")
    if kind is FileKind.OBJECTIVE:
        make = None if arch is None else partial(arch, {})
        objective = cv.Objective.load(path, trust=task.trust, arch=make, data=data_of(task.data, task), **_cut(task))
        return _adjusted(objective, task, loaded=True)
    if _is_folder(path, task):
        module, data, task = parts_of_folder(Path(path), task)
        return _from_made(module, path, task, data)
    _need_loss_and_data(path, task, arch is None and kind in WEIGHTS)  # before the file is opened: it may be large
    with as_script(task.arch if task.trust else None):
        module, notes = read_module(path, arch=arch, trust=task.trust, allow=task.allow_global)
    say_all(notes)
    return _from_made(module, path, task, data_of(task.data, task))


def _is_folder(model: str, task: Task) -> bool:
    """Whether MODEL is a Hugging Face folder, or an adapter, that says itself what its model is."""
    from curvature.io.recognise import FileKind, recognise

    if task.arch is not None or task.objective is not None or model.startswith("demo:") or is_spec(model):
        return False
    return recognise(model) in (FileKind.HUGGING_FACE, FileKind.ADAPTER)


def _from_made(made: Any, name: str, task: Task, data: Any) -> cv.Objective:
    """An objective of what MODEL turned out to be: an objective already, or a module."""
    import torch

    import curvature as cv
    from curvature.io.models import fixed_batch

    if isinstance(made, cv.Objective):
        return _adjusted(made, task)
    if not isinstance(made, torch.nn.Module):
        raise cv.BadObjective(f"{name} made a {type(made).__name__}.", "Return a torch.nn.Module or an Objective.")
    _need_loss_and_data(name, task)
    if (size := fixed_batch(made)) is not None:
        data = whole_batches(data, size, task.max_examples, name)
        task = replace(task, batch_size=None, max_examples=None)
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
        return cv.Objective.from_loss(made, resolve(task.loss), data, **options).first(task.max_examples)
    return cv.Objective.of(made, task.loss, data, **options).first(task.max_examples)


def _adjusted(objective: cv.Objective, task: Task, *, loaded: bool = False) -> cv.Objective:
    """An objective that came whole, with what the options change of it."""
    if task.loss is not None or (task.arch is not None and not loaded):
        raise Misuse("MODEL brings its own model and loss.", "Leave --loss and --arch out, or name another MODEL.")
    if task.batch_size is not None and task.data is None:
        raise Misuse("MODEL brings its own batches.", "Give --batch-size together with --data.")
    if task.params or task.exclude:
        objective = objective.narrowed(_select(task))
    if task.data is not None and not loaded:
        objective = objective.on(data_of(task.data, task), **_cut(task))
    if task.mode is not None and task.mode != objective.mode:
        objective = objective.in_mode(task.mode)
    if task.l2:
        objective = replace(objective, l2=task.l2)
    return objective.first(task.max_examples).to(dtype=_dtype(task), device=_device(task))


def _need_loss_and_data(name: str, task: Task, architecture: bool = False) -> None:
    """Raise Misuse when the loss or the data are not said; it tells all that is missing, the architecture included.
    ValueError when there is no such loss."""
    missing = [option for option, given in (("--loss", task.loss), ("--data", task.data)) if given is None]
    if missing:
        missing = ["--arch", *missing] if architecture else missing
        told = ", ".join([*missing[:-2], " and ".join(missing[-2:])])
        raise Misuse(
            f"{name} says nothing about {told.replace('--', '').replace('arch', 'its architecture')}.",
            f"Pass {told}, or --objective ./file.py:NAME that returns a curvature.Objective.",
        )
    if not is_spec(str(task.loss)):
        from curvature.objective.losses import as_loss

        as_loss(task.loss)  # which knows its names


def _cut(task: Task) -> dict[str, int]:
    return {} if task.batch_size is None else {"batch_size": task.batch_size}


def _select(task: Task) -> Callable[[str, Any], bool]:
    from curvature.objective.params import predicate

    wanted, unwanted = predicate(task.params or None), predicate(task.exclude)
    return lambda name, p: wanted(name, p) and not unwanted(name, p)


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
