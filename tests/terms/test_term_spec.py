"""Specs and tensors: round trips through files, accounting, and what is refused."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mctk.errors import CheckpointError
from mctk.terms import (
    BankShape,
    Dense,
    LowRank,
    Sparse,
    Term,
    kind,
    kinds,
    register_kind,
    spec_bytes,
    spec_parameters,
)
from mctk.terms import registry as registry_module
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from term_strategies import KINDS, terms


def payload(path):
    """Bytes of tensor data in a safetensors file, and the float elements in it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    floats = 0
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            floats += tensor.numel() if tensor.is_floating_point() else 0
    return size - 8 - header, floats


@pytest.mark.parametrize("kind_name", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_round_trip_through_files(kind_name, data, tmp_path_factory):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    term = data.draw(terms(kind_name, dtype=torch.float64)).to(dtype=dtype)
    path = tmp_path_factory.mktemp("term") / "term.safetensors"
    save_file({name: t.contiguous() for name, t in term.tensors().items()}, path)
    spec = json.loads(json.dumps(term.spec()))
    loaded = Term.from_spec(spec, load_file(path))
    assert type(loaded) is type(term)
    assert loaded.spec() == term.spec() == spec
    x = torch.randn(2, term.shape.in_features).to(dtype)
    for member in range(term.shape.members):
        assert torch.equal(loaded.apply(x, member), term.apply(x, member))
    written, floats = payload(path)
    assert term.nbytes() == spec_bytes(spec) == written
    assert term.parameters() == spec_parameters(spec) == floats


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_meta_tensors_count_the_same(data):
    term = data.draw(terms())
    meta = {name: t.to("meta") for name, t in term.tensors().items()}
    empty = Term.from_spec(term.spec(), meta)
    assert empty.device.type == "meta"
    assert empty.parameters() == term.parameters()
    assert empty.nbytes() == term.nbytes()
    assert [empty.macs(e) for e in range(term.shape.members)] == [
        term.macs(e) for e in range(term.shape.members)
    ]
    x = torch.empty(2, term.shape.in_features, dtype=term.dtype, device="meta")
    assert empty.apply(x, 0).shape == (2, term.shape.out_features)


def test_weights_may_be_loaded_in_another_dtype():
    term = Dense(BankShape(1, 2, 3), [0], torch.randn(1, 2, 3))
    loaded = Term.from_spec(term.spec(), {"weight": term.weight.bfloat16()})
    assert loaded.dtype == torch.bfloat16


DENSE_TERM = Dense(
    BankShape(3, 4, 5), [0, None, 1], torch.randn(2, 3, 5), rows=torch.tensor([3, 1, 0])
)
SPARSE_TERM = Sparse(
    BankShape(2, 4, 5), [0, 1], torch.randn(2, 3), torch.tensor([[0, 7, 19], [1, 2, 3]])
)
PIVOTED_TERM = LowRank(
    BankShape(2, 4, 5), [0, 1], [0, 1], U=torch.randn(2, 4, 2), V=torch.randn(2, 2, 5)
).pivot()


def refuse(term, match, change_spec=None, change_tensors=None):
    spec, tensors = copy.deepcopy(term.spec()), dict(term.tensors())
    if change_spec is not None:
        change_spec(spec)
    if change_tensors is not None:
        change_tensors(tensors)
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            spec["tensors"][name] = {"shape": list(tensor.shape), "dtype": dtype}
    with pytest.raises(CheckpointError, match=match):
        Term.from_spec(spec, tensors)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("members", 2, r"slots: has 3 entries, the bank has 2"),
        ("members", 0, r"members: must be a positive integer"),
        ("out", "4", r"out: must be a positive integer"),
        ("in", 6, r"weight: has shape \[2, 3, 5\], expected \[2, 3, 6\]"),
        ("out", 3, r"rows: index 3 is outside 0\.\.2"),
        ("slots", [0, None, 2], r"slots\[2\]: slot 2 is not one of the 2"),
        ("slots", [0, None, -1], r"slots\[2\]: slot -1"),
        ("slots", [0, None, True], r"slots\[2\]: must be an integer"),
        ("slots", None, r"slots: must be a list"),
        ("storage", "fp4", r"storage: is 'fp4'"),
        ("colour", "red", r"colour: unknown key"),
        ("tensors", [], r"tensors: must map"),
        ("kind", "desne", r"unknown term kind 'desne' \(did you mean 'dense'\?\)"),
        ("kind", 3, r"kind: must be the name"),
    ],
)
def test_bad_specs_name_the_key(key, value, match):
    refuse(DENSE_TERM, match, lambda spec: spec.update({key: value}))


