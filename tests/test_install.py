"""The wheel, in a clean environment, from another folder: what a user gets."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_its_assets_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"curvature", "curvature_cli"}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "curvature").rglob("*.py")}
    assert sources <= names
    for asset in (
        "digits.npz",
        "hamlet.txt",
        "digits_mlp.safetensors",
        "digits_cnn.safetensors",
        "hamlet_gpt.safetensors",
    ):
        assert f"curvature/assets/{asset}" in names
    assert "curvature/py.typed" in names
    assert wheel.stat().st_size < 2 << 20


@pytest.mark.timeout(900)
def test_curv_runs_from_the_wheel_in_a_clean_environment(wheel, tmp_path):
    """The environment sees this one's dependencies, but the package only from the wheel."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    ours = [p for p in sys.path if p.endswith("site-packages")]
    (Path(site) / "dependencies.pth").write_text("\n".join(ours))  # paths only: .pth files inside them do not run
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    curv = tmp_path / "venv" / "bin" / "curv"
    where = [python, "-c", "import curvature, curvature_cli; print(curvature.__file__, curvature_cli.__file__)"]
    for file in subprocess.run(where, capture_output=True, text=True, check=True, cwd=elsewhere).stdout.split():
        assert file.startswith(str(tmp_path))
    command = [curv, "spectrum", "--probes", "2", "--steps", "5", "--out", "result", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["size"] == 3466
    assert {p.name for p in (elsewhere / "result").iterdir()} == {"result.json", "arrays.safetensors", "spectrum.png"}
