"""Families that pass more than hidden states between layers, and those that cannot be streamed."""

from __future__ import annotations

import pytest
import torch
from mctk.checkpoint import Source
from mctk.errors import UserError
from mctk.statistics import Fisher, GradientCollector
from mctk.sweep import (
    BackwardSweep,
    BackwardVisit,
    ForwardSweep,
    LayerVisit,
    Passed,
    StreamedModel,
)
from mctk.sweep.passed import LayerCall, mapping_after, read_mapping
from mctk.sweep.wiring import trace_wiring
from torch import nn

from tests import families
from tests.sweep.sweep_bench import LENGTH, Bench, assert_close, plain, reference

# What is passed: a router's states; indices; outputs of earlier layers that the model puts
# together; keys and values in a mapping that layers share, and indices.
CARRYING = {
    "zaya": (2, [set(), {"0.1"}, {"1.1"}, set()], set()),
    "hy_v4": (2, [set(), {"0.1"}, {"1.1"}, {"2.1"}, set()], set()),
    "inkling2": (0, [set(), set(), set(), {"1.0"}, {"1.0"}], set()),
    "mistral_large4": (2, [set(), {"0.1"}, {"1.1"}, set()], {"shared_kv_states"}),
}


@pytest.mark.parametrize("family", CARRYING)
def test_what_passes_is_found_without_weights(benches, family):
    elements, live, shared = CARRYING[family]
    wiring = benches(family).model.wiring
    assert wiring.elements == elements
    assert [set(names) for names in wiring.live] == live
    assert wiring.shared == shared
    assert wiring.more
    assert wiring.width == 4 * 32 * (2 if family == "hy_v4" else 1)
    assert wiring.passing() > wiring.width


def test_layers_that_take_keys_and_values_of_others_are_streamed(tmp_path):
    # The later two have none of their own, and are passed only those tokens that the head needs.
    kinds = ["sliding_attention", "full_attention"] * 2
    changes = {"num_hidden_layers": 4, "layer_types": kinds, "num_kv_shared_layers": 2}
    bench = Bench(tmp_path, "gemma4", **changes, hidden_size_per_layer_input=8)
    seen = []

    def visit(layer: LayerVisit) -> list[torch.Tensor]:
        seen.append(sorted(layer.more[0]))
        return plain(layer)

    ForwardSweep(bench.model, bench.ids, 2).run(visit)  # compares with the model's own logits

    def written(layer: int) -> list[str]:
        return [f"{layer}.shared_kv_states.{kinds[layer]}.{part}" for part in (0, 1)]

    every = written(0) + written(1)
    assert seen == [[], written(0), every, every]


def test_what_passes_nothing_but_hidden_states_says_so(benches):
    wiring = benches("mixtral").model.wiring
    assert wiring.elements == 0
    assert not wiring.more


@pytest.mark.parametrize("family", ["zaya", "inkling2", "mistral_large4"])
def test_gradients_pass_through_what_is_carried(benches, family):
    bench = benches(family)
    expected, own = reference(bench.whole, bench.ids, bench.ids)
    values = {}

    def visit(layer: BackwardVisit) -> None:
        sites = bench.sites[layer.index]
        # Not those of an indexer, which chooses without gradients.
        names = [name for name in sites if name.startswith("experts") or name.endswith(".o")]
        needs = [Fisher(name) for name in names]
        device = bench.model.device
        collector = GradientCollector(layer.module, layer.index, sites, needs, LENGTH, device)
        with collector.listening():
            layer.run()
        values.update({(layer.index, n.bank): v for n, v in collector.result().items()})

    # With only every second boundary kept, what lies between is carried once more.
    losses = BackwardSweep(bench.model, bench.ids, 2, bench.forward(2, every=2)).run(visit)
    assert losses == pytest.approx(own, rel=1e-5)
    assert len(values) >= 2 * len(bench.sites)
    assert_close(values, {key: expected[key] for key in values})


@pytest.mark.parametrize("family", ["zaya", "mistral_large4"])
def test_a_killed_sweep_goes_on_with_what_was_carried(benches, family, tmp_path):
    bench = benches(family)
    state = tmp_path / "hidden.safetensors"

    def killed(layer: LayerVisit) -> list[torch.Tensor]:
        if layer.index == 2:
            raise KeyboardInterrupt
        return plain(layer)

    whole = ForwardSweep(bench.model, bench.ids, 2).run(plain)
    with pytest.raises(KeyboardInterrupt):
        ForwardSweep(bench.model, bench.ids, 2, state).run(killed)
    sweep = ForwardSweep(bench.model, bench.ids, 2, state)
    assert sweep.saved_layer() == 2
    for again, once in zip(sweep.run(plain, 2), whole, strict=True):
        assert torch.equal(again.hidden, once.hidden)


def test_what_is_carried_matters(benches, monkeypatch):
    bench = benches("zaya")
    leave = StreamedModel.leave

    def forgetful(self, index, passed, call, output):
        left = leave(self, index, passed, call, output)
        return Passed(left.hidden, {name: torch.zeros_like(t) for name, t in left.more.items()})

    monkeypatch.setattr(StreamedModel, "leave", forgetful)
    with pytest.raises(UserError, match="layer 1 gets other arguments"):
        ForwardSweep(bench.model, bench.ids, 2).run(plain)


