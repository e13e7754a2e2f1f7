"""Statistics equal plain loops over a whole model."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import families
import pytest
import torch
from calibration_bench import (
    BATCH,
    FAMILIES,
    LENGTH,
    SEQUENCES,
    Bench,
    activated,
    experts_path,
    needs_of,
    recorded,
)
from mctk.models import bank_sites, installed, read_banks
from mctk.runtime import observe
from mctk.statistics import (
    ChannelEnergy,
    ChannelMagnitude,
    ExpertFrequency,
    Fisher,
    LayerCollector,
    LayerSamples,
    LayerStatistics,
    Magnitude,
    Moment,
    Need,
    RouterWeight,
    SecondMoment,
)
from mctk.sweep import ForwardSweep
from mctk.terms import Bank, BankShape, Bias, Dense, LowRank

# Plain loops.


def naive(bench: Bench, index: int, found: dict) -> dict[Need, object]:
    """All statistics of a layer by loops over tokens and members."""
    layer = bench.whole.model.layers[index]
    sites = bench.sites[index]
    banks = read_banks(layer, index)
    inputs: dict[str, dict[int, list[torch.Tensor]]] = {name: defaultdict(list) for name in sites}
    members = max((s.shape.members for s in sites.values() if s.part == "down"), default=0)
    frequency = torch.zeros(members, dtype=torch.int64)
    weight = torch.zeros(members, dtype=torch.float64)
    weighted: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, site in sites.items():
        if site.part == "linear":
            for (x,) in found[site.module]:
                inputs[name][0] += list(x.reshape(-1, x.shape[-1]))
    for hidden, chosen, weights in found[experts_path(layer)]:
        for token, row in enumerate(chosen.tolist()):
            mixed: dict[str, torch.Tensor | int] = dict.fromkeys(("gate", "up", "down"), 0)
            for slot, e in enumerate(row):
                frequency[e] += 1
                weight[e] += weights[token, slot].double()
                x = hidden[token]
                h = activated(layer, banks, e, x)
                for part, value in (("gate", x), ("up", x), ("down", h)):
                    inputs[f"experts.{part}"][e].append(value)
                    mixed[part] = mixed[part] + weights[token, slot].double() * value.double()
            for part, value in mixed.items():
                weighted[f"experts.{part}"].append(value)
    values: dict[Need, object] = {ExpertFrequency(): frequency, RouterWeight(): weight}
    for name, site in sites.items():
        shape = site.shape
        for side, n in (("input", shape.in_features), ("output", shape.out_features)):
            total = torch.zeros(shape.members, n, n, dtype=torch.float64)
            for member, rows in inputs[name].items():
                matrix = banks[name].materialise(member)[0].double()
                for x in rows:
                    v = x.double() if side == "input" else matrix @ x.double()
                    total[member] += v[:, None] * v[None, :]
            count = torch.tensor([len(inputs[name][m]) for m in range(shape.members)])
            values[SecondMoment(name, side)] = Moment(total, count)
            pooled = Moment(total.sum(0, keepdim=True), count.sum()[None])
            values[SecondMoment(name, side, pooled=True)] = pooled
            if side == "input":
                values[ChannelEnergy(name)] = total.diagonal(dim1=1, dim2=2)
                magnitude = torch.zeros(shape.members, n, dtype=torch.float64)
                for member, rows in inputs[name].items():
                    magnitude[member] = sum(x.double().abs() for x in rows)
                values[ChannelMagnitude(name)] = Magnitude(magnitude, count)
        if name in weighted:
            energy = sum(row.square() for row in weighted[name])
            values[ChannelEnergy(name, weighted=True)] = energy[None]
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_plain_loops(benches, family):
    bench = benches(family)
    for index, found in enumerate(recorded(bench)):
        statistics = bench.statistics(index)
        tokens = SEQUENCES * LENGTH
        for need, expected in naive(bench, index, found).items():
            value = statistics[need]
            if isinstance(need, SecondMoment):
                assert value.value.dtype == torch.float32
                assert torch.equal(value.count, expected.count)
                scale = expected.value.abs().max()
                assert torch.allclose(value.value.double(), expected.value, atol=1e-5 * scale)
            elif isinstance(need, ChannelMagnitude):
                assert value.value.dtype == torch.float32
                assert torch.equal(value.count, expected.count)
                assert torch.allclose(value.value.double(), expected.value, rtol=1e-5)
                mean = expected.value / expected.count.clamp(min=1)[:, None]
                assert torch.allclose(value.mean().double(), mean, rtol=1e-5)
            elif isinstance(need, ChannelEnergy):
                assert value.dtype == torch.float32 and value.shape == expected.shape
                assert torch.allclose(value.double(), expected, rtol=1e-5)
            elif isinstance(need, ExpertFrequency):
                assert value.dtype == torch.int64
                assert torch.equal(value, expected)
                assert value.sum() in (0, 2 * tokens)  # no padding: every token, k times
            else:
                assert value.dtype == torch.float64
                assert torch.allclose(value, expected, atol=1e-5)
        for name, site in bench.sites[index].items():
            if site.part == "linear":
                assert statistics[SecondMoment(name)].count.tolist() == [tokens]
        samples = statistics[LayerSamples(20)]
        assert samples.shape == (2, LENGTH, 32)  # whole sequences, 20 tokens at least
        assert torch.equal(samples, torch.cat(found["layer"])[:2])


def test_biases_do_not_enter_the_output_moment(benches):
    bench = benches("gpt_oss")
    for name in ("experts.gate", "experts.up", "experts.down", "attention.q"):
        inside = bench.statistics(0)[SecondMoment(name, "input").canonical(bench.sites[0])]
        outside = bench.statistics(0)[SecondMoment(name, "output")]
        bank = read_banks(bench.whole.model.layers[0], 0)[name]
        assert bank.materialise(0)[1] is not None
        for member in range(bank.shape.members):
            weight = bank.materialise(member)[0]
            expected = weight @ inside.value[member] @ weight.T
            assert torch.allclose(outside.value[member], expected, atol=1e-4 * expected.abs().max())


def test_what_enters_up_enters_gate(benches):
    bench = benches("mixtral")
    statistics = bench.statistics(0)
    assert SecondMoment("experts.up").canonical(bench.sites[0]) == SecondMoment("experts.gate")
    assert SecondMoment("experts.up") in statistics
    up, gate = (statistics[SecondMoment(f"experts.{part}")] for part in ("up", "gate"))
    assert torch.equal(up.value, gate.value)
    assert SecondMoment("experts.up").canonical(["experts.up"]) == SecondMoment("experts.up")


def test_needs_have_one_name_where_inputs_are_the_same():
    both = ["experts.gate", "experts.up", "experts.down"]
    for need in (
        SecondMoment("experts.up", of="current", pooled=True),
        ChannelEnergy("experts.up"),
        ChannelEnergy("experts.up", weighted=True),
        ChannelMagnitude("experts.up"),
    ):
        assert need.canonical(both) == dataclasses.replace(need, bank="experts.gate")
        assert need.canonical(["experts.up"]) == need
    for need in (
        SecondMoment("experts.up", "output"),
        Fisher("experts.up"),
        ChannelEnergy(),
        ExpertFrequency(),
    ):
        assert need.canonical(both) == need


def test_what_needs_the_backward_sweep_and_cannot_be_kept():
    assert Fisher("x").gradient and Fisher("x").transient
    for need in (SecondMoment("x"), ChannelEnergy(), ExpertFrequency(), LayerSamples()):
        assert not need.gradient and not need.transient


def test_a_layer_without_experts(benches):
    bench = benches("deepseek_v3")
    statistics = bench.statistics(0)
    assert statistics[ExpertFrequency()].numel() == statistics[RouterWeight()].numel() == 0
    assert "mlp.gate" in bench.sites[0]


def test_two_sample_sizes_are_two_prefixes(benches):
    bench = benches("mixtral")
    bench.model.load_outer()
    found: dict[Need, torch.Tensor] = {}

    def visit(layer):
        needs = [LayerSamples(LENGTH), LayerSamples(3 * LENGTH + 1), LayerSamples(1000)]
        banks = read_banks(layer.module, layer.index)
        collector = LayerCollector(
            layer.module, layer.index, bench.sites[layer.index], banks, needs, torch.device("cpu")
        )
        collector.sample(layer.inputs)
        found.update(collector.result())
        return [layer.run(b) for b in range(len(layer.inputs))]

    ForwardSweep(bench.model, bench.ids, BATCH).run(visit)
    lengths = {need.tokens: len(value) for need, value in found.items()}
    assert lengths == {LENGTH: 1, 3 * LENGTH + 1: 4, 1000: SEQUENCES}
    assert torch.equal(found[LayerSamples(LENGTH)], found[LayerSamples(1000)][:1])


def test_output_moments_of_a_compressed_layer():
    # Of a model that holds terms already, "the weights" are their sum.
    shape = BankShape(1, 3, 4)
    base = Dense(shape, [0], torch.randn(1, 3, 4))
    low = LowRank(shape, [0], [0], U=torch.randn(1, 3, 2), V=torch.randn(1, 2, 4))
    bank = Bank("x", 0, shape, [base, low, Bias(shape, [0], torch.randn(1, 3))])
    layer = torch.nn.Module()
    layer.x = torch.nn.Linear(4, 3)
    need = SecondMoment("x", "output")
    collector = LayerCollector(
        layer, 0, bank_sites(layer), {"x": bank}, [need], torch.device("cpu")
    )
    rows = torch.randn(7, 4)
    with collector.listening():
        layer.x(rows.view(1, 7, 4))
    outputs = rows @ (base.weight[0] + low.U[0] @ low.V[0]).T
    moment = collector.result()[need]
    assert torch.allclose(moment.value[0], outputs.T @ outputs, atol=1e-4)
    assert moment.count.tolist() == [7]


# What steps have made of a layer.


def current(layer, banks: dict[str, Bank], needs: list[Need]) -> tuple[LayerStatistics, dict]:
    """Statistics of a layer as it runs with other terms, and what reached its experts' down."""
    sites = bank_sites(layer)
    reached: dict[int, list[torch.Tensor]] = defaultdict(list)
    hidden = torch.randn(19, 32, generator=torch.Generator().manual_seed(4))
    with installed(layer, banks, torch.float32), torch.no_grad():
        collector = LayerCollector(layer, 0, sites, banks, needs, torch.device("cpu"))
        with collector.listening():
            layer.mlp(hidden[None])
        with observe(layer.mlp.experts, lambda e, *a: reached[e].append(a[3])):
            layer.mlp(hidden[None])
    return collector.result(), {e: torch.cat(rows) for e, rows in reached.items()}


