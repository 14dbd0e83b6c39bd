"""merge.py against dense matrices: dW = scaling B A, so every merge has a known answer."""

import pytest
import torch
from conftest import call
from peft.utils.merge_utils import ties
from torch.linalg import svdvals
from torch.testing import assert_close

import merge as script
from experiments import slow_loops
from merge import truncate
from support.lora import read_adapter, save_adapter

Q, K, OUT = (f"transformer_blocks.0.attn.{end}" for end in ("to_q", "to_k", "to_out.0"))
SHAPES = {Q: (12, 20), K: (12, 20), OUT: (20, 12)}  # (out, in)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def lora(seed, rank, scaling, layers=SHAPES):
    """A random adapter as `read_adapter` gives it: {layer: (A, B, scaling)}."""
    rng = torch.Generator().manual_seed(seed)
    adapter = {}
    for name in layers:
        out, into = SHAPES[name]
        A, B = torch.randn(rank, into, generator=rng), torch.randn(out, rank, generator=rng)
        adapter[name] = (A, B, scaling)
    return adapter


def dense(adapter):
    """{layer: dW}, zero where the adapter leaves a layer alone."""
    updates = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return updates | {name: scaling * B @ A for name, (A, B, scaling) in adapter.items()}


def dense_mean(adapters, weights):
    total, parts = sum(weights), [dense(adapter) for adapter in adapters]
    mean = lambda name: sum(w / total * part[name] for w, part in zip(weights, parts))
    return {name: mean(name) for name in SHAPES}


def merge(adapters, method, weights, **how):
    """{layer: dW} of the merged adapter."""
    merged, _ = script.merge(adapters, method, weights, **how)
    return {name: B @ A for name, (A, B) in merged.items()}


UNLIKE = [lora(1, 2, 2.0), lora(2, 5, 0.5, [Q, OUT]), lora(3, 3, 1.0, [K])]


@pytest.mark.parametrize("weights", ([1.0, 1.0, 1.0], [2.0, 1.0, 0.5]))
def test_the_mean_is_the_mean_of_the_updates(weights):
    """A teacher without a layer counts as zero there."""
    assert_close(merge(UNLIKE, "mean", weights), dense_mean(UNLIKE, weights))


def test_svd_loses_what_the_dropped_singular_values_say():
    weights = [1.0, 1.0, 1.0]
    merged, kept = script.merge(UNLIKE, "mean", weights, rank=3)
    for (name, whole), energy in zip(sorted(dense_mean(UNLIKE, weights).items()), kept):
        A, B = merged[name]
        S = svdvals(whole)
        assert A.shape[0] == B.shape[1] == 3 and energy < 0.999
        assert_close(torch.linalg.norm(whole - B @ A), torch.linalg.norm(S[3:]), **CLOSE)
        assert_close(energy, (S[:3].square().sum() / S.square().sum()).item(), rtol=1e-5, atol=0)
        assert_close(svdvals(A), svdvals(B), **CLOSE)  # split evenly


@pytest.mark.parametrize("out, into, rank", ((20, 20, 3), (6, 30, 8), (30, 6, 8), (6, 30, 4)))
def test_a_rank_above_the_layers_own_is_filled_with_zeros(out, into, rank):
    """Less rank than the 10 asked for, or a layer narrower than 10: rank 10, nothing lost."""
    rng = torch.Generator().manual_seed(0)
    A, B = torch.randn(rank, into, generator=rng), torch.randn(out, rank, generator=rng)
    new_A, new_B, energy = truncate(A, B, 10)
    assert new_A.shape == (10, into) and new_B.shape == (out, 10)
    assert_close(new_B @ new_A, B @ A, **CLOSE)
    assert_close(energy, 1.0)


@pytest.mark.parametrize("weights", ([1.0, 1.0, 1.0], [0.5, 0.3, 0.2], [3.0, 0.0, 1.0]))
@pytest.mark.parametrize("density", (0.1, 0.4, 1.0))
def test_ties_elects_and_averages_by_weight(weights, density):
    merged = merge(UNLIKE, "ties", weights, density=density)
    for name in SHAPES:
        parts = [dense(adapter)[name] for adapter in UNLIKE]
        assert_close(merged[name], slow_loops.ties(parts, weights, density), **CLOSE)
        if weights == [1.0, 1.0, 1.0] and density < 1:  # without weights it is peft's
            assert_close(merged[name], ties(parts, torch.ones(3), density), **CLOSE)
    alone = merge(UNLIKE[:2], "ties", [1.0, 0.0], density=1.0)
    assert_close(alone, dense(UNLIKE[0]), **CLOSE)


