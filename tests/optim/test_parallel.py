"""Several processes train one model, each on its share of the mini-batches."""

from __future__ import annotations

import pytest
import torch
from optimizers import CASES, EGN, EKFAC, KFAC, SophiaG
from parallel import EXACT, SEARCH, alone, both

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    return both(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [*map(str, CASES + EXACT), SEARCH])
def test_processes_stay_together_to_the_last_bit(name, ends):
    assert torch.equal(ends[0][name], ends[1][name])


@pytest.mark.parametrize("case", CASES + EXACT, ids=str)
def test_they_come_to_where_one_process_with_all_data_does(case, ends):
    if case.kind is EGN:
        pytest.skip("the mean of inverses is not the inverse of the mean")
    if case.kind in (KFAC, EKFAC, SophiaG) and "fisher" not in case.kwargs:
        pytest.skip("labels are drawn, and each process draws its own")
    if reason := case.skips.get("test_gradients_can_be_accumulated"):
        pytest.skip(reason)
    torch.testing.assert_close(ends[0][str(case)], alone(case), rtol=1e-7, atol=1e-9)
