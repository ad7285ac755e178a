"""Every test: one thread, a fixed global seed, and the shared zoo on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks")]  # for `import objectives`, `import demo_accuracy`


LOOPBACK = ("127.0.0.1", "::1", "localhost")


def refuse_the_network(event: str, arguments: tuple) -> None:
    """No test, and nothing that it calls, talks to another machine."""
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            raise AssertionError(f"a connection to {address[0]}")


sys.addaudithook(refuse_the_network)


@pytest.fixture(autouse=True)
def seeded():
    """Draws from the global generator repeat, and bits do not depend on how many cores there are."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors are small, and as many processes as cores run tests
