"""Experts in a `ModuleList` as banks, and the module that stands for them once compressed."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from mctk.errors import CheckpointError, UserError
from mctk.models import (
    bank_sites,
    has_expert_list,
    installed,
    module_specs,
    module_tensors,
    own_tensors,
    read_banks,
    write_banks,
)
from mctk.runtime import TermExpertList, dynamic_pruning, observe, swap
from mctk.terms import Bank, BankShape, Dense, DynamicDense, LowRank
from torch import Tensor, nn

E, H, I = 4, 8, 6  # noqa: E741 (the project's letters)
EXPERTS = ["experts.gate", "experts.up", "experts.down"]


class Mlp(nn.Module):
    """A gated MLP as DeepSeek's."""

    def __init__(self, names: tuple[str, str, str], bias: bool = False, width: int = I) -> None:
        super().__init__()
        self.names = names
        for name, (out, size) in zip(names, ((width, H), (width, H), (H, width)), strict=True):
            setattr(self, name, nn.Linear(size, out, bias=bias))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class Swapped(Mlp):
    """Activates the other half."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(gate(x) * self.act_fn(up(x)))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = (x @ self.weight.T).softmax(-1).topk(2, dim=-1)
        return index, weights


class Block(nn.Module):
    """Routes by itself, and goes through its experts by iteration."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate = Router()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        index, weights = self.gate(x)
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = (index == number).nonzero(as_tuple=True)
            token, slot = token.flip(0), slot.flip(0)  # an order of its own
            total.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return total


class Layer(nn.Module):
    def __init__(self, *experts: nn.Module) -> None:
        super().__init__()
        self.mlp = Block(nn.ModuleList(experts))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


DEEPSEEK, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")


def layer(names: tuple[str, str, str] = DEEPSEEK, bias: bool = False) -> Layer:
    torch.manual_seed(0)
    return Layer(*(Mlp(names, bias) for _ in range(E))).requires_grad_(False)


@pytest.mark.parametrize("names", [DEEPSEEK, MIXTRAL])
@pytest.mark.parametrize("bias", [False, True])
def test_banks_go_out_and_come_back(names, bias):
    source, x = layer(names, bias), torch.randn(7, H)
    expected = source(x)
    sites = bank_sites(source)
    assert list(sites) == EXPERTS and all(s.module == "mlp.experts" for s in sites.values())
    assert sites["experts.up"].shape == BankShape(E, I, H) and sites["experts.up"].bias == bias
    assert sites["experts.down"].shape == BankShape(E, H, I)
    banks = read_banks(source, 3)
    for e, expert in enumerate(source.mlp.experts):
        for bank, name in zip(banks.values(), names, strict=True):
            weight, vector = bank.materialise(e)
            assert torch.equal(weight, getattr(expert, name).weight)
            assert (vector is not None) == bias
    fresh = layer(names, bias)
    for parameter in fresh.mlp.experts.parameters():
        parameter.data.zero_()
    assert not torch.allclose(fresh(x), expected)
    write_banks(fresh, banks)
    assert torch.equal(fresh(x), expected)


def test_the_experts_lie_side_by_side_once():
    source = layer()
    expected = [p.clone() for p in source.mlp.experts.parameters()]
    banks = read_banks(source, 0)
    stack = banks["experts.gate"].terms[0].tensors()["weight"]
    for e, expert in enumerate(source.mlp.experts):
        assert expert.gate_proj.weight.data_ptr() == stack[e].data_ptr()
    again = read_banks(source, 0)["experts.gate"].terms[0].tensors()["weight"]
    assert again.data_ptr() == stack.data_ptr()
    for parameter, value in zip(source.mlp.experts.parameters(), expected, strict=True):
        assert torch.equal(parameter, value)
    stack.zero_()
    assert not source.mlp.experts[2].gate_proj.weight.any()


def test_a_list_on_meta():
    source = layer().to("meta")
    assert list(bank_sites(source)) == EXPERTS
    terms = read_banks(source, 0)["experts.down"].terms
    assert terms[0].tensors()["weight"].is_meta
    assert terms[0].tensors()["weight"].shape == (E, H, I)


def test_specs_tensors_and_what_goes():
    source = layer(bias=True)
    banks = read_banks(source, 0)
    [(path, entry)] = module_specs(source, banks).items()
    assert path == "mlp.experts" and entry["type"] == "expert_list"
    assert list(entry["terms"]) == ["gate", "up", "down"]
    assert sorted(module_tensors(source, banks)) == sorted(
        f"mlp.experts.terms_{part}_{i}_{key}"
        for part in ("gate", "up", "down")
        for i, key in enumerate(("weight", "vector"))
    )
    own = own_tensors(source, bank_sites(source)["experts.up"])
    assert sorted(own) == sorted(name for name, _ in source.mlp.experts.named_parameters())
    assert has_expert_list(source) and not has_expert_list(nn.Linear(3, 3))


