"""Packed storage: bits, groups, degenerate values, and terms of every kind around them."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mctk.errors import CheckpointError
from mctk.terms import (
    Bank,
    BankShape,
    Bias,
    Dense,
    DynamicDense,
    PackedTensor,
    Term,
    drop_members,
    pack,
    packed_bits,
    register_kind,
    spec_bytes,
    spec_elements,
    spec_parameters,
)
from mctk.terms import registry as registry_module
from mctk.terms.bits import pack_bits, unpack_bits
from mctk.terms.rounding import quantise
from safetensors.torch import load_file, save_file
from term_strategies import KINDS, terms

BITS = (2, 3, 4, 8)


@pytest.mark.parametrize("bits", [1, *BITS])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_bits_are_packed_without_gaps(bits, data):
    rows, n = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 40))
    values = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n),
                min_size=rows,
                max_size=rows,
            )
        )
    ).view(rows, n)
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-n * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, n).long(), values)
    # As the format's page says it, in the words of a stranger.
    for row, line in zip(packed.tolist(), values.tolist(), strict=True):
        stream = sum(byte << (8 * i) for i, byte in enumerate(row))
        assert stream == sum(value << (bits * i) for i, value in enumerate(line))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_rounding_is_to_the_nearest_level(bits, symmetric, data):
    """No weight inside the range is further than half a step, give or take the scale's rounding."""
    n, group = data.draw(st.integers(1, 33)), data.draw(st.sampled_from([1, 3, 8, 64, None]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(2, 3, n, generator=random) * 10 ** data.draw(st.integers(-6, 6))
    packed = quantise(weight, bits, group, symmetric)
    assert packed.group == min(group or n, n)
    step = packed.scales.abs().repeat_interleave(packed.group, -1)[..., :n]
    # At the ends of the range a step is cut off at most (a zero point is rounded, the level
    # opposite is missing), and what rounding the scale to bfloat16 takes of the whole range.
    assert bool(((packed - weight).abs() <= (1.01 + 2**bits / 512) * step).all())
    levels = 2**bits - 1
    codes = unpack_bits(packed.codes, bits, n)
    inside = (codes > 0) & (codes < levels)
    assert bool((((packed - weight).abs() <= 0.501 * step) | ~inside).all())
    assert torch.equal(packed.scales, packed.scales.bfloat16().float())


def test_more_bits_and_smaller_groups_lose_less():
    weight = torch.randn(4, 16, 96, generator=torch.Generator().manual_seed(0))
    for symmetric in (True, False):
        errors = [
            float((quantise(weight, bits, group, symmetric) - weight).square().sum())
            for bits, group in [(2, 64), (2, 16), (3, 16), (4, 16), (8, 16)]
        ]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_degenerate_groups(bits, symmetric):
    zero = quantise(torch.zeros(1, 2, 5), bits, 3, symmetric)
    assert not zero.unpack().any()
    for value in (0.37, -2.5):
        constant = quantise(torch.full((1, 2, 5), value), bits, 3, symmetric)
        torch.testing.assert_close(
            constant.unpack(), torch.full((1, 2, 5), value), rtol=4e-3, atol=0
        )
    huge = quantise(torch.tensor([[1e38, -1e38, 3e37, 0.0]]), bits, None, symmetric)
    assert bool(huge.unpack().isfinite().all())
    tiny = quantise(torch.tensor([[1e-45, -1e-45, 0.0]]), bits, None, symmetric)
    assert bool((tiny.unpack().abs() <= 1e-44).all())
    half = quantise(torch.tensor([[6e4, -2.0]], dtype=torch.float16), bits, None, symmetric)
    assert half.dtype == torch.float16 and bool(half.unpack().isfinite().all())
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantise(torch.tensor([[1.0, bad]]), bits, None, symmetric)
    for shape in ((0, 2, 3), (2, 0, 3), (2, 3, 0)):
        empty = quantise(torch.zeros(shape), bits, 2, symmetric)
        assert empty.unpack().shape == shape


@pytest.mark.parametrize("kind_name", KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_packed_terms_of_every_kind(kind_name, data, tmp_path_factory):
    """Files, meta tensors and counts; what is packed applies as its values say."""
    plain = data.draw(terms(kind_name, dtype=torch.float32))
    floating = [name for name, t in plain.tensors().items() if t.is_floating_point()]
    options = {
        "bits": data.draw(st.sampled_from(BITS)),
        "group": data.draw(st.sampled_from([1, 2, 5, None])),
        "symmetric": data.draw(st.booleans()),
        "tensors": floating,
    }
    term = pack(plain, **options)
    assert type(term) is type(plain) and packed_bits(term) == [options["bits"]]
    assert pack(plain.to(device="meta"), **options).spec() == term.spec()

    path = tmp_path_factory.mktemp("term") / "term.safetensors"
    save_file({name: t.contiguous() for name, t in term.stored().items()}, path)
    spec = json.loads(json.dumps(term.spec()))
    stored = load_file(path)
    loaded = Term.from_spec(spec, stored)
    assert loaded.spec() == spec
    written = sum(t.numel() * t.element_size() for t in stored.values())
    assert term.nbytes() == spec_bytes(spec) == written
    assert term.parameters() == plain.parameters() == spec_parameters(spec)
    assert sum(spec_elements(spec).values()) == plain.parameters()
    assert set(spec_elements(spec)) == set(stored)

    whole = loaded.unpacked()
    assert not packed_bits(whole) and whole.unpacked() is whole
    x = torch.randn(3, plain.shape.in_features, generator=torch.Generator().manual_seed(0))
    for member in range(plain.shape.members):
        assert torch.equal(loaded.apply(x, member), whole.apply(x, member))
        assert loaded.macs(member) == plain.macs(member)
        for one, other in zip(loaded.materialise(member), whole.materialise(member), strict=True):
            assert one is None if other is None else torch.equal(one, other)


def test_casting_changes_no_code():
    term = pack(Dense(BankShape(2, 6, 10), [0, 1], torch.randn(2, 6, 10)), 4, 4)
    for dtype in (torch.bfloat16, torch.float64):
        cast = term.to(dtype=dtype)
        assert cast.dtype == dtype and cast.weight.dtype == dtype
        assert torch.equal(cast.weight.codes, term.weight.codes)
        assert torch.equal(cast.weight.scales.float(), term.weight.scales)
    # Rounding to bfloat16 and back is what a plain weight goes through as well.
    narrow = term.to(dtype=torch.bfloat16).unpacked().weight
    assert torch.equal(narrow, term.weight.to(torch.bfloat16))


def test_some_tensors_stay_plain():
    shape = BankShape(2, 3, 8)
    bias = Bias(shape, [0, 1], torch.randn(2, 3))
    assert packed_bits(pack(bias, 4)) == []
    assert packed_bits(pack(bias, 4, tensors=["vector"])) == [4]
    dynamic = DynamicDense(
        shape, [0, 0], torch.randn(1, 3, 8), drop=2, axis="cols", energy=torch.rand(1, 8)
    )
    packed = pack(dynamic, 4)
    assert isinstance(packed.weight, PackedTensor) and packed.energy is dynamic.energy
    x, dropped = torch.randn(5, 8), torch.arange(8) < 2
    assert torch.equal(packed.without(x, 0, dropped), packed.unpacked().without(x, 0, dropped))
    with pytest.raises(ValueError, match="a dense term has no weights 'U'"):
        pack(Dense(shape, [0, 1], torch.randn(2, 3, 8)), 4, tensors=["U"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 5}, "bits: must be one of 2, 3, 4, 8, not 5"),
        ({"bits": 4, "group": 0}, "group: must be a positive integer, not 0"),
    ],
)
def test_impossible_options(options, match):
    with pytest.raises(ValueError, match=match):
        pack(Dense(BankShape(1, 2, 2), [0], torch.randn(1, 2, 2)), **options)


def test_a_slot_is_read_alone(monkeypatch):
    """Reading one expert multiplies out that one only."""
    from mctk.terms import packing

    term = pack(Dense(BankShape(3, 4, 8), [0, 1, 2], torch.randn(3, 4, 8)), 4)
    seen = []
    honest = packing.unpack_bits
    monkeypatch.setattr(
        packing, "unpack_bits", lambda packed, *a: seen.append(packed.shape) or honest(packed, *a)
    )
    term.apply(torch.randn(2, 8), 1)
    assert seen == [(4, 4)]


def test_it_reads_like_a_tensor():
    weight = torch.randn(3, 4, 10)
    packed = quantise(weight, 4, 4, False)
    plain = packed.unpack()
    assert packed.shape == plain.shape and packed.dtype == plain.dtype and packed.dim() == 3
    assert packed.numel() == 120 and packed.is_floating_point() and not packed.is_meta
    assert torch.equal(packed, plain) and torch.equal(packed[1], plain[1])
    assert torch.equal(packed[:, 2:], plain[:, 2:]) and torch.equal(
        torch.cat([packed[0]]), plain[0]
    )
    assert torch.equal(torch.stack(list(packed)), plain)
    assert torch.equal(packed.double() @ torch.eye(10).double(), plain.double())
    assert torch.equal(packed.norm(dim=-1), plain.norm(dim=-1))
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.cpu()):
        assert isinstance(again, PackedTensor) and torch.equal(again, plain)
    picked = packed.index_select(0, torch.tensor([2, 0]))
    assert isinstance(picked, PackedTensor) and torch.equal(picked, plain[[2, 0]])
    assert isinstance(packed.to("meta"), PackedTensor) and packed.to("meta").is_meta
    assert type(packed.to(torch.bfloat16)) is torch.Tensor
    x = torch.randn(2, 10, requires_grad=True)
    torch.nn.functional.linear(x, packed[0]).sum().backward()
    torch.testing.assert_close(x.grad, plain[0].sum(0).expand(2, 10))
    assert repr(packed) == "PackedTensor([3, 4, 10], float32, 4 bits, groups of 4)"


