"""Results of models of several modalities: their paths in other classes, their names when saved."""

from __future__ import annotations

import pytest
import torch
from mctk.errors import CheckpointError
from mctk.models import build
from mctk.runtime.quantizer import _sparing_terms
from mctk.runtime.resize import find_path
from transformers.conversion_mapping import get_model_conversion_mapping

from tests.families import tiny_config


def test_a_path_is_found_in_the_text_model_alone():
    config = tiny_config("qwen3_5_moe")
    config.architectures = ["Qwen3_5MoeForCausalLM"]
    model = build(config, torch.float32)
    path = "model.language_model.layers.0.mlp.experts"
    assert find_path(model, path) == "model.layers.0.mlp.experts"
    with pytest.raises(CheckpointError, match="no such module"):
        find_path(model, "model.visual.layers.0")


def test_saving_again_leaves_the_names_of_terms():
    # This family stores gate and up of its dense layers as one tensor, and its patterns say no more
    # than the two names.
    model = build(tiny_config("inkling_mm_model"), torch.float32)
    names = [f"model.language_model.layers.0.mlp.{part}_proj.terms_0_V" for part in ("gate", "up")]
    weight = "model.language_model.layers.0.mlp.gate_proj.weight"
    plain, sparing = set(), set()
    for conversion in get_model_conversion_mapping(model):
        plain |= {conversion.reverse_transform().rename_source_key(name)[0] for name in names}
        undone = _sparing_terms(conversion).reverse_transform()
        sparing |= {undone.rename_source_key(name)[0] for name in names}
        # Whatever is no term is undone as before.
        expected = conversion.reverse_transform().rename_source_key(weight)
        assert undone.rename_source_key(weight) == expected
    assert not plain <= set(names)
    assert sparing == set(names)
