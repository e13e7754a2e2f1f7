"""ResMoE: the barycenter, what it leaves of the experts, and how the rest is compressed."""

from __future__ import annotations

import itertools

import pytest
import torch
from d2moe_layer import Tokens, after, make_layer, on_meta, output, with_weights
from mctk.errors import UserError
from mctk.linalg import reorder
from mctk.notes import collect
from mctk.statistics import LayerStatistics
from mctk.terms import DENSE
from mctk_resmoe import methods
from mctk_resmoe.barycenter import aligned, barycenter, best_barycenter, mean, objective
from mctk_resmoe.residuals import design, joint, largest
from mctk_svd import methods as svd_methods
from routed_layer import RoutedLayer

from tests.families import FAMILIES

WASSERSTEIN, UP, JOINT = methods()
NOTHING = LayerStatistics(3, {}, set())
EXACT = UP.Options(entry_multiple=1)


def parts_of(layer):
    return {name.rsplit(".", 1)[-1]: bank.terms[0].weight for name, bank in layer.items()}


def shuffled(weights, seed=0):
    """The same experts, each with its neurons in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    experts, neurons, _ = weights["up"].shape
    orders = torch.stack([torch.randperm(neurons, generator=generator) for _ in range(experts)])
    moved = {part: reorder(w, part, orders) for part, w in weights.items()}
    return moved, orders


def in_float32(layer):
    return after(layer, {n: [t.to(torch.float32) for t in b.terms] for n, b in layer.items()})


def merged(layer, **options):
    terms = WASSERSTEIN.merge(layer, NOTHING, None, WASSERSTEIN.Options(**options))
    return after(layer, terms)


@pytest.mark.parametrize("parts", [("gate", "up", "down"), ("up", "down")])
def test_experts_that_are_permutations_of_one_another_leave_no_residual(parts):
    one = parts_of(make_layer(experts=1, parts=parts))
    weights, _ = shuffled({part: w.expand(5, -1, -1) for part, w in one.items()})
    found = barycenter(weights)
    assert found.objective[-1] == 0.0
    for part, weight in weights.items():
        for e in range(5):
            assert torch.equal(aligned(weight, part, found.order, e), found.support[part])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("start", [0, 3])
def test_the_objective_never_rises_and_is_that_of_the_result(seed, start):
    weights = parts_of(make_layer(neurons=24, seed=seed))
    found = barycenter(weights, start)
    assert len(found.objective) >= 2
    assert all(later <= earlier for earlier, later in itertools.pairwise(found.objective))
    assert found.objective[-1] == pytest.approx(objective(weights, found.order, found.support))
    for part, own in mean(weights, found.order).items():
        assert torch.equal(own, found.support[part])
    # The last assignment is optimal for the support: no swap of two neurons is better.
    for e, (i, j) in itertools.product(range(4), [(0, 1), (5, 17), (11, 20)]):
        order = found.order.clone()
        order[e, [i, j]] = order[e, [j, i]]
        assert objective(weights, order, found.support) >= found.objective[-1] - 1e-3


def test_alignment_beats_no_alignment_and_each_order_is_a_permutation():
    weights, _ = shuffled(parts_of(make_layer(neurons=16, spread=0.2)))
    found = barycenter(weights)
    as_they_are = torch.arange(16).repeat(4, 1)
    unaligned = objective(weights, as_they_are, mean(weights, as_they_are))
    assert found.objective[-1] < 0.2 * unaligned
    assert torch.equal(found.order.sort(dim=1).values, as_they_are)


def test_tiny_optimum_by_brute_force():
    """Two experts of four neurons: the barycenter's objective is half the transport's cost."""
    weights = parts_of(make_layer(experts=2, neurons=4, hidden=3))
    a, b = (design({part: w[e] for part, w in weights.items()}) for e in range(2))
    best = min(
        float((a - b[list(order)]).square().sum()) for order in itertools.permutations(range(4))
    )
    found = best_barycenter(weights, 100, 1e-7, 1)
    assert found.objective[-1] == pytest.approx(best / 2, rel=1e-5)


def test_options_of_the_barycenter():
    weights = parts_of(make_layer(neurons=24, seed=2))
    first, second = barycenter(weights, 0), barycenter(weights, 1)
    assert first.objective[-1] != second.objective[-1]
    best = best_barycenter(weights, 100, 1e-7, 2)
    assert best.objective[-1] == min(barycenter(weights, e).objective[-1] for e in range(4))
    assert len(barycenter(weights, 0, iterations=1).objective) == 1
    assert len(barycenter(weights, 0, tolerance=1e9).objective) == 1
    assert torch.equal(barycenter(weights, 0, workers=3).order, first.order)


def test_all_starts_are_indifferent_to_the_order_of_the_experts():
    weights = parts_of(make_layer(neurons=12, seed=5))
    order = [2, 0, 3, 1]
    moved = {part: w[order] for part, w in weights.items()}
    ours, other = (best_barycenter(w, 100, 1e-7, 1) for w in (weights, moved))
    assert other.objective[-1] == pytest.approx(ours.objective[-1], rel=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_exact_and_its_layout_is_right(bias, dtype):
    layer, tokens = make_layer(neurons=16, bias=bias), Tokens()
    for bank in layer.values():
        bank.terms[:] = [term.to(dtype) for term in bank.terms]
    with collect() as notes:
        now = merged(layer)
    assert len(notes) == 1 and notes[0].startswith("barycenter from expert 0: objective after")
    assert torch.allclose(
        output(in_float32(now), tokens), output(in_float32(layer), tokens), rtol=1e-4, atol=1e-3
    )
    planned = WASSERSTEIN.layout(on_meta(layer), None, WASSERSTEIN.Options())
    for name, bank in now.items():
        assert bank.terms[0].weight.shape[0] == 1 and bank.terms[1].weight.shape[0] == 4
        assert bank.terms[0].dtype == bank.terms[1].dtype == torch.float32
        specs = [[t.spec()["tensors"] for t in terms] for terms in (bank.terms, planned[name])]
        assert specs[0] == specs[1]
        assert all(t.device.type == "meta" for t in planned[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_layer_gives_what_it_gave(family):
    """Transposed, interleaved and biased experts too."""
    routed = RoutedLayer(family, tokens=20)
    terms = WASSERSTEIN.merge(routed.experts, NOTHING, None, WASSERSTEIN.Options(start=1))
    moved = terms["experts.up"][1].weight[0] + terms["experts.up"][0].weight[0]
    assert not torch.allclose(moved, routed.experts["experts.up"].terms[0].weight[0], atol=1e-3)
    expected = routed.run()
    assert torch.allclose(routed.run_with(terms), expected, atol=1e-4 * float(expected.abs().max()))


def test_what_the_merge_refuses():
    layer = make_layer()
    with pytest.raises(UserError, match="rewritten by a step before: merge comes first"):
        merged(merged(layer))
    with pytest.raises(UserError, match="start: 4 in layer 3, whose experts are 0 to 3"):
        merged(layer, start=4)
    with pytest.raises(UserError, match="one expert"):
        merged(make_layer(experts=1))
    bad = with_weights(layer, lambda name, w: w.index_fill(0, torch.tensor(2), float("nan")))
    with pytest.raises(UserError, match="layer 3: expert 2 holds NaN"):
        merged(bad)


def test_the_largest_entries_by_one_threshold():
    parts = {
        "gate": torch.tensor([[5.0, -1.0], [0.5, 2.0]]),
        "down": torch.tensor([[-4.0, 2.0], [2.0, 0.1]]),
    }
    found = largest(parts, 4)
    assert found["gate"].tolist() == [[True, False], [False, True]]
    assert found["down"].tolist() == [[True, True], [False, False]]
    assert all(bool(mask.all()) for mask in largest(parts, 8).values())
    zero = largest({"up": torch.zeros(2, 3)}, 4)["up"]
    assert zero.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("merge", [True, False])
def test_pruned_residuals_have_the_stated_entries(merge):
    layer = make_layer(neurons=16)
    before = merged(layer) if merge else layer
    settings, costs = UP.sizes(before, EXACT)
    assert settings[-1] == DENSE and settings[:-1] == sorted(set(settings[:-1]))
    for size, cost in list(zip(settings, costs, strict=True))[:: len(settings) // 5]:
        terms = UP.prune(before, NOTHING, size, EXACT)
        planned = UP.layout(on_meta(before), size, EXACT)
        base = sum(bank.terms[0].parameters() for bank in before.values()) if merge else 0
        for found in (terms, planned):
            assert sum(t.parameters() for ts in found.values() for t in ts) == base + cost
        nbytes = [
            sum(t.nbytes() for ts in found.values() for t in ts) for found in (terms, planned)
        ]
        assert nbytes[0] == nbytes[1]
    whole = UP.prune(before, NOTHING, 3 * 16 * 6, EXACT)
    tokens = Tokens()
    exact = output(layer, tokens)
    assert torch.allclose(output(after(layer, whole), tokens), exact, atol=1e-3)


def test_numbers_of_entries_are_rounded_and_their_sum_stays():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        parts = {part: torch.randn(9, 8, generator=generator) for part in ("gate", "up", "down")}
        exact, rounded = largest(parts, 96), largest(parts, 96, 16)
        numbers = [int(mask.sum()) for mask in rounded.values()]
        assert sum(numbers) == 96 and all(n % 16 == 0 for n in numbers)
        for part, mask in exact.items():
            assert int((mask != rounded[part]).sum()) == abs(
                int(mask.sum()) - int(rounded[part].sum())
            )
            assert int((mask != rounded[part]).sum()) < 16
    layer = make_layer(neurons=16)
    settings, _ = UP.sizes(layer, UP.Options(entry_multiple=32))
    assert settings == [32, 64, 96, 128, 160, 192, 224, 256, DENSE]
    with pytest.raises(UserError, match="size 100 of the experts of layer 3 is no multiple"):
        UP.layout(layer, 100, UP.Options())


def test_one_threshold_an_expert_over_its_three_matrices():
    layer = make_layer(neurons=16)
    scaled = with_weights(layer, lambda name, w: 100 * w if name == "experts.down" else w)
    terms = UP.prune(scaled, NOTHING, 96, EXACT)
    entries = {name: [t.parameters() for t in found] for name, found in terms.items()}
    assert sum(entries["experts.down"]) > 4 * 90
    for e in range(4):
        kept = torch.cat([after(layer, terms)[n].materialise(e)[0].flatten() for n in layer])
        every = torch.cat([scaled[n].materialise(e)[0].flatten() for n in layer])
        assert int((kept != 0).sum()) == 96
        assert every[kept != 0].abs().min() >= every[kept == 0].abs().max()
        assert torch.equal(kept[kept != 0], every[kept != 0])


def test_storage_of_positions_changes_bytes_and_nothing_else():
    before = merged(make_layer(neurons=16))
    plain, bitmap = (
        UP.prune(before, NOTHING, 72, UP.Options(storage=storage, entry_multiple=1))
        for storage in ("positions", "bitmap")
    )
    for name, bank in before.items():
        a, b = (after(before, terms)[name] for terms in (plain, bitmap))
        assert a.parameters() == b.parameters() and a.nbytes() > b.nbytes()
        for e in range(4):
            assert torch.equal(a.materialise(e)[0], b.materialise(e)[0])
        assert bank.terms[0] in a.terms


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
def test_joint_factors_share_u_and_lose_the_tail(storage):
    before = merged(make_layer(neurons=5, hidden=7))
    options = JOINT.Options(storage=storage, rank_multiple=1)
    residual = {name.rsplit(".", 1)[-1]: bank.terms[1].weight for name, bank in before.items()}
    tails = [joint({part: w[e] for part, w in residual.items()}).spectrum for e in range(4)]
    last = float("inf")
    for rank in range(1, 6):
        terms = JOINT.prune(before, NOTHING, rank, options)
        planned = JOINT.layout(on_meta(before), rank, options)
        specs = [[t.spec() for ts in found.values() for t in ts] for found in (terms, planned)]
        assert specs[0] == specs[1]
        lost = sum(
            float((terms[f"experts.{part}"][1].materialise(e)[0] - w[e]).square().sum())
            for part, w in residual.items()
            for e in range(4)
        )
        assert lost == pytest.approx(sum(float(t[rank:].sum()) for t in tails), rel=1e-4, abs=1e-6)
        assert lost <= last
        last = lost
        if storage == "plain":
            gate, up, down = (terms[f"experts.{part}"][1] for part in ("gate", "up", "down"))
            assert torch.equal(gate.U, up.U) and torch.equal(down.V, gate.U.transpose(1, 2))
    assert last == pytest.approx(0, abs=1e-6)
    settings, costs = JOINT.sizes(before, options)
    for size, cost in zip(settings[:-1], costs[:-1], strict=True):
        found = JOINT.layout(on_meta(before), size, options)
        assert sum(ts[1].parameters() for ts in found.values()) == cost


def test_each_matrix_by_itself_loses_less_at_the_rank_and_size_that_are_stored():
    """U is stored in every bank: at equal rank joint and per-matrix SVD store the same here."""
    before = merged(make_layer(neurons=16, hidden=12))
    [svd] = [m for m in svd_methods() if m.name == "svd"]

    def lost(terms):
        return sum(
            float((ts[1].materialise(e)[0] - before[name].terms[1].weight[e]).square().sum())
            for name, ts in terms.items()
            for e in range(4)
        )

    together = JOINT.prune(before, NOTHING, 4, JOINT.Options())
    apart = {name: svd.decompose(bank, NOTHING, 4, svd.Options()) for name, bank in before.items()}
    assert sum(t.parameters() for ts in together.values() for t in ts) == sum(
        t.parameters() for ts in apart.values() for t in ts
    )
    assert lost(apart) < lost(together)


@pytest.mark.parametrize("method", [UP, JOINT], ids=lambda m: m.name)
def test_dense_changes_nothing_and_bad_sizes_are_named(method):
    before = merged(make_layer())
    options = EXACT if method is UP else method.Options()
    for terms in (
        method.prune(before, NOTHING, DENSE, options),
        method.layout(on_meta(before), DENSE, options),
    ):
        assert [t.kind for t in terms["experts.up"]] == ["dense", "dense"]
    with pytest.raises(UserError, match="experts of layer 3"):
        method.prune(before, NOTHING, 10**6, options)
