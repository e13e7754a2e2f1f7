"""The experts' loop against transformers' own, and terms against the weights they stand for."""

from __future__ import annotations

from types import SimpleNamespace

import families
import pytest
import torch
from compression import (
    by_hand,
    compress,
    compress_mixed,
    compressible,
    exact_terms,
    random_terms,
)
from mctk.errors import CheckpointError
from mctk.runtime import TermExperts, TermLinear, observe, swap
from mctk.terms import BankShape, Bias, Dense
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def routing(tokens: int = 11, experts: int = 4, k: int = 2, seed: int = 3):
    """Indices and weights [T, k]; expert 0 is chosen by no token."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    scores[:, 0] = -1
    weights, index = scores.topk(k)
    return index, weights


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(families.token_ids()).logits


def bare_experts(kind: str) -> nn.Module:
    """Experts in layouts that none of the families has: without a gate, with a norm."""
    config = SimpleNamespace(
        n_routed_experts=4,
        num_local_experts=4,
        hidden_size=32,
        moe_hidden_size=32,
        moe_intermediate_size=24,
        moe_latent_size=None,
        mlp_hidden_act="relu2",
        hidden_act="silu",
        post_norm_eps=1e-5,
        _experts_implementation="eager",
    )
    module = {"no gate": NemotronHExperts, "norm": MuseSparkExperts}[kind](config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.mark.parametrize("family", families.FAMILIES)
def test_forward_equals_eager(family):
    model = families.tiny(family)
    model.set_experts_implementation("eager")
    expected = logits(model)
    model.set_experts_implementation("mctk")
    torch.testing.assert_close(logits(model), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["no gate", "norm"])
def test_forward_equals_eager_in_rare_layouts(kind):
    module = bare_experts(kind)
    x = torch.randn(11, 32, generator=torch.Generator().manual_seed(1))
    expected = module(x, *routing())
    module.config._experts_implementation = "mctk"
    torch.testing.assert_close(module(x, *routing()), expected, **CLOSE)
    terms = exact_terms(module)
    exact = TermExperts(module, {part: [t.spec() for t in bank] for part, bank in terms.items()})
    for part, bank in terms.items():
        exact.set_terms(part, bank)
    torch.testing.assert_close(exact(x, *routing()), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_weights_of_another_dtype(dtype):
    module = families.tiny("mixtral").model.layers[0].mlp.experts.to(dtype)
    x = torch.randn(11, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    index, weights = routing()
    module.config._experts_implementation = "mctk"
    ours = module(x, index, weights)
    module.config._experts_implementation = "batched_mm"
    theirs = module(x, index, weights)
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, **(CLOSE if dtype == torch.float32 else {}))


@pytest.mark.parametrize("family", [*families.FAMILIES, "llama"])
def test_exact_terms_equal_the_original(family):
    model = families.tiny(family)
    expected = logits(model)
    compress(model, {path: exact_terms(m) for path, m in compressible(model).items()})
    swapped = [m for m in model.modules() if isinstance(m, (TermExperts, TermLinear))]
    assert len(swapped) == len(compressible(families.tiny(family)))
    torch.testing.assert_close(logits(model), expected, **CLOSE)


@pytest.mark.parametrize("family", [*families.FAMILIES, "llama"])
def test_terms_equal_their_product(family):
    changes = {} if family == "gpt_oss" else {"num_hidden_layers": 4}
    model, original = families.tiny(family, **changes), families.tiny(family, **changes)
    described = compress_mixed(model)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    for path in described:
        module, before = model.get_submodule(path), original.get_submodule(path)
        if isinstance(module, TermLinear):
            wide = torch.randn(7, module.in_features, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(module(wide), by_hand(module, before, wide), **CLOSE)
        else:
            chosen = routing(7, module.num_experts)
            got, expected = module(x, *chosen), by_hand(module, before, x, *chosen)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(
                got, ALL_EXPERTS_FUNCTIONS["batched_mm"](before, x, *chosen), atol=0.1
            )


def test_dropped_and_constant_experts():
    module = families.tiny("mixtral").model.layers[0].mlp.experts
    exact = exact_terms(module)
    shape = exact["down"][0].shape
    constant = torch.arange(32.0)[None]
    down = [
        Dense(shape, [0, 1, None, None], exact["down"][0].weight[:2]),
        Bias(shape, [None, None, 0, None], constant),
    ]
    terms = {**exact, "down": down}
    experts = TermExperts(module, {p: [t.spec() for t in bank] for p, bank in terms.items()})
    for part, bank in terms.items():
        experts.set_terms(part, bank)
    x = torch.randn(2, 32)
    index, weights = torch.tensor([[3, 2], [2, 3]]), torch.tensor([[0.9, 0.1], [0.25, 0.75]])
    expected = torch.tensor([[0.1], [0.25]]) * constant
    torch.testing.assert_close(experts(x, index, weights), expected)


def test_all_experts_may_be_dropped():
    module = families.tiny("mixtral").model.layers[0].mlp.experts
    experts = TermExperts(module, {"gate": [], "up": [], "down": []})
    assert torch.equal(experts(torch.randn(11, 32), *routing()), torch.zeros(11, 32))


def test_no_tokens():
    module = families.tiny("mixtral").model.layers[0].mlp.experts
    module.config._experts_implementation = "mctk"
    index, weights = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)
    assert module(torch.zeros(0, 32), index, weights).shape == (0, 32)


@pytest.mark.parametrize("compressed", [False, True])
def test_observer_sees_everything(compressed):
    model = families.tiny("gpt_oss")
    model.set_experts_implementation("mctk")
    module = model.model.layers[0].mlp.experts
    if compressed:
        terms = random_terms(exact_terms(module), seed=0)
        compress(model, {"model.layers.0.mlp.experts": terms})
        module = model.model.layers[0].mlp.experts
    x = torch.randn(11, 32, generator=torch.Generator().manual_seed(1))
    index, weights = routing()
    total = torch.zeros(11, 32)
    seen = torch.zeros(11, 2, dtype=torch.bool)

    def observer(expert, token, slot, inputs, h, y, routed):
        assert expert != 0  # no token chose it
        assert torch.equal(index[token, slot], torch.full_like(token, expert))
        assert bool((token.diff() > 0).all())
        assert torch.equal(x[token], inputs)
        assert torch.equal(weights[token, slot], routed)
        assert h.shape == (len(token), 24)
        seen[token, slot] = True
        total.index_add_(0, token, y * routed[:, None])

    with observe(module, observer), torch.no_grad():
        out = module(x, index, weights)
    assert bool(seen.all())
    torch.testing.assert_close(total, out)
    seen.zero_()
    with torch.no_grad():
        again = module(x, index, weights)
    if compressed:  # the shared base is then multiplied once per token
        torch.testing.assert_close(again, out)
    else:
        assert torch.equal(again, out)
    assert not seen.any()


def test_observing_needs_our_implementation():
    model = families.tiny("mixtral")
    module = model.model.layers[0].mlp.experts
    with (
        pytest.raises(ValueError, match=r"set_experts_implementation\('mctk'\)"),
        observe(module, lambda *_: None),
    ):
        pass


def test_expert_parallelism_is_refused():
    module = families.tiny("mixtral").model.layers[0].mlp.experts
    index, weights = routing()
    index[3, 1] = 4
    with pytest.raises(ValueError, match="expert index 4 of 4"):
        ALL_EXPERTS_FUNCTIONS["mctk"](module, torch.randn(11, 32), index, weights)


def test_linear_equals_the_original():
    original = nn.Linear(6, 5)
    terms = exact_terms(original)["linear"]
    linear = TermLinear(6, 5, [term.spec() for term in terms])
    linear.set_terms("linear", terms)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(linear(x), original(x))
    assert sorted(linear.state_dict()) == ["terms_0_weight", "terms_1_vector"]
    assert repr(linear) == "TermLinear(linear: dense + bias)"
    # What modelling code may read beside calling it.
    assert torch.equal(linear.weight, original.weight) and torch.equal(linear.bias, original.bias)


def test_a_linear_without_terms_has_a_zero_matrix():
    linear = TermLinear(6, 5, [], torch.bfloat16)
    assert linear.bias is None and not linear.weight.any()
    assert (linear.weight.shape, linear.weight.dtype) == ((5, 6), torch.bfloat16)


def linear_entry(out: int = 32, into: int = 32) -> dict:
    term = Dense(BankShape(1, out, into), [0], torch.zeros(1, out, into))
    return {"type": "linear", "terms": [term.spec()]}


def experts_entry(**changes) -> dict:
    module = families.tiny("mixtral").model.layers[0].mlp.experts
    terms = {p: [t.spec() for t in bank] for p, bank in exact_terms(module).items()}
    return {"type": "experts", "terms": {**terms, **changes}}


@pytest.mark.parametrize(
    ("path", "entry", "message"),
    [
        ("model.layers.9.mlp", linear_entry(), r"module model\.layers\.9\.mlp: .*no such module"),
        ("model.norm", linear_entry(), "MixtralRMSNorm is not a linear layer"),
        ("lm_head", linear_entry(), r"module lm_head: terms\.linear\[0\]\.out: is 32, .* has 96"),
        ("lm_head", {"type": "linear"}, "must have 'type' and 'terms'"),
        ("lm_head", {"type": "dense", "terms": []}, "type: must be 'experts', 'expert_list'"),
        ("lm_head", {"type": "linear", "terms": {}}, "terms: must be a list"),
        ("lm_head", {"type": "experts", "terms": {}}, "Linear is not an experts module"),
        ("model.layers.0.mlp.experts", {"type": "linear", "terms": []}, "is not a linear layer"),
        ("model.layers.0.mlp.experts", experts_entry(down="x"), r"terms\.down: must be a list"),
        ("model.layers.0.mlp.experts", experts_entry(dwn=[]), r"terms\.dwn: .*mean 'down'"),
        (
            "model.layers.0.mlp.experts",
            {"type": "experts", "terms": {"up": [], "down": []}},
            r"terms\.gate: is missing",
        ),
        (
            "model.layers.0.mlp.experts",
            experts_entry(gate=experts_entry()["terms"]["down"]),
            r"module model\.layers\.0\.mlp\.experts: terms\.gate\[0\]\.out: is 32, .* has 24",
        ),
        (
            "model.layers.0.mlp.experts",
            experts_entry(gate=[{**experts_entry()["terms"]["gate"][0], "slots": [0, 1, 2, 9]}]),
            r"terms\.gate\[0\]: dense term: slots\[3\]",
        ),
        (
            "model.layers.0.mlp.experts",
            experts_entry(gate=[{**experts_entry()["terms"]["gate"][0], "kind": "mobe"}]),
            r"terms\.gate\[0\]: unknown term kind 'mobe'",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_named(path, entry, message):
    model = families.tiny("mixtral")
    with pytest.raises(CheckpointError, match=message):
        swap(model, {path: entry})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"a.b": {"shape": [1], "dtype": "float32"}}, r"tensors\.a\.b: is not a name"),
        ({"weight": {"shape": [1], "dtype": "float33"}}, "unknown dtype 'float33'"),
        ({"weight": {"shape": [-1], "dtype": "float32"}}, r"tensors\.weight\.shape"),
        ({"weight": {"shape": None, "dtype": "float32"}}, r"tensors\.weight\.shape"),
        ({"weight": "float32"}, r"tensors\.weight"),
        ([], "tensors: must map"),
    ],
)
def test_damaged_tensor_specs_are_named(tensor, message):
    spec = {**linear_entry()["terms"][0], "tensors": tensor}
    with pytest.raises(CheckpointError, match=message):
        TermLinear(32, 32, [spec])


def test_unknown_layouts_are_refused():
    module = families.tiny("mixtral").model.layers[0].mlp.experts
    module.scale = nn.Parameter(torch.ones(4))
    with pytest.raises(CheckpointError, match="holds scale: a layout that mctk does not know"):
        TermExperts(module, experts_entry()["terms"])


def test_recompressing_compressed_modules():
    model = families.tiny("gpt_oss")
    expected = logits(model)
    terms = {path: exact_terms(m) for path, m in compressible(model).items()}
    for _ in range(2):
        compress(model, terms)
        torch.testing.assert_close(logits(model), expected, **CLOSE)
