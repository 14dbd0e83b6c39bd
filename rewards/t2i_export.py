"""Check our T2I-CompBench scores against the authors' own scripts, image by image.

    # 1. The prompts, each ten times, and an image for each line
    python -m rewards.t2i_export prompts color_val.txt --out data/t2i_color.txt
    python evaluate.py --rewards rewards --tasks t2i_color --prompts t2i_color=data/t2i_color.txt \\
        --models base --out runs/t2i …
    # 2. The same images under the names that the authors' scripts expect
    python -m rewards.t2i_export images runs/t2i/images/base/t2i_color \\
        --prompts data/t2i_color.txt --out export/color
    # 3. In the authors' environment, in BLIPvqa_eval/ (for color, shape, texture) or UniDet_eval/
    BLIP_vqa.py --out_dir=/…/export/color
    numeracy_eval.py --outpath=/…/export/numeracy
    3D_spatial_eval.py --outpath=/…/export/3d
    # 4. Ours beside theirs
    python -m rewards.t2i_export compare export/color --task t2i_color --device cuda

Give the authors' scripts the folder without a slash at its end, and remove export/3d/labels before
3D_spatial_eval.py is run again: it takes the depth maps that it finds there, even if some are
missing. Nothing is overwritten here.
"""

import argparse
import math
import re
import shutil
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from rewards import REWARDS
from rewards.images import as_rgb
from support.files import FAULTS, read_json, read_prompts
from support.flags import Help, fail, make_parser, positive, reason

BINDING, SPATIAL = "annotation_blip", "labels/annotation_obj_detection_3d"
RESULTS = {
    "t2i_color": BINDING,
    "t2i_shape": BINDING,
    "t2i_texture": BINDING,
    "t2i_numeracy": "annotation_num",
    "t2i_3d": SPATIAL,
    "t2i_3d_fixed": SPATIAL,
}


