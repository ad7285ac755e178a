"""The layers: who may import whom, and what is done in one place only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from curvature.objective.losses import CLASSES

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"errors", "progress", "distributed", "io", "result", "comparison"},
    {"linalg"},
    {"objective"},
    {"operators"},
    {"uses", "probes", "optim"},
    {"diagnostics"},
    {"plots", "assets"},
    {"reporting"},
)
PLACE = {name: i for i, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for p in (ROOT / "curvature").rglob("*.py") if p != ROOT / "curvature" / "__init__.py")
UPWARD = {("result.py", "curvature.plots"), ("objective/objective.py", "curvature.objective")}


def imports(path: Path) -> list[str]:
    """Every module a file imports, at any depth of its code."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "curvature").as_posix()


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT / "curvature").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_the_layers_before_its_own(path):
    own = PLACE[layer_of(path)]
    for module in imports(path):
        parts = module.split(".")
        if parts[0] != "curvature" or len(parts) < 2 or (name_of(path), ".".join(parts[:2])) in UPWARD:
            continue
        assert PLACE[parts[1]] <= own, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_each_dependency_stays_in_its_place(path):
    modules = imports(path)
    banned = {"curvature_cli", "rich", "cyclopts", "transformers", "peft", "matplotlib"}
    if layer_of(path) == "plots":
        banned -= {"matplotlib"}
    if name_of(path) == "result.py":
        banned -= {"matplotlib"}  # the type of `Result.plot`, for type checkers
    if layer_of(path) == "linalg":
        banned |= {"torch.nn", "torch.func"}
    for module in modules:
        assert not any(module == b or module.startswith(f"{b}.") for b in banned), f"{name_of(path)}: {module}"


def test_linalg_names_no_torch_nn():
    for path in (ROOT / "curvature" / "linalg").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("nn", "func"), f"{path.name}:{node.lineno}"


def test_nobody_outside_losses_asks_what_kind_a_loss_is():
    kinds = set(CLASSES)
    for path in FILES:
        if "losses" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                named = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not named & kinds, f"{name_of(path)}:{node.lineno}"


def test_only_one_loop_over_data():
    """`Passes` reads the batches; the check and storage look at them without computing."""
    readers = {"objective/passes.py", "objective/check.py", "objective/storage.py", "objective/batches.py"}
    for path in FILES:
        if "batches" in path.read_text() and layer_of(path) in ("objective", "operators", "linalg"):
            loops = [
                node
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.For | ast.comprehension) and "batches" in ast.unparse(node.iter)
            ]
            assert not loops or name_of(path) in readers, name_of(path)


def test_only_one_file_calls_collectives():
    for path in (path for path in FILES if name_of(path) != "distributed.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "distributed":
                assert node.attr == "ProcessGroup", f"{name_of(path)}:{node.lineno}"


def test_importing_the_library_changes_no_torch_flag_and_draws_nothing():
    import subprocess
    import sys

    code = """
import torch
before = (torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32, torch.get_rng_state().sum().item(),
          torch.is_grad_enabled(), torch.backends.mkldnn.enabled, torch.backends.cuda.flash_sdp_enabled())
import curvature
after = (torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32, torch.get_rng_state().sum().item(),
         torch.is_grad_enabled(), torch.backends.mkldnn.enabled, torch.backends.cuda.flash_sdp_enabled())
assert before == after, (before, after)
import sys
assert not {"matplotlib", "scipy.stats", "transformers", "cyclopts", "rich", "torch._dynamo"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
