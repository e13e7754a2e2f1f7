from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import VOCABULARY, tiny, token_ids
from mctk.data import Source, evaluation_windows
from mctk.errors import UserError
from mctk.evaluate import (
    Perplexity,
    forward_logits,
    paired_bootstrap,
    perplexity,
    streamed_logits,
    window_nll,
)
from tiny_checkpoint import tokenizer, words


def naive(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(logits[:, :-1].mT.double(), ids[:, 1:], reduction="none")
    return losses.sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7 * VOCABULARY, 1 << 24])
def test_window_nll_equals_cross_entropy_in_any_chunk(monkeypatch, dtype, chunk):
    import sys

    monkeypatch.setattr(sys.modules["mctk.evaluate.perplexity"], "_CHUNK", chunk)
    ids = token_ids(3, 19)
    logits = (5 * torch.randn(3, 19, VOCABULARY, generator=torch.Generator().manual_seed(0))).to(
        dtype
    )
    sums = window_nll(logits, ids)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, naive(logits, ids), rtol=1e-6, atol=1e-5)


def test_perplexity_of_a_model_equals_a_naive_computation():
    model, ids = tiny("mixtral"), token_ids(5, 17)
    seen = []
    batches = forward_logits(model, ids, 2, lambda done, total: seen.append((done, total)))
    result = perplexity(batches)
    with torch.no_grad():
        expected = naive(model(input_ids=ids).logits, ids)
    assert result.window_nll == pytest.approx(expected.tolist(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected.sum() / (5 * 16)), rel=1e-5)
    assert (result.windows, result.tokens) == (5, 5 * 16)
    assert result.protocol == "token_ppl/v1 window=17 stride=17"
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_the_windows_are_contiguous_and_the_digest_is_that_of_the_data(tmp_path):
    text = words(50)
    (tmp_path / "a.txt").write_text(text)
    windows = evaluation_windows(tokenizer(), Source(text=[str(tmp_path / "a.txt")]), 16)
    whole = tokenizer()(text)["input_ids"]
    assert windows.ids.flatten().tolist() == whole[:48]  # the tail of two tokens is dropped
    logits = torch.zeros(3, 16, VOCABULARY)
    result = perplexity([(windows.ids, logits)])
    assert result.digest == windows.digest
    assert result.perplexity == pytest.approx(VOCABULARY)  # uniform; 15 predictions a window
    assert result.tokens == 45


def test_batches_do_not_change_the_result():
    ids = token_ids(4, 9)
    logits = torch.randn(4, 9, VOCABULARY, generator=torch.Generator().manual_seed(1))
    whole = perplexity([(ids, logits)])
    assert perplexity(zip(ids.split(3), logits.split(3), strict=True)) == whole


def test_no_window_and_no_prediction_are_errors():
    with pytest.raises(UserError, match="not one whole window"):
        perplexity([])
    with pytest.raises(UserError, match="at least 2 tokens"):
        perplexity([(token_ids(2, 1), torch.zeros(2, 1, VOCABULARY))])


def test_figures_that_are_not_finite_become_null():
    assert Perplexity(3, (1e9,), "").to_json()["perplexity"] is None
    broken = Perplexity(3, (math.nan, 1.0), "").to_json()
    assert broken["perplexity"] is None and broken["window_nll"] == [None, 1.0]


def test_the_streamed_front_end_pairs_logits_with_their_ids(monkeypatch):
    ids = token_ids(5, 9)
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2))

    def stream_logits(model, ids, batch_size, progress):
        assert model == "model"
        for batch in ids.split(batch_size):
            yield table[batch]
        progress(2, 2)

    import mctk.sweep

    monkeypatch.setattr(mctk.sweep, "stream_logits", stream_logits)
    seen = []
    batches = streamed_logits("model", ids, 2, lambda done, total: seen.append((done, total)))
    assert perplexity(batches).window_nll == pytest.approx(naive(table[ids], ids).tolist())
    assert seen == [(2, 2)]


def test_paired_bootstrap_is_right_where_the_answer_is_known():
    generator = np.random.default_rng(0)
    a = generator.normal(300, 40, 200)  # windows differ far more than the models do
    b = a + generator.normal(2, 1, 200)
    difference, low, high = paired_bootstrap(a, b, 100)
    assert difference == pytest.approx((b - a).sum() / (200 * 100))
    assert low < difference < high
    error = (b - a).std() / math.sqrt(200) / 100
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert low > 0
    assert paired_bootstrap(a, b, 100) == (difference, low, high)
    assert paired_bootstrap(a, b, 100, seed=1) != (difference, low, high)


def test_paired_bootstrap_weighs_windows_by_their_tokens():
    assert paired_bootstrap([1, 2], [2, 4], [1, 1])[0] == pytest.approx(1.5)
    assert paired_bootstrap([1, 2], [2, 4], [1, 3])[0] == pytest.approx(0.75)
    assert paired_bootstrap([1, 2], [1, 2], 5) == (0, 0, 0)
    with pytest.raises(ValueError, match="correspond"):
        paired_bootstrap([1, 2], [1], 5)
