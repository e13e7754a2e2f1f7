"""`propagate: compressed`: statistics are those of the run's own compressed layers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import mctk  # noqa: F401
import pytest
import torch
from mctk.engine import run
from mctk.engine.run import read_calibration
from mctk.planning import describe, make_plan
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.statistics import ExpertFrequency, RoutedOutputs, SecondMoment
from mctk_svdllm.methods import SvdLlm
from transformers import AutoModelForCausalLM

from tests.engine.conftest import DEMO, TEXT
from tests.engine.test_resume import check, weights
from tests.families import tiny

TEXTS = {
    "text": str(TEXT / "calibration" / "*.jsonl"),
    "sequences": 12,
    "length": 64,
    "batch": 4,
}
COMPRESSED = {**TEXTS, "propagate": "compressed"}
STEP = {"decompose": "svd_llm", "options": {"rank_multiple": 1}}


@pytest.fixture(scope="module")
def registry():
    return load_plugins()


@pytest.fixture
def spied(monkeypatch):
    """What svd_llm was given: (layer, need) → value."""
    seen = {}
    decompose = SvdLlm.decompose

    def spy(self, bank, statistics, size, options):
        for need in statistics:
            seen[bank.layer, need] = statistics[need]
        return decompose(self, bank, statistics, size, options)

    monkeypatch.setattr(SvdLlm, "decompose", spy)
    return seen


def naive(original: Path, compressed: Path, ids: torch.Tensor, targets: set[str]) -> dict:
    """Moments of the inputs of each layer of the original, fed by the compressed layers before.

    Both models whole in memory, tokens one sequence at a time, and nothing of the engine's.
    """
    whole = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    small = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)
    found: dict = {}

    def add(key, rows):
        total, count = found.get(key, (0.0, 0))
        found[key] = total + rows.double().T @ rows.double(), count + len(rows)

    def replay(index):
        """Runs the original's layer on what enters the compressed one."""

        def hook(module, args, kwargs):
            layer = whole.model.layers[index]
            handles = []
            for name, child in layer.named_modules():
                if name == "self_attn.o_proj":
                    handles.append(
                        child.register_forward_pre_hook(
                            lambda m, a: add((index, "attention.o", 0), a[0].flatten(0, -2))
                        )
                    )
                if name.endswith(".experts"):

                    def experts(m, a):
                        hidden, chosen = a[0], a[1]
                        for e in range(int(chosen.max()) + 1):
                            rows = (chosen == e).any(-1)
                            if rows.any():
                                add((index, "experts.gate", e), hidden[rows])

                    handles.append(child.register_forward_pre_hook(experts))
            layer(*args, **kwargs)
            for handle in handles:
                handle.remove()

        return hook

    for index, layer in enumerate(small.model.layers):
        layer.register_forward_pre_hook(replay(index), with_kwargs=True)
    with torch.no_grad():
        for sequence in ids.split(1):
            small(input_ids=sequence, use_cache=False)
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2", "zaya"])
def test_statistics_are_those_of_a_naive_recomputation(
    family, tmp_path, cache, write_recipe, registry, spied, monkeypatch
):
    model = tmp_path / "model"
    tiny(family, vocab_size=4096).save_pretrained(model, max_shard_size="200kB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, model)
    path = write_recipe(
        model=str(model),
        calibration=COMPRESSED,
        steps=[{**STEP, "targets": ["experts.*", "attention.o"]}],
        budget={"remove": 0.5, "of": "targets"},
    )
    recipe = load_recipe(path, registry=registry)
    run([recipe], registry, cache=cache)
    ids = read_calibration(make_plan(recipe, registry)).ids
    expected = naive(model, tmp_path / "out", ids, {"experts.gate", "attention.o"})
    checked = 0
    for (layer, bank, member), (total, count) in expected.items():
        found = spied[layer, SecondMoment(bank)]
        assert int(found.count[member]) == count
        error = (found.value[member].double() - total).norm() / total.norm()
        assert error < 1e-4, (layer, bank, member)
        checked += 1
    assert checked > 6


def test_later_layers_see_the_compressed_ones(write_recipe, registry, cache, spied, tmp_path):
    """The first layer's statistics are the original's, and only those."""
    need = SecondMoment("experts.gate")
    [first] = run(
        [load_recipe(write_recipe(calibration=COMPRESSED), registry=registry)],
        registry,
        cache=cache,
    )
    compressed = dict(spied)
    path = write_recipe("other", output=str(tmp_path / "other"))
    [second] = run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert torch.equal(compressed[0, need].value, spied[0, need].value)
    for layer in (1, 2):
        difference = (compressed[layer, need].value - spied[layer, need].value).norm()
        assert difference > 1e-3 * spied[layer, need].value.norm()
    assert second["statistics"]["sweeps"] == 1  # the first took samples only
    # Traces are alike: both of the original's inputs.
    tokens = [[layer["tokens_per_expert"] for layer in m["layers"]] for m in (first, second)]
    assert tokens[0] == tokens[1]
    assert not (tmp_path / "out" / ".mctk" / "prefix").exists()


def test_a_set_gives_what_single_runs_give(write_recipe, registry, cache, tmp_path):
    def recipe(name, output, **changes):
        path = write_recipe(name, output=str(tmp_path / output), **changes)
        return load_recipe(path, registry=registry)

    kinds = {
        "original": {},
        "compressed": {"calibration": COMPRESSED},
        "smaller": {"calibration": COMPRESSED, "budget": {"remove": 0.6, "of": "experts"}},
    }
    together = [recipe(name, name, **changes) for name, changes in kinds.items()]
    run(together, registry, cache=cache)
    for name, changes in kinds.items():
        single = recipe(name, f"{name}-alone", **changes)
        run([single], registry, cache=tmp_path / f"cache-{name}")
        assert weights(tmp_path / name) == weights(tmp_path / f"{name}-alone")
    assert weights(tmp_path / "original") != weights(tmp_path / "compressed")


def test_killed_runs_go_on_and_end_with_the_same_bytes(write_recipe, tmp_path):
    check(write_recipe(calibration=COMPRESSED), tmp_path, [0.3, 0.5, 0.7, 0.9])


@pytest.mark.slow
def test_killed_at_every_commit(write_recipe, tmp_path):
    recipe = write_recipe(calibration=COMPRESSED, allocate={"method": "by_loss"})
    check(recipe, tmp_path, [n / 60 for n in range(1, 61)])


def test_another_batch_size_goes_on(write_recipe, registry, cache, tmp_path, monkeypatch):
    """The states that were kept are split anew; the last bits may differ, the ranks do not."""
    add_layer = sys.modules["mctk.engine.compress"].Workspace.add_layer

    def interrupted(self, index, record):
        add_layer(self, index, record)
        if index == 0:
            raise KeyboardInterrupt

    path = write_recipe(calibration=COMPRESSED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys.modules["mctk.engine.compress"].Workspace, "add_layer", interrupted)
        run([load_recipe(path, registry=registry)], registry, cache=cache)
    path = write_recipe(calibration={**COMPRESSED, "batch": 3})
    [metrics] = run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    assert "going on from layer 1 of 3" in (tmp_path / "out" / "run.log").read_text()


def test_sizes_are_decided_by_the_originals_curves(write_recipe, registry, cache, tmp_path):
    allocate = {"method": "by_loss"}
    sizes = []
    for name, calibration in (("a", TEXTS), ("b", COMPRESSED)):
        path = write_recipe(
            name, output=str(tmp_path / name), calibration=calibration, allocate=allocate
        )
        run([load_recipe(path, registry=registry)], registry, cache=cache)
        plan = json.loads((tmp_path / name / ".mctk" / "plan.json").read_text())
        sizes.append(plan["sizes"])
    assert sizes[0] == sizes[1]
    assert weights(tmp_path / "a") != weights(tmp_path / "b")


def test_what_a_merge_left_is_measured_on_the_compressed_prefix(
    write_recipe, registry, cache, tmp_path, spied
):
    """Prepared steps keep the original's statistics; what comes after them is measured anew."""
    steps = [{"merge": "fisher"}, {**STEP, "targets": ["experts.*"]}]
    budget = {"remove": 0.2, "of": "experts"}
    runs = {}
    for name, calibration in (("a", TEXTS), ("b", COMPRESSED)):
        path = write_recipe(
            name, output=str(tmp_path / name), calibration=calibration, steps=steps, budget=budget
        )
        run([load_recipe(path, registry=registry)], registry, cache=cache)
        runs[name] = dict(spied)
        spied.clear()
    current = [key for key in runs["b"] if key[1].current]
    assert current
    for layer, need in current:
        equal = torch.equal(runs["a"][layer, need].value, runs["b"][layer, need].value)
        assert equal == (layer == 0), (layer, need)


def test_routed_outputs_compare_with_the_original(write_recipe, registry, cache, monkeypatch):
    """Inputs of a progressive run are its own, and what it is held against is the original's."""
    need = RoutedOutputs(200)
    seen: dict = {}
    own, needs = SvdLlm.decompose, SvdLlm.needs

    def decompose(self, bank, statistics, size, options):
        seen[bank.layer] = statistics[need]
        chosen, _ = seen[bank.layer].route([0, 2])  # the live layer's router
        assert set(chosen.flatten().tolist()) <= {0, 2}
        return own(self, bank, statistics, size, options)

    monkeypatch.setattr(SvdLlm, "decompose", decompose)
    monkeypatch.setattr(SvdLlm, "needs", lambda *a: [*needs(*a), need])
    found = {}
    for name, calibration in (("original", TEXTS), ("compressed", COMPRESSED)):
        path = write_recipe(output=str(cache / name), dtype="float32", calibration=calibration)
        run([load_recipe(path, registry=registry)], registry, cache=cache / "statistics")
        found[name] = dict(seen)
    for layer in range(3):
        original, compressed = found["original"][layer], found["compressed"][layer]
        same = torch.equal(original.inputs, compressed.inputs)
        assert same == (layer == 0)
        torch.testing.assert_close(compressed.energy, original.energy, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found["compressed"][1].target, found["original"][1].target)
    assert not (cache / "compressed" / ".mctk" / "stream").exists()


def test_plans_tell_of_it(write_recipe, registry):
    plain = describe(make_plan(load_recipe(write_recipe(), registry=registry), registry))
    path = write_recipe("other", calibration=COMPRESSED)
    plan = make_plan(load_recipe(path, registry=registry), registry)
    found = describe(plan)
    assert found["recollected"] and not plain["recollected"]
    assert found["weight_reads"] == plain["weight_reads"]
    rows = {row["need"]: row for row in found["statistics"]}
    assert rows["SecondMoment(experts.gate, input) of the compressed prefix"]["layers"] == 3
    assert "SecondMoment(experts.gate, input)" not in rows
    hidden = 12 * 64 * 48 * 2
    assert found["resources"]["disk_temporary"] == plain["resources"]["disk_temporary"] + 2 * hidden
    assert set(plan.needs[0]) >= {ExpertFrequency()}


def test_a_recipe_says_what_later_layers_see(write_recipe, registry, monkeypatch):
    monkeypatch.setattr(SvdLlm, "propagate", "compressed")
    plan = make_plan(load_recipe(write_recipe(), registry=registry), registry)
    assert plan.recollected  # the method's paper is sequential
    path = write_recipe(calibration={**TEXTS, "propagate": "original"})
    assert not make_plan(load_recipe(path, registry=registry), registry).recollected


def test_banks_are_read_of_the_layer_at_work(write_recipe, registry, cache, monkeypatch):
    """A sequential run reads the weights no more often than another."""
    module = sys.modules["mctk.sweep.stream"]
    loads = []
    fill = module.fill
    monkeypatch.setattr(module, "fill", lambda *a, **k: (loads.append(a[-1]), fill(*a, **k))[1])
    counts = []
    for calibration in (TEXTS, COMPRESSED):
        path = write_recipe(calibration=calibration, output=str(cache / str(len(counts))))
        run([load_recipe(path, registry=registry)], registry, cache=cache / f"c{len(counts)}")
        counts.append(len(loads))
        loads.clear()
    assert counts[0] == counts[1]
