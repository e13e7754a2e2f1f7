"""Statistics equal plain loops over a whole model; the cache gives back what was put in."""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from functools import partial
from pathlib import Path

import families
import pytest
import torch
from mctk.checkpoint import Source
from mctk.engine.calibrate import cache_context, calibrate
from mctk.engine.progress import Reporter
from mctk.errors import UserError
from mctk.models import BankSite, bank_sites, installed, read_banks
from mctk.runtime import observe
from mctk.statistics import (
    ChannelEnergy,
    ExpertFrequency,
    Fisher,
    LayerCollector,
    LayerSamples,
    LayerStatistics,
    Moment,
    Need,
    RouterWeight,
    SecondMoment,
    StatisticsCache,
    cache_directory,
    size_of,
)
from mctk.statistics.values import to_tensors
from mctk.sweep import ForwardSweep, StreamedModel
from mctk.terms import Bank, BankShape, Bias, Dense, LowRank
from safetensors.torch import load_file, save_file

SEQUENCES, LENGTH, BATCH = 5, 11, 2


def needs_of(sites: dict, samples: int = 20) -> list[Need]:
    """Everything that can be asked of a layer."""
    needs: list[Need] = []
    for name, site in sites.items():
        for side in ("input", "output"):
            needs += [SecondMoment(name, side), SecondMoment(name, side, pooled=True)]
        needs.append(ChannelEnergy(name))
        if site.part != "linear":
            needs.append(ChannelEnergy(name, weighted=True))
    unique = {need.canonical(sites) for need in needs}
    return [ExpertFrequency(), RouterWeight(), LayerSamples(samples), *sorted(unique, key=repr)]


class Bench:
    """One family, streamed and whole, and what a calibration of it gives."""

    def __init__(self, root: Path, family: str) -> None:
        self.whole = families.tiny(family)
        self.whole.save_pretrained(root / "model", max_shard_size="40KB")
        if family != "llama":
            self.whole.set_experts_implementation("mctk")
        self.model = StreamedModel(Source(root / "model"))
        self.ids = families.token_ids(SEQUENCES, LENGTH)
        self.sites = [bank_sites(layer) for layer in self.model.layers]
        self.needs = {i: needs_of(sites) for i, sites in enumerate(self.sites)}
        self.root = root

    def cache(self, **changes: object) -> StatisticsCache:
        context = {**cache_context(self.model, "f", "t", BATCH), **changes}
        return StatisticsCache(self.root / "cache", context)

    def calibrate(self, cache: StatisticsCache) -> int:
        state = self.root / "state"
        state.mkdir(exist_ok=True)
        reporter = Reporter(quiet=True)
        return calibrate(
            self.model, self.ids, BATCH, self.needs, self.sites, cache, state, reporter
        )

    def statistics(self, layer: int) -> LayerStatistics:
        values = {n: partial(self.cache().get, n, layer) for n in self.needs[layer]}
        return LayerStatistics(layer, values, self.sites[layer])


FAMILIES = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "llama"]


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    made: dict[str, Bench] = {}

    def bench(family: str) -> Bench:
        if family not in made:
            made[family] = Bench(tmp_path_factory.mktemp(family), family)
            assert made[family].calibrate(made[family].cache()) == 1
        return made[family]

    return bench


# Plain loops.