def write_prompts(args: argparse.Namespace) -> None:
    """Every prompt of FILE, `repeat` times in a row."""
    out = Path(args.out)
    if {Path(args.file).suffix, out.suffix} != {".txt"}:
        raise ValueError(
            f"{args.file}, --out {out}: expected two .txt files, with a prompt per line"
        )
    if out.exists():
        raise ValueError(f"--out {out} exists; choose another name")
    prompts, _ = read_prompts(args.file, "FILE")
    lines = [prompt for prompt in prompts for _ in range(args.repeat)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    print(f"{len(prompts)} prompts x {args.repeat} -> {out}")


def export_images(args: argparse.Namespace) -> None:
    """IMAGES/00000.png ... -> OUT/samples/PROMPT_000000.png ...; the number is the prompt's line.

    It is global: BLIP_vqa.py takes an image's place among all as its question_id."""
    prompts, _ = read_prompts(args.prompts)
    files = [Path(args.images, f"{number:05d}.png") for number in range(len(prompts))]
    missing = [file for file in files if not file.is_file()]
    if missing:
        needed = f"one image for each of the {len(prompts)} lines of {args.prompts}"
        raise ValueError(f"no file {missing[0]}; expected {needed}")
    names = [f"{prompt}_{number:06d}.png" for number, prompt in enumerate(prompts)]
    for name, prompt in zip(names, prompts):  # the scripts read the prompt from the file's name
        if "/" in prompt or "_" in prompt or len(name.encode()) > 255:
            needed = "the name has no / and no other _ and at most 255 bytes"
            raise ValueError(
                f"--prompts {args.prompts}: {prompt!r} cannot be a file's name: {needed}"
            )
    folder = Path(args.out, "samples")
    if folder.exists():
        raise ValueError(f"--out {args.out} holds images already; choose another folder")
    folder.mkdir(parents=True)
    for file, name in zip(files, names):
        shutil.copyfile(file, folder / name)
    print(f"{len(files)} images -> {folder}")


def find_samples(folder: Path) -> tuple[list[Path], list[str]]:
    """The images of FOLDER/samples in the order of their numbers, and their prompts."""
    images, found = {}, sorted(folder.glob("samples/*"))
    if not found:
        raise ValueError(f"no images in {folder}/samples; write them first (see --help)")
    for file in found:
        match = re.fullmatch(r"([^_]+)_(\d+)\.png", file.name)
        if not match:
            raise ValueError(f"{file}: expected a name PROMPT_000000.png")
        number = int(match[2])
        if number in images:
            needed = "a number of its own for each image, not for each image of a prompt"
            raise ValueError(f"{folder}/samples: number {number} occurs twice; expected {needed}")
        images[number] = file, match[1]
    if sorted(images) != list(range(len(images))):
        raise ValueError(
            f"{folder}/samples: expected images with the numbers 0, 1, 2 ... without a gap"
        )
    ordered = [images[number] for number in range(len(images))]
    return [file for file, _ in ordered], [prompt for _, prompt in ordered]


def read_results(file: Path, number: int) -> list[float]:
    """The authors' scores of images 0 ... number - 1."""
    needed = '[{"question_id": 0, "answer": 0.5}, ...] with an answer for each image'
    try:
        entries = read_json(file.read_text(encoding="utf-8"))
        answers = {int(entry["question_id"]): float(entry["answer"]) for entry in entries}
    except OSError as error:
        raise ValueError(f"no file {file}: run the authors' script first (see --help)") from error
    except FAULTS as error:
        raise ValueError(f"{file}: expected {needed} ({error})") from error
    complete = sorted(answers) == list(range(number)) and len(entries) == number
    if not complete or not all(map(math.isfinite, answers.values())):
        raise ValueError(f"{file}: {len(entries)} answers for {number} images; expected {needed}")
    return [answers[i] for i in range(number)]


def open_picture(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return as_rgb(image)
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(f"{file} cannot be decoded ({reason(error)})") from error


def compare(args: argparse.Namespace) -> None:
    """A line for each image: its number, our score, theirs, the difference, the prompt."""
    files, prompts = find_samples(Path(args.folder))
    theirs = read_results(Path(args.folder, RESULTS[args.task], "vqa_result.json"), len(files))
    scorer, scores = REWARDS[args.task], []
    scorer.device = args.device
    scorer.check(prompts)
    for i in tqdm(range(0, len(files), args.batch), unit="batch", dynamic_ncols=True):
        pictures = [open_picture(file) for file in files[i : i + args.batch]]
        scores += scorer(pictures, prompts[i : i + args.batch]).tolist()
    differences = torch.tensor(scores).double() - torch.tensor(theirs).double()
    print("image   ours    theirs  ours - theirs  prompt")
    for i, prompt in enumerate(prompts):
        print(f"{i:06d}  {scores[i]:.4f}  {theirs[i]:.4f}  {differences[i]:+.4f}        {prompt}")
    n = len(scores)
    print(f"mean    {sum(scores) / n:.4f}  {sum(theirs) / n:.4f}  {differences.mean():+.4f}")
    worst = differences.abs().argmax()
    print(f"largest difference: {differences[worst]:+.4f}, image {worst:06d}; {n} images")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="prompts | images | compare")

    one = commands.add_parser("prompts", help="a prompt file with every prompt several times")
    one.add_argument("file", metavar="FILE", help="T2I-CompBench's color_val.txt, for example")
    one.add_argument("--repeat", type=positive, default=10, help="images of each prompt")
    one.add_argument("--out", required=True, metavar="FILE", help="the file to write; must be new")
    one.set_defaults(run=write_prompts)

    one = commands.add_parser("images", help="evaluate.py's images under the authors' names")
    one.add_argument("images", metavar="IMAGES", help="folder with 00000.png, 00001.png, ...")
    one.add_argument("--prompts", required=True, metavar="FILE", help="line n: prompt of image n")
    one.add_argument("--out", required=True, metavar="DIR", help="images go to DIR/samples")
    one.set_defaults(run=export_images)

    one = commands.add_parser("compare", help="our score and the authors' of each image")
    one.add_argument("folder", metavar="DIR", help="with samples/ and what their script wrote")
    one.add_argument("--task", required=True, choices=RESULTS, help="which score")
    one.add_argument("--device", default="cpu", help="where our networks run")
    one.add_argument("--batch", type=positive, default=32, help="images read at a time")
    one.set_defaults(run=compare)
    for command in commands.choices.values():
        command.formatter_class = Help
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        fail(str(error))


if __name__ == "__main__":
    main(parse_args())
