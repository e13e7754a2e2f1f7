"""Streaming gives the model's own bits with one layer in memory, or refuses the family."""

from __future__ import annotations

import functools
from pathlib import Path

import families
import pytest
import torch
from mctk.checkpoint import Source
from mctk.errors import UserError
from mctk.files import write_tensors
from mctk.sweep import ForwardSweep, LayerVisit, StreamedModel, stream_logits
from mctk.sweep.passed import same
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralModel

ALL = [*families.FAMILIES, "llama"]


def save(path: Path, family: str, **changes: object) -> nn.Module:
    """Writes a model in several small shards; returns it, run by our experts."""
    model = families.tiny(family, **changes)
    model.save_pretrained(path, max_shard_size="30KB")
    if family != "llama":
        model.set_experts_implementation("mctk")
    return model


def own_logits(model: nn.Module, ids: torch.Tensor, batch: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part, use_cache=False).logits for part in ids.split(batch)])


def plain(layer: LayerVisit) -> list[torch.Tensor]:
    return [layer.run(b) for b in range(len(layer.inputs))]


def real_layers(model: StreamedModel) -> set[int]:
    """Layers of which any parameter or stored buffer is in memory."""
    found = set()
    for index, layer in enumerate(model.layers):
        stored = layer.state_dict(keep_vars=True).values()
        if any(not tensor.is_meta for tensor in stored):
            found.add(index)
    return found


@pytest.fixture
def mixtral(tmp_path) -> StreamedModel:
    save(tmp_path / "model", "mixtral", num_hidden_layers=3)
    return StreamedModel(Source(tmp_path / "model"))