@pytest.mark.parametrize("key", ["members", "slots", "tensors"])
def test_missing_keys(key):
    refuse(DENSE_TERM, rf"{key}: is missing", lambda spec: spec.pop(key))


def test_bad_tensors_name_the_key():
    def entry(**changes):
        return lambda spec: spec["tensors"]["weight"].update(changes)

    refuse(DENSE_TERM, r"tensors\.weight: has shape", entry(shape=[2, 3, 6]))
    refuse(DENSE_TERM, r"tensors\.weight\.shape: must be", entry(shape=[2, 3, -6]))
    refuse(DENSE_TERM, r"tensors\.weight\.dtype: unknown dtype 'float7'", entry(dtype="float7"))
    refuse(DENSE_TERM, r"tensors\.weight: is float32, the spec says int32", entry(dtype="int32"))
    refuse(DENSE_TERM, r"tensors\.rows: is not in", lambda spec: spec["tensors"].pop("rows"))
    refuse(
        DENSE_TERM,
        r"tensors\.cols: the data is missing",
        lambda spec: spec["tensors"].update(cols={"shape": [2], "dtype": "int32"}),
    )
    refuse(
        DENSE_TERM,
        r"rows: an index is repeated",
        None,
        lambda tensors: tensors.update(rows=torch.tensor([3, 1, 3])),
    )
    refuse(
        DENSE_TERM,
        r"tensors\.vector: unknown tensor",
        None,
        lambda tensors: tensors.update(vector=torch.zeros(3)),
    )
    refuse(
        DENSE_TERM,
        r"rows: must be int32 or int64",
        None,
        lambda tensors: tensors.update(rows=torch.zeros(3)),
    )
    refuse(
        SPARSE_TERM,
        r"positions: index 20 is outside 0\.\.19",
        None,
        lambda tensors: tensors.update(positions=torch.tensor([[0, 7, 20], [1, 2, 3]])),
    )
    refuse(
        SPARSE_TERM,
        r"positions: has shape",
        None,
        lambda tensors: tensors.update(positions=torch.tensor([[0, 7], [1, 2]])),
    )
    refuse(
        PIVOTED_TERM,
        r"pivots: index -1 is outside",
        None,
        lambda tensors: tensors.update(pivots=torch.tensor([[0, 1], [-1, 2]])),
    )
    refuse(
        PIVOTED_TERM,
        r"pivots: an index is repeated",
        None,
        lambda tensors: tensors.update(pivots=torch.tensor([[0, 1], [2, 2]])),
    )


def test_bad_low_rank_specs():
    refuse(PIVOTED_TERM, r"side: is 'V'", lambda spec: spec.update(side="V"))
    refuse(PIVOTED_TERM, r"storage: is 'plain'", lambda spec: spec.update(storage="plain"))
    refuse(PIVOTED_TERM, r"v_slots\[1\]: is None", lambda spec: spec.update(v_slots=[0, None]))
    with pytest.raises(ValueError, match="expected U and V"):
        LowRank(BankShape(1, 2, 2), [0], [0], U=torch.zeros(1, 2, 1))
    with pytest.raises(ValueError, match="one dtype: U float32, V float64"):
        LowRank(
            BankShape(1, 2, 2),
            [0],
            [0],
            U=torch.zeros(1, 2, 1),
            V=torch.zeros(1, 1, 2, dtype=torch.float64),
        )


def test_values_are_not_read_on_meta():
    bad = DENSE_TERM.to(device="meta")
    assert Term.from_spec(bad.spec(), bad.tensors()).parameters() == DENSE_TERM.parameters()


class Doubled(Dense):
    kind = "doubled"


def test_plugins_may_add_kinds(monkeypatch):
    monkeypatch.setattr(registry_module, "_kinds", dict(registry_module._kinds))
    register_kind(Doubled, provider="mctk-doubled")
    register_kind(Doubled, provider="mctk-doubled")
    term = Doubled(BankShape(1, 2, 2), [0], torch.randn(1, 2, 2))
    spec = term.spec()
    assert spec["provider"] == "mctk-doubled"
    assert kinds()["doubled"] == "mctk-doubled"
    assert isinstance(Term.from_spec(spec, term.tensors()), Doubled)
    assert spec_parameters(spec) == 4
    with pytest.raises(ValueError, match="already provided by mctk"):
        register_kind(type("Other", (Dense,), {"kind": "dense"}), provider="other")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="pip install mctk-doubled"):
        Term.from_spec(spec, term.tensors())


def test_from_spec_of_a_class_wants_that_class():
    assert kind("dense") is Dense
    with pytest.raises(CheckpointError, match="expected 'lowrank'"):
        LowRank.from_spec(DENSE_TERM.spec(), DENSE_TERM.tensors())
