"""Gradients of a streamed model are those of a backward pass through the whole one."""

from __future__ import annotations

import pytest
import torch
from mctk.errors import UserError
from mctk.sweep import (
    IGNORED,
    BackwardSweep,
    BackwardVisit,
    BoundaryStore,
    ForwardSweep,
    LayerVisit,
    Passed,
    StreamedModel,
)

from tests.sweep.sweep_bench import (
    Bench,
    Values,
    assert_close,
    padded,
    plain,
    reference,
)

FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"]


# Exactness.


@pytest.mark.parametrize("family", FAMILIES)
def test_squared_gradients_are_those_of_the_whole_model(benches, family):
    bench = benches(family)
    labels = padded(bench.ids)
    expected, own = reference(bench.whole, bench.ids, labels)
    assert any(value.any() for value in expected.values())
    for batch, every in ((1, 1), (3, 2), (4, 1)):
        values, losses = bench.fisher(batch, every, targets=labels)
        assert_close(values, expected)
        assert losses == pytest.approx(own, rel=1e-6)
    assert not list(bench.root.glob("boundaries/segment/*"))


def test_tied_embeddings_and_scaled_logits(tmp_path):
    bench = Bench(tmp_path, "granitemoe")
    expected, own = reference(bench.whole, bench.ids, bench.ids)
    values, losses = bench.fisher(2)
    assert_close(values, expected)
    assert losses == pytest.approx(own, rel=1e-6)


def test_the_auxiliary_loss_has_no_part_in_it(tmp_path):
    bench = Bench(tmp_path, "mixtral", output_router_logits=True, router_aux_loss_coef=10.0)
    with_auxiliary, own = reference(bench.whole, bench.ids, bench.ids)
    values, losses = bench.fisher(2)
    assert all(abs(a - b) > 1 for a, b in zip(losses, own, strict=True))
    bench.whole.config.output_router_logits = False
    expected, own = reference(bench.whole, bench.ids, bench.ids)
    assert_close(values, expected)
    assert losses == pytest.approx(own, rel=1e-6)
    key = 0, "experts.down"  # the test's test: with the auxiliary loss it is something else
    assert (with_auxiliary[key] - expected[key]).norm() > 1e-2 * expected[key].norm()


def test_one_layer_is_in_memory_at_a_time(benches):
    bench = benches("deepseek_v3")
    store = bench.forward(2, every=3)
    seen = []

    def visit(layer: BackwardVisit) -> None:
        held = {
            index
            for index, module in enumerate(bench.model.layers)
            if any(not p.is_meta for p in module.parameters())
        }
        assert held == {layer.index}
        assert layer.module is bench.model.layers[layer.index]
        assert not any(p.requires_grad for p in layer.module.parameters())
        layer.run()
        assert all(p.grad is None for p in layer.module.parameters())
        seen.append(layer.index)

    BackwardSweep(bench.model, bench.ids, 2, store).run(visit, 1)
    assert seen == [2, 1]
    assert all(p.is_meta for layer in bench.model.layers for p in layer.parameters())


# Labels.


def test_labels_of_the_model_are_drawn_from_its_distribution(benches, tmp_path):
    bench = benches("mixtral")
    labels = padded(bench.ids)
    banks = ["experts.up", "attention.q"]

    def run(batch: int, **settings: object) -> tuple[Values, list[float]]:
        values: Values = {}
        sweep = BackwardSweep(bench.model, bench.ids, batch, bench.forward(batch), **settings)
        losses = sweep.run(bench.collecting(values, settings.get("labels", "data"), banks))
        return values, losses

    drawn = {"labels": "model", "targets": labels}
    values, losses = run(1, **drawn)
    again, losses_again = run(1, **drawn)
    assert losses == losses_again
    assert all(torch.equal(values[key], again[key]) for key in values)
    other_batch, losses_of_it = run(3, **drawn)
    assert losses_of_it == pytest.approx(losses, rel=1e-5)
    assert_close(other_batch, values)
    assert run(1, **drawn, seed=1)[1] != losses
    _, of_data = run(1, targets=labels)
    assert of_data != losses
    # The reference is given the labels that were drawn. They can be told from the losses alone.
    with torch.no_grad():
        logits = bench.whole(bench.ids, use_cache=False).logits
    chances = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    reached = logits[:, :-1].double().softmax(-1).cumsum(-1)
    tokens = (reached < chances[:, 1:, None]).sum(-1)
    targets = torch.cat([labels[:, :1], tokens], 1).where(labels != IGNORED, labels)
    expected, own = reference(bench.whole, bench.ids, targets)
    assert losses == pytest.approx(own, rel=1e-5)
    assert_close(values, {key: expected[key] for key in values})


