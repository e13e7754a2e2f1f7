"""Routers that are more than a row an expert: rows behind, tables, numbers in configurations."""

from __future__ import annotations

import pytest
import torch
from mctk.errors import UserError
from mctk.models import Rerouter, find_layers, find_router, renumbered
from mctk.models.routing import router_of
from mctk.runtime import is_count_name, is_total_name, with_fewer
from torch import nn
from transformers import AutoConfig

from tests.families import tiny

KEPT = [0, 2, 3]


def layers_of(family: str, **changes) -> list[nn.Module]:
    layers = find_layers(tiny(family, **changes))[1]
    return [layer for layer in layers if find_router(layer) is not None]


def test_rows_behind_the_experts_stay():
    """Inkling's router has rows for shared experts, after those of the routed ones."""
    layer = layers_of("inkling_mm_model")[0]
    router = find_router(layer)
    gate = layer.mlp.gate
    weight, bias = gate.weight.detach().clone(), gate.e_score_correction_bias.clone()
    assert router.extra == {"mlp.gate.weight": 1} and weight.shape[0] == 5 == gate.n_total_experts
    with router_of(layer.get_submodule, router, KEPT):
        assert torch.equal(gate.weight, weight[[0, 2, 3, 4]])
        assert torch.equal(gate.e_score_correction_bias, bias[KEPT])
        assert (gate.num_experts, gate.n_total_experts, gate.n_shared_experts) == (3, 4, 1)
    assert torch.equal(gate.weight, weight) and (gate.num_experts, gate.n_total_experts) == (4, 5)


def test_a_choice_that_computes_nothing_stays():
    """ZAYA's router chooses among the experts and none; its forward asks the configuration."""
    layer = layers_of("zaya")[0]
    router, gate = find_router(layer), layer.mlp.gate
    config = gate.config
    assert set(router.extra.values()) == {1} and router.configs == ("mlp.gate",)
    with torch.no_grad():
        gate.balancing_biases[-1] = 100.0  # nothing is chosen always
    x = torch.randn(1, 7, 32)
    with router_of(layer.get_submodule, router, KEPT), torch.no_grad():
        assert gate.config.num_experts == 3 and config.num_experts == 4
        logits, weights, index, _ = gate(x)
        assert logits.shape == (7, 4) and index.max() < 3
        assert (weights == 0).any(1).all()
    assert gate.config is config and gate.num_router_classes == 5


def test_a_table_takes_the_next_expert_that_stays():
    table = torch.tensor([[0, 1], [1, 4], [4, 0], [5, 4], [2, 3]])
    assert renumbered(table, [0, 2, 3]).tolist() == [[0, 1], [1, 0], [1, 0], [0, 1], [1, 2]]
    assert torch.equal(renumbered(table, range(6)), table)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_table_keeps_what_it_can_and_repeats_nothing(dtype):
    experts, k, kept = 12, 4, [1, 2, 5, 8, 11]
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(200, experts, generator=generator).argsort(1)[:, :k].to(dtype)
    new = renumbered(table, kept)
    assert new.dtype == dtype and new.min() == 0 and new.max() == len(kept) - 1
    assert all(len(set(row)) == k for row in new.tolist())
    for before, after in zip(table.flatten().tolist(), new.flatten().tolist(), strict=True):
        if before in kept:
            assert kept[after] == before


def test_a_layer_that_routes_by_token_chooses_among_what_is_left():
    layer = layers_of("deepseek_v4")[0]
    router, gate = find_router(layer), layer.mlp.gate
    assert router.tables == ("mlp.gate.tid2eid",)
    table = gate.tid2eid.clone()
    ids = torch.arange(20)[None]
    with router_of(layer.get_submodule, router, KEPT), torch.no_grad():
        logits, _, index = gate(torch.randn(1, 20, 32), ids)
        assert logits.shape == (20, 3)
        assert torch.equal(index, renumbered(table, KEPT)[:20])
    assert torch.equal(gate.tid2eid, table)


@pytest.mark.parametrize(
    ("family", "message"),
    [("deepseek_v4", "is given input_ids"), ("zaya", "is given prev_router_hidden_states")],
)
def test_what_cannot_be_routed_anew_is_refused(family, message):
    with pytest.raises(UserError, match=message):
        Rerouter(layers_of(family)[0])


def test_names():
    assert is_total_name("num_router_classes") and is_total_name("n_total_experts")
    assert not is_total_name("router_hidden_size") and not is_total_name("num_experts_per_tok")
    assert not is_count_name("num_router_classes")
    config = AutoConfig.for_model("mixtral", num_local_experts=8, num_experts_per_tok=8)
    other = with_fewer(config, 8, 5)
    assert (other.num_local_experts, other.num_experts_per_tok) == (5, 8)
    assert config.num_local_experts == 8