def test_current_outputs_are_those_of_the_residuals():
    layer = families.tiny("gpt_oss").model.layers[0]
    layer.mlp.experts.config._experts_implementation = "mctk"
    banks = read_banks(layer, 0)
    bank = banks["experts.down"]
    dense, bias = bank.terms
    base = dense.weight.mean(0, keepdim=True)
    residual = Dense(bank.shape, dense.slots, dense.weight - base)
    low = LowRank(bank.shape, [0] * 4, [0] * 4, U=torch.randn(1, 32, 2), V=torch.randn(1, 2, 24))
    shared = Dense(bank.shape, [0] * 4, base)
    banks["experts.down"] = Bank("experts.down", 0, bank.shape, [shared, residual, low, bias])
    banks = {name: b for name, b in banks.items() if name.startswith("experts.")}
    each = SecondMoment("experts.down", "output", of="current")
    every = dataclasses.replace(each, pooled=True)
    found, reached = current(layer, banks, [each, every])
    assert reached
    total = torch.zeros(32, 32)
    for e in range(4):
        rows = reached.get(e, torch.zeros(0, 24)) @ residual.weight[e].T
        assert found[each].count[e] == len(rows)
        torch.testing.assert_close(found[each].value[e], rows.T @ rows, rtol=1e-4, atol=1e-4)
        total += rows.T @ rows
    torch.testing.assert_close(found[every].value, total[None], rtol=1e-4, atol=1e-4)
    assert found[every].count.tolist() == [2 * 19]
    banks["experts.down"] = Bank("experts.down", 0, bank.shape, [low, bias])
    with pytest.raises(ValueError, match=r"experts.down of layer 0: has no dense term left"):
        current(layer, banks, [each])