def test_drawn_tokens_have_the_distribution():
    from mctk.sweep.backward import _draw

    scores = torch.tensor([1.0, -2.0, 0.5, -torch.inf, 0.0]).expand(20000, 5)
    drawn = _draw(scores, torch.rand(20000, generator=torch.Generator().manual_seed(0)))
    share = torch.bincount(drawn, minlength=5) / 20000
    assert share[3] == 0
    assert torch.allclose(share, scores[0].softmax(-1), atol=0.01)
    edges = _draw(torch.tensor([[-torch.inf, 0.0, 0.0]] * 2), torch.tensor([0.0, 1 - 2**-24]))
    assert edges.tolist() == [1, 2]


def test_a_sequence_without_labels_is_an_error(benches):
    bench = benches("mixtral")
    labels = bench.ids.clone()
    labels[1, 1:] = IGNORED  # the first label is never predicted
    with pytest.raises(UserError, match="sequence 1 has no token to predict"):
        BackwardSweep(bench.model, bench.ids, 1, BoundaryStore(bench.root, 2), targets=labels)


# Going on after a kill.


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("moment", ["before", "after", "saving"])
def test_a_sweep_back_goes_on(benches, tmp_path, monkeypatch, every, moment):
    bench = benches("deepseek_v3")
    store = bench.forward(3, every)
    state = tmp_path / "gradients.safetensors"
    whole: Values = {}
    losses = BackwardSweep(bench.model, bench.ids, 3, store).run(bench.collecting(whole))
    values: Values = {}
    collect = bench.collecting(values)

    def killed(layer: BackwardVisit) -> None:
        if layer.index == 1 and moment == "before":
            raise KeyboardInterrupt
        collect(layer)
        if layer.index == 1 and moment == "after":
            raise KeyboardInterrupt
        if layer.index == 1:
            monkeypatch.setattr("mctk.sweep.backward.write_tensors", lambda *_: 1 / 0)

    first = BackwardSweep(bench.model, bench.ids, 3, store, state=state)
    assert first.saved_layer() is None
    with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
        first.run(killed)
    monkeypatch.undo()
    again = BackwardSweep(bench.model, bench.ids, 3, store, state=state)
    assert again.saved_layer() == 2
    seen = []
    assert again.run(lambda layer: seen.append(layer.index) or collect(layer)) == losses
    assert seen == [1, 0]
    assert values.keys() == whole.keys()
    assert all(torch.equal(values[key], whole[key]) for key in whole)
    assert again.saved_layer() == 0
    assert again.run(lambda layer: pytest.fail("visited again")) == losses
    assert not list(store.directory.glob("segment/*"))


def test_gradients_of_other_tokens_are_not_taken(benches, tmp_path):
    bench = benches("mixtral")
    store = bench.forward(2)
    state = tmp_path / "gradients.safetensors"

    def sweep(ids: torch.Tensor, batch: int = 2, **settings: object) -> BackwardSweep:
        return BackwardSweep(bench.model, ids, batch, store, state=state, **settings)

    sweep(bench.ids).run(lambda layer: None, 1)  # a visit that does not care: the sweep runs it
    assert sweep(bench.ids).saved_layer() == 1
    assert sweep(bench.ids, seed=3).saved_layer() == 1  # draws nothing
    assert sweep(bench.ids.flip(0)).saved_layer() is None
    assert sweep(bench.ids, batch=1).saved_layer() is None
    assert sweep(bench.ids, labels="model").saved_layer() is None
    assert sweep(bench.ids, targets=padded(bench.ids)).saved_layer() is None
    state.write_bytes(b"garbage")
    assert sweep(bench.ids).saved_layer() is None


def test_a_layer_runs_once_a_visit(benches):
    bench = benches("mixtral")

    def visit(layer: BackwardVisit) -> None:
        layer.run()
        layer.run()

    with pytest.raises(ValueError, match="have gone through already"):
        BackwardSweep(bench.model, bench.ids, 2, bench.forward(2)).run(visit, 1)


# Boundaries.


