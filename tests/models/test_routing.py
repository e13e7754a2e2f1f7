"""Re-routing: a family's own router over fewer experts, and what depends on their number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mctk.checkpoint import Source
from mctk.errors import UserError
from mctk.models import (
    Rerouter,
    find_layers,
    find_router,
    installed,
    keeps_form,
    read_banks,
)
from mctk.runtime import is_count_name, observe
from mctk.sweep import StreamedModel
from mctk.terms import Bias, drop_members
from torch import nn

from tests.families import FAMILIES, save_remote, tiny, tiny_config

TOKENS = 11


def layer_of(family: str, **changes) -> tuple[int, nn.Module]:
    model = tiny(family, **changes)
    model.set_experts_implementation("mctk")
    layers = find_layers(model)[1]
    return next((i, layer) for i, layer in enumerate(layers) if find_router(layer) is not None)


def run_block(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    block = layer.get_submodule(find_router(layer).block)
    with torch.no_grad():
        out = block(x[None])
    return (out[0] if isinstance(out, tuple) else out)[0]


def routed(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the block's own forward hands to its experts."""
    seen = []
    experts = layer.get_submodule(find_router(layer).module)
    handle = experts.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    run_block(layer, x)
    handle.remove()
    return seen[0][1], seen[0][2].float()


def some(router) -> list[int]:
    return [0, 2, 3] if router.groups == 1 else [0, 1, 3, 4, 6, 7]


def smaller(family: str, layer: nn.Module, kept: list[int]) -> nn.Module:
    """The same layer as the family builds it with fewer experts, its weights copied."""
    key = "n_routed_experts" if hasattr(tiny_config(family), "n_routed_experts") else "num_experts"
    key = "num_local_experts" if not hasattr(tiny_config(family), key) else key
    _, other = layer_of(family, **{key: len(kept)})
    router = find_router(layer)
    state = dict(layer.state_dict())
    for name, tensor in state.items():
        dim = router.tensors.get(name)
        dim = 0 if name.startswith(router.module + ".") else dim
        if dim is not None:
            state[name] = tensor.index_select(dim, torch.tensor(kept))
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_are_the_original(family):
    _, layer = layer_of(family)
    x = torch.randn(TOKENS, 32)
    index, weights = Rerouter(layer)(x, range(find_router(layer).experts))
    own_index, own_weights = routed(layer, x)
    assert torch.equal(index, own_index) and torch.equal(weights, own_weights)
    assert index.dtype == torch.int64 and weights.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_are_the_smaller_model(family):
    """Against the family's own block of that size: softmax, groups and biases are all its own."""
    number, layer = layer_of(family)
    router = find_router(layer)
    kept = some(router)
    other = smaller(family, layer, kept)
    x = torch.randn(TOKENS, 32)
    before = run_block(layer, x)
    reroute = Rerouter(layer)
    index, weights = reroute(x, kept)
    own_index, own_weights = routed(other, x)
    assert torch.equal(index, torch.tensor(kept)[own_index])
    assert torch.equal(weights, own_weights)
    gone = [e for e in range(router.experts) if e not in kept]
    banks = {
        name: replace(bank, terms=drop_members(bank, gone))
        for name, bank in read_banks(layer, number).items()
        if name.startswith("experts.")
    }
    assert keeps_form(banks.values())
    expected = run_block(other, x)
    with installed(layer, banks, torch.float32, keep_form=True):
        assert torch.equal(run_block(layer, x), expected)
    with installed(layer, banks, torch.float32):
        heard = []
        with observe(layer.get_submodule(router.module), lambda number, *_: heard.append(number)):
            torch.testing.assert_close(run_block(layer, x), expected, rtol=1e-5, atol=1e-5)
        assert sorted(heard) == sorted(index.unique().tolist())  # by their old numbers
    # Nothing stays behind, whichever subset was asked for.
    assert torch.equal(run_block(layer, x), before)
    index, _ = reroute(x, range(router.experts))
    assert torch.equal(index, routed(layer, x)[0])