def recorded(bench: Bench) -> list[dict]:
    """Per layer: its inputs, every linear layer's inputs, and what reached the experts."""
    layers: list[dict] = [defaultdict(list) for _ in bench.sites]
    handles = []
    for layer, found in zip(bench.whole.model.layers, layers, strict=True):

        def entry(module, args, found=found):
            found["layer"].append(args[0])

        handles.append(layer.register_forward_pre_hook(entry))
        for path, module in layer.named_modules():

            def tap(module, args, found=found, path=path):
                found[path].append(args)

            if isinstance(module, torch.nn.Linear) or path.endswith("experts"):
                handles.append(module.register_forward_pre_hook(tap))
    with torch.no_grad():
        for ids in bench.ids.split(BATCH):
            bench.whole(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return layers


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
    for hidden, chosen, weights in found["mlp.experts"]:
        experts = layer.mlp.experts
        for token, row in enumerate(chosen.tolist()):
            mixed: dict[str, torch.Tensor | int] = dict.fromkeys(("gate", "up", "down"), 0)
            for slot, e in enumerate(row):
                frequency[e] += 1
                weight[e] += weights[token, slot].double()
                x = hidden[token]
                gate, gate_bias = banks["experts.gate"].materialise(e)
                up, up_bias = banks["experts.up"].materialise(e)
                gate = gate @ x + (0 if gate_bias is None else gate_bias)
                up = up @ x + (0 if up_bias is None else up_bias)
                if experts.is_concatenated:
                    fused = torch.cat([gate, up])
                else:
                    fused = torch.stack([gate, up], 1).reshape(-1)
                h = experts._apply_gate(fused[None])[0]
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
        if isinstance(need, SecondMoment):
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


# Sizes.


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_stored_tensors(benches, family):
    bench = benches(family)
    cache = bench.cache()
    for index, sites in enumerate(bench.sites):
        for need in bench.needs[index]:
            tensors = to_tensors(cache.get(need, index))
            stored = sum(t.numel() * t.element_size() for t in tensors.values())
            assert size_of(need, sites, 32, 4, LENGTH) == stored, need
            payload = load_file(cache.path(need, index))
            assert sum(t.numel() * t.element_size() for t in payload.values()) == stored


def test_the_size_of_fisher_information():
    sites = {"x": BankSite("x", "x", "linear", BankShape(3, 5, 7), False)}
    assert size_of(Fisher("x"), sites, 32, 2, LENGTH) == 3 * 5 * 7 * 4


# The cache.


def test_the_second_calibration_is_all_hits_and_no_sweep(benches, monkeypatch):
    bench = benches("mixtral")
    monkeypatch.setattr(ForwardSweep, "run", lambda *args: pytest.fail("swept again"))
    cache = bench.cache()
    asked = sum(len(needs) for needs in bench.needs.values())
    assert bench.calibrate(cache) == 0
    assert (cache.hits, cache.misses) == (asked, 0)
    assert bench.calibrate(cache) == 0
    assert (cache.hits, cache.misses) == (2 * asked, 0)


def test_only_what_is_missing_is_collected(tmp_path):
    bench = Bench(tmp_path, "mixtral")
    cache = bench.cache()
    everything = bench.needs
    bench.needs = {0: [ExpertFrequency()], 1: [ExpertFrequency()]}
    assert bench.calibrate(cache) == 1
    assert (cache.hits, cache.misses) == (0, 2)
    bench.needs = everything
    assert bench.calibrate(cache) == 1
    asked = sum(len(needs) for needs in everything.values())
    assert (cache.hits, cache.misses) == (2, 2 + asked - 2)
    assert not list((tmp_path / "state").glob("*.safetensors"))


def test_a_killed_calibration_goes_on(tmp_path, monkeypatch):
    bench = Bench(tmp_path, "deepseek_v3")
    reference = bench.cache(model="other")
    bench.calibrate(reference)
    put = StatisticsCache.put

    def killed(self, need, layer, value):
        if layer == 2 and isinstance(need, LayerSamples):
            raise KeyboardInterrupt
        put(self, need, layer, value)

    monkeypatch.setattr(StatisticsCache, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.calibrate(bench.cache())
    monkeypatch.undo()
    starts = []
    run = ForwardSweep.run
    monkeypatch.setattr(
        ForwardSweep,
        "run",
        lambda self, visit, start: starts.append(start) or run(self, visit, start),
    )
    cache = bench.cache()
    bench.calibrate(cache)
    assert starts == [2]
    for layer, needs in bench.needs.items():
        for need in needs:
            ours, theirs = (
                to_tensors(cache.get(need, layer)),
                to_tensors(reference.get(need, layer)),
            )
            assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_states_of_other_tokens_are_not_taken(tmp_path, monkeypatch):
    bench = Bench(tmp_path, "mixtral")
    put = StatisticsCache.put

    def killed(self, need, layer, value):
        if layer == 1:
            raise KeyboardInterrupt
        put(self, need, layer, value)

    monkeypatch.setattr(StatisticsCache, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.calibrate(bench.cache())
    monkeypatch.undo()
    bench.ids = families.token_ids(SEQUENCES, LENGTH, seed=9)
    other, fresh = bench.cache(tokens="other"), bench.cache(tokens="fresh")
    bench.calibrate(other)
    bench.calibrate(fresh)
    need = SecondMoment("attention.o")
    assert torch.equal(other.get(need, 1).value, fresh.get(need, 1).value)


@pytest.mark.parametrize(
    "change", ["model", "tokens", "batch", "dtype", "attention", "device", "activations", "torch"]
)
def test_the_key_changes_with_the_context(benches, change):
    bench = benches("mixtral")
    need = SecondMoment("experts.gate")
    path = bench.cache().path(need, 0)
    assert bench.cache().path(need, 0) == path
    assert bench.cache(**{change: "other"}).path(need, 0) != path
    assert not bench.cache(**{change: "other"}).has(need, 0)


def test_the_context_has_model_tokens_and_dtype(benches):
    bench = benches("mixtral")
    half = StreamedModel(bench.model.source, dtype="bfloat16")
    contexts = [
        cache_context(bench.model, "f", "t", 1),
        cache_context(bench.model, "g", "t", 1),
        cache_context(bench.model, "f", "u", 1),
        cache_context(bench.model, "f", "t", 2),
        cache_context(half, "f", "t", 1),
    ]
    assert len({repr(context) for context in contexts}) == len(contexts)


def test_the_key_changes_with_need_layer_and_version(benches, monkeypatch):
    cache = benches("mixtral").cache()
    needs = [
        SecondMoment("experts.gate"),
        SecondMoment("experts.gate", "output"),
        SecondMoment("experts.down"),
        SecondMoment("experts.down", of="current"),
        SecondMoment("experts.down", pooled=True),
        ChannelEnergy(),
        ChannelEnergy(weighted=True),
        ChannelEnergy(of="current"),
        Fisher("experts.down"),
        Fisher("experts.down", "model"),
        ExpertFrequency(),
        RouterWeight(),
        LayerSamples(10),
        LayerSamples(11),
    ]
    paths = {cache.path(need, layer) for need in needs for layer in (0, 1)}
    assert len(paths) == 2 * len(needs)
    monkeypatch.setattr(SecondMoment, "version", 2)
    assert cache.path(needs[0], 0) not in paths


@pytest.mark.parametrize("damage", ["cut", "garbage", "no checksum"])
def test_a_statistic_that_is_not_whole_counts_as_missing(tmp_path, caplog, damage):
    cache = StatisticsCache(tmp_path, {})
    need = SecondMoment("x")
    cache.put(need, 0, Moment(torch.randn(2, 3, 3), torch.tensor([4, 5])))
    path = cache.path(need, 0)
    if damage == "cut":
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 4)
    elif damage == "garbage":
        path.write_bytes(b"garbage")
    else:
        save_file(load_file(path), path)
    with caplog.at_level(logging.WARNING):
        assert not cache.has(need, 0)
    assert not path.exists()
    assert damage == "no checksum" or "damaged and will be collected anew" in caplog.text
    cache.put(need, 0, Moment(torch.ones(1, 2, 2), torch.tensor([1])))
    assert cache.has(need, 0)


def test_a_changed_byte_is_an_error_and_never_a_number(tmp_path):
    cache = StatisticsCache(tmp_path, {})
    cache.put(RouterWeight(), 0, torch.randn(50, dtype=torch.float64))
    path = cache.path(RouterWeight(), 0)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"checksum is wrong.*removed; run the same"):
        cache.get(RouterWeight(), 0)
    assert not cache.has(RouterWeight(), 0)
    with pytest.raises(UserError, match="has gone from the cache"):
        cache.get(RouterWeight(), 0)


def test_values_come_back_as_they_were_put(tmp_path):
    cache = StatisticsCache(tmp_path, {})
    values = {
        ExpertFrequency(): torch.tensor([3, 0, 7]),
        RouterWeight(): torch.randn(3, dtype=torch.float64),
        LayerSamples(4): torch.randn(2, 4, 3).bfloat16(),
        SecondMoment("x"): Moment(torch.randn(2, 3, 3).mT, torch.tensor([1, 2])),
        SecondMoment("x", pooled=True): Moment(torch.randn(1, 3, 3), torch.tensor([3])),
        ChannelEnergy("x"): torch.randn(2, 3),
        Fisher("x"): torch.randn(2, 4, 3),
    }
    for need, value in values.items():
        cache.put(need, 1, value)
        got, expected = to_tensors(cache.get(need, 1)), to_tensors(value)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[k], expected[k]) for k in got)
        assert all(got[k].dtype == expected[k].dtype for k in got)


def test_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("MCTK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "mctk"
    monkeypatch.setenv("MCTK_CACHE", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"
    assert cache_directory(tmp_path / "given") == tmp_path / "given"