def _equal(a: Passed, b: Passed) -> bool:
    """Whether all tensors of two are equal."""
    pairs = zip(a.tensors("x").items(), b.tensors("x").items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


def test_which_boundaries_are_kept(tmp_path):
    hidden = [
        Passed(torch.randn(2, 3, 4), {"1.1": torch.arange(6).reshape(2, 3)}),
        Passed(torch.randn(1, 3, 4).to(torch.bfloat16), {"1.1": torch.zeros(1, 3)}),
    ]
    store = BoundaryStore(tmp_path / "kept", layers=7, every=3, first=4)
    assert [i for i in range(8) if store.keeps(i)] == [3, 6, 7]
    assert store.nbytes(tokens=10, width=8) == (3 + 2) * 10 * 8
    assert not store.has(3)
    assert store.complete(3) and not store.complete(4)
    store.put(3, hidden)
    assert store.has(3) and store.complete(6) and not store.complete(7)
    assert all(_equal(a, b) for a, b in zip(store.get(3), hidden, strict=True))
    assert store.batch(3, 1).hidden.dtype == torch.bfloat16
    store.segment().put(5, hidden)
    (store.directory / ".layer.6.safetensors.1.tmp").touch()
    store.clear()
    assert not store.directory.exists()
    store.clear()
    for every, first in ((0, 0), (1, 7)):
        with pytest.raises(ValueError, match="of 7 layers"):
            BoundaryStore(tmp_path, 7, every, first)


def test_boundaries_are_kept_across_a_killed_forward_sweep(benches, tmp_path):
    bench = benches("deepseek_v3")
    whole = bench.forward(2, every=2)
    expected = {i: whole.get(i) for i in (0, 2, 3)}
    store = BoundaryStore(tmp_path / "boundaries", 3, every=2)
    state = tmp_path / "hidden.safetensors"

    def killed(layer: LayerVisit) -> list[torch.Tensor]:
        if layer.index == 2:
            raise KeyboardInterrupt
        outputs = plain(layer)
        for b in range(len(outputs)):
            layer.inputs[b] = outputs[b][:0]  # as a calibration frees them
        return outputs

    with pytest.raises(KeyboardInterrupt):
        ForwardSweep(bench.model, bench.ids, 2, state, store).run(killed)
    sweep = ForwardSweep(bench.model, bench.ids, 2, state, store)
    sweep.run(plain, sweep.saved_layer())
    for layer, hidden in expected.items():
        assert all(_equal(a, b) for a, b in zip(store.get(layer), hidden, strict=True))
    assert not store.has(1)
    store.clear()
    with pytest.raises(ValueError, match="lacks boundaries below layer 2"):
        sweep.run(plain, 2)
    with pytest.raises(ValueError, match="no boundary below layer 1"):
        store.put(3, expected[3])
        store.put(2, expected[2])
        BackwardSweep(bench.model, bench.ids, 2, store).run(lambda layer: None)


# What cannot be right is an error.


def test_losses_that_are_not_finite(benches, tmp_path):
    bench = benches("mixtral")
    store = bench.forward(2)
    hidden = store.get(2)
    hidden[1].hidden[0, 3, 5] = torch.nan
    store.put(2, hidden)
    with pytest.raises(UserError, match=r"losses are not finite in torch.float32; try another"):
        BackwardSweep(bench.model, bench.ids, 2, store).run(lambda layer: None)


def test_gradients_that_are_not_finite(benches):
    bench = benches("mixtral")
    store = bench.forward(2)

    def visit(layer: BackwardVisit) -> None:
        layer.module.self_attn.o_proj.weight.mul_(1e30)
        layer.module.self_attn.v_proj.weight.mul_(1e30)
        layer.run()

    with pytest.raises(UserError, match="gradients that leave layer 1 are not finite"):
        BackwardSweep(bench.model, bench.ids, 2, store).run(visit)


def test_float16_is_refused(benches):
    bench = benches("mixtral")
    half = StreamedModel(bench.model.source, dtype="float16")
    with pytest.raises(UserError, match="underflow in float16"):
        BackwardSweep(half, bench.ids, 2, BoundaryStore(bench.root, 2))


def test_a_model_without_gradients_is_an_error(benches, monkeypatch):
    bench = benches("mixtral")
    store = bench.forward(2)
    sweep = BackwardSweep(bench.model, bench.ids, 2, store)
    kinds = {"head": type(bench.model.model), "layer": type(bench.model.layers[1])}
    for what, message in (("head", "its head runs without"), ("layer", "layer 1 runs without")):
        with monkeypatch.context() as patch:
            patch.setattr(kinds[what], "forward", torch.no_grad()(kinds[what].forward))
            with pytest.raises(UserError, match=message):
                sweep.run(lambda layer: None)


def test_experts_that_run_without_gradients_are_an_error(benches, monkeypatch):
    # As remote code made for inference may: the layer has gradients past its experts.
    bench = benches("mixtral")
    sweep = BackwardSweep(bench.model, bench.ids, 2, bench.forward(2))
    kind = type(bench.model.layers[1].mlp.experts)
    monkeypatch.setattr(kind, "forward", torch.no_grad()(kind.forward))
    message = r"layer 1, mlp.experts: gradients came for 0 of the 52 rows that went through gate_up"
    with pytest.raises(UserError, match=message):
        sweep.run(bench.collecting({}, banks=["experts.gate"]))


def test_bfloat16_gradients_come_near(benches):
    bench = benches("mixtral")
    half = StreamedModel(bench.model.source, dtype="bfloat16")
    expected, own = reference(bench.whole, bench.ids, bench.ids)
    store = BoundaryStore(bench.root / "half", 2)
    ForwardSweep(half, bench.ids, 2, boundaries=store).run(plain)
    assert store.batch(1, 0).hidden.dtype == torch.bfloat16
    values: Values = {}
    losses = BackwardSweep(half, bench.ids, 2, store).run(bench.collecting(values))
    assert losses == pytest.approx(own, rel=0.05)
    for key in ((1, "attention.o"), (1, "experts.down")):
        assert (values[key] - expected[key]).norm() < 0.3 * expected[key].norm()
