"""KL divergence and agreement: by hand, against the definition, and through files."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mctk.evaluate import divergence
from mctk.evaluate.bootstrap import bootstrap_mean
from mctk.evaluate.divergence import (
    LogitStore,
    Watcher,
    Writer,
    shared_out,
    watched,
    window_divergence,
)


def by_definition(q, r):
    """Σ p (log p - log q) in float64, over all positions but the last, and agreements."""
    p = torch.log_softmax(r.double(), -1)[:, :-1]
    other = torch.log_softmax(q.double(), -1)[:, :-1]
    kl = (p.exp() * (p - other)).sum(-1).sum(-1)
    return kl, (q.argmax(-1) == r.argmax(-1))[:, :-1].sum(-1)


def test_by_hand():
    # Two positions of which the last does not count; p = (3/4, 1/4), q = (1/2, 1/2).
    reference = torch.tensor([[[math.log(3), 0.0], [9.0, 0.0]]])
    logits = torch.tensor([[[5.0, 5.0], [0.0, 9.0]]])
    kl, same = window_divergence(logits, reference)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl.tolist() == pytest.approx([expected], abs=1e-6)
    assert same.tolist() == [1]  # of two equal logits the first counts


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), shift=st.floats(-30, 30), chunk=st.sampled_from([3, 16, 1 << 18]))
def test_it_is_the_definitions(seed, shift, chunk):
    generator = torch.Generator().manual_seed(seed)
    r = 3 * torch.randn(2, 5, 7, generator=generator)
    q = r + torch.randn(2, 5, 7, generator=generator)
    divergence._ROWS, kept = chunk, divergence._ROWS
    try:
        kl, same = window_divergence(q + shift, r)
    finally:
        divergence._ROWS = kept
    wanted, agreed = by_definition(q, r)
    assert torch.allclose(kl, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(same, agreed)
    assert (kl > -1e-5).all()


def test_equal_logits_do_not_diverge():
    logits = 20 * torch.randn(3, 6, 50, generator=torch.Generator().manual_seed(0))
    kl, same = window_divergence(logits, logits.clone())
    assert kl.tolist() == [0.0] * 3 and same.tolist() == [5] * 3


def test_the_share_of_each_text():
    windows, length = {"a": 3, "b": 100, "c": 1}, {"a": 512, "b": 512, "c": 2048}
    assert shared_out(windows, length, 12 * 512) == {"a": 3, "b": 4, "c": 1}
    assert shared_out(windows, length, 1) == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_come_back_from_disk_as_they_were(tmp_path, dtype):
    logits = torch.randn(5, 4, 6).to(dtype)
    writer = Writer(tmp_path / "logits")
    watchers = [
        (0, Watcher("a", "digest a", 2, 4, writer)),
        (3, Watcher("b", "digest b", 2, 4, writer)),
    ]
    ids = torch.zeros(5, 4, dtype=torch.long)
    pairs = zip(ids.split(2), logits.split(2), strict=True)
    assert sum(len(x) for x, _ in watched(pairs, watchers)) == 5
    assert not LogitStore(tmp_path / "logits").complete
    writer.finish()
    store = LogitStore(tmp_path / "logits")
    assert store.complete
    assert torch.equal(store.logits("a", "digest a"), logits[:2])
    assert torch.equal(store.logits("b", "digest b"), logits[3:])
    assert store.logits("a", "other tokens") is None
    assert store.logits("c", "digest a") is None


def test_what_is_seen_is_what_is_compared(tmp_path):
    """Batches that cut across texts give each text's own figures."""
    r, q = torch.randn(5, 4, 6), torch.randn(5, 4, 6)
    writer = Writer(tmp_path / "logits")
    for name, part in (("a", r[:3]), ("b", r[3:])):
        Watcher(name, "", len(part), 4, writer).see(0, part)
    writer.finish()
    store = LogitStore(tmp_path / "logits")
    a = Watcher("a", "", 2, 4, reference=store.logits("a", ""))
    b = Watcher("b", "", 2, 4, reference=store.logits("b", ""))
    ids = torch.zeros(5, 4, dtype=torch.long)
    list(watched(zip(ids.split(2), q.split(2), strict=True), [(0, a), (3, b)]))
    for watcher, first, last in ((a, 0, 2), (b, 3, 5)):
        found = watcher.result()
        kl, same = by_definition(q[first:last], r[first:last])
        assert found.window_kl == pytest.approx(kl.tolist(), abs=1e-5)
        assert found.window_same == tuple(same.tolist())
        json = found.to_json()
        assert json["tokens"] == 6
        assert json["kl"]["value"] == pytest.approx(float(kl.sum()) / 6, abs=1e-6)
        assert json["agreement"]["low"] <= json["agreement"]["value"] <= json["agreement"]["high"]
        assert "windows=2 window=4" in json["protocol"]


def test_an_unfinished_store_leaves_nothing(tmp_path):
    writer = Writer(tmp_path / "logits")
    writer.add("a", "", 1, 0, torch.zeros(1, 2, 3))
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_groups_weigh_the_same_in_the_bootstrap():
    long, short = [1.0] * 50, [3.0] * 2
    value, low, high = bootstrap_mean([(long, 1), (short, 1)])
    assert value == low == high == 2.0
    value, low, high = bootstrap_mean([([0.0, 2.0] * 20, 2)])
    assert value == 0.5 and 0.2 < low < 0.5 < high < 0.8
    with pytest.raises(ValueError, match="nothing"):
        bootstrap_mean([])