@pytest.mark.parametrize("family", ALL)
def test_streamed_logits_are_the_models_own_bit_for_bit(tmp_path, monkeypatch, family):
    model = save(tmp_path, family)
    ids = families.token_ids(3)
    expected = own_logits(model, ids, 2)

    def loads(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded whole")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loads)
    source = Source(tmp_path)
    assert len(source.files) > 2
    streamed = StreamedModel(source)
    steps = []
    logits = stream_logits(streamed, ids, 2, lambda done, total: steps.append((done, total)))
    parts = list(logits)
    assert [len(part) for part in parts] == [2, 1]
    assert torch.equal(torch.cat(parts), expected)
    count = len(streamed.layers)
    assert steps == [(i + 1, count) for i in range(count)]


@pytest.mark.parametrize("family", ALL)
def test_one_layer_is_in_memory_at_a_time(tmp_path, family):
    save(tmp_path, family)
    streamed = StreamedModel(Source(tmp_path))
    assert all(p.is_meta for p in streamed.model.parameters())
    seen = []

    def visit(layer: LayerVisit) -> list[torch.Tensor]:
        assert layer.module is streamed.layers[layer.index]
        assert real_layers(streamed) == {layer.index}
        assert all(not p.is_meta for p in layer.module.parameters())
        seen.append(layer.index)
        return plain(layer)

    ForwardSweep(streamed, families.token_ids(), 1).run(visit)
    assert seen == list(range(len(streamed.layers)))
    assert real_layers(streamed) == set()
    assert not streamed.model.get_input_embeddings().weight.is_meta
    ForwardSweep(streamed, families.token_ids(), 1).run(visit)  # and a second time


def test_a_layer_is_freed_when_a_visit_fails(mixtral):
    def visit(layer: LayerVisit) -> list[torch.Tensor]:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        ForwardSweep(mixtral, families.token_ids(), 1).run(visit)
    assert real_layers(mixtral) == set()
    assert not any("forward" in vars(layer) for layer in mixtral.layers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_compute_dtype(tmp_path, dtype):
    save(tmp_path, "qwen2_moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
    model.set_experts_implementation("mctk")
    streamed = StreamedModel(Source(tmp_path), dtype=dtype)
    ids = families.token_ids()
    logits = torch.cat(list(stream_logits(streamed, ids)))
    assert logits.dtype == streamed.dtype == getattr(torch, dtype)
    assert torch.equal(logits, own_logits(model, ids, 1))


def test_settings_that_would_record_are_without_effect(tmp_path):
    # Saved after training with an auxiliary loss, as some checkpoints are.
    model = save(tmp_path, "mixtral", output_router_logits=True, output_hidden_states=True)
    ids = families.token_ids()
    logits = torch.cat(list(stream_logits(StreamedModel(Source(tmp_path)), ids)))
    model.config.output_router_logits = False
    assert torch.equal(logits, own_logits(model, ids, 1))


def test_hidden_states_leave_as_they_enter_the_next_layer(mixtral, tmp_path):
    model = save(tmp_path / "again", "mixtral", num_hidden_layers=3)
    ids = families.token_ids(3)
    entering: dict[int, list[torch.Tensor]] = {}

    def visit(layer: LayerVisit) -> list[torch.Tensor]:
        entering[layer.index] = [x.clone() for x in layer.inputs]
        return plain(layer)

    final = ForwardSweep(mixtral, ids, 2).run(visit)
    expected: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: expected.append(args[0]))
        for layer in model.model.layers
    ]
    handles.append(model.model.norm.register_forward_pre_hook(lambda m, a: expected.append(a[0])))
    own_logits(model, ids, 2)
    for handle in handles:
        handle.remove()
    for b in range(2):
        ours = [*(entering[i][b] for i in range(3)), final[b].hidden]
        theirs = expected[4 * b : 4 * b + 4]
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


# Going on after a kill.


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_sweep_goes_on_from_saved_states(mixtral, tmp_path, start):
    ids = families.token_ids(3)
    whole = ForwardSweep(mixtral, ids, 2).run(plain)
    state = tmp_path / "hidden.safetensors"

    def killed(layer: LayerVisit) -> list[torch.Tensor]:
        if layer.index == start:
            raise KeyboardInterrupt
        return plain(layer)

    first = ForwardSweep(mixtral, ids, 2, state)
    assert first.saved_layer() == 0
    if start == 3:
        first.run(killed)
    else:
        with pytest.raises(KeyboardInterrupt):
            first.run(killed)
    again = ForwardSweep(mixtral, ids, 2, state)
    assert again.saved_layer() == start
    seen = []

    def visit(layer: LayerVisit) -> list[torch.Tensor]:
        seen.append(layer.index)
        return plain(layer)

    final = again.run(visit, start)
    assert seen == list(range(start, 3))
    assert all(torch.equal(x.hidden, y.hidden) for x, y in zip(final, whole, strict=True))


def test_states_of_another_layer_are_not_taken(mixtral, tmp_path):
    state = tmp_path / "hidden.safetensors"
    sweep = ForwardSweep(mixtral, families.token_ids(), 1, state)
    sweep.run(plain)
    with pytest.raises(ValueError, match="does not hold the states that enter layer 1"):
        sweep.run(plain, 1)


@pytest.mark.parametrize("damage", ["cut", "garbage", "fewer batches", "no layer"])
def test_states_that_cannot_be_used_count_as_none(mixtral, tmp_path, damage):
    state = tmp_path / "hidden.safetensors"
    sweep = ForwardSweep(mixtral, families.token_ids(), 1, state)
    sweep.run(plain)
    assert sweep.saved_layer() == 3
    if damage == "cut":
        with state.open("r+b") as file:
            file.truncate(300)
    elif damage == "garbage":
        state.write_bytes(b"garbage")
    elif damage == "fewer batches":
        write_tensors(state, {"batch.0": torch.zeros(1)}, {"layer": "2"})
    else:
        write_tensors(state, {"batch.0": torch.zeros(1), "batch.1": torch.zeros(1)})
    assert sweep.saved_layer() == 0


# Families that cannot be streamed are refused.


class _More(MixtralDecoderLayer):
    """Returns more than hidden states."""

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states, *args, **kwargs), hidden_states.mean()


class _Notes(MixtralDecoderLayer):
    """Leaves notes for later layers in what it is passed."""

    def forward(self, hidden_states, *args, notes=None, **kwargs):
        out = super().forward(hidden_states, *args, **kwargs)
        if notes is not None:
            out = out + sum(notes)
            notes.append(out.mean())
        return out


