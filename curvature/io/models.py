"""A module from a file or folder, of whatever kind: told by content, and without running its code unless trusted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvature.errors import BadFile, UnsafeFile, listing, printable
from curvature.io.architecture import load_stock
from curvature.io.recognise import FileKind, pickle_globals, recognise
from curvature.io.weights import load_into, load_trusted, read_tensors, read_trusted, state_dict_of

WEIGHTS = (FileKind.TENSORS, FileKind.LEGACY, FileKind.SAFETENSORS)


def read_module(
    path: str | Path,
    *,
    arch: Callable[[], nn.Module] | None = None,
    trust: bool = False,
    allow: Sequence[str] = (),
) -> tuple[nn.Module, list[str]]:
    """The module at `path`, on the CPU, and notes on what was done to read it.

    Weights need `arch`, which makes the module they belong to. A pickled nn.Sequential of stock layers and a Hugging
    Face folder load as data; any other pickled module, TorchScript and .pt2 run code and need `trust`. `allow` names
    further classes that may be unpickled. Raises BadFile or UnsafeFile with the ways on, before any code has run.
    """
    path = Path(path)
    kind = recognise(path)
    if kind is FileKind.HUGGING_FACE:
        return _hugging_face(path)
    if kind in WEIGHTS and not (kind is FileKind.LEGACY and arch is None):
        return _with_weights(path, kind, arch, trust, allow)
    if arch is not None and kind is not FileKind.DCP:
        module = load_trusted(path) if trust else _stock_or_refuse(path, kind)
        fresh = arch()
        load_into(fresh, module.state_dict())
        return fresh, [f"took the weights of {kind.value} into --arch"]
    if trust:
        return load_trusted(path), [f"ran code of {path}, as --trust allows"]
    return _stock_or_refuse(path, kind), []


def _with_weights(
    path: Path, kind: FileKind, arch: Callable[[], nn.Module] | None, trust: bool, allow: Sequence[str]
) -> tuple[nn.Module, list[str]]:
    if arch is None:
        raise BadFile(
            f"{path} is {kind.value}: weights without the model they belong to.",
            "Name the code that makes the model: --arch ./file.py:NAME.",
        )
    pickled = kind is not FileKind.SAFETENSORS
    held = read_trusted(path) if trust and pickled else read_tensors(path, allow=allow)
    state, notes = state_dict_of(held)
    module = arch()
    if not isinstance(module, nn.Module):
        raise BadFile(f"--arch made a {type(module).__name__}.", "It must return a torch.nn.Module.")
    load_into(module, state)
    return module, notes


def _stock_or_refuse(path: Path, kind: FileKind) -> nn.Module:
    """The module of stock layers pickled in the file; UnsafeFile for everything that would run code."""
    if kind in (FileKind.MODULE, FileKind.LEGACY):
        return load_stock(path)
    names = [printable(name) for name in pickle_globals(path)[:3]] if kind is FileKind.MODULE else []
    raise UnsafeFile(
        f"{path} is {kind.value}, and loading it runs code" + (f" ({', '.join(names)})." if names else "."),
        "Pass --trust if you trust its author, or save model.state_dict() and pass --arch ./file.py:NAME.",
    )


def _hugging_face(folder: Path) -> tuple[nn.Module, list[str]]:
    """The model of a Hugging Face folder, of the class its config names; never code from the folder itself."""
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BadFile(
            f"{folder} is a Hugging Face folder, and transformers is not installed.",
            'Install it: pip install "curvature-toolkit[hf]".',
        ) from error
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["AutoModel"]
        known = isinstance(names[0], str) and hasattr(transformers, names[0])
        make = getattr(transformers, names[0] if known else "AutoModel")
        with _quietly(transformers), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # for what the folder lacks
            module, found = make.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        first = printable((str(error).strip().splitlines() or [type(error).__name__])[0])
        raise BadFile(
            f"{folder} cannot be loaded as a Hugging Face model: {first}",
            "Check that the folder is whole, or pass --objective ./file.py:NAME that builds the model.",
        ) from error
    missing = sorted(found["missing_keys"])
    drawn = f"{folder} lacks {len(missing)} tensors of {names[0]}, which were drawn at random: {listing(missing)}"
    return module, [drawn] if missing else []


@contextmanager
def _quietly(transformers: Any) -> Iterator[None]:
    """Context without transformers' progress bar and report: what matters in it is said by whoever calls."""
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
