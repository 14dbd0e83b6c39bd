"""Stage 2, a cold start: merge the teachers' LoRAs in parameter space, without training.

    python merge.py                                        # the miniature's teachers -> runs/merged
    python merge.py --adapters A B C --rank 32             # exact mean, cut to rank 32 by SVD
    python merge.py --adapters runs/opd/adapter --fuse toy --out runs/fused   # base + update

A LoRA changes a layer by dW = scaling B A, or by 0 if it lacks the layer. A merge averages dW:
    mean         sum_i w_i dW_i, exactly a LoRA of summed rank: stack A_i and w_i scaling_i B_i.
    ties         TIES (arXiv 2306.01708): keep the largest entries of each dW, a share of --density.
                 Average, by weight, the entries that have the sign of their weighted sum.
    dare         DARE (arXiv 2311.03099): mean of entries kept with chance --density, divided by it.
    factor-mean  mean(B) mean(A), as Flow-OPD's public code does; for comparison only. It averages
                 all B_i A_j: each teacher's own product counts 1/n^2, the rest are cross terms.
"""

import argparse
import shlex
from pathlib import Path

import support  # noqa: F401  first: it quiets the notices of transformers
import torch
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from recipes.model_card import write_card
from support.files import check_model, fetch, new_folder
from support.flags import TASKS, at_least, check_folder, fail, make_parser, reason, within
from support.lora import check_layers, read_adapter, save_adapter
from support.model import check_weights

TEACHERS = [f"toy/adapters/{task}" for task in TASKS]


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("--adapters", nargs="+", default=TEACHERS, metavar="DIR|HUB", help="what to merge")
    flag("--method", choices=("mean", "ties", "dare", "factor-mean"), default="mean", help="above")
    flag("--weights", nargs="+", type=within(0), help="one per adapter, relative; default equal")
    flag("--rank", type=at_least(0), default=0, help="of the result; 0 = exact (not ties, dare)")
    flag("--density", type=within(0.001, 1), default=0.5, help="share that ties and dare keep")
    flag("--seed", type=at_least(0), default=0, help="of dare's dropping")
    flag("--fuse", metavar="MODEL", help="write this pipeline's transformer plus the result")
    flag("--out", default="runs/merged", help="folder of the adapter or the fused transformer")
    flag("--overwrite", action="store_true", help="replace an earlier result in --out")
    args = parser.parse_args()
    args.weights = args.weights or [1.0] * len(args.adapters)
    if not args.fuse and len(args.adapters) < 2:
        fail("--adapters: merging needs at least two")
    if len(args.weights) != len(args.adapters):
        fail(f"--weights: {len(args.weights)} for {len(args.adapters)} adapters; give one each")
    if not 0 < sum(args.weights) < float("inf"):
        fail("--weights must not all be 0, and their sum must be finite")
    if args.method in ("ties", "dare") and not args.rank:
        fail(f"--method {args.method} gives a dense matrix: give a rank, for example --rank 32")
    check_folder(args.out)
    present = {file.name for file in Path(args.out).glob("*")}
    if present and not (args.overwrite and present & {"adapter_config.json", "config.json"}):
        fail(f"--out {args.out} is not empty: choose another, or --overwrite an earlier result")
    return args


