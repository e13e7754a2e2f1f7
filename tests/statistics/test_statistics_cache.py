"""Statistics on disk: sizes, keys, what a killed or damaged one does."""

from __future__ import annotations

import logging

import families
import pytest
import torch
from calibration_bench import FAMILIES, LENGTH, SEQUENCES, Bench
from mctk.engine.calibrate import cache_context
from mctk.errors import UserError
from mctk.models import BankSite
from mctk.statistics import (
    ChannelEnergy,
    ExpertFrequency,
    Fisher,
    LayerSamples,
    Moment,
    RouterWeight,
    SecondMoment,
    StatisticsCache,
    cache_directory,
    size_of,
)
from mctk.statistics.values import to_tensors
from mctk.sweep import ForwardSweep, StreamedModel
from mctk.terms import BankShape
from safetensors.torch import load_file, save_file

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