def test_removed_members_take_their_codes_along():
    term = pack(Dense(BankShape(3, 4, 10), [0, 1, 2], torch.randn(3, 4, 10)), 3, 4)
    bank = Bank("experts.up", 0, term.shape, [term])
    [left] = drop_members(bank, [1])
    assert left.slots == (0, None, 1) and packed_bits(left) == [3]
    assert left.nbytes() * 3 == term.nbytes() * 2
    assert torch.equal(left.materialise(2)[0], term.materialise(2)[0])


def test_packing_twice_starts_from_the_values():
    term = Dense(BankShape(1, 4, 10), [0], torch.randn(1, 4, 10))
    twice = pack(pack(term, 8), 2)
    assert packed_bits(twice) == [2]
    assert twice.spec() == pack(term, 2).spec()
    assert torch.equal(twice.weight, pack(pack(term, 8).unpacked(), 2).weight)


def refuse(match, change):
    term = pack(Dense(BankShape(2, 4, 10), [0, 1], torch.randn(2, 4, 10)), 4, 4, symmetric=False)
    spec, stored = copy.deepcopy(term.spec()), dict(term.stored())
    change(spec, stored)
    for name, tensor in stored.items():
        spec["tensors"][name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
    with pytest.raises(CheckpointError, match=match):
        Term.from_spec(spec, stored)


def test_bad_specs_name_the_key():
    def entry(**changes):
        return lambda spec, stored: spec["packing"]["weight"].update(changes)

    refuse(r"packing\.weight\.bits: must be one of", entry(bits=5))
    refuse(r"weight_codes: is uint8 \[2, 4, 5\], expected uint8 \[2, 4, 3\]", entry(bits=2))
    refuse(r"packing\.weight\.group: must be", entry(group=0))
    refuse(r"weight_scales: has shape \[2, 4, 3\], expected \[2, 4, 5\]", entry(group=2))
    refuse(r"packing\.weight\.shape: must be", entry(shape="wide"))
    refuse(r"weight_scales: has shape", entry(shape=[2, 4, 40]))
    refuse(r"packing\.weight: must have", entry(colour="red"))
    refuse(r"packing: must map", lambda spec, stored: spec.update(packing=[]))
    refuse(
        r"tensors\.weight_scales: the data is missing",
        lambda spec, stored: (stored.pop("weight_scales"), spec["tensors"].pop("weight_scales")),
    )
    refuse(
        r"tensors\.weight: is stored both plain and packed",
        lambda spec, stored: stored.update(weight=torch.zeros(2, 4, 10)),
    )
    refuse(r"weight: is missing", lambda spec, stored: spec["packing"].clear())


class Product(Dense):
    """A plugin's kind: a matrix, scaled by another tensor of its own."""

    kind = "product_for_test"

    def materialise(self, member):
        return self.weight.square().sum(0), None


def test_plugins_kinds_are_packed_as_well(monkeypatch):
    monkeypatch.setattr(registry_module, "_kinds", dict(registry_module._kinds))
    register_kind(Product, provider="mctk-product")
    term = pack(Product(BankShape(2, 3, 8), [0, 1], torch.randn(2, 3, 8)), 4)
    again = Term.from_spec(term.spec(), term.stored())
    assert torch.equal(again.materialise(0)[0], term.unpacked().materialise(0)[0])
