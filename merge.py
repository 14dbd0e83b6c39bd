"""Cold start: merge the teachers' LoRAs in parameter space, at no training cost. Works on files, loads no model.

    python merge.py                                        # the miniature's four teachers -> runs/merged
    python merge.py --adapters A B C --method mean         # exact mean of the updates; the rank grows to the sum
    python merge.py --adapters A B C --rank 32             # the same, back to rank 32 by SVD, retained energy printed
    python merge.py --adapters A B C --weights 2 1 1 --method ties --rank 32

A LoRA changes a layer by dW = scaling * B A. The mean of several teachers is the mean of their dW:

    mean         sum_i w_i dW_i. Exact as a LoRA of summed rank: stack the A, stack the w_i scaling_i B_i.
    ties         TIES: keep each dW's largest entries, elect a sign per entry, average those that agree.
    dare         DARE: drop entries at random, rescale the rest, average.
    factor-mean  mean(B) mean(A), as Flow-OPD's public code does; for comparison only. It is not the mean:
                 mean(B) mean(A) = mean over all pairs (i, j) of B_i A_j, so of n teachers' own products each
                 counts 1/n^2 and the rest is cross terms that nobody trained.

With --fuse the result is not an adapter but the full transformer, base + dW, that `from_pretrained` loads:

    python merge.py --adapters runs/opd/adapter --fuse toy --out runs/fused

ties and dare act on the dense dW (through peft's merge_utils) and need the SVD afterwards. Inputs may differ in
rank and in which layers they adapt: a teacher that leaves a layer alone counts as zero there.
"""

import argparse
import sys
from pathlib import Path

from support.files import check_adapter, check_model, fetch, written_beside
from support.flags import TASKS, at_least, check_folder, fail, make_parser, reason


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--adapters", nargs="+", default=[f"toy/adapters/{t}" for t in TASKS], metavar="DIR", help="what to merge"
    )
    parser.add_argument("--method", choices=("mean", "ties", "dare", "factor-mean"), default="mean", help="see above")
    parser.add_argument("--weights", nargs="+", type=float, help="one per adapter, used relative to their sum; default equal")
    parser.add_argument(
        "--rank", type=at_least(0), default=0, help="rank of the result by SVD; 0 = exact (mean, factor-mean only)"
    )
    parser.add_argument("--density", type=float, default=0.5, help="share of entries that ties and dare keep")
    parser.add_argument(
        "--alpha_per_rank", type=float, default=2.0, help="alpha / rank of the result: 2 as in the paper (64 / 32)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of dare's dropping")
    parser.add_argument("--fuse", metavar="MODEL", help="add the result to this pipeline's transformer and write that, in full")
    parser.add_argument("--out", default="runs/merged", help="folder for the merged adapter or the fused transformer")
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter in --out")
    args = parser.parse_args()

    for path in args.adapters:
        check_adapter(path, "--adapters")
    if args.fuse:
        check_model(args.fuse, "--fuse")
    elif len(args.adapters) < 2:
        fail("--adapters: merging takes at least two")
    args.weights = args.weights or [1.0] * len(args.adapters)
    if len(args.weights) != len(args.adapters):
        fail(f"--weights: {len(args.weights)} weights for {len(args.adapters)} adapters; give one each")
    if not all(w >= 0 for w in args.weights) or not 0 < sum(args.weights) < float("inf"):
        fail("--weights must be numbers of at least 0, not all of them 0, and their sum finite")
    if not 0 < args.alpha_per_rank < float("inf"):
        fail("--alpha_per_rank must be above 0")
    if not 0 < args.density <= 1:
        fail("--density must be above 0 and at most 1")
    if args.method in ("ties", "dare") and not args.rank:
        fail(f"--method {args.method} gives a dense matrix: say the rank to cut it to, for example --rank 32")
    check_folder(args.out)
    if Path(args.out).exists() and any(Path(args.out).iterdir()) and not args.overwrite:
        fail(f"--out {args.out} is not empty: choose another folder, or --overwrite the adapter in it")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch
from peft import LoraConfig
from peft.utils.merge_utils import dare_linear, ties
from safetensors import SafetensorError
from tqdm import tqdm

from support.lora import read_adapter, save_adapter


