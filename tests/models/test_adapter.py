"""The adapter: every family's layers as banks, and back, without knowing any family."""

from __future__ import annotations

import families
import pytest
import torch
from mctk.errors import UserError
from mctk.models import (
    bank_sites,
    find_layers,
    installed,
    module_specs,
    module_tensors,
    own_tensors,
    read_banks,
    write_banks,
)
from mctk.runtime import TermExperts, TermLinear
from mctk.terms import Bank, BankShape, Bias, Dense, LowRank
from torch import nn

EXPERTS = ["experts.gate", "experts.up", "experts.down"]
ATTENTION = ["attention.q", "attention.k", "attention.v", "attention.o"]
LATENT = [
    "attention.q_a",
    "attention.q_b",
    "attention.kv_a_proj_with_mqa",
    "attention.kv_b",
    "attention.o",
]
SHARED = ["shared_expert.gate", "shared_expert.up", "shared_expert.down"]
MLP = ["mlp.gate", "mlp.up", "mlp.down"]
# Banks of the first layer and of the last.
NAMES = {
    "mixtral": (EXPERTS + ATTENTION, EXPERTS + ATTENTION),
    "qwen2_moe": (EXPERTS + ATTENTION + SHARED, EXPERTS + ATTENTION + SHARED),
    "qwen3_moe": (EXPERTS + ATTENTION, EXPERTS + ATTENTION),
    "deepseek_v2": (MLP + LATENT, EXPERTS + LATENT + SHARED),
    "deepseek_v3": (MLP + LATENT, EXPERTS + LATENT + SHARED),
    "olmoe": (EXPERTS + ATTENTION, EXPERTS + ATTENTION),
    "phimoe": (EXPERTS + ATTENTION, EXPERTS + ATTENTION),
    "granitemoe": (EXPERTS + ATTENTION, EXPERTS + ATTENTION),
    "gpt_oss": (EXPERTS + ATTENTION, EXPERTS + ATTENTION),
    "glm4_moe": (MLP + ATTENTION, EXPERTS + ATTENTION + SHARED),
    "llama": (MLP + ATTENTION, MLP + ATTENTION),
}


def ours(family: str, **changes: object) -> nn.Module:
    model = families.tiny(family, **changes)
    if family != "llama":
        model.set_experts_implementation("mctk")
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(families.token_ids()).logits


@pytest.mark.parametrize("family", [*families.FAMILIES, "llama"])
def test_banks_go_out_and_come_back(family):
    model = ours(family)
    expected = logits(model)
    fresh = ours(family)
    for index, (layer, target) in enumerate(
        zip(find_layers(model)[1], find_layers(fresh)[1], strict=True)
    ):
        for site in bank_sites(target).values():
            for parameter in target.get_submodule(site.module).parameters():
                parameter.data.zero_()
        write_banks(target, read_banks(layer, index))
    assert torch.equal(logits(fresh), expected)


@pytest.mark.parametrize("family", [*families.FAMILIES, "llama"])
def test_the_names_of_banks_and_what_they_are(family):
    model = ours(family)
    path, layers = find_layers(model)
    assert path == "model.layers"
    first, last = NAMES[family]
    assert sorted(bank_sites(layers[0])) == sorted(first)
    assert sorted(bank_sites(layers[-1])) == sorted(last)
    for index, layer in enumerate(layers):
        for name, site in bank_sites(layer).items():
            bank = read_banks(layer, index)[name]
            assert (bank.layer, bank.shape) == (index, site.shape)
            assert [term.kind for term in bank.terms] == ["dense"] + ["bias"] * site.bias


@pytest.mark.parametrize("family", [*families.FAMILIES, "llama"])
def test_whatever_is_no_bank_is_a_router_or_a_vector(family):
    for layer in find_layers(ours(family))[1]:
        sites = bank_sites(layer).values()
        inside = tuple(site.module + "." for site in sites)
        left = [
            (name, parameter)
            for name, parameter in layer.named_parameters()
            if not name.startswith(inside)
        ]
        experts = {site.shape.members for site in sites if site.part == "down"}
        for name, parameter in left:
            if parameter.dim() >= 2:
                assert parameter.shape[0] in experts | {1}, name
                assert any(word in name for word in ("gate", "router")), name


def test_a_linear_layer_that_computes_otherwise_is_no_bank():
    # DeepSeek-V4 multiplies groups of heads by blocks of the matrix.
    for layer in find_layers(ours("deepseek_v4"))[1]:
        assert isinstance(layer.self_attn.o_a_proj, nn.Linear)
        assert "attention.o_b" in bank_sites(layer) and "attention.o_a" not in bank_sites(layer)


