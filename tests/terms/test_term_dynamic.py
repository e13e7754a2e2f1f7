"""A dynamic term is a dense one of which a run leaves channels out."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mctk.errors import CheckpointError
from mctk.terms import BankShape, Dense, DynamicDense, Term
from term_strategies import terms

SHAPE = BankShape(3, 6, 5)


@st.composite
def dynamic_terms(draw):
    """A dynamic term with random values, sharing, absence, rows and columns."""
    dense = draw(terms("dense"))
    axis = draw(st.sampled_from(["rows", "cols"]))
    stored, *sizes = dense.weight.shape
    channels = sizes[axis == "cols"]
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    energy = torch.rand(stored, channels, generator=random, dtype=torch.float64)
    return dense, DynamicDense(
        dense.shape,
        dense.slots,
        dense.weight,
        dense.rows,
        dense.cols,
        drop=draw(st.integers(0, channels - 1)),
        axis=axis,
        energy=energy if axis == "cols" else None,
    )


@settings(max_examples=60, deadline=None)
@given(pair=dynamic_terms())
def test_by_itself_it_is_the_whole_matrix(pair):
    dense, term = pair
    x = torch.randn(3, term.shape.in_features, dtype=torch.float64)
    for member in range(term.shape.members):
        assert torch.equal(term.apply(x, member), dense.apply(x, member))
        ours, theirs = term.materialise(member)[0], dense.materialise(member)[0]
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(pair=dynamic_terms())
def test_all_of_it_is_stored_and_only_work_is_saved(pair):
    dense, term = pair
    extra = 0 if term.energy is None else term.energy.numel()
    assert term.parameters() == dense.parameters() + extra
    assert term.nbytes() == dense.nbytes() + 8 * extra
    _, rows, cols = term.weight.shape
    for member in range(term.shape.members):
        saved = term.drop * (cols if term.axis == "rows" else rows)
        assert term.macs(member) == (dense.macs(member) - saved if term.has(member) else 0)


@settings(max_examples=60, deadline=None)
@given(pair=dynamic_terms(), data=st.data())
def test_without_is_a_product_with_zeroed_channels(pair, data):
    _, term = pair
    side = term.shape.out_features if term.axis == "rows" else term.shape.in_features
    index = term.rows if term.axis == "rows" else term.cols
    tokens = data.draw(st.sampled_from([1, 200]))  # the second makes a smaller product pay
    x = torch.randn(tokens, term.shape.in_features, dtype=torch.float64)
    for member in range(term.shape.members):
        slot = term.slots[member]
        if slot is None:
            continue
        channels = torch.arange(side) if index is None else index.view(-1, index.shape[-1])
        channels = channels if channels.dim() == 1 else channels[slot if len(channels) > 1 else 0]
        dropped = torch.zeros(side, dtype=torch.bool)
        dropped[channels[: term.drop].long()] = True
        weight = term.materialise(member)[0].clone()
        weight[dropped if term.axis == "rows" else (slice(None), dropped)] = 0
        torch.testing.assert_close(term.without(x, member, dropped), x @ weight.t())


@settings(max_examples=40, deadline=None)
@given(pair=dynamic_terms())
def test_a_spec_and_its_tensors_are_the_term(pair):
    _, term = pair
    spec = json.loads(json.dumps(term.spec()))
    again = Term.from_spec(spec, term.tensors())
    assert isinstance(again, DynamicDense)
    assert again.spec() == term.spec() == spec
    assert (again.drop, again.axis) == (term.drop, term.axis)
    assert isinstance(again, Dense)
    meta = {name: tensor.to("meta") for name, tensor in term.tensors().items()}
    assert Term.from_spec(spec, meta).spec() == spec
    narrow = term.to(torch.bfloat16)
    assert {t.dtype for t in narrow.tensors().values() if t.is_floating_point()} == {torch.bfloat16}


def spec_of(**changes: object) -> tuple[dict, dict]:
    term = DynamicDense(
        SHAPE, [0] * 3, torch.ones(1, 6, 5), drop=2, axis="cols", energy=torch.ones(1, 5)
    )
    return {**term.spec(), **changes}, term.tensors()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": 5}, r"drop: is 5, must lie in 0\.\.4"),
        ({"drop": -1}, "drop: is -1"),
        ({"drop": 1.5}, r"drop: must be an integer, not 1\.5"),
        ({"drop": True}, "drop: must be an integer, not True"),
        ({"axis": "columns"}, "axis: must be 'rows' or 'cols', not 'columns'"),
        ({"axis": "rows"}, "energy: belongs to axis 'cols'"),
        ({"mix": 0.5}, "mix: unknown key"),
    ],
)
def test_damaged_specs_are_refused(changes, message):
    spec, tensors = spec_of(**changes)
    with pytest.raises(CheckpointError, match=f"dynamic term: {message}"):
        Term.from_spec(spec, tensors)


@pytest.mark.parametrize("key", ["drop", "axis"])
def test_missing_settings_are_named(key):
    spec, tensors = spec_of()
    del spec[key]
    with pytest.raises(CheckpointError, match=f"dynamic term: {key}: is missing"):
        Term.from_spec(spec, tensors)


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (None, "energy: belongs to axis 'cols', and is needed there"),
        (torch.ones(1, 4), r"energy: has shape \[1, 4\], expected \[1, 5\]"),
        (torch.ones(1, 5).double(), "must have one dtype"),
        (torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0]]), "energy: must be finite and not negative"),
        (torch.full((1, 5), float("nan")), "energy: must be finite and not negative"),
    ],
)
def test_energies_are_checked(energy, message):
    with pytest.raises(ValueError, match=message):
        DynamicDense(SHAPE, [0] * 3, torch.ones(1, 6, 5), drop=2, axis="cols", energy=energy)