def truncate(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple:
    """The best rank-`rank` approximation of B A, and the share of squared singular values it keeps.

    SVD in the small space of the factors: B A = Qb (Rb Ra^T) Qa^T. Missing ranks become zeros."""
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    energy = (S[:rank].square().sum() / S.square().sum().clamp(min=1e-300)).item()
    root = S[:rank].sqrt()  # split evenly between the factors
    new_A, new_B = A.new_zeros(rank, A.shape[1]), B.new_zeros(len(B), rank)
    new_A[: len(root)] = root[:, None] * (Vh[:rank] @ Qa.T)
    new_B[:, : len(root)] = (Qb @ U[:, :rank]) * root
    return new_A, new_B, energy if S.any() else 1.0  # a layer of zeros loses nothing


def ties(dense: torch.Tensor, w: torch.Tensor, density: float) -> torch.Tensor:
    """dense (adapters, out, in), weights w (adapters, 1, 1) -> (out, in)."""
    number = max(int(density * dense[0].numel()), 1)
    smallest = dense.abs().flatten(1).topk(number).values[:, -1, None, None]  # (adapters, 1, 1)
    kept = torch.where(dense.abs() >= smallest, dense, 0)
    elected = (w * kept).sum(0).sign()  # (out, in)
    w = torch.where(kept.sign() == elected, w, 0) * elected.abs()  # (adapters, out, in); no sign: 0
    return (w * kept).sum(0) / w.sum(0).clamp(min=1e-12)


def merge(
    adapters: list[dict], method: str, weights: list, rank: int = 0, density=0.5, seed: int = 0
) -> tuple[dict[str, tuple], list[float]]:
    """[{layer: (A, B, scaling)}] -> {layer: (A, B)} with dW = B A, and each cut's energy."""
    weights = [weight / sum(weights) for weight in weights]
    layers = sorted(set().union(*adapters))
    merged, energies = {}, []
    torch.manual_seed(seed)
    for layer in tqdm(layers, "merging", unit="layer", disable=len(layers) < 100):
        sizes = {(len(a[layer][1]), a[layer][0].shape[1]) for a in adapters if layer in a}
        if len(sizes) > 1:
            fail(f"--adapters: layer {layer} has sizes {sorted(sizes)}: of different models?")
        out, into = sizes.pop()
        absent = (torch.zeros(0, into), torch.zeros(out, 0), 1.0)  # rank 0: dW = 0
        parts = [adapter.get(layer, absent) for adapter in adapters]
        if method == "mean":  # B A = sum_i w_i scaling_i B_i A_i
            A = torch.cat([A for A, _, _ in parts])  # (R, in), R the sum of the ranks
            B = [w * scaling * B for w, (_, B, scaling) in zip(weights, parts)]
            B = torch.cat(B, 1)  # (out, R)
        elif method == "factor-mean":
            if len({(A.shape, scaling) for A, _, scaling in parts}) > 1:
                fail("--method factor-mean needs adapters of one rank, alpha and set of layers")
            A = sum(w * A for w, (A, _, _) in zip(weights, parts))
            B = parts[0][2] * sum(w * B for w, (_, B, _) in zip(weights, parts))
        else:
            dense = torch.stack([scaling * B @ A for A, B, scaling in parts])  # (adapters, out, in)
            w, A = torch.tensor(weights).view(-1, 1, 1), torch.eye(into)
            if method == "ties":
                B = ties(dense, w, density)
            else:  # dare: divided by density, the expectation is the mean
                B = (w * dense * (torch.rand(dense.shape) < density) / density).sum(0)
        if rank:
            A, B, energy = truncate(A, B, rank)
            energies.append(energy)
        merged[layer] = (A, B)
    return merged, energies


def fuse(model: str, merged: dict[str, tuple], out: str | Path) -> None:
    """Write base + B A as a full transformer, in the base's dtype, summed in float32."""
    folder = fetch(model, "--fuse", ("model_index.json", "transformer/*"))
    check_model(folder, "--fuse")
    folder = Path(folder, "transformer")
    try:
        files = [file for file in folder.glob("*.safetensors") if "." not in file.stem]  # no .fp16
        with safe_open(min(files), "pt") as file:
            dtype = file.get_tensor(min(file.keys())).dtype
        base = SD3Transformer2DModel.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        check_weights(base)
    except Exception as error:  # whatever a damaged or foreign file leads to
        fail(f"--fuse {model}: its transformer cannot be loaded ({reason(error)})")
    check_layers(base, {layer: (A, B, 1.0) for layer, (A, B) in merged.items()}, f"--fuse {model}")
    for layer, (A, B) in merged.items():
        weight = base.get_submodule(layer).weight
        weight.data = (weight.float() + B @ A).to(dtype)
    with new_folder(out) as folder:
        base.save_pretrained(folder)
    print(f"-> {out}\nload it with SD3Transformer2DModel.from_pretrained({str(out)!r})")


def save(args: argparse.Namespace, merged: dict[str, tuple], energies: list[float]) -> None:
    """Write the merged adapter and print the share that the cut to --rank kept."""
    tensors, root = {}, 2**0.5  # a student of scale 2 will divide B by 2: then A and B are balanced
    for layer, (A, B) in merged.items():
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = A / root, B * root
    with new_folder(args.out) as folder:
        save_adapter(folder, tensors)
        write_card(folder, args)
    rank = max(len(A) for A, _ in merged.values())
    print(f"{args.method} of {len(args.adapters)} adapters, {len(merged)} layers, rank {rank}")
    if energies:
        mean = sum(energies) / len(energies)
        print(f"retained energy {mean:.1%} on average, {min(energies):.1%} in the worst layer")
    print(f"-> {args.out}")
    if args.adapters == TEACHERS:  # of others, model and tasks are not known here
        words = ["python", "train_opd.py", "--init", args.out]
        print("next:", shlex.join([*words, "--out", f"runs/opd_{Path(args.out).name}"]))


def main(args: argparse.Namespace) -> None:
    loras = [read_adapter(path, "--adapters") for path in args.adapters]
    merged, energies = merge(loras, args.method, args.weights, args.rank, args.density, args.seed)
    try:
        if args.fuse:
            return fuse(args.fuse, merged, args.out)
        save(args, merged, energies)
    except (OSError, SafetensorError) as error:  # no space, for example
        fail(f"--out {args.out}: cannot be written ({reason(error)}); the old content is kept")


if __name__ == "__main__":
    main(parse_args())
