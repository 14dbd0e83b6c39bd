"""Images: sampled, decoded, in files, in grids; and the curves of a run."""

import json
import math
import os
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from rewards.images import as_rgb
from rewards.tables import COLUMNS
from sde import rollout
from support.files import prompt_files, read_prompts
from support.flags import fail, one_line
from support.metrics import read_log
from support.model import initial_noise, time_grid, velocity
from support.run import chunks, generator, rank_and_world


@torch.no_grad()
def decode(vae: torch.nn.Module, latents: Tensor, batch: int = 128) -> Tensor:
    """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], on the CPU."""
    if not len(latents):
        return torch.empty(0, 3, 1, 1)
    vae, config, images = vae.to(latents.device), vae.config, []
    for part in latents.split(batch):
        scaled = part / config.scaling_factor + (config.shift_factor or 0)
        images.append(vae.decode(scaled.to(vae.dtype)).sample.float().cpu())
    return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def sample_latents(
    pipe: StableDiffusion3Pipeline, text: dict, prompts: Sequence[str], keys: Sequence[tuple],
    steps: int, guidance: float, batch: int = 128,
) -> Tensor:  # fmt: skip
    """ODE samples of the active LoRA: (B, C, H, W). keys[i] seeds the noise of sample i."""
    grid, samples = time_grid(pipe, steps), [initial_noise(pipe, [])]
    for numbers in chunks(torch.arange(len(prompts)), batch):
        rows = torch.tensor([text["rows"][prompts[i]] for i in numbers])
        noise = initial_noise(pipe, [generator(*keys[i]) for i in numbers])
        v = lambda x, t, rows=rows: velocity(pipe.transformer, x, t, text, rows, guidance)
        samples.append(rollout(v, noise, grid, a=0.0).x[-1])
    return torch.cat(samples)


def sample_images(pipe, text, prompts, keys, steps, guidance, batch: int = 128) -> Tensor:
    """The same, decoded: (B, 3, H, W) in [0, 1], on the CPU."""
    latents = sample_latents(pipe, text, prompts, keys, steps, guidance, batch)
    return decode(pipe.vae, latents, batch)