@pytest.mark.parametrize("bias", [False, True])
def test_installed_exact_terms_compute_the_same_and_leave_again(bias):
    source, x = layer(bias=bias), torch.randn(9, H)
    original, expected = source.mlp.experts, source(x)
    with installed(source, read_banks(source, 0), torch.float32):
        experts = source.mlp.experts
        assert isinstance(experts, TermExpertList) and len(experts) == E
        assert torch.allclose(source(x), expected, atol=1e-6)
        assert list(bank_sites(source)) == EXPERTS
        assert read_banks(source, 0)["experts.up"].shape == BankShape(E, I, H)
        with installed(source, read_banks(source, 0), torch.float32):
            assert torch.allclose(source(x), expected, atol=1e-6)
    assert source.mlp.experts is original and torch.equal(source(x), expected)


def compressed(source: Layer) -> dict[str, Bank]:
    """A base and deltas; the last expert has no term of down."""
    banks = read_banks(source, 0)
    made = {}
    for name, bank in banks.items():
        shape, weight = bank.shape, bank.terms[0].tensors()["weight"]
        slots = [0, 0, 0, None if name == "experts.down" else 0]
        base = Dense(shape, slots, weight.mean(0)[None])
        u, v = torch.randn(3, shape.out_features, 2), torch.randn(3, 2, shape.in_features)
        low = LowRank(shape, [0, 1, 2, None], [0, 1, 2, None], U=u, V=v)
        made[name] = Bank(name, 0, shape, [base, low])
    return made


def test_compressed_experts_compute_what_their_matrices_say():
    torch.manual_seed(1)
    source, x = layer(), torch.randn(5, 3, H)
    banks = compressed(source)
    plain = layer()
    write_banks(plain, banks)
    with installed(source, banks, torch.float32):
        experts = source.mlp.experts
        for number, (ours, reference) in enumerate(zip(experts, plain.mlp.experts, strict=True)):
            assert torch.allclose(ours(x), reference(x), atol=1e-5), number
            assert torch.equal(experts[number - E](x), ours(x))
        assert not experts[3](x).any()
        with pytest.raises(IndexError, match="expert 4 of 4"):
            experts[4]
        with pytest.raises(TypeError, match="slice"):
            experts[1:]


def test_experts_run_through_the_module_that_holds_the_tensors():
    """accelerate's hooks bring offloaded tensors back there, and nowhere else."""
    source = layer()
    called = []
    with installed(source, read_banks(source, 0), torch.float32):
        source.mlp.experts.register_forward_pre_hook(lambda *_: called.append(1))
        source(torch.randn(20, H))
    assert len(called) == E


@pytest.mark.parametrize("stage", ["original", "installed"])
def test_what_is_observed_is_in_order_of_tokens(stage):
    source, x = layer(), torch.randn(11, H)
    index, weights = source.mlp.gate(x)
    banks = read_banks(source, 0)
    bank_sites(source)
    seen = []

    def observer(expert, token, slot, rows, h, y, weight):
        assert torch.equal(token, token.sort().values)
        assert torch.equal(rows, x[token]) and torch.equal(weight, weights[token, slot])
        down = banks["experts.down"].materialise(expert)[0]
        assert torch.allclose(y, h @ down.T, atol=1e-6)
        seen.append(len(token))

    def run() -> None:
        with observe(source.mlp.experts, observer):
            source(x)

    if stage == "original":
        run()
    else:
        with installed(source, banks, torch.float32):
            run()
    assert sum(seen) == index.numel()
    source(x)
    assert sum(seen) == index.numel()  # it has stopped listening


def test_a_block_that_hides_its_choices_is_refused():
    source = layer()
    bank_sites(source)
    source.mlp.gate.forward = lambda x: SimpleNamespace()  # type: ignore[method-assign]
    with (
        observe(source.mlp.experts, lambda *_: None),
        pytest.raises(UserError, match="Block: its router does not hand out"),
    ):
        source.mlp.experts[0](torch.randn(2, H))


def test_experts_that_get_other_rows_are_refused():
    source = layer()
    bank_sites(source)
    source.mlp.experts[0].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    with (
        observe(source.mlp.experts, lambda *_: None),
        pytest.raises(UserError, match="expert 0 got other rows than the block's own"),
    ):
        source(torch.randn(30, H))


