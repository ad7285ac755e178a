"""Hugging Face folders: transformers builds the model, its tensors are read here, and no code of the folder runs.

A folder may be a whole model or a PEFT adapter, which names the model that it changes. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvature.errors import BadFile, TooLarge, UnsafeFile, listing, one_line, printable
from curvature.io.recognise import FileKind, json_object, recognise

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_WHOLE = "Check that the folder is whole, or pass --objective ./file.py:NAME that builds the model."

Read = Callable[[Path], Any]  # the tensors in a file, by `read_tensors`


def weights_file(folder: Path, names: tuple[str, ...] = WEIGHTS) -> Path:
    """The file with the weights of the folder, or with their index; BadFile when there is none."""
    present = [folder / name for name in names if (folder / name).exists()]
    if not present:
        raise BadFile(f"{folder} holds no weights: there is no {' and no '.join(names[::2])}.", "Download it whole.")
    return present[0]


def read_folder(folder: Path, read: Read) -> tuple[nn.Module, list[str]]:
    """The model of a Hugging Face folder, of the class its config names, and a note on what the folder lacks."""
    transformers = _installed("transformers", folder)
    config = json_object(folder / "config.json")
    make = _class_of(config, folder, transformers)
    state = read(weights_file(folder))
    _check_claims(config, state, folder)
    with _built(folder, transformers):
        module, found = make.from_pretrained(
            None,
            config=transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
            state_dict=state,
            output_loading_info=True,
            attn_implementation="sdpa" if make._supports_sdpa else "eager",  # others can be code from the hub
        )
    missing = sorted(found["missing_keys"])
    drawn = f"{folder} lacks {len(missing)} tensors of {make.__name__}, which were drawn at random: {listing(missing)}"
    return module, [drawn] if missing else []


def read_adapter(folder: Path, read: Read, base: Path | None = None) -> tuple[nn.Module, list[str]]:
    """The model that a PEFT adapter changes, with the adapter in it; only the adapter's parameters are trainable.

    `base` is the Hugging Face folder of that model, by default the one that the adapter names, if it is here.
    """
    named = json_object(folder / "adapter_config.json").get("base_model_name_or_path")
    where = base_of(folder) if base is None else base
    if where is None or not _is_folder(where):
        raise BadFile(
            f"{folder} is an adapter of {printable(where or named)}, which is no Hugging Face folder here.",
            "Pass --base FOLDER, the model that it was trained from.",
        )
    peft = _installed("peft", folder)
    state = read(weights_file(folder, ADAPTER))
    model, notes = read_folder(where, read)
    with _built(folder, _installed("transformers", folder)):
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False  # which would freeze the adapter, too
        model = peft.get_peft_model(model, config)
        found = peft.set_peft_model_state_dict(model, dict(state))
    lacking = [name for name in found.missing_keys if model.get_parameter(name).requires_grad]
    if found.unexpected_keys or lacking:
        told = listing([*found.unexpected_keys, *lacking], 3)
        raise BadFile(f"{folder} does not fit {where}: {told}.", "Pass --base FOLDER, the model it was trained from.")
    return model, [*notes, f"{folder} is a {printable(config.peft_type.value)} adapter of {where}"]


def _is_folder(place: Path) -> bool:
    try:
        return recognise(place) is FileKind.HUGGING_FACE
    except BadFile:
        return False


def base_of(folder: Path) -> Path | None:
    """The folder of the model that an adapter names, seen from here or from the adapter; None when there is none."""
    named = json_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    return next((place for place in (Path(named), folder / named) if place.is_dir()), None)


def read_tokenizer(*folders: Path) -> Any:
    """The tokenizer in the first of the folders that has one."""
    with_one = [folder for folder in folders if (folder / "tokenizer_config.json").is_file()]
    if not with_one:
        raise BadFile(
            f"{folders[0]} has no tokenizer, so that it cannot read a text.",
            "Save it there with tokenizer.save_pretrained, or give arrays called input_ids and labels.",
        )
    transformers = _installed("transformers", with_one[0])
    with _built(with_one[0], transformers):
        return transformers.AutoTokenizer.from_pretrained(
            str(with_one[0]), local_files_only=True, trust_remote_code=False
        )


def _class_of(config: Mapping[str, Any], folder: Path, transformers: Any) -> Any:
    """The class of transformers that the config names; UnsafeFile when it is code in the folder."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "AutoModel"
    known = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
        return known
    if isinstance(remote := config.get("auto_map"), Mapping):
        raise UnsafeFile(
            f"{folder} needs code of its author: {listing(list(remote.values()), 3)}.",
            "Read that code; if you trust it pass --objective ./file.py:NAME that builds the model with it.",
        )
    if name == "AutoModel" and config.get("model_type") in transformers.CONFIG_MAPPING:
        return transformers.AutoModel._model_mapping[transformers.CONFIG_MAPPING[config["model_type"]]]
    raise BadFile(
        f"{folder} names {printable(name)} of model_type {printable(config.get('model_type'))}, which the installed "
        f"transformers {transformers.__version__} lacks.",
        "Install the version that it was saved with, or pass --objective ./file.py:NAME that builds the model.",
    )


def _check_claims(config: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path) -> None:
    """Raise BadFile for a quantised model, and for more layers than the weights can be of."""
    if config.get("quantization_config"):
        raise BadFile(f"{folder} is quantised and has no derivatives.", "Give the float model that it was made from.")
    layers = {key: value for key, value in config.items() if "layer" in key and isinstance(value, int)}
    if claims := [f"{printable(key)} = {value}" for key, value in layers.items() if value > len(state)]:
        raise BadFile(f"{folder} holds {len(state)} tensors, but its config says {claims[0]}.", _WHOLE)


def _installed(package: str, folder: Path) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise BadFile(
            f"{folder} is read with {package}, which is not installed ({one_line(error)}).",
            f"Install it: pip install {package}.",
        ) from error


@contextmanager
def _built(folder: Path, transformers: Any) -> Iterator[None]:
    """Context in which other people's code makes the module: quiet, from a fixed seed, its failures explained."""
    try:
        with _quietly(transformers), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which packages have about each other
            torch.default_generator.manual_seed(0)  # for what the folder lacks
            yield
    except MemoryError as error:
        raise TooLarge(f"{folder} needs more memory than there is.", "Use a larger machine.") from error
    except Exception as error:  # a config that a stranger wrote can make it raise anything
        raise BadFile(f"{folder} cannot be loaded as a Hugging Face model: {one_line(error)}.", _WHOLE) from error


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
