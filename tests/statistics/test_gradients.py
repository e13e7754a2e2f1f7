"""Gradients are told as they pass, change no bit of the forward, and are never missed unseen."""

from __future__ import annotations

from collections.abc import Callable

import families
import pytest
import torch
from mctk.errors import UserError
from mctk.models import bank_sites, installed, read_banks
from mctk.runtime import experts_forward, observe_gradients
from mctk.statistics import ChannelFisher, Fisher, GradientCollector
from torch import nn

CPU = torch.device("cpu")


class Ungated(nn.Module):
    """Experts without a gate, as some families have them."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(4, 24, 32))
        self.down_proj = nn.Parameter(torch.randn(4, 32, 24))
        self.act_fn = nn.ReLU()
        self.has_gate = self.has_bias = self.is_transposed = self.has_post_expert_norm = False
        self.is_concatenated = True

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return experts_forward(self, *args)


def experts(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    if family == "ungated":
        torch.manual_seed(0)
        return Ungated().to(dtype)
    module = families.tiny(family).model.layers[-1].mlp.experts.to(dtype)
    module.config._experts_implementation = "mctk"
    return module


def routing(tokens: int, dtype: torch.dtype = torch.float32, count: int = 4) -> tuple:
    """Hidden states, chosen experts (never the first) and routing weights."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(tokens, count - 1, generator=generator)
    weights, index = scores.topk(2)
    return torch.randn(tokens, 32, generator=generator).to(dtype), index + 1, weights.to(dtype)


# observe_gradients.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "ungated"])
def test_an_observed_forward_is_the_same_bits_and_passes_gradients_on(family, dtype):
    module = experts(family, dtype)
    x, index, weights = routing(21, dtype)
    module.requires_grad_(True)
    x.requires_grad_()
    out = module(x, index, weights)
    sum_of = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    out.backward(sum_of)
    own_x, x.grad = x.grad, None
    own = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    module.requires_grad_(False)

    wide = "gate_up_proj" if module.has_gate else "up_proj"
    total = {name: torch.zeros_like(own[name], dtype=torch.float64) for name in own}
    seen = []

    def observer(name, expert, token, inputs, grad):
        assert not torch.is_grad_enabled()
        assert bool((index[token] == expert).any(dim=1).all())
        assert bool((token.diff() > 0).all())
        seen.append((name, expert))
        gradient = grad.double().T @ inputs.double()
        key = f"{name}_proj"
        total[key][expert] += gradient.T if module.is_transposed else gradient

    with observe_gradients(module, observer):
        again = module(x, index, weights)
        with torch.no_grad():
            assert torch.equal(module(x, index, weights), out)
    assert torch.equal(again, out)
    assert not seen
    again.backward(sum_of)
    assert len(seen) == len(set(seen))
    expected = {(key.removesuffix("_proj"), e) for key in (wide, "down_proj") for e in (1, 2, 3)}
    assert set(seen) == expected
    assert all(p.grad is None for p in module.parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(x.grad, own_x, rtol=tolerance, atol=tolerance * own_x.abs().max())
    for key in (wide, "down_proj"):
        difference = (total[key] - own[key].double()).norm()
        assert difference <= tolerance * own[key].double().norm()
    seen.clear()
    module(x, index, weights).backward(sum_of)
    assert not seen  # the context has ended


def test_what_cannot_be_observed():
    model = families.tiny("mixtral")
    module = model.model.layers[0].mlp.experts
    with (
        pytest.raises(ValueError, match=r"set_experts_implementation\('mctk'\)"),
        observe_gradients(module, lambda *_: None),
    ):
        pass
    layer = model.model.layers[0]
    banks = {k: b for k, b in read_banks(layer, 0).items() if k.startswith("experts.")}
    with (
        installed(layer, banks, torch.float32),
        pytest.raises(ValueError, match="of original weights only"),
        observe_gradients(layer.mlp.experts, lambda *_: None),
    ):
        pass


# GradientCollector.


def collect(
    layer: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    batches: list[torch.Tensor],
    banks: list[str],
    length: int,
) -> dict:
    """Fisher information where a sequence's loss is the squared norm of what `forward` returns."""
    layer.requires_grad_(False)
    sites = bank_sites(layer)
    needs = [Fisher(bank) for bank in banks]
    collector = GradientCollector(layer, 7, sites, needs, length, CPU)
    with collector.listening():
        for batch in batches:
            x = batch.clone().requires_grad_()
            torch.autograd.grad(forward(x).square().sum(), x)
    return {need.bank: value for need, value in collector.result().items()}


def linear_layer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Module()
    layer.a_proj, layer.b_proj = nn.Linear(6, 8), nn.Linear(4, 5, bias=False)
    return layer


@pytest.mark.parametrize("form", ["[B,T,in]", "[B*T,in]", "heads"])
def test_linear_layers_in_every_form(form):
    layer = linear_layer()
    length, x = 3, torch.randn(5, 3, 6)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = layer.a_proj(x.reshape(-1, 6) if form == "[B*T,in]" else x)
        if form == "heads":  # [B, heads, T, in of a head]
            y = y.view(-1, length, 2, 4).transpose(1, 2)
            return layer.b_proj(y)
        return layer.b_proj(y[..., :4])

    expected = {}
    for name in ("a", "b"):
        weight = getattr(layer, f"{name}_proj").weight
        weight.requires_grad_(True)
        gradients = [torch.autograd.grad(forward(s[None]).square().sum(), weight)[0] for s in x]
        expected[name] = torch.stack(gradients).square().mean(0)[None]
        weight.requires_grad_(False)
    for batches in ([x], list(x.split(2))):
        found = collect(layer, forward, batches, ["a", "b"], length)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4)
    assert expected["b"].any()


