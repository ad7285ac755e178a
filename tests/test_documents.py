"""What the documents say is true: README code runs, notebooks execute, public names and commands are documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import curvature as cv

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in readme_blocks() if not block.startswith(("import transformers", "import lightning"))]
    assert len(blocks) == 3  # those two are in tests/optim/test_trainers.py
    scope: dict[str, object] = {}
    for block in blocks:
        exec(block, scope)
    assert (tmp_path / "model.pt").exists()
    assert len(scope["sharpness"]) == 3  # pyright: ignore


def test_every_public_name_is_in_the_readme():
    public = {name for name in vars(cv) if not name.startswith("_") and name[0].isalpha()}
    modules = {
        "assets",
        "comparison",
        "diagnostics",
        "errors",
        "io",
        "linalg",
        "objective",
        "operators",
        "plots",
        "optim",
        "probes",
        "progress",
        "reporting",
        "result",
        "uses",
    }
    for name in public - modules:
        assert name in README, f"{name} is exported but not in the README's table"


def test_every_command_is_in_the_readme_or_its_help():
    from curvature_cli.main import COMMANDS

    named = set(re.findall(r"curv (\w+)", README))
    assert named <= set(COMMANDS)
    assert {"spectrum", "eig", "trace", "inspect"} <= named


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_executes_and_was_kept_with_its_outputs(path, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "execute the notebook and keep its outputs"
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert len(notebook.cells) <= 30
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
