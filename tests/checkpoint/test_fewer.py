"""What config.json says, and what tensors are, where some experts are left."""

from __future__ import annotations

import pytest
import torch
from mctk.checkpoint import Share, fewer
from mctk.checkpoint.fewer import without_experts
from mctk.checkpoint.source import TensorInfo


def test_one_entry_a_layer():
    """Hunyuan's configuration may say the number of experts of every layer."""
    config = {"num_experts": [8, 8, 8], "moe_topk": [2, 2, 2], "num_shared_expert": [8, 8, 8]}
    [changed] = without_experts(config, config, 8, 6)
    assert changed == {**config, "num_experts": [6, 6, 6]}
    assert config["num_experts"] == [8, 8, 8]


def test_inside_the_language_models_part():
    inner = {"n_routed_experts": 8, "n_shared_experts": 8, "num_experts_per_tok": 8}
    config = {"text_config": inner, "vision_config": {"hidden_size": 8}}
    [changed] = without_experts(config, config, 8, 6)
    assert changed == {**config, "text_config": {**inner, "n_routed_experts": 6}}


def test_a_number_that_the_file_leaves_at_its_default():
    full = {"model_type": "mixtral", "num_local_experts": 8}
    assert list(without_experts({"model_type": "mixtral"}, full, 8, 6)) == [
        {"model_type": "mixtral", "num_local_experts": 6}
    ]


def test_two_keys_go_together_before_each_by_itself():
    config = {"num_experts": 8, "num_local_experts": 8}
    found = [tuple(changed.values()) for changed in without_experts(config, config, 8, 6)]
    assert found == [(6, 6), (6, 8), (8, 6)]


@pytest.mark.parametrize(("rows", "behind"), [(8, []), (10, [8, 9])])
def test_rows_behind_the_experts_stay(rows, behind):
    share = Share("router", dim=0, experts=8)
    tensor = torch.arange(rows * 3).reshape(rows, 3)
    kept = [0, 5, 7]
    assert torch.equal(share.rest(tensor, kept), tensor[[*kept, *behind]])
    info = TensorInfo("router", "file", "F32", (rows, 3))
    assert fewer(info, share, len(kept)).shape == (3 + len(behind), 3)


def test_a_table_is_renumbered_and_anything_else_is_as_it_was():
    table = torch.tensor([[1, 3], [3, 2]])
    assert Share("table", table=True).rest(table, [1, 3]).tolist() == [[0, 1], [1, 0]]
    assert Share("norm").rest(table, [1, 3]) is table
