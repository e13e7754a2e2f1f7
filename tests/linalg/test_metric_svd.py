"""Truncated SVD in the metric of a moment, against a full SVD of the outputs in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mctk.linalg import loss, metric_svd, square_root

F64 = torch.float64
SHAPES = [(112, 48), (48, 112), (64, 64)]


def randn(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def tokens(kind, n, seed=1):
    """Calibration inputs [T, n] of one kind of covariance."""
    count = n // 2 if kind == "rank-deficient" else 8 * n
    basis = torch.linalg.qr(randn(n, n, seed=seed)).Q
    spread = {
        "well-conditioned": torch.linspace(1, 0.1, n, dtype=F64),
        "power law with massive channels": torch.arange(1, n + 1, dtype=F64) ** -0.5,
        "condition 1e10": torch.logspace(0, -5, n, dtype=F64),
        "rank-deficient": torch.ones(n, dtype=F64),
    }[kind]
    x = (randn(count, n, seed=seed + 1) * spread) @ basis.t()
    if "massive" in kind:
        x[:, :3] *= 100
    return x


KINDS = ["well-conditioned", "power law with massive channels", "condition 1e10", "rank-deficient"]


def oracle(weight, x):
    """Squared singular values of the outputs: what the best approximation of a rank loses."""
    sigma2 = torch.linalg.svdvals(weight @ x.t()) ** 2
    padded = torch.zeros(min(weight.shape), dtype=F64)
    padded[: min(len(sigma2), len(padded))] = sigma2[: len(padded)]
    return padded


def output_loss(weight, factors, x):
    U, V = factors
    return float(((weight - U.double() @ V.double()) @ x.t()).square().sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("fraction", [0.1, 0.23, 0.4])
def test_excess_over_the_optimum(kind, m, n, fraction):
    weight, x = randn(m, n), tokens(kind, n)
    rank = int(fraction * min(m, n))
    optimum = float(oracle(weight, x)[rank:].sum())
    by_input = metric_svd(weight, input_moment=x.t() @ x)
    outputs = x @ weight.t()
    by_output = metric_svd(weight, output_moment=outputs.t() @ outputs)
    for found in (by_input, by_output):
        attained = output_loss(weight, found.factors(rank), x)
        assert attained <= optimum * (1 + 1e-6)
        assert attained >= optimum * (1 - 1e-9)
    assert by_input.damping == (0.0 if m <= n else 1e-10)
    assert by_output.damping == 0.0


@pytest.mark.parametrize("kind", ["well-conditioned", "power law with massive channels"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_float32_moments_and_weights(kind, m, n):
    weight, x = randn(m, n), tokens(kind, n)
    rank = min(m, n) // 3
    found = metric_svd(weight.float(), input_moment=(x.t() @ x).float())
    factors = found.factors(rank)
    assert {factor.dtype for factor in factors} == {torch.float32}
    optimum = float(oracle(weight.float().double(), x)[rank:].sum())
    attained = output_loss(weight.float().double(), factors, x)
    assert attained <= optimum * (1 + 1e-6)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_loss_is_the_sum_of_dropped_squares(m, n):
    weight, x = randn(m, n), tokens("well-conditioned", n)
    moment = x.t() @ x
    found = metric_svd(weight, input_moment=moment)
    assert found.spectrum.dtype == F64
    assert found.spectrum.shape == (min(m, n),)
    assert bool((found.spectrum.diff() <= 0).all())
    torch.testing.assert_close(found.spectrum, oracle(weight, x), rtol=1e-7, atol=0)
    for rank in (0, 1, 17, min(m, n) - 1):
        U, V = found.factors(rank)
        dropped = float(found.spectrum[rank:].sum())
        assert loss(weight, U @ V, moment) == pytest.approx(dropped, rel=1e-7)


@pytest.mark.parametrize("kind", ["well-conditioned", "rank-deficient"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_full_rank_is_the_weight(kind, m, n):
    weight, x = randn(m, n), tokens(kind, n)
    for found in (metric_svd(weight, input_moment=x.t() @ x), metric_svd(weight)):
        U, V = found.factors(min(m, n))
        torch.testing.assert_close(U @ V, weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_plain_svd(m, n):
    weight = randn(m, n) * torch.logspace(0, -3, n, dtype=F64)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    rank = min(m, n) // 2
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    plain = metric_svd(weight)
    assert plain.metric == "plain"
    optimum = float((S[rank:] ** 2).sum())
    left, right = plain.factors(rank)
    assert loss(weight, left @ right) == pytest.approx(optimum, rel=1e-7)
    assert float(plain.spectrum[rank:].sum()) == pytest.approx(optimum, rel=1e-7)
    torch.testing.assert_close(left @ right, best, rtol=1e-6, atol=1e-6)
    identity = metric_svd(weight, input_moment=torch.eye(n, dtype=F64))
    left, right = identity.factors(rank)
    torch.testing.assert_close(left @ right, best, rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    scale=st.sampled_from([1e-20, 1e-6, 3.0, 1e12]),
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 1000),
)
def test_scale_and_rotation_of_the_tokens_change_nothing(scale, shape, seed):
    m, n = shape
    weight, x = randn(m, n, seed=seed), tokens("well-conditioned", n, seed)
    rotation = torch.linalg.qr(randn(x.shape[0], x.shape[0], seed=seed + 2)).Q
    rotated = rotation @ x
    rank = min(m, n) // 3
    first = metric_svd(weight, input_moment=x.t() @ x)
    second = metric_svd(weight, input_moment=scale * (rotated.t() @ rotated))
    products = [U @ V for U, V in (first.factors(rank), second.factors(rank))]
    torch.testing.assert_close(products[0], products[1], rtol=1e-6, atol=1e-6)
    # What float64 leaves of the smallest values depends on the largest.
    noise = 1e-13 * float(second.spectrum[0])
    torch.testing.assert_close(second.spectrum, scale * first.spectrum, rtol=1e-7, atol=noise)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_balance_shares_the_singular_values(m, n):
    weight, x = randn(m, n), tokens("well-conditioned", n)
    moment = x.t() @ x
    found = metric_svd(weight, input_moment=moment)
    U, V = found.factors(9)
    balanced_u, balanced_v = found.factors(9, balance=True)
    torch.testing.assert_close(balanced_u @ balanced_v, U @ V, rtol=1e-9, atol=1e-9)
    sigma = found.spectrum[:9].sqrt()
    torch.testing.assert_close(balanced_u.t() @ balanced_u, sigma.diag(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        balanced_v @ moment @ balanced_v.t(), sigma.diag(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("balance", [False, True])
def test_refit_is_optimal_for_the_rounded_v(kind, m, n, balance):
    weight, x = randn(m, n), tokens(kind, n)
    moment = x.t() @ x
    found = metric_svd(weight, input_moment=moment)
    rank = min(m, n) // 4
    U, V = found.factors(rank, balance)
    fitted, rounded = found.factors(rank, balance, refit=torch.bfloat16)
    assert torch.equal(rounded, V.bfloat16().double())
    best = torch.linalg.lstsq(x @ rounded.t(), x @ weight.t(), driver="gelsd").solution.t()
    optimum = output_loss(weight, (best, rounded), x)
    assert output_loss(weight, (fitted, rounded), x) <= optimum * (1 + 1e-6)
    assert optimum <= output_loss(weight, (U, rounded), x) * (1 + 1e-9)


def test_refit_without_a_moment_and_with_the_wrong_one():
    weight = randn(20, 30)
    _, rounded = metric_svd(weight).factors(5, refit=torch.bfloat16)
    fitted = metric_svd(weight).factors(5, refit=torch.bfloat16)[0]
    torch.testing.assert_close(fitted, weight @ torch.linalg.pinv(rounded))
    by_output = metric_svd(weight, output_moment=torch.eye(20))
    with pytest.raises(ValueError, match="refit needs the input moment"):
        by_output.factors(5, refit=torch.bfloat16)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_degenerate_inputs_are_defined(m, n):
    x = tokens("well-conditioned", n)
    moment = x.t() @ x
    weight = randn(m, n)
    zero = metric_svd(torch.zeros(m, n), input_moment=moment)
    U, V = zero.factors(5, balance=True)
    assert not (U @ V).any()
    assert not zero.spectrum.any()
    U, V = metric_svd(weight, input_moment=moment).factors(0)
    assert (U.shape, V.shape) == ((m, 0), (0, n))
    plain_u, plain_v = metric_svd(weight).factors(5)
    for unseen in (
        metric_svd(weight, input_moment=torch.zeros(n, n)),
        metric_svd(weight, output_moment=torch.zeros(m, m)),
    ):
        assert unseen.metric == "plain"
        U, V = unseen.factors(5)
        assert torch.equal(U @ V, plain_u @ plain_v)
    one_token = metric_svd(weight, input_moment=x[:1].t() @ x[:1])
    U, V = one_token.factors(1)
    assert output_loss(weight, (U, V), x[:1]) <= 1e-12 * float((weight @ x[0]).square().sum())
    dead = moment.clone()
    dead[:4] = 0
    dead[:, :4] = 0
    for factor in metric_svd(weight, input_moment=dead).factors(10, refit=torch.bfloat16):
        assert bool(factor.isfinite().all())


def test_dtypes_and_gradients():
    weight = torch.nn.Parameter(randn(12, 8).bfloat16())
    U, V = metric_svd(weight, input_moment=torch.eye(8)).factors(3)
    assert U.dtype == V.dtype == torch.float32
    assert not U.requires_grad
    assert metric_svd(randn(12, 8)).factors(3)[0].dtype == F64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(bad):
    weight, moment = randn(6, 4), torch.eye(4)
    broken = weight.clone()
    broken[2, 1] = bad
    with pytest.raises(ValueError, match="weight contains NaN or infinity"):
        metric_svd(broken, input_moment=moment)
    broken = moment.clone()
    broken[2, 1] = bad
    with pytest.raises(ValueError, match="input moment contains NaN or infinity"):
        metric_svd(weight, input_moment=broken)
    broken = torch.full((6, 6), bad)
    with pytest.raises(ValueError, match="output moment contains NaN or infinity"):
        metric_svd(weight, output_moment=broken)


def test_wrong_arguments():
    weight = randn(6, 4)
    with pytest.raises(ValueError, match="not both"):
        metric_svd(weight, input_moment=torch.eye(4), output_moment=torch.eye(6))
    with pytest.raises(ValueError, match=r"input moment has shape \[6, 6\], expected \[4, 4\]"):
        metric_svd(weight, input_moment=torch.eye(6))
    with pytest.raises(ValueError, match="negative diagonal"):
        metric_svd(weight, input_moment=-torch.eye(4))
    with pytest.raises(ValueError, match="weight has shape"):
        metric_svd(weight[0])
    for rank in (-1, 5, 2.0):
        with pytest.raises(ValueError, match="integer from 0 to 4"):
            metric_svd(weight).factors(rank)


def test_root_damps_no_more_than_it_must():
    x = tokens("rank-deficient", 40)
    moment = x.t() @ x
    root = square_root(moment)
    assert root.damping == 1e-10
    rows = randn(3, 40)
    torch.testing.assert_close(root.divide(rows @ root.factor), rows, rtol=1e-5, atol=1e-5)
    # Float32 noise makes eigenvalues negative: more damping, up to a limit.
    vectors = torch.linalg.qr(randn(40, 40)).Q
    spread = torch.linspace(1, 2, 40, dtype=F64)
    spread[:3] = -3e-9
    noisy = square_root((vectors * spread) @ vectors.t())
    assert noisy.eigenvalues is None
    assert noisy.damping == pytest.approx(1e-8)
    spread[:3] = -1e-3
    broken = square_root((vectors * spread) @ vectors.t())
    assert broken.damping == 0.0
    assert float(broken.eigenvalues[0]) == pytest.approx(2e-12)
    torch.testing.assert_close(broken.divide(rows @ broken.factor), rows, rtol=1e-4, atol=1e-4)
    cut = (vectors * spread.clamp(min=0)) @ vectors.t()
    torch.testing.assert_close(broken.factor @ broken.factor.t(), cut, rtol=1e-8, atol=1e-8)
    weight = randn(60, 40)
    U, V = metric_svd(weight, input_moment=(vectors * spread) @ vectors.t()).factors(40)
    torch.testing.assert_close(U @ V, weight, rtol=1e-6, atol=1e-6)