def test_routers_that_are_linear_layers_are_no_banks():
    # As in Granite's checkpoints of old, and in Qwen2-MoE, whose shared expert has a gate.
    granite = find_layers(ours("granitemoe"))[1][0]
    block = granite.block_sparse_moe
    block.router = nn.Module()
    block.router.layer = nn.Linear(32, 4)
    assert not [s for s in bank_sites(granite).values() if "router" in s.module]
    qwen = find_layers(ours("qwen2_moe"))[1][0]
    assert qwen.mlp.shared_expert_gate.out_features == 1
    assert not [s for s in bank_sites(qwen).values() if "shared_expert_gate" in s.module]


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router():
    # As in Qwen3-Next: 512 experts, and a shared expert with 512 neurons.
    layer = find_layers(ours("qwen2_moe", shared_expert_intermediate_size=4))[1][0]
    assert set(SHARED) <= set(bank_sites(layer))
    assert bank_sites(layer)["shared_expert.up"].shape == BankShape(1, 4, 32)


@pytest.mark.parametrize("family", [*families.FAMILIES, "llama"])
def test_installed_exact_terms_compute_the_same_and_leave_again(family):
    model = ours(family)
    expected = logits(model)
    for index, layer in enumerate(find_layers(model)[1]):
        banks = read_banks(layer, index)
        before = dict(layer.named_modules())
        with installed(layer, banks, torch.float32):
            kinds = {type(layer.get_submodule(s.module)) for s in bank_sites(layer).values()}
            assert kinds <= {TermExperts, TermLinear}
            assert sorted(bank_sites(layer)) == sorted(banks)
            assert torch.allclose(logits(model), expected, rtol=1e-4, atol=1e-5)
            again = read_banks(layer, index)
            assert {n: b.shape for n, b in again.items()} == {n: b.shape for n, b in banks.items()}
        after = dict(layer.named_modules())
        assert before.keys() == after.keys()
        assert all(before[name] is after[name] for name in before)
    assert torch.equal(logits(model), expected)


def test_installed_restores_the_layer_after_an_error():
    layer = find_layers(ours("mixtral"))[1][0]
    before = dict(layer.named_modules())
    with (
        pytest.raises(RuntimeError, match="stop"),
        installed(layer, read_banks(layer, 0), torch.float32),
    ):
        raise RuntimeError("stop")
    assert all(before[name] is module for name, module in layer.named_modules())


def test_gpt_oss_layout_by_value():
    layer = find_layers(ours("gpt_oss"))[1][0]
    experts = layer.mlp.experts
    banks = read_banks(layer, 0)
    for e in range(4):
        gate, gate_bias = banks["experts.gate"].materialise(e)
        up, up_bias = banks["experts.up"].materialise(e)
        down, down_bias = banks["experts.down"].materialise(e)
        for j in range(24):
            assert torch.equal(gate[j], experts.gate_up_proj[e, :, 2 * j])
            assert torch.equal(up[j], experts.gate_up_proj[e, :, 2 * j + 1])
            assert torch.equal(down[:, j], experts.down_proj[e, j])
        assert torch.equal(gate_bias, experts.gate_up_proj_bias[e, 0::2])
        assert torch.equal(up_bias, experts.gate_up_proj_bias[e, 1::2])
        assert torch.equal(down_bias, experts.down_proj_bias[e])


def test_banks_are_views_not_copies():
    layer = find_layers(ours("mixtral"))[1][0]
    banks = read_banks(layer, 0)
    layer.mlp.experts.gate_up_proj.data.zero_()
    assert not banks["experts.gate"].terms[0].tensors()["weight"].any()
    assert not banks["experts.up"].terms[0].tensors()["weight"].any()


def test_write_banks_multiplies_terms_out_and_zeros_what_is_gone():
    layer = find_layers(ours("gpt_oss"))[1][0]
    shape = bank_sites(layer)["experts.down"].shape
    u, v = torch.randn(4, 32, 3), torch.randn(1, 3, 24)
    slots = [0, 1, 2, None]
    low = LowRank(shape, slots, [0, 0, 0, None], U=u, V=v)
    base = Dense(shape, [0, 0, 0, None], torch.randn(1, 32, 24))
    bias = Bias(shape, [0, None, None, None], torch.randn(1, 32))
    bank = Bank("experts.down", 0, shape, [base, low, bias])
    write_banks(layer, {"experts.down": bank})
    experts = layer.mlp.experts
    expected = base.weight[0] + u[1] @ v[0]
    assert torch.allclose(experts.down_proj[1].T, expected, atol=1e-6)
    assert torch.equal(experts.down_proj_bias[0], bias.vector[0])
    assert not experts.down_proj[3].any()
    assert not experts.down_proj_bias[1:].any()