def test_a_layer_that_is_not_the_originals_passes_nothing_on(benches):
    bench = benches("zaya")

    def twice(layer: LayerVisit) -> list[torch.Tensor]:
        outputs = plain(layer)
        weight = next(p for p in layer.module.parameters() if p.ndim == 2)
        kept = weight.detach().clone()
        weight.data.zero_()
        for b in range(len(layer.inputs)):
            layer.run(b, False)
        weight.data.copy_(kept)
        return outputs

    for ours, theirs in zip(
        ForwardSweep(bench.model, bench.ids, 2).run(twice),
        ForwardSweep(bench.model, bench.ids, 2).run(plain),
        strict=True,
    ):
        assert torch.equal(ours.hidden, theirs.hidden)


def test_a_loop_over_layers_is_refused_before_weights_are_read(tmp_path):
    families.tiny("inkling2_loop").save_pretrained(tmp_path)
    model = StreamedModel(Source(tmp_path))
    with pytest.raises(UserError, match=r"calls layer 2 again after layer 3 \(a loop"):
        _ = model.wiring
    assert all(parameter.is_meta for parameter in model.model.parameters())


class _Odd(nn.Module):
    """A model whose forward calls its layers in a way of its own."""

    def __init__(self, call) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.call = call

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache):
        hidden = self.call(self.layers, self.embedding(input_ids))
        return Logits(self.head(hidden))


class Logits:
    def __init__(self, logits) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layers, x: layers[1](layers[0](x)), "calls only 2 of its 3 layers"),
        (lambda layers, x: layers[2](layers[1](x)), "calls layer 1 before layer 0"),
        (lambda layers, x: layers[0](x).no_such_thing, "cannot be followed .*no_such_thing"),
    ],
)
def test_a_model_that_cannot_be_streamed_is_refused(call, message):
    model = _Odd(call)
    with pytest.raises(UserError, match=message):
        trace_wiring(model, model.layers)
    assert "forward" not in model.head.__dict__
    assert not any("forward" in layer.__dict__ for layer in model.layers)


def test_what_is_changed_in_place_is_followed():
    def call(layers, x):
        first = layers[0](x)
        second = layers[1](first)
        second += 1
        return layers[2](second) + first

    model = _Odd(call)
    wiring = trace_wiring(model, model.layers)
    assert [set(names) for names in wiring.live] == [set(), set(), {"0.0"}, {"0.0"}]
    assert not wiring.computed


def test_unpacked_elements_are_counted():
    def call(layers, x):
        for layer in layers:
            x, _, last = layer(x)
        return x + last

    model = _Odd(call)
    wiring = trace_wiring(model, model.layers)
    assert wiring.elements == 3
    # Nobody but the logits uses the last element, and nobody the middle one.
    assert [set(names) for names in wiring.live] == [set(), set(), set(), {"2.2"}]


def test_a_shared_mapping_keeps_what_was_written_last():
    first, second, new = (torch.full((2, 1), float(i)) for i in range(3))
    earlier = {"0.kv.full.0": first, "0.kv.full.1": second, "1.kv.local": second}
    assert read_mapping(earlier, "0.kv.") == {"full": (first, second)}
    assert read_mapping(earlier, "1.kv.") == {"local": second}
    mapping = {"full": (new, second), "local": second, "more": second}
    after = mapping_after(mapping, earlier, "2.kv.", "Layer, layer 2")
    assert list(after) == ["2.kv.full.0", "0.kv.full.1", "1.kv.local", "2.kv.more"]
    assert after["2.kv.full.0"] is new
    with pytest.raises(UserError, match=r"Layer, layer 2: writes a int under 'count'"):
        mapping_after({"count": 3}, {}, "2.kv.", "Layer, layer 2")


def test_a_layer_that_is_not_given_the_shared_mapping_leaves_it_alone():
    def call(layers, x):
        kv: dict = {}
        x = layers[0](x)
        return layers[2](layers[1](x, kv=kv), kv=kv)

    model = _Odd(call)
    wiring = trace_wiring(model, model.layers)
    assert wiring.shared == {"kv"}
    streamed = object.__new__(StreamedModel)
    streamed.wiring, streamed.layers = wiring, model.layers
    earlier = {"1.kv.full": torch.ones(2, 1)}
    passed = Passed(torch.zeros(2, 3), earlier)
    after = streamed.leave(0, passed, LayerCall((), {}), torch.zeros(2, 3))
    assert after.more == earlier
    streamed.answer(0, torch.zeros(2, 3), LayerCall((), {}), passed, 1)
    call_of_one = LayerCall((), {"kv": {}})
    streamed.answer(1, torch.zeros(2, 3), call_of_one, passed, 2)
    assert call_of_one.kwargs["kv"].keys() == {"full"}


def test_batches_are_split_and_joined_with_all_that_passes():
    passed = Passed(torch.randn(5, 3, 2), {"0.1": torch.arange(10).reshape(5, 2)})
    parts = passed.split([2, 3])
    assert [len(part) for part in parts] == [2, 3]
    again = Passed.cat(parts)
    assert torch.equal(again.hidden, passed.hidden)
    assert torch.equal(again.more["0.1"], passed.more["0.1"])
    assert Passed.of(passed.tensors("x"), "x").more.keys() == {"0.1"}
    assert LayerCall((), {"a": 1, "b": 2}).without({"a"}).kwargs == {"b": 2}
