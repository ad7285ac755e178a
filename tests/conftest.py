"""Every test: two threads, a fixed global seed, and the shared zoo on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks")]  # for `import objectives`, `import demo_accuracy`


@pytest.fixture(autouse=True)
def seeded():
    """Draws from the global generator repeat, and bits do not depend on how many cores there are."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