def test_write_banks_refuses_a_bias_that_has_no_place():
    layer = find_layers(ours("mixtral"))[1][0]
    shape = bank_sites(layer)["attention.q"].shape
    dense = Dense(shape, [0], torch.randn(1, shape.out_features, 32))
    bias = Bias(shape, [0], torch.randn(1, shape.out_features))
    with pytest.raises(ValueError, match=r"attention\.q: has a bias"):
        write_banks(layer, {"attention.q": Bank("attention.q", 0, shape, [dense, bias])})


def test_specs_and_tensors_of_changed_modules():
    layer = find_layers(ours("gpt_oss"))[1][0]
    banks = read_banks(layer, 0)
    chosen = {name: banks[name] for name in [*EXPERTS, "attention.o"]}
    specs = module_specs(layer, chosen)
    assert {path: spec["type"] for path, spec in specs.items()} == {
        "mlp.experts": "experts",
        "self_attn.o_proj": "linear",
    }
    assert list(specs["mlp.experts"]["terms"]) == ["gate", "up", "down"]
    assert sorted(module_tensors(layer, chosen)) == sorted(
        [f"mlp.experts.terms_{part}_0_weight" for part in ("gate", "up", "down")]
        + [f"mlp.experts.terms_{part}_1_vector" for part in ("gate", "up", "down")]
        + ["self_attn.o_proj.terms_0_weight", "self_attn.o_proj.terms_1_vector"]
    )
    assert own_tensors(layer, bank_sites(layer)["experts.up"]) == [
        "gate_up_proj",
        "gate_up_proj_bias",
        "down_proj",
        "down_proj_bias",
    ]


class _Block(nn.Module):
    """A decoder layer whose experts are whatever it is given."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.gate = nn.Linear(8, 4)
        self.mlp.experts = experts


class _Stacked(nn.Module):
    """Fused experts; flags are set from outside."""

    def __init__(self, **flags: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 6))
        for name, value in flags.items():
            setattr(self, name, value)


FLAGS = {"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True}


def test_flags_are_trusted():
    sites = bank_sites(_Block(_Stacked(**FLAGS)))
    assert sites["experts.gate"].shape == BankShape(4, 6, 8)
    assert sites["experts.down"].shape == BankShape(4, 8, 6)
    assert sorted(sites) == sorted(EXPERTS)


def test_a_list_of_experts_is_refused():
    experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
    with pytest.raises(UserError, match=r"_Block\.mlp\.experts: ModuleList is not the experts"):
        bank_sites(_Block(experts))


@pytest.mark.parametrize("missing", list(FLAGS))
def test_a_missing_flag_is_refused(missing):
    flags = {name: value for name, value in FLAGS.items() if name != missing}
    with pytest.raises(UserError, match=f"has no {missing}"):
        bank_sites(_Block(_Stacked(**flags)))


def test_experts_under_another_name_are_refused():
    block = _Block(_Stacked(**FLAGS))
    block.mlp.bank = _Stacked()
    with pytest.raises(UserError, match=r"mlp\.bank: _Stacked is not the experts"):
        bank_sites(block)


@pytest.mark.parametrize(
    "flags", [{"is_transposed": True}, {"has_bias": True}, {"has_gate": False}]
)
def test_flags_that_contradict_the_tensors_are_refused(flags):
    with pytest.raises(UserError, match=r"mlp\.experts: _Stacked holds .* layout"):
        bank_sites(_Block(_Stacked(**{**FLAGS, **flags})))


def test_more_tensors_than_the_flags_promise_are_refused():
    experts = _Stacked(**FLAGS)
    experts.gate_up_scale = nn.Parameter(torch.randn(4, 1))
    with pytest.raises(UserError, match="gate_up_scale"):
        bank_sites(_Block(experts))


def test_a_router_beside_the_experts_in_the_layer_itself_is_no_bank():
    # As in Gemma 4: the layer is its own MoE block.
    layer = nn.Module()
    layer.router = nn.Module()
    layer.router.proj = nn.Linear(8, 4)
    layer.experts = _Stacked(**FLAGS)
    layer.mlp = nn.Module()
    layer.mlp.up_proj, layer.mlp.down_proj = nn.Linear(8, 4), nn.Linear(4, 8)
    assert sorted(bank_sites(layer)) == sorted([*EXPERTS, "mlp.up", "mlp.down"])


def test_two_banks_of_one_name_are_refused():
    layer = nn.Module()
    layer.self_attn, layer.attention = nn.Module(), nn.Module()
    layer.self_attn.q_proj, layer.attention.q = nn.Linear(8, 8), nn.Linear(8, 8)
    with pytest.raises(UserError, match=r"two banks would be called attention\.q"):
        bank_sites(layer)


def test_a_model_without_one_list_of_layers_is_refused():
    model = ours("mixtral")
    model.config.num_hidden_layers = 7
    with pytest.raises(UserError, match="cannot tell its decoder layers: 0 lists of 7"):
        find_layers(model)