def test_masked_logits_would_be_wrong():
    """Why rows are taken out: groups are chosen by their two best, -inf among them or not."""
    _, layer = layer_of("deepseek_v3", n_group=1, topk_group=1, norm_topk_prob=False)
    x = torch.randn(TOKENS, 32)
    _, all_weights = Rerouter(layer)(x, range(8))
    _, weights = Rerouter(layer)(x, [0, 1, 2])
    assert weights.shape == all_weights.shape and not torch.equal(weights, all_weights)


def test_hooks_hear_nothing():
    _, layer = layer_of("mixtral")
    heard = []
    for module in layer.modules():
        module.register_forward_hook(lambda *_: heard.append(1))
    Rerouter(layer)(torch.randn(TOKENS, 32), [0, 1, 3])
    assert not heard


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_as_many_experts_as_channels(family):
    """E = H: which dimension is which is told by the module, and shared experts stay whole."""
    heads = {"hidden_size": 8, "head_dim": 4, "intermediate_size": 24}
    if family == "qwen2_moe":
        heads |= {"shared_expert_intermediate_size": 8, "num_experts": 8}
    elif family != "deepseek_v3":
        heads |= {"num_local_experts": 8}
    _, layer = layer_of(family, **heads)
    router = find_router(layer)
    assert router.experts == 8 and set(router.tensors.values()) == {0}
    names = {name.rpartition(".")[2] for name in router.tensors}
    assert names <= {"weight", "bias", "e_score_correction_bias"}
    assert not any("shared" in name or "norm" in name for name in router.tensors)


def test_a_list_of_experts(tmp_path, modules_cache):
    model = StreamedModel(Source(save_remote(tmp_path / "model")), trust_remote_code=True)
    x = torch.randn(TOKENS, 32)
    with model.layer(1) as layer:
        router = find_router(layer)
        assert (router.experts, dict(router.tensors)) == (8, {"mlp.gate.weight": 0})
        kept = [0, 3, 4, 6, 7]
        index, weights = Rerouter(layer)(x, kept)
        assert set(index.unique().tolist()) <= set(kept) and weights.shape == (TOKENS, 3)
        probabilities = (x @ layer.mlp.gate.weight[kept].t()).softmax(-1)
        torch.testing.assert_close(
            weights.sort(-1).values, probabilities.topk(3).values.sort(-1).values
        )
        before = run_block(layer, x)
        banks = {
            name: replace(bank, terms=drop_members(bank, [1, 2, 5]))
            for name, bank in read_banks(layer, 1).items()
            if name.startswith("experts.")
        }
        with installed(layer, banks, torch.float32):
            by_terms = run_block(layer, x)
        with installed(layer, banks, torch.float32, keep_form=True):
            torch.testing.assert_close(run_block(layer, x), by_terms, rtol=1e-5, atol=1e-5)
            assert len(layer.mlp.experts) == 5
        assert len(layer.mlp.experts) == 8 and torch.equal(run_block(layer, x), before)
        assert not torch.allclose(by_terms, before, atol=1e-2)


def test_replaced_experts_are_not_removed():
    """Constants in their place (MoNE) leave the routing as it was."""
    number, layer = layer_of("mixtral")
    banks = {}
    for name, bank in read_banks(layer, number).items():
        if name.startswith("experts."):
            terms = drop_members(bank, [2])
            if name == "experts.down":
                terms.append(Bias(bank.shape, [None, None, 0, None], torch.ones(1, 32)))
            banks[name] = replace(bank, terms=terms)
    assert not keeps_form(banks.values())
    x = torch.randn(TOKENS, 32)
    with installed(layer, banks, torch.float32):
        assert find_router(layer).experts == 4
        run_block(layer, x)


def test_names_of_counts():
    yes = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    no = ("num_experts_per_tok", "n_shared_experts", "num_expert_group", "expert_ffn_hidden_size")
    assert all(map(is_count_name, yes)) and not any(map(is_count_name, no))


def test_a_layer_without_experts():
    layer = find_layers(tiny("llama"))[1][0]
    assert find_router(layer) is None
    with pytest.raises(ValueError, match="no experts"):
        Rerouter(layer)


def test_a_block_without_router_rows_is_refused():
    _, layer = layer_of("mixtral")
    layer.mlp.gate.weight = nn.Parameter(torch.zeros(5, 32))
    with pytest.raises(UserError, match="no tensor of its router has a row for each of the 4"):
        find_router(layer)