def moe(family: str = "mixtral") -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    layer = nn.Module()
    layer.experts = experts(family)
    count = layer.experts.down_proj.shape[0]

    def forward(x: torch.Tensor) -> torch.Tensor:
        _, index, weights = routing(x.shape[0], count=count)
        return layer.experts(x, index, weights)

    return layer, forward


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "ungated"])
def test_experts_of_every_layout(family):
    layer, forward = moe(family)
    module = layer.experts
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(6))
    names = {"up": "experts.up", "down": "experts.down"}
    if module.has_gate:
        names["gate"] = "experts.gate"
    squares = {name: 0.0 for name in names.values()}
    wide = "gate_up_proj" if module.has_gate else "up_proj"
    module.requires_grad_(True)
    out = forward(x)
    for rows in out.split(4):  # sequences
        given = (getattr(module, wide), module.down_proj)
        gradients = torch.autograd.grad(rows.square().sum(), given, retain_graph=True)
        first, down = (g.mT if module.is_transposed else g for g in gradients)
        squares["experts.down"] += down.square() / 3
        if not module.has_gate:
            squares["experts.up"] += first.square() / 3
            continue
        halves = (
            first.chunk(2, dim=1) if module.is_concatenated else (first[:, ::2], first[:, 1::2])
        )
        squares["experts.gate"] += halves[0].square() / 3
        squares["experts.up"] += halves[1].square() / 3
    found = collect(layer, forward, [x], list(names.values()), 4)
    assert found.keys() == squares.keys()
    for name, value in squares.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).norm() <= 1e-5 * value.norm()
        assert not found[name][0].any()  # no token chose it
    # One alone is the same: what is not asked for is not missed.
    for name in names.values():
        assert torch.equal(collect(layer, forward, [x], [name], 4)[name], found[name])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "ungated"])
def test_channels_are_the_sums_of_what_entries_are(family):
    layer, forward = moe(family)
    layer.requires_grad_(False)
    banks = [name for name in bank_sites(layer) if name.startswith("experts.")]
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(6))
    channels = [ChannelFisher(bank, side) for bank in banks for side in ("input", "output")]
    entries = [Fisher(bank) for bank in banks]
    found = []
    for needs in (entries + channels, channels, channels[::2]):
        collector = GradientCollector(layer, 0, bank_sites(layer), needs, 4, CPU)
        with collector.listening():
            given = x.clone().requires_grad_()
            torch.autograd.grad(forward(given).square().sum(), given)
        found.append(collector.result())
    for need in channels:
        sums = found[0][need]
        over = -2 if need.side == "input" else -1
        expected = found[0][Fisher(need.bank)].sum(over)
        torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-6)
        assert sums.dtype == torch.float32
        # Whoever else asks.
        assert all(torch.equal(sums, other[need]) for other in found[1:] if need in other)