def as_picture(image: torch.Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> PIL, rounded to bytes."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save_picture(file: str | Path, image: torch.Tensor, mark: str) -> None:
    """(3, H, W) in [0, 1] -> PNG. `mark`, a text inside the file, tells what it was made from.
    Written beside and renamed: the file is complete or not there."""
    info, beside = PngInfo(), Path(file).with_suffix(f".{os.getpid()}")
    info.add_text("made from", mark)
    beside.parent.mkdir(parents=True, exist_ok=True)
    as_picture(image).save(beside, "PNG", pnginfo=info)
    beside.replace(file)


def is_kept(file: str | Path, mark: str) -> bool:
    """Whether the file is there and carries this mark."""
    try:
        with Image.open(file) as image:
            return image.info.get("made from") == mark
    except (OSError, SyntaxError):
        return False


def read_pictures(files: Iterable[str | Path]) -> list[torch.Tensor]:
    """[(3, H, W) in [0, 1]], of any sizes. ValueError where a file is no image."""
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                pixels = torch.from_numpy(np.array(as_rgb(image)))  # (H, W, 3)
        except Exception as error:  # damaged files fail in many ways
            why = str(error).splitlines()[0]
            raise ValueError(f"{file} cannot be decoded ({why}); make this image again") from error
        images.append(pixels.permute(2, 0, 1) / 255)
    return images


def find_images(
    path: str, task: str, tasks: Collection[str], model: str, file: str | None = None, number=0
) -> tuple[list[Path], list[str], list[dict]]:
    """A folder of images -> (files, prompts, metadata), one entry per image.

    DIR/TASK (or DIR, for a single task) lists them in metadata.jsonl, or names each by its line in
    the prompt `file`, from 0: 00000.png or 00000/samples/0000.png. number: only the first lines;
    0 = all. Every prompt needs an image, all need equally many, and none may be left over."""
    folder, end = Path(path, task), number or None
    if not folder.is_dir() and len(tasks) > 1:
        fail(f"--scores_only {path}: no folder {folder}; give with --tasks what it holds")
    folder = folder if folder.is_dir() else Path(path)
    if (folder / "metadata.jsonl").is_file():
        return listed_images(folder, end)
    file = prompt_files({task: file} if file else {}, [task], "test", model)[task]
    prompts, metadata = (part[:end] for part in read_prompts(file))
    images = {n: [] for n in range(len(prompts))}
    for image in sorted([*folder.glob("*.*"), *folder.glob("*/samples/*.*")]):
        if image.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            continue
        name = image.relative_to(folder).parts[0].split(".")[0]
        if not (name.isascii() and name.isdecimal()):
            fail(f"{image}: expected a line number as its name (00000.png), or a metadata.jsonl")
        if not number or int(name) < number:
            images.setdefault(int(name), []).append(image)
    files, order, wanted = [], [], max(len(images[0]), 1)
    for n, own in images.items():
        expected = wanted if n < len(prompts) else 0
        if len(own) != expected:
            has = f"{len(own)} image(s) of prompt {n:05d}, expected {expected}"
            lines = f"{file} has {len(prompts)} prompts (--num_prompts N takes the first N)"
            fail(f"--scores_only {folder}: {has}; {lines}")
        files += own
        order += [n] * len(own)
    return files, [prompts[n] for n in order], [metadata[n] for n in order]


def listed_images(folder: Path, end: int | None) -> tuple[list[Path], list[str], list[dict]]:
    """The same, from the first `end` lines of the folder's metadata.jsonl."""
    own = folder / "metadata.jsonl"
    prompts, metadata = (part[:end] for part in read_prompts(own, "--scores_only"))
    files = [folder / str(about.get("file_name")) for about in metadata]
    for n, file in enumerate(files, 1):
        if not file.is_file():
            fail(f'{own}: line {n} needs the "file_name" of an existing image, not {file.name!r}')
    return files, prompts, metadata


def picture_grid(
    path: str | Path,
    columns: dict[str, Sequence[torch.Tensor]],
    prompts: Sequence[str],
    scores: dict[str, Sequence[float]] | None = None,
    tasks: Sequence[str] = (),
) -> None:
    """A column per model, a row per prompt; the prompt and its task above its row, a score under
    each image.

    columns {name: images (3, H, W) in [0, 1]}, scores {name: numbers}. No prompt, no file. In the
    file stands where each picture is: [[column, prompt, left, top, right, bottom], ...]."""
    if not prompts:
        return
    largest = max(image.shape[-1] for images in columns.values() for image in images)
    side = largest * math.ceil(96 / largest)  # all pixels of an image are equally large
    font, pad, line = ImageFont.load_default(13), 8, 18
    prompts = [one_line(prompt)[:120] for prompt in prompts]
    heads = [f"{task}: {prompt}" for task, prompt in zip(tasks, prompts)] or prompts
    names = [textwrap.wrap(one_line(name), side // 7)[:2] for name in columns]
    top = pad + line * max(map(len, names))
    height = line + side + pad
    if scores:
        height += line
    longest = int(max(font.getlength(head) for head in heads))
    width = max(pad + (side + pad) * len(columns), 4 * pad + longest)
    page = Image.new("RGB", (width, top + pad + height * len(prompts)), "white")
    pen, places, info = ImageDraw.Draw(page), [], PngInfo()
    for row, head in enumerate(heads):
        y = top + height * row
        pen.rectangle((pad, y, width - pad, y + line - 1), "gainsboro")
        pen.text((2 * pad, y + 1), head, "black", font)
    for column, (name, images) in enumerate(columns.items()):
        x = pad + (side + pad) * column
        for number, words in enumerate(names[column]):
            pen.text((x, pad / 2 + line * number), words, "black", font)
        for row in range(len(prompts)):
            y = top + line + height * row
            picture = ImageOps.contain(as_picture(images[row]), (side, side), Image.NEAREST)
            page.paste(picture, (x, y))
            places.append([name, prompts[row], x, y, x + picture.width, y + picture.height])
            if scores and not math.isnan(scores[name][row]):
                pen.text((x, y + side), f"{float(scores[name][row]):.2f}", "black", font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    info.add_text("pictures", json.dumps(places))
    page.save(path, pnginfo=info)


def save_grid(path: str | Path, scores: dict, files: dict, tests: dict, rows: dict) -> None:
    """The images `rows` {task: [number, ...]} of every model, with their task's own score. Removes
    an older file where there is none to show."""
    Path(path).unlink(missing_ok=True)
    places = [(task, j) for task in tests for j in rows.get(task, ())]
    columns, marks = {}, {}
    for name, of_model in scores.items():
        columns[name] = read_pictures(files[name][task][j] for task, j in places)
        marks[name] = [of_model[task][j] if task in of_model else math.nan for task, j in places]
    prompts, tasks = [tests[task][0][j] for task, j in places], [task for task, _ in places]
    picture_grid(path, columns, prompts, marks, [COLUMNS.get(task, task) for task in tasks])


def draw_curves(folder: str | Path, panels: dict[str, str]) -> None:
    """curves.png from metrics.jsonl, a panel each: {title: beginning of the metrics' names}."""
    if rank_and_world()[0] > 0:
        return
    import matplotlib.pyplot as plt  # here: it takes a second that most commands need not spend

    plt.switch_backend("Agg")
    log = read_log(folder)
    logged = list(dict.fromkeys(name for line in log for name in line))
    panels = {title: [n for n in logged if n.startswith(start)] for title, start in panels.items()}
    panels = {title: names for title, names in panels.items() if names}  # those with data
    size = (4.2 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    # Colours that colour-blind readers tell apart.
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    for axis, (title, names) in zip(axes[0], panels.items()):
        axis.set_prop_cycle(color=colours)
        for name in names:
            points = [(line["iteration"], line[name]) for line in log if name in line]
            marker = "." if len(points) < 10 else ""
            axis.plot(*zip(*points), marker=marker, label=name.split("/")[-1])
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.savefig(Path(folder) / "curves.png", dpi=110)
    plt.close(figure)