def _wrapped(layer: nn.Module, **more: object) -> None:
    """Lets the model pass more to a layer, however `forward` is replaced."""
    layer.__class__ = type("_Wrapped", (type(layer),), {"__call__": _call})
    layer.more = more


def _call(self: nn.Module, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
    more = {k: v(hidden_states) if callable(v) else v for k, v in self.more.items()}
    return super(type(self), self).__call__(hidden_states, *args, **kwargs, **more)


def test_a_layer_that_returns_more_than_hidden_states_is_refused(mixtral):
    mixtral.layers[0].__class__ = _More
    visited = []
    with pytest.raises(UserError, match=r"_More, layer 0: returns a tensor of shape \[\]"):
        ForwardSweep(mixtral, families.token_ids(), 1).run(lambda x: visited.append(x) or plain(x))
    assert not visited  # before anything is collected
    assert real_layers(mixtral) == set()


def test_arguments_that_depend_on_hidden_states_are_refused_where_nothing_shows_it(mixtral):
    _wrapped(mixtral.layers[1], energy=lambda hidden: hidden.detach().square().mean())
    with pytest.raises(UserError, match="layer 1 gets other arguments"):
        ForwardSweep(mixtral, families.token_ids(), 1).run(plain)


def test_arguments_that_depend_on_hidden_states_are_computed_anew(mixtral):
    _wrapped(mixtral.layers[1], energy=lambda hidden: hidden.square().mean())
    assert mixtral.wiring.computed
    assert not any(mixtral.wiring.live)
    ForwardSweep(mixtral, families.token_ids(), 1).run(plain)


def test_state_that_is_passed_from_layer_to_layer_is_refused(mixtral, monkeypatch):
    for layer in mixtral.layers:
        layer.__class__ = _Notes
    original = MixtralModel.forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        return original(self, *args, **kwargs, notes=[])

    monkeypatch.setattr(MixtralModel, "forward", forward)
    with pytest.raises(UserError, match="layer 0 changes what it is passed"):
        ForwardSweep(mixtral, families.token_ids(), 1).run(plain)


def test_layers_that_are_called_out_of_order_or_not_at_all_are_refused(mixtral, monkeypatch):
    sweep = ForwardSweep(mixtral, families.token_ids(), 1)
    layers = list(mixtral.layers)
    monkeypatch.setattr(
        type(mixtral.model.model.layers), "__iter__", lambda self: iter(reversed(layers))
    )
    monkeypatch.setattr(
        type(mixtral.model.model.layers), "__getitem__", lambda self, i: layers[::-1][i]
    )
    mixtral.layers = layers
    with pytest.raises(UserError, match="calls layer 2 before layer 0"):
        sweep.run(plain)
    monkeypatch.undo()
    mixtral.model.config.num_hidden_layers = 2
    with pytest.raises(UserError, match="calls only 2 of its 3 layers"):
        sweep.run(plain)


def test_a_visit_that_changes_what_goes_on_is_found_out(mixtral):
    def visit(layer: LayerVisit) -> list[torch.Tensor]:
        return [x + 1 if layer.index == 1 else x for x in plain(layer)]

    with pytest.raises(UserError, match="layer 2 gets other hidden states"):
        ForwardSweep(mixtral, families.token_ids(), 1).run(visit)


def test_overflow_is_not_taken_for_an_unsupported_family(tmp_path):
    model = families.tiny("mixtral")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(100)
        model.model.layers[0].self_attn.o_proj.weight.mul_(2e4)
    model.save_pretrained(tmp_path)
    streamed = StreamedModel(Source(tmp_path), dtype="float16")
    with pytest.raises(UserError, match=r"layer 1 is not finite in torch.float16; try another"):
        ForwardSweep(streamed, families.token_ids(), 1).run(plain)


def test_same():
    x = torch.tensor([1.0, 2.0])
    assert same(x, x.clone())
    assert not same(x, x.double())
    assert not same(x, x[:1])
    assert same({"a": (x, [None, 3])}, {"a": (x.clone(), [None, 3])})
    assert not same({"a": x}, {"a": x, "b": None})
    assert not same((x,), [x])
    assert not same(object(), object())
    assert not same(x, None)