def test_current_inputs_come_in_the_present_order():
    layer = families.tiny("mixtral").model.layers[0]
    layer.mlp.experts.config._experts_implementation = "mctk"
    banks = {k: b for k, b in read_banks(layer, 0).items() if k.startswith("experts.")}
    need = SecondMoment("experts.down", of="current")
    energy = ChannelEnergy(weighted=True, of="current")
    before, _ = current(layer, banks, [need, energy])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    permuted = {}
    for name, bank in banks.items():
        weight = bank.terms[0].weight
        weight = weight[:, :, order] if name == "experts.down" else weight[:, order]
        terms = [Dense(bank.shape, bank.terms[0].slots, weight.contiguous())]
        permuted[name] = Bank(name, 0, bank.shape, terms)
    after, _ = current(layer, permuted, [need, energy])
    torch.testing.assert_close(after[energy], before[energy][:, order], rtol=1e-4, atol=1e-5)
    expected = before[need].value[:, order][:, :, order]
    torch.testing.assert_close(after[need].value, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before[need].value, expected, rtol=1e-2)


def test_current_is_the_original_where_no_step_came_before():
    original, present = (Moment(torch.ones(1, 2, 2) * i, torch.tensor([i])) for i in (1, 2))
    need = SecondMoment("experts.up", of="current")
    values: dict[Need, Moment] = {SecondMoment("experts.gate"): original}
    statistics = LayerStatistics(0, values, ["experts.gate", "experts.up"])
    assert need in statistics
    assert statistics[need] is original
    assert dataclasses.replace(need, pooled=True) not in statistics
    energy = ChannelEnergy("experts.up", weighted=True, of="current")
    assert energy not in statistics
    values[ChannelEnergy("experts.gate", weighted=True)] = torch.ones(1, 2)
    assert energy in LayerStatistics(0, values, ["experts.gate", "experts.up"])
    values[SecondMoment("experts.gate", of="current")] = present
    statistics = LayerStatistics(0, values, ["experts.gate", "experts.up"])
    assert statistics[need] is present
    assert statistics[SecondMoment("experts.up")] is original