@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_dare_is_the_mean_on_average_and_where_nothing_is_dropped():
    weights = [2.0, 1.0, 0.5]
    wanted = dense_mean(UNLIKE, weights)
    assert_close(merge(UNLIKE, "dare", weights, density=1.0), wanted)
    draws = [merge(UNLIKE, "dare", weights, density=0.4, seed=seed)[Q] for seed in range(400)]
    error = torch.stack(draws).std(0) / len(draws) ** 0.5
    assert ((sum(draws) / len(draws) - wanted[Q]) / error.clamp(min=1e-6)).abs().max() < 5
    assert not torch.equal(draws[0], draws[1])


def test_averaged_factors_are_not_the_average():
    """mean(B) mean(A) holds all pairs B_i A_j."""
    first, second = lora(1, 4, 2.0), lora(2, 4, 2.0)
    pairs = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for name in SHAPES:
        for weight_A, (A, _, _) in ((0.75, first[name]), (0.25, second[name])):
            for weight_B, (_, B, _) in ((0.75, first[name]), (0.25, second[name])):
                pairs[name] += weight_A * weight_B * 2.0 * B @ A
    assert_close(merge([first, second], "factor-mean", [3.0, 1.0]), pairs)


def test_factor_mean_needs_adapters_alike(capsys):
    """Of one rank, one scaling, and the same layers."""
    for other in (lora(2, 3, 2.0), lora(2, 4, 1.0), lora(2, 4, 2.0, [Q])):
        with pytest.raises(SystemExit):
            merge([lora(1, 4, 2.0), other], "factor-mean", [1.0, 1.0])
        assert capsys.readouterr().err.startswith("error: --method factor-mean needs")


@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_the_script_on_files(monkeypatch, tmp_path, capsys):
    adapters = [lora(1, 2, 2.0), lora(2, 3, 0.5, [Q, OUT])]
    for folder, adapter in zip("AB", adapters):
        tensors, scaling = {}, adapter[Q][2]
        for name, (A, B, _) in adapter.items():
            tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        save_adapter(tmp_path / folder, tensors, scaling)
    flags = ["--adapters", tmp_path / "A", tmp_path / "B", "--out"]
    call(monkeypatch, "merge", *flags, tmp_path / "exact")
    merged = read_adapter(tmp_path / "exact", "--adapters")
    assert_close(dense(merged), dense_mean(adapters, [1.0, 1.0]), **CLOSE)

    whole = ["--method", "dare", "--density", 1, "--rank", 12]  # nothing is dropped
    call(monkeypatch, "merge", *flags, tmp_path / "dare", *whole)
    merged = read_adapter(tmp_path / "dare", "--adapters")
    assert_close(dense(merged), dense_mean(adapters, [1.0, 1.0]), **CLOSE)

    cut = ["--rank", 2, "--weights", 3, 1]
    call(monkeypatch, "merge", *flags, tmp_path / "cut", *cut)
    merged = read_adapter(tmp_path / "cut", "--adapters")
    assert {(len(A), scaling) for A, _, scaling in merged.values()} == {(2, 1)}
    for A, B, _ in merged.values():  # a student of scale 2 divides B by it
        assert_close(svdvals(B) / 2, svdvals(A), **CLOSE)
    kept = []
    for name, whole in dense_mean(adapters, [3.0, 1.0]).items():
        U, S, V = torch.linalg.svd(whole)
        assert_close(dense(merged)[name], U[:, :2] * S[:2] @ V[:2], **CLOSE)
        kept.append((S[:2].square().sum() / S.square().sum()).item())
    wanted = f"retained energy {sum(kept) / 3:.1%} on average, {min(kept):.1%} in the worst layer"
    assert wanted in capsys.readouterr().out
