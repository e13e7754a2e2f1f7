"""Which unread tensors are of prediction layers, and what config.json says of those."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from mctk.checkpoint import (
    TensorInfo,
    crowded,
    extra_layers,
    find_unread,
    predictor_keys,
    without_predictors,
)

PREDICTORS = (
    "model.layers.61.eh_proj.weight",  # DeepSeek-V3
    "model.layers.62.mlp.experts.0.up_proj.weight",
    "mtp.layers.0.mlp.gate.weight",  # Qwen3-Next
    "model.mtp_layers.1.input_layernorm.weight",  # MiMo
)
OTHERS = ("model.layers.60.self_attn.rotary_emb.inv_freq", "junk", "model.mixtmp.weight")


def test_prediction_layers_lie_behind_the_others_or_have_a_name():
    found = find_unread([*OTHERS, *PREDICTORS], 61)
    assert found.predictors == PREDICTORS and found.others == OTHERS
    assert set(found.names) == {*PREDICTORS, *OTHERS}
    assert found.routed and not find_unread(PREDICTORS[2:], 61).routed
    assert find_unread(["model.layers.61.eh_proj.weight"], 62).predictors == ()


@pytest.mark.parametrize(
    ("names", "experts"),
    [
        ({"mtp.experts.0.up.weight": (3, 4), "mtp.experts.5.up.weight": (3, 4)}, 6),  # one by one
        ({"mtp.mlp.experts.gate_up_proj": (6, 3, 4), "mtp.mlp.experts.scale": ()}, 6),  # fused
    ],
)
def test_prediction_layers_are_crowded_by_more_experts_than_are_said(names, experts):
    source = SimpleNamespace(tensors={n: TensorInfo(n, "", "F32", s) for n, s in names.items()})
    unread = find_unread([*names, "junk"], 3)
    assert crowded(source, unread, experts) == ()
    assert crowded(source, unread, experts - 1) == unread.predictors


def test_shared_experts_crowd_nothing():
    names = {"mtp.shared_experts.5.up.weight": (7, 4), "mtp.norm.weight": (9,)}
    source = SimpleNamespace(tensors={n: TensorInfo(n, "", "F32", s) for n, s in names.items()})
    assert crowded(source, find_unread(names, 3), 0) == ()


def test_the_configuration_says_of_none():
    config = {
        "num_nextn_predict_layers": 1,
        "num_hidden_layers": 61,
        "mtp_hidden_states_first": True,
        "text_config": {"mtp_num_hidden_layers": 2, "num_mtp_modules": 0},
    }
    keys = [("num_nextn_predict_layers",), ("text_config", "mtp_num_hidden_layers")]
    assert predictor_keys(config) == keys
    changed = without_predictors(config)
    assert changed["num_nextn_predict_layers"] == 0
    assert changed["text_config"] == {"mtp_num_hidden_layers": 0, "num_mtp_modules": 0}
    assert config["num_nextn_predict_layers"] == 1 and changed["num_hidden_layers"] == 61


def test_how_many_layers_may_follow():
    def model(said: int | None, *patterns: str) -> SimpleNamespace:
        text = SimpleNamespace(num_nextn_predict_layers=said)
        config = SimpleNamespace(get_text_config=lambda: text)
        return SimpleNamespace(config=config, _keys_to_ignore_on_load_unexpected=patterns)

    names = ["model.layers.80.eh_proj.weight", "model.layers.81.eh_proj.weight"]
    assert extra_layers(model(None), {}, names, 80) == 0
    assert extra_layers(model(2), {}, names, 80) == 2
    assert extra_layers(model(None), {"text_config": {"num_mtp_layers": 3}}, names, 80) == 3
    family = model(None, r"model\.layers\.80.*")  # no key says it, the class passes it over
    assert extra_layers(family, {}, names, 80) == 1
    assert extra_layers(family, {}, names, 40) == 0  # a config.json with half of the layers
