"""Which channels of a base a forward skips, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from compression import by_hand
from mctk.errors import CheckpointError
from mctk.runtime import TermExperts, dynamic_pruning, observe
from mctk.terms import Dense, DynamicDense, LowRank, Term
from test_runtime_shared import assert_equal, compressed, inputs, original, plain

DROP = 5
CHANNELS = 24  # I of the tiny families


def dynamic_terms(
    module, slots=None, drop: int = DROP, pruned: bool = False, seed: int = 0, deltas: bool = True
) -> dict[str, list[Term]]:
    """A dynamic base (of some channels), and low-rank deltas."""
    generator = torch.Generator().manual_seed(seed)
    template = compressed(module, {part: [] for part in _parts(module)})
    kept = torch.randperm(CHANNELS, generator=generator)[:17].int() if pruned else None
    count = CHANNELS if kept is None else len(kept)
    terms: dict[str, list[Term]] = {}
    for part, shape in template.shapes.items():
        members = shape.members
        own = [0] * members if slots is None else slots
        stored = 1 + max(s for s in own if s is not None)
        down = part == "down"
        size = (shape.out_features, count) if down else (count, shape.in_features)
        weight = 0.3 * torch.randn(stored, *size, generator=generator)
        energy = torch.rand(stored, count, generator=generator) if down else None
        base = DynamicDense(
            shape,
            own,
            weight,
            rows=None if down else kept,
            cols=kept if down else None,
            drop=drop,
            axis="cols" if down else "rows",
            energy=energy,
        )
        every = range(members)
        U = 0.3 * torch.randn(members, shape.out_features, 4, generator=generator)
        V = 0.3 * torch.randn(members, 4, shape.in_features, generator=generator)
        terms[part] = [base, LowRank(shape, every, every, U=U, V=V)] if deltas else [base]
    return terms


def _parts(module) -> list[str]:
    return ["gate", "up", "down"] if module.has_gate else ["up", "down"]


def static(terms: dict[str, list[Term]]) -> dict[str, list[Term]]:
    """The same terms with an ordinary base."""
    found = {}
    for part, (base, *others) in terms.items():
        dense = Dense(base.shape, base.slots, base.weight, rows=base.rows, cols=base.cols)
        found[part] = [dense, *others]
    return found


@pytest.mark.parametrize("layout", ["mixtral", "gpt_oss", "no gate", "norm"])
def test_drop_0_is_a_dense_base(layout):
    module = original(layout)
    terms = dynamic_terms(module, drop=0)
    experts, dense = compressed(module, terms), compressed(module, static(terms))
    given = inputs(experts)
    assert torch.equal(experts(*given), dense(*given))
    assert experts.active_channels is None


def test_switched_off_it_is_a_dense_base():
    module = original("mixtral")
    terms = dynamic_terms(module)
    experts, dense = compressed(module, terms), compressed(module, static(terms))
    given = inputs(experts)
    with dynamic_pruning(experts, False):
        assert torch.equal(experts(*given), dense(*given))
        assert torch.equal(plain(experts, *given), plain(dense, *given))
        assert experts.active_channels is None
    assert not torch.allclose(experts(*given), dense(*given), atol=1e-3)
    dynamic_pruning(torch.nn.ModuleList([experts]), False)
    assert torch.equal(experts(*given), dense(*given))


def chosen_by_hand(experts: TermExperts, x, index, weights) -> tuple[dict, dict]:
    """The documented choice, token by token: slot → (probe tokens, kept channels)."""
    base = experts.terms("down")[0]
    assert isinstance(base, DynamicDense)
    probes, kept = {}, {}
    for slot in sorted({s for s in base.slots if s is not None}):
        members = [e for e, s in enumerate(base.slots) if s == slot]
        tokens = [t for t in range(len(x)) if set(index[t].tolist()) & set(members)]
        if not tokens:
            continue
        by_norm = sorted(tokens, key=lambda t: (-float(x[t].norm()), t))
        probe = by_norm[: min(len(tokens), max(2, len(tokens) // 2))]
        total = torch.zeros(CHANNELS)
        for t in probe:
            z = torch.zeros(CHANNELS)
            for e, g in zip(index[t].tolist(), weights[t], strict=True):
                if e in members:
                    wide = [
                        experts.bank(p).apply(x[t][None], e) for p in experts.shapes if p != "down"
                    ]
                    z += g * experts._activate(torch.cat(wide, dim=1))[0]
            total += z.square() / len(probe)
        channels = torch.arange(CHANNELS) if base.cols is None else base.cols.long()
        norms = base.weight[slot].square().sum(0)
        seen, frozen = total[channels] * norms, base.energy[slot]
        score = 0.5 * frozen / frozen.sum() + 0.5 * seen / seen.sum()
        stays = channels[score.argsort()[base.drop :]]
        probes[slot], kept[slot] = probe, sorted(stays.tolist())
    return probes, kept


def result_by_hand(experts: TermExperts, module, x, index, weights) -> torch.Tensor:
    """The output with the documented choice: the base's matrices zeroed in the skipped channels."""
    probes, kept = chosen_by_hand(experts, x, index, weights)
    base = experts.terms("down")[0]
    total = torch.zeros_like(x)
    for t in range(len(x)):
        # A copy whose base is, for this token, what each slot leaves of it.
        own = copy.deepcopy(experts)
        for part in own.shapes:
            bank = own.terms(part)
            weight = bank[0].weight.clone()
            for slot, stays in kept.items():
                gone = sorted(set(range(CHANNELS)) - set(stays))
                index_set = bank[0].cols if part == "down" else bank[0].rows
                positions = gone
                if index_set is not None:
                    positions = [i for i, c in enumerate(index_set.tolist()) if c in gone]
                if part == "down":
                    weight[slot][:, positions] = 0
                elif t not in probes[slot]:
                    weight[slot][positions] = 0
            tensors = {**bank[0].tensors(), "weight": weight}
            own.set_terms(part, [bank[0].with_tensors(tensors), *bank[1:]])
        total[t] = by_hand(own, module, x[t][None], index[t][None], weights[t][None])[0]
    assert isinstance(base, DynamicDense)
    return total


