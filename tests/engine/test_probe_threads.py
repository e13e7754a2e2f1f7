"""The gate's probe is checked with the threads that it was made with: they move last bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mctk.engine.gate import GateError
from mctk.engine.probe import check_probe, keep_probe


class Model(torch.nn.Module):
    """Its logits are the number of threads."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config, self.device = SimpleNamespace(), torch.device("cpu")

    def forward(self, input_ids, use_cache):
        logits = torch.full((*input_ids.shape, 3), float(torch.get_num_threads()))
        return SimpleNamespace(logits=logits)


@pytest.fixture
def threads():
    """Sets the number of threads; as it was afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_probe_is_checked_with_the_threads_that_made_it(tmp_path, threads):
    ids = torch.zeros(1, 4, dtype=torch.long)
    threads(2)
    keep_probe(tmp_path, ids, torch.full((1, 4, 3), 2.0))
    threads(1)
    assert not check_probe(Model(), tmp_path / "other")
    assert check_probe(Model(), tmp_path) and torch.get_num_threads() == 1
    assert not list(tmp_path.glob("*.safetensors"))  # large, and used up
    assert check_probe(Model(), tmp_path)  # an evaluation that was stopped, or another one
    keep_probe(tmp_path, ids, torch.full((1, 4, 3), 2.0))
    with pytest.raises(GateError, match="gives other logits"):
        check_probe(Model(), tmp_path)
