"""Properties of plain SVD, and of what every low-rank method shares (`mctk.decompose`)."""

from __future__ import annotations

import logging

import pytest
import torch
from mctk import decompose
from mctk.decompose import LowRankOptions
from mctk.errors import UserError
from mctk.terms import DENSE, Bank, BankShape, Bias, Dense, LowRank
from mctk_svd.math import decompositions
from mctk_svd.methods import Svd
from pydantic import ValidationError


def make_bank(members=3, out=12, into=20, slots=None, seed=0, bias=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = BankShape(members, out, into)
    slots = list(range(members)) if slots is None else slots
    stored = len({slot for slot in slots if slot is not None})
    weight = torch.randn(stored, out, into, generator=generator).to(dtype)
    terms = [Dense(shape, slots, weight)]
    if bias:
        vector = torch.randn(members, out, generator=generator).to(dtype)
        terms.append(Bias(shape, list(range(members)), vector))
    return Bank("experts.gate", 3, shape, terms)


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("storage", ["plain", "pivoted"])
def test_truncation_is_the_best_of_its_rank(size, storage):
    bank = make_bank(out=size[0], into=size[1])
    options = LowRankOptions(storage=storage)
    for rank in (1, 5, 11):
        (term,) = Svd().decompose(bank, None, rank, options)
        assert isinstance(term, LowRank)
        assert (term.rank, term.storage) == (rank, storage)
        for member in range(3):
            weight = bank.terms[0].weight[member]
            u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
            best = u[:, :rank] * s[:rank] @ v[:rank]
            assert distance(term.materialise(member)[0], best) < 1e-5


def test_full_rank_is_the_identity():
    bank = make_bank()
    for storage in ("plain", "pivoted"):
        (term,) = Svd().decompose(bank, None, 12, LowRankOptions(storage=storage))
        for member in range(3):
            assert distance(term.materialise(member)[0], bank.terms[0].weight[member]) < 1e-6


def test_error_is_the_sum_of_the_dropped_squares():
    weight = make_bank().terms[0].weight[:1]
    (part,) = decompositions(weight)
    ranks = [1, 4, 8, 11, 12, DENSE]
    errors = decompose.tail_errors(part.spectrum, ranks)
    for rank, error in zip(ranks[:-1], errors, strict=False):
        u, v = part.factors(rank)
        measured = float((weight[0].double() - u.double() @ v.double()).square().sum())
        assert measured == pytest.approx(error, rel=1e-5, abs=1e-10)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0


def test_balance_gives_both_factors_the_same_weight():
    bank = make_bank()
    (plain,) = Svd().decompose(bank, None, 6, LowRankOptions())
    (balanced,) = Svd().decompose(bank, None, 6, LowRankOptions(balance=True))
    assert not torch.equal(plain.U, balanced.U)
    assert torch.allclose(balanced.U.norm(dim=1), balanced.V.norm(dim=2), rtol=1e-4)
    assert distance(balanced.materialise(0)[0], plain.materialise(0)[0]) < 1e-5


def test_sizes_say_what_is_stored():
    shape = BankShape(3, 12, 20)
    for storage in ("plain", "pivoted"):
        options = LowRankOptions(storage=storage, rank_multiple=2)
        bank = make_bank()
        settings, costs = Svd().sizes({bank.name: bank}, options)
        assert settings[-1] == DENSE
        assert costs[-1] == shape.parameters
        for rank, cost in zip(settings, costs, strict=True):
            terms = Svd().decompose(bank, None, rank, options)
            assert sum(term.parameters() for term in terms) == cost
    plain = Svd().sizes({bank.name: bank}, LowRankOptions(rank_multiple=2))[0]
    assert plain == [2, 4, 6, 8, 10, 12, DENSE]  # a plan leaves out what is no smaller
    assert Svd().sizes({bank.name: bank}, LowRankOptions(rank_multiple=3))[0] == [
        3,
        6,
        9,
        12,
        DENSE,
    ]
    assert 10 in settings


def test_dense_changes_nothing_and_biases_stay():
    bank = make_bank(bias=True)
    assert Svd().decompose(bank, None, DENSE, LowRankOptions()) == bank.terms
    first, second = Svd().decompose(bank, None, 4, LowRankOptions())
    assert isinstance(first, LowRank)
    assert second is bank.terms[1]


def test_bank_is_not_changed():
    bank = make_bank()
    before, terms = bank.terms[0].weight.clone(), list(bank.terms)
    Svd().decompose(bank, None, 4, LowRankOptions(storage="pivoted"))
    assert torch.equal(bank.terms[0].weight, before)
    assert bank.terms == terms


def test_merged_and_dropped_members_keep_their_slots():
    bank = make_bank(members=4, slots=[0, 1, 0, None])
    (term,) = Svd().decompose(bank, None, 12, LowRankOptions())
    assert list(term.u_slots) == [0, 1, 0, None]
    assert term.U.shape[0] == 2
    assert distance(term.materialise(2)[0], bank.terms[0].weight[0]) < 1e-6
    assert term.materialise(3) == (None, None)


def test_base_stays_and_deltas_are_decomposed():
    bank = make_bank()
    base = Dense(bank.shape, [0, 0, 0], torch.randn(1, 12, 20))
    bank = Bank(bank.name, bank.layer, bank.shape, [base, *bank.terms])
    first, second = Svd().decompose(bank, None, 4, LowRankOptions())
    assert first is base
    assert isinstance(second, LowRank)


@pytest.mark.parametrize("weight", ["zero", "rank one"])
def test_degenerate_matrices(weight):
    shape = BankShape(1, 6, 8)
    matrix = torch.zeros(1, 6, 8)
    if weight == "rank one":
        matrix = torch.randn(1, 6, 1) @ torch.randn(1, 1, 8)
    bank = Bank("experts.up", 0, shape, [Dense(shape, [0], matrix)])
    for options in (LowRankOptions(), LowRankOptions(storage="pivoted")):
        (term,) = Svd().decompose(bank, None, 3, options)
        assert torch.allclose(term.materialise(0)[0], matrix[0], atol=1e-5)
        assert all(t.isfinite().all() for t in term.tensors().values())


def test_errors_name_the_bank():
    bank = make_bank()
    for rank in (0, 13, None):
        with pytest.raises(UserError, match=r"experts.gate of layer 3: rank .* between 1 and 12"):
            Svd().decompose(bank, None, rank, LowRankOptions())
    bank = Bank(bank.name, 3, bank.shape, Svd().decompose(bank, None, 4, LowRankOptions()))
    with pytest.raises(UserError, match="no full matrices to decompose"):
        Svd().decompose(bank, None, 4, LowRankOptions())
    with pytest.raises(ValidationError, match="balance has no effect in pivoted storage"):
        LowRankOptions(storage="pivoted", balance=True)
    with pytest.raises(ValidationError):
        LowRankOptions(rank_multiple=0)


def test_pruned_channels_are_refused():
    shape = BankShape(1, 6, 8)
    part = Dense(shape, [0], torch.randn(1, 3, 8), rows=torch.tensor([0, 2, 4]))
    with pytest.raises(UserError, match="decompose first, then prune"):
        Svd().decompose(Bank("mlp.up", 0, shape, [part]), None, 2, LowRankOptions())


def test_a_rank_that_gains_nothing_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        Svd().decompose(make_bank(), None, 10, LowRankOptions(storage="pivoted"))
        assert not caplog.messages
        Svd().decompose(make_bank(), None, 10, LowRankOptions())
    assert "rank 10 stores more than the matrices" in caplog.text