def other(kind: str) -> Layer:
    experts: list[nn.Module] = [Mlp(DEEPSEEK) for _ in range(E)]
    if kind == "widths":
        experts[2] = Mlp(DEEPSEEK, width=I + 1)
    elif kind == "classes":
        experts[1] = Swapped(DEEPSEEK)
    elif kind == "computes":
        experts = [Swapped(DEEPSEEK) for _ in range(E)]
    elif kind == "holds":
        for expert in experts:
            expert.norm = nn.LayerNorm(H)
    elif kind == "activation":
        for expert in experts:
            del expert.act_fn
    return Layer(*experts)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("widths", "expert 2 differs from expert 0"),
        ("classes", "expert 1 differs from expert 0"),
        ("computes", r"Swapped does not compute down\(act_fn\(gate\(x\)\) \* up\(x\)\)"),
        ("holds", "Mlp holds norm besides its three matrices"),
        ("activation", "Mlp has no act_fn"),
    ],
)
def test_lists_of_anything_else_are_refused(kind, message):
    with pytest.raises(UserError, match=rf"mlp\.experts: a list of experts, but {message}"):
        bank_sites(other(kind))


def test_specs_that_do_not_fit_are_refused():
    source = layer()
    specs = module_specs(source, read_banks(source, 0))
    fused = {"mlp.experts": {**specs["mlp.experts"], "type": "experts"}}
    with pytest.raises(CheckpointError, match="ModuleList is not an experts module"):
        swap(layer(), fused)
    router = {"mlp.gate": specs["mlp.experts"]}
    with pytest.raises(CheckpointError, match="Router is not a list of experts"):
        swap(layer(), router)
    with pytest.raises(CheckpointError, match="Swapped does not compute"):
        swap(other("computes"), specs)


def pruned(source: Layer) -> dict[str, Bank]:
    """One base, two of whose channels each forward skips, and the experts' differences from it."""
    torch.manual_seed(2)
    made = {}
    for name, bank in read_banks(source, 0).items():
        shape, weight = bank.shape, bank.terms[0].tensors()["weight"]
        base, down = weight.mean(0)[None], name == "experts.down"
        axis, energy = ("cols", torch.rand(1, I)) if down else ("rows", None)
        dynamic = DynamicDense(shape, [0] * E, base, drop=2, axis=axis, energy=energy)
        made[name] = Bank(name, 0, shape, [dynamic, Dense(shape, range(E), weight - base)])
    return made


class Fused(nn.Module):
    """The same experts as transformers holds them."""

    def __init__(self, source: Layer) -> None:
        super().__init__()
        self.is_transposed = self.has_bias = self.has_post_expert_norm = False
        self.is_concatenated = self.has_gate = True
        banks = read_banks(source, 0)
        gate, up, down = (banks[name].terms[0].tensors()["weight"] for name in EXPERTS)
        self.gate_up_proj = nn.Parameter(torch.cat([gate, up], dim=1))
        self.down_proj = nn.Parameter(down.clone())

    def _apply_gate(self, wide: Tensor) -> Tensor:
        gate, up = wide.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def test_dynamic_channels_are_those_of_fused_experts():
    """The block calls expert by expert, in an order of its own, and the choice is one for all."""
    source, x = layer(), torch.randn(13, H)
    banks, plain = pruned(source), source(x)
    other = nn.Module()
    other.mlp = nn.Module()
    other.mlp.experts = Fused(source)
    index, weights = source.mlp.gate(x)
    with torch.no_grad(), installed(other, banks, torch.float32):
        expected = other.mlp.experts(x, index, weights)
        channels = other.mlp.experts.active_channels
    assert channels is not None and len(channels[0]) == I - 2
    with torch.no_grad(), installed(source, banks, torch.float32):
        for _ in range(2):  # nothing is left of the forward before
            assert torch.allclose(source(x), expected, atol=1e-5)
            found = source.mlp.experts.active_channels
            assert torch.equal(found[0], channels[0])
        seen = []
        with observe(source.mlp.experts, lambda *given: seen.append(given)):
            source(x)
        sums = torch.zeros_like(x)
        for _, token, _, _, _, y, weight in seen:
            sums.index_add_(0, token, y * weight[:, None])
        assert torch.allclose(sums, expected, atol=1e-5)
        with dynamic_pruning(source, False):
            assert torch.allclose(source(x), plain, atol=1e-5)
            assert source.mlp.experts.active_channels is None
        term = weakref.ref(source.mlp.experts)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert term() is None and torch.equal(source(x), plain)
    assert not source.mlp._forward_hooks and not source.mlp._forward_pre_hooks
