"""One thread: these matrices are so small that a second one costs more than it gives on a busy machine."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(seeded):
    torch.set_num_threads(1)