@pytest.mark.parametrize("layout", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("slots", [None, [0, 1, 0, 1], [None, 0, 1, 1]])
@pytest.mark.parametrize("tokens", [1, 3, 13])
def test_the_choice_is_the_documented_one(layout, pruned, slots, tokens):
    module = original(layout)
    experts = compressed(module, dynamic_terms(module, slots, pruned=pruned))
    given = inputs(experts, tokens)
    got = experts(*given)
    _, kept = chosen_by_hand(experts, *given)
    assert experts.active_channels is not None
    assert {s: c.tolist() for s, c in experts.active_channels.items()} == kept
    stored = 17 if pruned else CHANNELS
    assert all(len(channels) == stored - DROP for channels in kept.values())
    assert_equal(got, result_by_hand(experts, module, *given))


@pytest.mark.parametrize("layout", ["mixtral", "gpt_oss", "no gate", "norm"])
@pytest.mark.parametrize("slots", [None, [0, 1, 0, 1], [0, 1, 2, 3]])
def test_the_plain_loop_makes_the_same_choice(layout, slots):
    module = original(layout)
    experts = compressed(module, dynamic_terms(module, slots, pruned=True))
    given = inputs(experts)
    got, first = experts(*given), experts.active_channels
    outputs = []
    with observe(experts, lambda *event: outputs.append(event)):
        again = experts(*given)
    assert outputs
    assert {s: c.tolist() for s, c in first.items()} == {
        s: c.tolist() for s, c in experts.active_channels.items()
    }
    assert_equal(again, got)


def test_the_same_batch_gives_the_same_bits_and_another_batch_may_choose_otherwise():
    module = original("mixtral")
    experts = compressed(module, dynamic_terms(module))
    x, index, weights = inputs(experts)
    out = experts(x, index, weights)
    first = experts.active_channels[0].tolist()
    assert torch.equal(experts(x, index, weights), out)
    others = []
    for seed in range(5):
        other = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        experts(other, index, weights)
        others.append(experts.active_channels[0].tolist())
    assert any(channels != first for channels in others)
    assert torch.equal(experts(x, index, weights), out)  # no memory of what came between


def test_frozen_energy_counts_and_its_scale_does_not():
    module = original("mixtral")
    terms = dynamic_terms(module)
    experts = compressed(module, terms)
    given = inputs(experts)
    experts(*given)
    before = experts.active_channels[0].tolist()
    base = terms["down"][0]
    scaled = base.with_tensors({**base.tensors(), "energy": 1000 * base.energy})
    experts.set_terms("down", [scaled, *terms["down"][1:]])
    experts(*given)
    assert experts.active_channels[0].tolist() == before
    # Channels that calibration saw as the only ones with energy always stay.
    energy = torch.zeros(1, CHANNELS)
    energy[0, :4] = 1
    single = base.with_tensors({**base.tensors(), "energy": energy})
    experts.set_terms("down", [single, *terms["down"][1:]])
    for seed in range(3):
        x = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(seed))
        experts(x, *given[1:])
        assert set(range(4)) <= set(experts.active_channels[0].tolist())


def test_norms_follow_changed_weights():
    module = original("mixtral")
    terms = dynamic_terms(module, deltas=False)
    experts = compressed(module, terms)
    given = inputs(experts)
    experts(*given)
    for _ in range(2):
        for parameter in experts.parameters():
            if parameter.dim() == 3:  # not the energy
                with torch.no_grad():
                    parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator()))
        experts(*given)
        assert experts.active_channels[0].tolist() == chosen_by_hand(experts, *given)[1][0]


def test_experts_without_a_base_and_groups_without_tokens():
    module = original("mixtral")
    experts = compressed(module, dynamic_terms(module, [None, 0, 1, None]))
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    index = torch.tensor([[0, 1], [3, 0], [1, 3], [0, 3]])
    given = x, index, torch.full((4, 2), 0.5)
    assert_equal(experts(*given), plain(experts, *given))
    assert set(experts.active_channels) == {0}
    nobody = x[1:2], index[1:2], torch.full((1, 2), 0.5)
    assert_equal(experts(*nobody), plain(experts, *nobody))
    assert experts.active_channels == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda terms: {**terms, "down": terms["down"][1:]},
            r"terms\.gate\[0\]: follows a dynamic",
        ),
        (
            lambda terms: {**terms, "down": [*terms["down"], terms["down"][0]]},
            r"terms\.down\[2\]: a second dynamic term",
        ),
        (
            lambda terms: {
                **terms,
                "up": [
                    DynamicDense(
                        terms["up"][0].shape,
                        [0, 0, 0, None],
                        terms["up"][0].weight,
                        drop=1,
                        axis="rows",
                    )
                ],
            },
            r"terms\.up\[0\]\.slots: differ",
        ),
        (
            lambda terms: {
                **terms,
                "down": [
                    DynamicDense(
                        terms["down"][0].shape,
                        [0] * 4,
                        terms["down"][0].weight,
                        drop=1,
                        axis="rows",
                    )
                ],
            },
            r"terms\.down\[0\]\.axis: must be 'cols'",
        ),
    ],
)
def test_dynamic_terms_must_fit_together(change, message):
    module = original("mixtral")
    terms = change(dynamic_terms(module))
    with pytest.raises(CheckpointError, match=message):
        TermExperts(module, {p: [t.spec() for t in bank] for p, bank in terms.items()})
