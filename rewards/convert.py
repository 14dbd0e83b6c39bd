"""Convert weights that are published as a pickle, once: -> config.json and model.safetensors.

    python -m rewards.convert hpsv2 HPS_v2.1_compressed.pt --out weights/hpsv2

The first word is the scorer's file in rewards/. It has

    SHA256           the published file's hash; no other file is opened (None: not known, any is)
    REFUSED          {first digits of a hash: reason} of files that are easily taken for it
    FETCH            the command that downloads and converts
    make_config()    transformers' config of the published network
    make_network     config -> the network, a torch.nn.Module
    convert          the file's content -> {name in that network: tensor}

The names and shapes must be exactly the network's, or nothing is written.
"""

import argparse
import hashlib
import importlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SCORERS = ("hpsv2", "imagereward", "blip_vqa")


def check_fit(converted: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """ValueError unless both have the same names and the same shapes."""
    shapes = []
    for name in sorted(converted.keys() & expected.keys()):
        has, needs = tuple(converted[name].shape), tuple(expected[name].shape)
        if has != needs:
            shapes.append(f"{name} {has}, not {needs}")
    problems = {
        "unknown weights": sorted(converted.keys() - expected.keys()),
        "missing weights": sorted(expected.keys() - converted.keys()),
        "weights of other shapes": shapes,
    }
    for problem, names in problems.items():
        if names:
            listed = ", ".join(names[:3])
            if len(names) > 3:
                listed += ", …"
            raise ValueError(f"{len(names)} {problem}: {listed}")


def read_published(path: str | Path, sha256: str | None, refused: dict[str, str]) -> dict:
    """The content of a pickle of tensors with this hash (None: any). Nothing in it is run."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    for other, reason in refused.items():
        if digest.startswith(other):
            raise ValueError(f"{path} {reason}")
    if sha256 and digest != sha256:
        raise ValueError(f"{path} has SHA-256 {digest[:8]}…, not {sha256[:8]}…")
    try:  # mmap: a tensor is read from the disk when it is used
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged, or holding more than tensors and plain values
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error


def convert_file(scorer, path: str | Path, out: str | Path) -> int:
    """A published file -> a folder. scorer: the module. Returns the number of tensors."""
    content = read_published(path, scorer.SHA256, scorer.REFUSED)
    try:
        converted = scorer.convert(content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold what is expected ({error})") from error
    config = scorer.make_config()
    with torch.device("meta"):  # no memory, no random numbers
        network = scorer.make_network(config)
    check_fit(converted, network.state_dict())
    save_converted(converted, config, out, scorer.SHA256)
    return len(converted)


def save_converted(state: dict[str, torch.Tensor], config, out: str | Path, digest: str) -> None:
    """The file's metadata holds the pickle's hash, so that no other model passes for this one."""
    Path(out).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    temporary = Path(out) / "model.tmp"
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, temporary, metadata={"format": "pt", "source_sha256": digest or ""})
    temporary.replace(Path(out) / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # one line, no usage
    parser.add_argument("scorer", choices=SCORERS, metavar="SCORER", help=" or ".join(SCORERS))
    parser.add_argument("file", metavar="FILE", help="the published file")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    args = parser.parse_args()
    scorer = importlib.import_module(f"rewards.{args.scorer}")
    try:
        number = convert_file(scorer, args.file, args.out)
    except (ValueError, OSError) as error:
        print(f"error: {args.scorer}: {error}; {scorer.FETCH}", file=sys.stderr)
        sys.exit(2)
    print(f"every weight has its place; wrote {number} to {args.out}")


if __name__ == "__main__":
    main()
