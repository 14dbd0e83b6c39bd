"""merge.py against dense matrices: dW = scaling B A, so every merge has a known answer."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.utils.merge_utils import dare_linear, ties
from torch.testing import assert_close

from support.lora import read_adapter, save_adapter
from merge import merge, truncate

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"block.to_q": (12, 20), "block.to_k": (12, 20), "block.to_out": (20, 12)}  # (out, in)


def lora(seed, rank, scaling, layers=SHAPES):
    """A random adapter as `read_adapter` gives it: {layer: (A, B, scaling)}."""
    g = torch.Generator().manual_seed(seed)
    adapter = {}
    for name in layers:
        out, inside = SHAPES[name]
        adapter[name] = (
            torch.randn(rank, inside, generator=g),
            torch.randn(out, rank, generator=g),
            scaling,
        )
    return adapter


def dense(adapter):
    """{layer: dW}, zero where the adapter leaves a layer alone."""
    none = (torch.zeros(1, 1), torch.zeros(1, 1), 0.0)
    found = {name: adapter.get(name, none) for name in SHAPES}
    return {name: (scaling * B @ A).expand(SHAPES[name]) for name, (A, B, scaling) in found.items()}


def dense_mean(adapters, weights):
    parts = [dense(a) for a in adapters]
    return {
        name: sum(w * p[name] for w, p in zip(weights, parts)) / sum(weights) for name in SHAPES
    }


def products(merged):
    return {name: B @ A for name, (A, B) in merged.items()}


UNLIKE = [
    lora(1, 2, 2.0),
    lora(2, 5, 0.5, ["block.to_q", "block.to_out"]),
    lora(3, 3, 1.0, ["block.to_k"]),
]


def test_the_mean_of_equals_is_the_same_again():
    adapter = lora(0, 4, 2.0)
    assert_close(products(merge([adapter] * 3, "mean", [1.0, 2.0, 3.0])[0]), dense(adapter))


@pytest.mark.parametrize("weights", ([1.0, 1.0, 1.0], [2.0, 1.0, 0.5]))
def test_the_mean_is_the_mean_of_the_updates(weights):
    """Whatever the ranks, scalings and layers: a teacher without a layer counts as zero there."""
    assert_close(products(merge(UNLIKE, "mean", weights)[0]), dense_mean(UNLIKE, weights))


def test_svd_loses_what_the_dropped_singular_values_say():
    merged, kept = merge(UNLIKE, "mean", [1.0, 1.0, 1.0], rank=3)
    for (name, whole), energy in zip(sorted(dense_mean(UNLIKE, [1.0, 1.0, 1.0]).items()), kept):
        A, B = merged[name]
        S = torch.linalg.svdvals(whole)
        assert A.shape[0] == B.shape[1] == 3 and energy < 0.999
        assert_close(
            torch.linalg.norm(whole - B @ A), torch.linalg.norm(S[3:]), rtol=1e-4, atol=1e-5
        )
        assert_close(energy, (S[:3].square().sum() / S.square().sum()).item(), rtol=1e-5, atol=0)
        assert_close(
            torch.linalg.svdvals(A), torch.linalg.svdvals(B), rtol=1e-4, atol=1e-5
        )  # split evenly


@pytest.mark.parametrize("out, inside, rank", ((20, 20, 3), (6, 30, 8), (30, 6, 8), (6, 30, 4)))
def test_a_rank_above_the_layers_own_is_filled_with_zeros(out, inside, rank):
    """Less rank than the 10 asked for, or a layer narrower than 10: rank 10, nothing lost."""
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(rank, inside, generator=g), torch.randn(out, rank, generator=g)
    A10, B10, energy = truncate(A, B, 10)
    assert A10.shape == (10, inside) and B10.shape == (out, 10)
    assert_close(B10 @ A10, B @ A, rtol=1e-4, atol=1e-5)
    assert_close(energy, 1.0)


def test_ties_and_dare_are_pefts():
    parts, weights = [dense(a) for a in UNLIKE], torch.tensor([0.5, 0.3, 0.2])
    merged = products(merge(UNLIKE, "ties", weights.tolist(), density=0.4)[0])
    assert_close(merged, {n: ties([p[n] for p in parts], 3 * weights, 0.4) for n in SHAPES})

    merged = products(merge(UNLIKE, "dare", weights.tolist(), density=0.4, seed=7)[0])
    torch.manual_seed(7)
    assert_close(
        merged, {n: dare_linear([p[n] for p in parts], weights, 0.4) for n in sorted(SHAPES)}
    )
    other = products(merge(UNLIKE, "dare", weights.tolist(), density=0.4, seed=8)[0])
    assert not torch.allclose(merged["block.to_q"], other["block.to_q"])


@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_when_nothing_is_dropped_dare_is_the_mean():
    weights = [2.0, 1.0, 0.5]
    assert_close(
        products(merge(UNLIKE, "dare", weights, density=1.0)[0]), dense_mean(UNLIKE, weights)
    )


def test_averaged_factors_are_not_the_average():
    first, second = lora(1, 4, 2.0), lora(2, 4, 2.0)
    pairs = {
        n: sum(
            w * u * 2.0 * b[n][1] @ a[n][0]
            for w, b in ((0.75, first), (0.25, second))
            for u, a in ((0.75, first), (0.25, second))
        )
        for n in SHAPES
    }
    assert_close(
        products(merge([first, second], "factor-mean", [3.0, 1.0])[0]), pairs
    )  # all pairs B_i A_j

    adapters = [lora(seed, 4, 2.0) for seed in (1, 2, 3)]
    wrong, right = (
        products(merge(adapters, "factor-mean", [1.0] * 3)[0]),
        dense_mean(adapters, [1.0] * 3),
    )
    cosine = torch.cosine_similarity(
        *(torch.cat([d[n].flatten() for n in SHAPES]) for d in (wrong, right)), dim=0
    )
    assert_close(
        cosine.item(), 3**-0.5, atol=0.1, rtol=0
    )  # 3 of the 9 pairs belong together: 1 / sqrt(3) expected

    shared = [
        {n: (adapters[0][n][0], B, s) for n, (_, B, s) in a.items()} for a in adapters
    ]  # one A for all
    assert_close(
        products(merge(shared, "factor-mean", [1.0, 2.0, 3.0])[0]),
        dense_mean(shared, [1.0, 2.0, 3.0]),
    )


@pytest.mark.parametrize(
    "other", (lora(2, 3, 2.0), lora(2, 4, 1.0), lora(2, 4, 2.0, ["block.to_q"]))
)
def test_factor_mean_needs_adapters_alike(other, capsys):
    with pytest.raises(SystemExit) as stopped:
        merge([lora(1, 4, 2.0), other], "factor-mean", [1.0, 1.0])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: --method factor-mean needs")


def save(folder, adapter):
    tensors, ranks, alphas = {}, {}, {}
    for name, (A, B, scaling) in adapter.items():
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        ranks[name], alphas[name] = len(A), scaling * len(A)
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=list(adapter), rank_pattern=ranks, alpha_pattern=alphas
    )
    save_adapter(folder, tensors, config)


def run(folder, *flags):
    command = [sys.executable, ROOT / "merge.py", *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "flags", ([], ["--rank", "2", "--weights", "3", "1", "--alpha_per_rank", "0.5"])
)
def test_the_script_on_files(tmp_path, flags):
    adapters = [lora(1, 2, 2.0), lora(2, 3, 0.5, ["block.to_q", "block.to_out"])]
    save(tmp_path / "A", adapters[0])
    save(tmp_path / "B", adapters[1])
    done = run(tmp_path, "--adapters", "A", "B", "--out", "C", *flags)
    assert done.returncode == 0, done.stderr
    merged = read_adapter(tmp_path / "C", "--adapters")
    if not flags:
        assert_close(dense(merged), dense_mean(adapters, [1.0, 1.0]), rtol=1e-4, atol=1e-5)
        return
    assert {(len(A), scaling) for A, _, scaling in merged.values()} == {(2, 0.5)}
    kept = []
    for name, whole in dense_mean(adapters, [3.0, 1.0]).items():
        U, S, V = torch.linalg.svd(whole)
        assert_close(dense(merged)[name], U[:, :2] * S[:2] @ V[:2], rtol=1e-4, atol=1e-5)
        kept.append((S[:2].square().sum() / S.square().sum()).item())
    assert (
        f"retained energy {sum(kept) / 3:.1%} on average, {min(kept):.1%} in the worst layer"
        in done.stdout
    )