def test_routing_weights_belong_to_experts(benches):
    layer = benches("mixtral").whole.model.layers[0]
    sites, banks = bank_sites(layer), read_banks(layer, 0)
    with pytest.raises(ValueError, match=r"no routing weights belong to attention.q"):
        LayerCollector(
            layer, 0, sites, banks, [ChannelEnergy("attention.q", True)], torch.device("cpu")
        )


def test_listening_ends(benches):
    layer = benches("mixtral").whole.model.layers[0]
    sites, banks = bank_sites(layer), read_banks(layer, 0)
    needs = [need for need in needs_of(sites) if not isinstance(need, LayerSamples)]
    collector = LayerCollector(layer, 0, sites, banks, needs, torch.device("cpu"))
    with pytest.raises(RuntimeError), collector.listening():
        raise RuntimeError
    seen = []
    with observe(layer.mlp.experts, lambda *args: seen.append(args)), torch.no_grad():
        benches("mixtral").whole(families.token_ids())
    assert seen
    assert int(collector.frequency.sum()) == 0
    for need, value in collector.result().items():
        if isinstance(need, SecondMoment | ChannelMagnitude):
            assert int(value.count.sum()) == 0
        elif isinstance(need, ChannelEnergy):
            assert not value.any()


def test_pooled():
    moment = Moment(torch.stack([torch.eye(2), 3 * torch.eye(2)]), torch.tensor([2, 6]))
    assert torch.equal(moment.pooled(), torch.eye(2) / 2)
    assert torch.equal(
        Moment(torch.zeros(2, 3, 3), torch.tensor([0, 0])).pooled(), torch.zeros(3, 3)
    )


def test_statistics_that_were_not_declared():
    read = []
    values = {ExpertFrequency(): lambda: read.append(1) or torch.ones(2)}
    statistics = LayerStatistics(3, values, ["experts.up"])
    assert ExpertFrequency() in statistics
    assert RouterWeight() not in statistics
    assert statistics.get(RouterWeight()) is None
    assert not read  # asking whether does not read
    assert len(statistics) == 1
    assert list(statistics) == [ExpertFrequency()]
    with pytest.raises(KeyError, match=r"layer 3: SecondMoment\(.*was not declared"):
        statistics[SecondMoment("experts.up")]
    assert torch.equal(statistics[ExpertFrequency()], torch.ones(2))
