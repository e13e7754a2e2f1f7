"""What experts give, and how tokens would be routed without some: equal to plain loops."""

from __future__ import annotations

import math
from pathlib import Path

import families
import pytest
import torch
from calibration_bench import (
    BATCH,
    LENGTH,
    SEQUENCES,
    experts_path,
    output,
    recorded,
)
from mctk.checkpoint import Source
from mctk.errors import UserError
from mctk.models import bank_sites, read_banks
from mctk.statistics import (
    ExpertFrequency,
    ExpertMeans,
    ExpertOutputs,
    LayerCollector,
    LayerStatistics,
    RoutedOutputs,
    RoutedSum,
    RouterLogits,
    check_needs,
    routed,
)
from mctk.sweep import ForwardSweep, StreamedModel

FAMILIES = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe"]
TOKENS = SEQUENCES * LENGTH
CPU = torch.device("cpu")


def expert_layers(bench):
    """Layers with experts: number, layer, banks, what reached the experts, all tokens together."""
    for index, found in enumerate(recorded(bench)):
        layer = bench.whole.model.layers[index]
        path = experts_path(layer)
        if path is not None:
            parts = (torch.cat(values) for values in zip(*found[path], strict=True))
            yield index, layer, read_banks(layer, index), *parts


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_of_outputs(benches, family):
    bench = benches(family)
    for index, layer, banks, hidden, chosen, weights in expert_layers(bench):
        found = bench.statistics(index)[ExpertOutputs()]
        assert torch.equal(found.count, bench.statistics(index)[ExpertFrequency()])
        for e in range(found.count.numel()):
            rows = [
                (output(layer, banks, e, hidden[t]).double(), float(weights[t, s]))
                for t, s in (chosen == e).nonzero().tolist()
            ]
            norms = [float(y.norm()) for y, _ in rows]
            assert found.count[e] == len(rows)
            assert math.isclose(found.norm[e], sum(norms), rel_tol=1e-5)
            weighted = sum(g * norm for (_, g), norm in zip(rows, norms, strict=True))
            assert math.isclose(found.weighted_norm[e], weighted, rel_tol=1e-5)
            assert math.isclose(found.largest[e], max(norms, default=0), rel_tol=1e-5)
            for value, expected in (
                (found.total[e], sum(y for y, _ in rows)),
                (found.square[e], sum(y.square() for y, _ in rows)),
            ):
                assert value.dtype == torch.float64
                expected = expected if rows else torch.zeros(32, dtype=torch.float64)
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_means_over_all_tokens(benches, family):
    bench = benches(family)
    for index, layer, banks, hidden, _, _ in expert_layers(bench):
        found = bench.statistics(index)[ExpertMeans()]
        assert found.dtype == torch.float32
        for e, mean in enumerate(found):
            expected = torch.stack([output(layer, banks, e, x) for x in hidden]).mean(0)
            torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_moment_of_the_routers_logits(benches, family):
    bench = benches(family)
    for index, layer, _, hidden, _, _ in expert_layers(bench):
        found = bench.statistics(index)[RouterLogits()]
        block = layer.get_submodule(experts_path(layer).rpartition(".")[0])
        router = block.router if hasattr(block, "router") else block.gate
        with torch.no_grad():
            logits = router(hidden)[0]
        assert logits.shape == (TOKENS, found.value.shape[1])
        assert found.count.tolist() == [TOKENS]
        torch.testing.assert_close(found.value[0], logits.T @ logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_routed_outputs(benches, family):
    bench = benches(family)
    for index, layer, banks, hidden, chosen, weights in expert_layers(bench):
        found = bench.statistics(index)[RoutedOutputs(20)]
        assert found.inputs.dtype == torch.float32
        assert torch.equal(found.inputs, hidden[:20])
        experts = found.gram.shape[1]
        for t in range(20):
            y = torch.stack([output(layer, banks, e, hidden[t]) for e in range(experts)])
            z = sum(g * y[e] for e, g in zip(chosen[t].tolist(), weights[t], strict=True))
            torch.testing.assert_close(found.gram[t], y @ y.T, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.target[t], y @ z, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.energy[t], z @ z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_kept_is_what_the_layer_does_and_costs_nothing(benches, family):
    bench = benches(family)
    for index, layer, _, _, chosen, weights in expert_layers(bench):
        statistics = bench.statistics(index)
        with pytest.raises(ValueError, match=r"takes the live layer"):
            statistics[RoutedOutputs(20)].route([0, 1])
        found = statistics.bind(layer)[RoutedOutputs(20)]
        experts = found.gram.shape[1]
        index, routing = found.route(range(experts))
        assert index.dtype == torch.int64 and routing.dtype == torch.float32
        dense, expected = (torch.zeros(20, experts) for _ in range(2))
        dense.scatter_(1, index, routing)
        expected.scatter_(1, chosen[:20], weights[:20].float())
        assert torch.equal(dense, expected)
        loss = found.energy - 2 * (dense * found.target).sum(1)
        loss += torch.einsum("te,tef,tf->t", dense, found.gram, dense)
        assert (loss.abs() < 1e-5 * found.energy.clamp(min=1e-6)).all()


def test_fewer_experts_are_chosen_among_those_kept(benches):
    bench = benches("mixtral")
    index, layer, _, hidden, _, _ = next(expert_layers(bench))
    found = bench.statistics(index).bind(layer)[RoutedOutputs(20)]
    chosen, weights = found.route([0, 1, 3])
    logits = torch.nn.functional.linear(hidden[:20], layer.mlp.gate.weight)[:, [0, 1, 3]]
    top = logits.softmax(-1).topk(2)
    expected = torch.tensor([0, 1, 3])[top.indices]
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights, top.values / top.values.sum(-1, keepdim=True))


def collected(bench, need, index=0, **changes):
    """A statistic of one layer, past the cache."""
    found = []
    bench.model.load_outer()

    def visit(visited):
        if visited.index == index:
            banks = read_banks(visited.module, index)
            collector = LayerCollector(
                visited.module, index, bench.sites[index], banks, [need], CPU, **changes
            )
            with collector.listening():
                outputs = [visited.run(b) for b in range(len(visited.inputs))]
            found.append(collector.result()[need])
            return outputs
        return [visited.run(b) for b in range(len(visited.inputs))]

    ForwardSweep(bench.model, bench.ids, BATCH).run(visit)
    return found[0]


def same(left, right):
    return all(
        torch.allclose(getattr(left, name), getattr(right, name), rtol=1e-5, atol=1e-5)
        for name in ("inputs", "gram", "target", "energy")
    )


def test_small_chunks_give_the_same_sample(benches, monkeypatch):
    bench = benches("gpt_oss")
    whole = collected(bench, RoutedOutputs(1000))
    assert whole.inputs.shape[0] == TOKENS  # no more than there are
    monkeypatch.setattr(routed, "CHUNK", 4 * 32 * 3)
    sizes = []
    chunk = routed.RoutedGrams._chunk
    monkeypatch.setattr(
        routed.RoutedGrams,
        "_chunk",
        lambda self, hidden, weights: sizes.append(len(hidden)) or chunk(self, hidden, weights),
    )
    assert same(collected(bench, RoutedOutputs(1000)), whole)
    assert max(sizes) == 3 and sum(sizes) == TOKENS
    short = collected(bench, RoutedOutputs(30))
    for name in ("inputs", "gram", "target", "energy"):
        torch.testing.assert_close(getattr(short, name), getattr(whole, name)[:30])


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_reference_takes_the_place_of_what_passes(benches, family):
    bench = benches(family)
    need = RoutedOutputs(30)
    plain = collected(bench, need)
    sums = []
    bench.model.load_outer()

    def visit(visited):
        if visited.index:
            return [visited.run(b) for b in range(len(visited.inputs))]
        total = RoutedSum(visited.module, bench.sites[0], need.tokens, CPU)
        with total.listening():
            outputs = [visited.run(b) for b in range(len(visited.inputs))]
        sums.append(total.value())
        return outputs

    ForwardSweep(bench.model, bench.ids, BATCH).run(visit)
    assert sums[0].shape == (30, 32) and sums[0].dtype == torch.float32
    assert same(collected(bench, need, reference=sums[0]), plain)
    other = collected(bench, need, reference=2 * sums[0])
    torch.testing.assert_close(other.target, 2 * plain.target, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.energy, 4 * plain.energy, rtol=1e-4, atol=1e-4)
    assert torch.equal(other.gram, plain.gram)
    with pytest.raises(ValueError, match=r"a reference of 7 tokens is too short"):
        collected(bench, need, reference=sums[0][:7])


def test_in_bfloat16_sums_are_float(tmp_path):
    model = families.tiny("mixtral").bfloat16()
    model.save_pretrained(tmp_path)
    streamed = StreamedModel(Source(tmp_path))
    assert streamed.dtype == torch.bfloat16
    sites = bank_sites(streamed.layers[0])
    needs = [ExpertOutputs(), ExpertMeans(), RouterLogits(), RoutedOutputs(8)]
    streamed.load_outer()
    found: list[LayerStatistics] = []

    def visit(visited):
        banks = read_banks(visited.module, visited.index)
        collector = LayerCollector(visited.module, 0, sites, banks, needs, CPU)
        with collector.listening():
            outputs = [visited.run(b) for b in range(len(visited.inputs))]
        found.append(collector.result())
        return outputs

    ForwardSweep(streamed, families.token_ids(2, 9), 1).run(visit)
    sample = found[0][RoutedOutputs(8)]
    assert sample.inputs.dtype == torch.bfloat16
    assert {t.dtype for t in (sample.gram, sample.target, sample.energy)} == {torch.float32}
    assert torch.equal(sample.gram, sample.gram.mT)
    assert found[0][ExpertOutputs()].total.dtype == torch.float64
    assert found[0][ExpertMeans()].dtype == torch.float32


def test_a_layer_without_experts_has_no_outputs_of_experts(benches):
    layer = benches("llama").whole.model.layers[0]
    with pytest.raises(ValueError, match="has no experts"):
        LayerCollector(layer, 0, bank_sites(layer), read_banks(layer, 0), [ExpertOutputs()], CPU)


# Experts in a list, as remote code holds them.


@pytest.fixture
def remote(tmp_path: Path, modules_cache) -> StreamedModel:
    families.save_remote(tmp_path / "model")
    return StreamedModel(Source(tmp_path / "model"), trust_remote_code=True)


def test_experts_in_a_list(remote):
    needs = [ExpertOutputs(), ExpertMeans(), RouterLogits(), RoutedOutputs(12), ExpertFrequency()]
    remote.load_outer()
    tested = []

    def visit(visited):
        layer = visited.module
        outputs = []
        if experts_path(layer) is None:
            return [visited.run(b) for b in range(len(visited.inputs))]
        sites, banks = bank_sites(layer), read_banks(layer, visited.index)
        collector = LayerCollector(layer, visited.index, sites, banks, needs, CPU)
        entered, hidden = [], []
        with collector.listening():
            handle = layer.mlp.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
            outputs = [visited.run(b) for b in range(len(visited.inputs))]
            handle.remove()
        found = collector.result().bind(layer)
        hidden = torch.cat([x.reshape(-1, 32) for x in entered])
        index, weights, *_ = layer.mlp.gate(hidden[None])
        y = torch.stack(
            [torch.stack([output(layer, banks, e, x) for e in range(8)]) for x in hidden]
        )
        torch.testing.assert_close(found[ExpertMeans()], y.mean(0), rtol=1e-4, atol=1e-5)
        logits = hidden @ layer.mlp.gate.weight.T
        torch.testing.assert_close(
            found[RouterLogits()].value[0], logits.T @ logits, rtol=1e-4, atol=1e-4
        )
        sums, sample = found[ExpertOutputs()], found[RoutedOutputs(12)]
        assert torch.equal(sums.count, found[ExpertFrequency()])
        for e in range(8):
            token, slot = (index == e).nonzero(as_tuple=True)
            norms = y[token, e].norm(dim=1)
            torch.testing.assert_close(
                sums.weighted_norm[e].float(), (norms * weights[token, slot]).sum()
            )
        z = torch.einsum("tk,tkh->th", weights, y.gather(1, index[..., None].expand(-1, -1, 32)))
        torch.testing.assert_close(sample.inputs, hidden[:12])
        torch.testing.assert_close(sample.gram, (y @ y.mT)[:12], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sample.energy, z.square().sum(1)[:12], rtol=1e-4, atol=1e-4)
        chosen, routing = sample.route(range(8))
        assert torch.equal(chosen.sort(1).values, index[:12].sort(1).values)
        torch.testing.assert_close(routing.sum(1), weights[:12].sum(1))
        tested.append(visited.index)
        return outputs

    with torch.no_grad():
        ForwardSweep(remote, families.token_ids(2, 9), 1).run(visit)
    assert tested == [1, 2]


@pytest.mark.parametrize("need", [RouterLogits(), RoutedOutputs(8)])
def test_a_router_that_is_of_no_known_form_is_refused_before_weights_are_read(need):
    layer = families.tiny("mixtral").model.layers[0].to("meta")
    check_needs(layer, bank_sites(layer), [need, ExpertOutputs()])
    layer.mlp.gate = torch.nn.Identity()
    check_needs(layer, bank_sites(layer), [ExpertOutputs()])
    with pytest.raises(UserError, match="no tensor of its router has a row for each"):
        check_needs(layer, bank_sites(layer), [need])


def test_two_matrices_that_could_be_the_routers():
    layer = families.tiny("mixtral").model.layers[0]
    layer.mlp.gate.other = torch.nn.Parameter(torch.zeros(4, 32))
    with pytest.raises(UserError, match="cannot tell its router's logits: 2 matrices"):
        check_needs(layer, bank_sites(layer), [RouterLogits()])