def exact_mean(parts: list[tuple], weights: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """[(A (r_i, in), B (out, r_i), scaling)] -> (A (R, in), B (out, R)), R = sum of ranks, B A = sum_i w_i dW_i."""
    A = torch.cat([A for A, _, _ in parts])  # (R, in)
    B = torch.cat([w * scaling * B for w, (_, B, scaling) in zip(weights, parts)], 1)  # (out, R)
    return A, B


def factor_mean(parts: list[tuple], weights: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """mean(A), mean(B): what the public code does. Needs equal ranks and scalings."""
    if len({(A.shape, scaling) for A, _, scaling in parts}) > 1:
        fail("--method factor-mean needs adapters of one rank and alpha that adapt the same layers")
    A = sum(w * A for w, (A, _, _) in zip(weights, parts))
    B = sum(w * B for w, (_, B, _) in zip(weights, parts))
    return A, parts[0][2] * B


def truncate(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best rank-`rank` approximation of B A, split evenly, and the share of squared singular values it keeps.

    The SVD is done in the small space of the factors: B A = Qb (Rb Ra^T) Qa^T."""
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().T)
    U, S, V = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    energy = (S[:rank].square().sum() / S.square().sum()).item() if S.any() else 1.0
    root = S[:rank].sqrt()
    B, A = (Qb @ U[:, :rank]) * root, root[:, None] * (V[:rank] @ Qa.T)
    if len(A) < rank:  # a layer with less rank than asked: fill with zeros, one rank for all layers
        A = torch.cat([A, A.new_zeros(rank - len(A), A.shape[1])])
        B = torch.cat([B, B.new_zeros(B.shape[0], rank - B.shape[1])], 1)
    return A.float(), B.float(), energy


def merge(
    adapters: list[dict[str, tuple]], method: str, weights: list[float], rank: int = 0, density: float = 0.5, seed: int = 0
) -> tuple[dict[str, tuple], list[float]]:
    """adapters: [{layer: (A, B, scaling)}, …] -> {layer: (A, B)} with dW = B A, and the retained energy of each layer."""
    weights = [w / sum(weights) for w in weights]
    names = sorted(set().union(*adapters))
    merged, kept = {}, []
    torch.manual_seed(seed)
    for layer in tqdm(names, desc="merging", unit="layer", disable=len(names) < 100):
        shapes = {(B.shape[0], A.shape[1]) for A, B, _ in (a[layer] for a in adapters if layer in a)}
        if len(shapes) > 1:
            fail(f"--adapters: layer {layer} has different sizes {sorted(shapes)}: these adapters belong to different models")
        (out_features, in_features), *_ = shapes
        absent = (torch.zeros(0, in_features), torch.zeros(out_features, 0), 1.0)  # rank 0: dW = 0
        parts = [a.get(layer, absent) for a in adapters]
        if method == "mean":
            A, B = exact_mean(parts, weights)
        elif method == "factor-mean":
            A, B = factor_mean(parts, weights)
        else:
            products = [scaling * B @ A for A, B, scaling in parts]  # (out, in) each
            if method == "ties":  # its average divides by how many agree, so weights are relative to 1
                dense = ties(products, torch.tensor(weights) * len(weights), density)
            else:
                dense = dare_linear(products, torch.tensor(weights), density)
            A, B = torch.eye(dense.shape[1]), dense
        if rank:
            A, B, energy = truncate(A, B, rank)
            kept.append(energy)
        merged[layer] = (A, B)
    return merged, kept


def fuse(model: str, merged: dict[str, tuple], out: str | Path) -> None:
    """Write base + B A of every layer as a full transformer, in the base's own dtype; the sum is taken in float32."""
    from diffusers import SD3Transformer2DModel
    from safetensors import safe_open

    from support.model import check_weights

    folder = fetch(model, "--fuse", ("model_index.json", "transformer/*"))
    check_model(folder, "--fuse")  # a hub id has been looked up only now
    folder = Path(folder) / "transformer"
    try:
        with safe_open(min(folder.glob("*.safetensors")), "pt") as file:
            dtype = file.get_tensor(min(file.keys())).dtype
        transformer = SD3Transformer2DModel.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        check_weights(transformer)
    except Exception as error:  # whatever a damaged or foreign file leads to
        fail(f"--fuse {model}: its transformer cannot be loaded ({reason(error)})")
    for layer, (A, B) in merged.items():
        try:
            weight = transformer.get_submodule(layer).weight
            weight.data = (weight.float() + B @ A).to(dtype)
        except (AttributeError, RuntimeError):
            fail(f"--fuse {model}: layer {layer} of the adapters is not in its transformer, or has another size there")
    with written_beside(out) as beside:
        transformer.save_pretrained(beside)
        written = {file.name for file in beside.iterdir()}
    for old in Path(out).glob("diffusion_pytorch_model*"):  # of a larger model: its index would be followed
        if old.name not in written:
            old.unlink()
    print(f"fused into {folder} -> {out}\nload it with SD3Transformer2DModel.from_pretrained({str(out)!r})")


def save(args: argparse.Namespace, merged: dict[str, tuple], kept: list[float]) -> None:
    """Write the merged adapter, and say what the cut to --rank has kept."""
    ranks = {layer: len(A) for layer, (A, _) in merged.items()}
    rank = max(ranks.values())
    tensors, root = {}, args.alpha_per_rank**0.5
    for layer, (A, B) in merged.items():  # peft multiplies by alpha / rank: take it out of the factors, half each
        tensors |= {f"{layer}.lora_A.weight": A / root, f"{layer}.lora_B.weight": B / root}
    alphas = {layer: args.alpha_per_rank * r for layer, r in ranks.items()}
    config = LoraConfig(r=rank, lora_alpha=args.alpha_per_rank * rank, target_modules=sorted(merged))
    if set(ranks.values()) != {rank}:
        config.rank_pattern, config.alpha_pattern = ranks, alphas
    save_adapter(args.out, tensors, config)
    print(f"{args.method} of {len(args.adapters)} adapters, {len(merged)} layers, rank {rank}", end="")
    if kept:
        print(f"; retained energy {sum(kept) / len(kept):.1%} on average, {min(kept):.1%} in the worst layer", end="")
    print(f" -> {args.out}\nnext: python train_opd.py --init {args.out} --out runs/opd_{Path(args.out).name}")


def main(args):
    adapters = [read_adapter(path, "--adapters") for path in args.adapters]
    merged, kept = merge(adapters, args.method, args.weights, args.rank, args.density, args.seed)
    try:
        return fuse(args.fuse, merged, args.out) if args.fuse else save(args, merged, kept)
    except (OSError, SafetensorError) as error:  # no space, for example
        fail(f"--out {args.out}: cannot be written ({reason(error)}); what was there is as it was")


if __name__ == "__main__":
    sys.exit(main(ARGS))