def test_listening_ends():
    layer, forward = moe()
    sites = bank_sites(layer)
    collector = GradientCollector(layer, 0, sites, [Fisher("experts.down")], 4, CPU)
    with pytest.raises(RuntimeError), collector.listening():
        raise RuntimeError
    x = torch.randn(4, 32, requires_grad=True)
    forward(x).sum().backward()
    with pytest.raises(UserError, match=r"layer 0, experts: was not run"):
        collector.result()


# What would be silently wrong is an error.


@pytest.mark.parametrize("how", ["no_grad", "detached", "unused"])
@pytest.mark.parametrize("batches", [1, 2])
def test_experts_that_no_gradient_reaches(how, batches):
    layer, run = moe()

    def forward(x: torch.Tensor) -> torch.Tensor:
        if how == "no_grad":
            with torch.no_grad():
                y = run(x)
            return x + y
        if how == "detached":
            return x + run(x).detach()
        run(x)
        return x

    x = [torch.randn(8, 32)] * batches
    message = "layer 7, experts: gradients came for 0 of the 16 rows that went through down"
    with pytest.raises(UserError, match=message):
        collect(layer, forward, x, ["experts.down"], 4)


@pytest.mark.parametrize("how", ["no_grad", "detached"])
def test_a_linear_layer_that_no_gradient_reaches(how):
    layer = linear_layer()

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(how != "no_grad"):
            y = layer.a_proj(x)
        return x.sum() + (y.detach() if how == "detached" else y)

    with pytest.raises(UserError, match="0 of the 6 rows that went through linear"):
        collect(layer, forward, [torch.randn(2, 3, 6)], ["a"], 3)


def test_a_module_that_runs_twice_in_a_forward():
    # Its squares would be those of two halves of a gradient.
    layer = linear_layer()
    with pytest.raises(UserError, match="twice in a forward"):
        collect(layer, lambda x: layer.a_proj(x) + layer.a_proj(x * 2), [torch.randn(2, 3, 6)],
                ["a"], 3)  # fmt: skip


@pytest.mark.parametrize("features", [6, 3])  # the module's own input, or a part of it
def test_inputs_that_are_changed_after_they_were_used(features):
    layer = nn.Module()
    layer.a_proj = nn.Linear(features, 2)

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        y = layer.a_proj(x[..., :features])
        x += y.sum()
        return x

    with pytest.raises(UserError, match="inputs are changed in place"):
        collect(layer, forward, [torch.randn(2, 3, 6)], ["a"], 3)


def test_tokens_that_are_not_whole_sequences():
    layer = linear_layer()
    for shape in ((2, 4, 6), (7, 6)):
        with pytest.raises(UserError, match="single sequences cannot be told apart"):
            collect(layer, layer.a_proj, [torch.randn(shape)], ["a"], 3)
    experts_layer, forward = moe()
    with pytest.raises(UserError, match="gets 9 tokens at once, not whole sequences of 4"):
        collect(experts_layer, forward, [torch.randn(9, 32)], ["experts.up"], 4)


def test_one_kind_of_labels_and_original_weights():
    layer = linear_layer()
    with pytest.raises(ValueError, match="one kind of labels"):
        GradientCollector(layer, 0, bank_sites(layer), [Fisher("a"), Fisher("b", "model")], 3, CPU)
    mixtral = families.tiny("mixtral").model.layers[0]
    with installed(mixtral, {"attention.q": read_banks(mixtral, 0)["attention.q"]}, torch.float32):
        sites = bank_sites(mixtral)
        with pytest.raises(UserError, match=r"layer 3, attention.q: is compressed already"):
            GradientCollector(mixtral, 3, sites, [Fisher("attention.q")], 3, CPU)
