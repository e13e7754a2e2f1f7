"""Models of several modalities: which class opens them, what of them is text."""

from __future__ import annotations

import pytest
import torch
from mctk.checkpoint import Source
from mctk.errors import UserError
from mctk.models import auto_class_name, bank_sites, build, find_layers, language_part, side_parts
from mctk.planning import count_model, side_sizes
from mctk.sweep import StreamedModel
from transformers import AutoConfig

from tests.families import CONFIGS, tiny, tiny_config


def named(family: str, *architectures: str) -> str:
    config = tiny_config(family)
    config.architectures = list(architectures) or None
    return auto_class_name(config)


def test_the_class_that_config_json_names_decides():
    # transformers' AutoModelForCausalLM would build this type's text model alone.
    whole, text = "Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"
    assert named("qwen3_5_moe", whole) == "AutoModelForImageTextToText"
    assert named("qwen3_5_moe", text) == "AutoModelForCausalLM"
    assert named("mixtral", "MixtralForCausalLM") == "AutoModelForCausalLM"


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("qwen3_5_moe", "AutoModelForImageTextToText"),
        ("dots3_note", "AutoModelForImageTextToText"),
        ("gemma4", "AutoModelForCausalLM"),
        ("qwen3_omni_moe", "AutoModelForMultimodalLM"),
        ("mixtral", "AutoModelForCausalLM"),
    ],
)
def test_without_a_known_name_the_whole_configuration_counts(family: str, auto: str):
    assert named(family) == named(family, "NobodysForConditionalGeneration") == auto


def test_a_model_that_denoises_blocks_is_no_language_model():
    config = tiny_config("diffusion_gemma")
    config.architectures = ["DiffusionGemmaForBlockDiffusion"]
    with pytest.raises(UserError, match=r"diffusion_gemma.* is not a causal language model"):
        build(config, torch.float32)


def test_of_several_speakers_the_one_that_writes_is_found():
    model = tiny("qwen3_omni_moe")
    path, part = language_part(model)
    assert path == "thinker" and part is model.thinker
    assert find_layers(model)[0] == "thinker.model.language_model.layers"
    assert language_part(tiny("mixtral"))[0] == ""


def test_layers_are_the_text_models_even_if_a_tower_is_as_deep():
    depth = len(find_layers(tiny("qwen3_vl_moe"))[1])
    config = tiny_config("aria", num_hidden_layers=depth)
    config.vision_config.num_hidden_layers = depth
    model = build(config, torch.float32)
    assert find_layers(model)[0] == "model.language_model.layers"


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("mixtral", set()),
        ("qwen3_vl_moe", {"model.visual"}),
        ("aria", {"model.vision_tower", "model.multi_modal_projector"}),
        (
            "ernie4_5_vl_moe",
            {
                "model.vision_tower",
                "model.resampler_model",
                "model.language_model.layers.*.mlp.vision_moe",
            },
        ),
        (
            "qwen3_omni_moe",
            {"thinker.model.visual", "thinker.model.audio_tower", "talker", "code2wav"},
        ),
    ],
)
def test_side_parts_are_all_that_text_does_not_meet(family: str, parts: set[str]):
    model = tiny(family)
    layers, _ = find_layers(model)
    side = side_parts(model, layers)
    assert set(side.values()) == parts
    # Those of images and sound are not needed for a forward on text.
    state = model.state_dict()
    for name in side:
        state[name].fill_(float("nan"))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert bool(torch.isfinite(language_part(model)[1](input_ids=ids).logits).all())


def test_experts_for_images_are_no_banks():
    _, layers = find_layers(tiny("ernie4_5_vl_moe"))
    sites = bank_sites(layers[1])
    assert {site.module for site in sites.values() if site.part != "linear"} == {
        "mlp.text_moe.experts"
    }
    assert not any("vision" in site.module for site in sites.values())


def test_towers_are_counted_as_stored_not_as_active_and_never_loaded(tmp_path):
    tiny("qwen3_vl_moe").save_pretrained(tmp_path)
    source = Source(tmp_path)
    model = StreamedModel(source)
    sizes = count_model(model, {})
    [(part, weighs)] = side_sizes(model).items()
    tower = sum(p.numel() for p in model.model.get_submodule(part).parameters())
    assert weighs["parameters"] == tower > 0
    assert sizes.parameters == sum(info.numel for info in source.tensors.values())
    k, experts = CONFIGS["qwen3_vl_moe"]["text_config"], sizes.expert_parameters
    met = experts * 2 // k["num_experts"]  # two of them
    assert sizes.active_parameters == sizes.parameters - tower - experts + met
    model.load_outer()
    assert all(p.is_meta for p in model.model.get_submodule(part).parameters())
    assert not model.language.get_input_embeddings().weight.is_meta


def test_a_saved_model_names_its_class(tmp_path):
    tiny("dots3_note").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert auto_class_name(config) == "AutoModelForImageTextToText"


def test_experts_that_share_tensors_with_those_of_images_are_counted_apart(tmp_path):
    """In its files this family numbers both kinds through; they are loaded together."""
    tiny("ernie4_5_vl_moe").save_pretrained(tmp_path)
    source = Source(tmp_path)
    model = StreamedModel(source)
    assert any(
        {target in model.side for target in targets} == {True, False}
        for targets in model.weights.targets.values()
    )
    sizes = count_model(model, {})
    blocks = [layer.mlp for layer in model.layers if hasattr(layer.mlp, "text_moe")]
    text, images = (
        sum(p.numel() for block in blocks for p in getattr(block, kind).parameters())
        for kind in ("text_moe", "vision_moe")
    )
    routers = sum(p.numel() for block in blocks for p in block.text_moe.gate.parameters())
    assert sizes.parameters == sum(info.numel for info in source.tensors.values())
    assert sizes.expert_parameters == text - routers
    assert sizes.expert_bytes == 4 * sizes.expert_parameters
    parts = side_sizes(model)
    assert parts["model.language_model.layers.*.mlp.vision_moe"]["parameters"] == images
    idle = sum(part["parameters"] for part in parts.values())
    # Of four experts a token meets two.
    assert sizes.active_parameters == sizes.parameters - idle - sizes.expert_parameters // 2
