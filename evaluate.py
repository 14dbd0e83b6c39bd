"""Evaluate any number of models side by side: the paper's table, picture grids, or your own prompt.

    python evaluate.py --models base merged=toy/adapters/merged student=runs/opd/adapter    # table + grids, minutes
    python evaluate.py --models base toy/adapters/ocr --prompt "sign reads K T in red"      # pictures of one's own prompt
    torchrun --nproc_per_node=2 evaluate.py --models base                                   # the same table from two processes
    python evaluate.py --scores_only mine=DIR --tasks ocr --prompts ocr=data/ocr_test.txt --rewards rewards   # any images

A model is `base` or the directory of an adapter, written PATH or NAME=PATH. All models see the same prompts and
start from the same noise, so differences between them are paired. If the four tasks' teachers are among the models
under their tasks' names, a row `oracle` asks each task of its own teacher: what perfect routing would score.

Columns are the paper's: each metric on the test prompts of its own task, and
Average = (GenEval + OCR + DeQA / 5 + PickScore / 26) / 4, which fits all published rows. ± is one standard error over
prompts. Deterministic: the same flags give the same table; on another number of processes, the same up to rounding.

First all images are painted, into OUT/images/MODEL/TASK/00000.png and so on; then they are read back and scored, a
scorer at a time. Each file carries what made it (weights, prompt, noise, settings): a later call paints only what is
not there in just that way, be it after a crash, for one more model, or for a scorer that lacked its weights.

--scores_only takes images made by anything: folders DIR/TASK, or DIR itself for a single task, that hold
    00000.png, 00001.jpg, …        image n belongs to line n, counted from 0, of the task's prompt file
    00000/samples/0000.png, …      several images a line, as GenEval's own scripts lay them out
    metadata.jsonl and its images  {"file_name": …, "prompt": …, what the scorer wants} a line; no prompt file then
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import support.files as given_files
import support.flags as cli
from support.flags import TASKS, at_least, fail, one_line, pairs, positive, within


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    cli.model_flags(parser)
    flag = parser.add_argument
    flag("--models", nargs="+", metavar="[NAME=]PATH", help="base, or adapters: directories or hub ids; default base")
    flag("--prompt", action="append", help="paint this prompt instead of scoring; may be repeated")
    flag("--scores_only", "--scores-only", nargs="+", metavar="[NAME=]DIR", help="score these images, paint nothing; see above")
    flag("--tasks", nargs="+", default=list(TASKS), help="whose test prompts to score")
    flag(
        "--prompts",
        "--test_prompts",
        nargs="+",
        action="extend",
        metavar="TASK=FILE",
        help="test prompts; default MODEL/prompts/TASK_test.txt",
    )
    flag("--num_prompts", type=at_least(0), default=0, help="test prompts per task; 0 = all of the file")
    cli.reward_flags(flag)
    flag("--published", action="store_true", help="add the paper's rows, of Stable Diffusion 3.5 Medium at 512 pixels")
    flag("--steps", type=positive, default=16, help="ODE steps (40 in the paper)")
    flag("--guidance", type=within(0), default=1.0, help="classifier-free guidance scale; 1 = off (4.5 for SD3.5)")
    flag("--model_guidance", nargs="+", metavar="NAME=SCALE", help="another scale for single models")
    flag("--seed", type=at_least(0), default=0, help="of the initial noise")
    flag("--batch", type=positive, default=128, help="images per forward pass; does not change the result beyond rounding")
    flag("--out", default="runs/evaluate", help="folder for results.json, table.md, images/ and the grids")
    flag("--overwrite", action="store_true", help="replace the evaluation in --out; images that still fit are used again")
    args = parser.parse_args()

    if args.prompt and args.scores_only:
        fail("--prompt paints and --scores_only does not: choose one")
    if args.models and args.scores_only:
        fail("--models are painted with and --scores_only paints nothing: choose one")
    if args.published and args.rewards == "toy":
        fail("--published: the miniature's scorers are not the paper's; give --rewards rewards")
    source, models = "--scores_only" if args.scores_only else "--models", {}
    for item in args.scores_only or args.models or ["base"]:
        name, equals, path = item.partition("=")
        name, path = (name, path) if equals else (Path(item.rstrip("/")).name, item)
        if name in models:
            fail(f"{source}: two models are called {name!r}; write NAME=PATH")
        if Path(name).name != name or name == "..":
            fail(f"{source} {item}: the name becomes a folder's, so it holds no slash; write NAME={path}")
        if args.scores_only and not Path(path).is_dir():
            fail(f"--scores_only {path}: not a folder of images")
        if not args.scores_only and path != "base":
            given_files.check_adapter(path, "--models")
        models[name] = path
    args.models = models
    if not args.scores_only:
        given_files.check_model(args.model)
    args.model_guidance = pairs(args.model_guidance, "--model_guidance", number=True)
    for name in args.model_guidance:
        if name not in models:
            fail(f"--model_guidance: no model is called {name!r}; there are {', '.join(models)}")
    given = pairs(args.prompts, "--prompts", overrule=True)
    for task in args.tasks:
        if Path(task).name != task or (task not in TASKS and task not in given and not args.scores_only):
            fail(f"unknown task {task!r}: one of {', '.join(TASKS)}, or any name with --prompts {task}=FILE")
    for task in set(given) - set(args.tasks):
        fail(f"--prompts: unknown task {task!r}: this run has {', '.join(args.tasks)}")
    for prompt in args.prompt or ():
        given_files.check_prompt(prompt, "--prompt")
    paints = not (args.prompt or args.scores_only)
    args.prompts = given_files.prompt_files(args.prompts, args.tasks, "test", args.model) if paints else given
    cli.check_folder(args.out)
    name = "prompts.png" if args.prompt else "results.json"
    if (Path(args.out) / "args.json").exists() or ((Path(args.out) / name).exists() and not args.overwrite):
        fail(f"--out {args.out} holds a run or an evaluation: choose another folder, or --overwrite the evaluation")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import importlib
import tempfile
import traceback

import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import support.lora as adapters
import support.run as common
import support.memory as memory
from support.model import TEXT, as_picture, backbone_dtype, embed_prompts, is_kept, load_pipeline, paint, read_pictures, save_picture
from support.tables import GENEVAL, average, compare, published, summarise, table

# ---- Scorers


def load_rewards(module: str, device: torch.device | str = "cpu") -> dict[str, Callable]:
    """{name: scorer} of a Python module's REWARDS; a scorer with weights gets the device, and loads them when first called."""
    try:
        rewards = dict(importlib.import_module(module).REWARDS)
    except (ImportError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        fail(f"--rewards {module}: no module (a name without .py) with REWARDS in it ({error})")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--reward_device {device}: {cli.reason(error)}")
    for scorer in rewards.values():
        if hasattr(scorer, "device"):
            scorer.device = device
    return rewards


def load_scorers(module: str, tasks: Iterable[str], device: torch.device | str = "cpu") -> dict[str, dict[str, Callable]]:
    """{task: {metric: scorer}}: the task's own, and variants such as geneval_strict where the module has them."""
    rewards = load_rewards(module, device)
    for task in tasks:
        if task not in rewards:
            fail(f"task {task!r} has no scorer of its name in {module}: there are {', '.join(rewards)}")
    return {task: {n: f for n, f in rewards.items() if n == task or n.startswith(task + "_")} for task in tasks}


def check_prompts(scorer: Callable, prompts: list[str], metadata: list[dict], file: str) -> None:
    """A prompt that a scorer could never score is found before hours of painting, not after them."""
    try:
        if hasattr(scorer, "check"):
            scorer.check(prompts, metadata)
    except ValueError as error:
        fail(f"{file}: {error}")


def ask(scorer: Callable, images: torch.Tensor | list[Image.Image], prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """The scores (B,) of a scorer, float64 on the CPU. ValueError, one line, whatever goes wrong in it: an exception of any
    kind, a number that is none, another shape. So an error can be reported or stop a run, and is never a score."""
    try:
        scores = scorer(images, prompts, metadata)
        scores = scores.detach().double().cpu() if torch.is_tensor(scores) else scores
    except Exception as error:
        what = (str(error).splitlines() or ["no message"])[0]
        if not isinstance(error, ValueError):  # a slip in the scorer's own code: say where
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {what} ({Path(where.filename).name}, line {where.lineno})"
        raise ValueError(what) from error
    shape = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
    if shape != (len(prompts),):
        raise ValueError(f"it gave {shape}, not a tensor of shape ({len(prompts)},), one number an image")
    if not scores.isfinite().all():
        raise ValueError(f"it gave {scores.tolist()[:4]}…, not a finite number for each of {len(prompts)} images")
    return scores


# ---- Images: painted into files, or found in them


def image_files(folder: Path, tests: dict, about: dict[str, dict], rank: int = 0, world: int = 1) -> tuple[dict, dict]:
    """Where the images of every model are or will be, and which of this process's part are still to be painted.

    tests {task: (prompts, metadata)}; about {model: dict}: all that the images of a model depend on.
    -> files {model: {task: [path, …]}}, todo {(model, task): {number: mark}}."""
    files, todo = {name: {} for name in about}, {}
    for name in about:
        for task, (prompts, _) in tests.items():
            files[name][task] = [folder / name / task / f"{j:05d}.png" for j in range(len(prompts))]
            todo[name, task] = {}
            for j in common.share(len(prompts), rank, world):
                mark = json.dumps(about[name] | {"task": task, "number": j, "prompt": prompts[j]})
                if not is_kept(files[name][task][j], mark):
                    todo[name, task][j] = mark
    return files, todo


def paint_files(pipe: StableDiffusion3Pipeline, text: dict | None, models: dict, tests: dict, files: dict, todo: dict,
                steps: int, guidance: dict, seed: int = 0, batch: int = 128, size: int | None = None,
                rank: int = 0) -> None:  # fmt: skip
    """Paint what is to be painted. models {name: adapter on the backbone, None for the base}; guidance {name: scale}."""
    total = sum(map(len, todo.values()))
    bar = tqdm(total=total, desc="painting", unit="image", disable=rank > 0 or not total, dynamic_ncols=True)
    for (name, task), marks in todo.items():
        for i in range(0, len(marks), batch):
            part = list(marks)[i : i + batch]
            keys = [(seed, "evaluate", task, j) for j in part]  # the same noise for every model
            with adapters.adapter(pipe.transformer, models[name]):
                images = paint(pipe, text, [tests[task][0][j] for j in part], keys, steps, guidance[name], batch, size)
            for j, image in zip(part, images):
                save_picture(files[name][task][j], image, marks[j])
            bar.update(len(part))
    bar.close()


def find_tests(args: argparse.Namespace) -> tuple[dict, dict]:
    """--scores_only: -> tests {task: (prompts, metadata)}, an entry an image, and files {name: {task: [path, …]}}."""
    tests, files = {}, {name: {} for name in args.models}
    for task in args.tasks:
        for name, path in args.models.items():
            files[name][task], *test = given_files.find_images(
                path, task, args.tasks, args.model, args.prompts.get(task), args.num_prompts
            )
            if tests.setdefault(task, test) != test:
                fail(f"--scores_only {path}: not the {task} prompts, or not as many images of each, as in the first folder")
    return tests, files


# ---- Scores


def score_files(files: dict, tests: dict, scorers: dict, batch: int = 128, rank: int = 0, world: int = 1) -> tuple[dict, dict]:
    """Score the images of every model (all ranks participate, each with its part, none twice).

    files {model: {task: [file, …]}}; tests {task: (prompts, metadata)}; scorers {task: {metric: scorer}}.
    A scorer goes through all models and is dropped: one at a time is on the device. One that fails is left out of every
    row. Returns scores {model: {metric: (N,) float64}} and the failures {metric: reason}."""
    scores, failed = {name: {} for name in files}, {}
    total = sum(len(prompts) * len(scorers[task]) for task, (prompts, _) in tests.items()) * len(files)
    bar = tqdm(total=total, desc="scoring", unit="image", disable=rank > 0, dynamic_ncols=True)
    for task, (prompts, metadata) in tests.items():
        own = common.share(len(prompts), rank, world)
        for metric, scorer in scorers[task].items():
            for name in files:
                values, reason = [], None
                for i in range(0, len(own), batch):
                    part = own[i : i + batch]
                    try:
                        images = read_pictures([files[name][task][j] for j in part])
                    except ValueError as error:  # no scorer's fault, and no score for this image by any
                        bar.close()
                        fail(str(error))
                    alike = len({image.shape for image in images}) == 1
                    images = torch.stack(images) if alike else [as_picture(image) for image in images]
                    try:
                        values += ask(scorer, images, [prompts[j] for j in part], [metadata[j] for j in part]).tolist()
                    except ValueError as error:
                        reason = str(error).removeprefix(f"{task}: ")
                        break
                    bar.update(len(part) * world)
                parts = common.gather((values, reason))  # all ranks participate
                reason = next((reason for _, reason in parts if reason), None)
                if reason:
                    failed[metric] = reason
                    break
                scores[name][metric] = torch.tensor([v for values, _ in parts for v in values], dtype=torch.float64)
            if hasattr(scorer, "model"):
                scorer.model = None
    bar.close()
    return {name: {m: s for m, s in row.items() if m not in failed} for name, row in scores.items()}, failed


def score_models(pipe: StableDiffusion3Pipeline, text: dict, models: dict, tests: dict, scorers: dict, steps: int,
                 guidance: dict, folder: str | Path, seed: int = 0, batch: int = 128, size: int | None = None, rank: int = 0,
                 world: int = 1) -> tuple[dict, dict, dict]:  # fmt: skip
    """Paint into an empty folder and score: for the end of a training run, whose weights no file stands for.
    -> scores, failures, files, as above."""
    files, todo = image_files(Path(folder), tests, {name: {} for name in models}, rank, world)
    paint_files(pipe, text, models, tests, files, todo, steps, guidance, seed, batch, size, rank)
    return *score_files(files, tests, scorers, batch, rank, world), files


# ---- Pictures


def picture_grid(path: str | Path, images: dict, prompts: list[str], scores: dict | None = None) -> None:
    """A column per model, a row per prompt, the prompt above each row and the score under each image.

    images {column: N of (3, H, W) in [0, 1]}, scores {column: N numbers}."""
    side = max(112, *(picture.shape[-1] for picture in next(iter(images.values()))))
    font, pad, line = ImageFont.load_default(12), 8, 16
    prompts = [one_line(prompt)[:120] for prompt in prompts]
    height = line + side + (line if scores else 0) + pad
    width = max(pad + (side + pad) * len(images), 2 * pad + int(max(map(font.getlength, prompts))))
    page = Image.new("RGB", (width, line + pad + height * len(prompts)), "white")
    pen = ImageDraw.Draw(page)
    for column, (name, pictures) in enumerate(images.items()):
        x = pad + (side + pad) * column
        pen.text((x, 4), one_line(name)[: side // 7], "black", font)
        for row in range(len(prompts)):
            y = line + pad + height * row
            if column == 0:
                pen.text((x, y), prompts[row], "black", font)
            page.paste(ImageOps.contain(as_picture(pictures[row]), (side, side), Image.NEAREST), (x, y + line))
            if scores:
                pen.text((x, y + line + side), f"{float(scores[name][row]):.2f}", "dimgray", font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def read_recorded(model: str | Path) -> tuple[dict, dict]:
    """The flags and results in MODEL/results.json; none where it is not there, or of another make: it may be a stranger's."""
    try:
        recorded = given_files.read_json((Path(model) / "results.json").read_text(encoding="utf-8"))
        cells = lambda row: {m: {"mean": float(c["mean"]), "se": float(c["se"]), "n": c.get("n")} for m, c in row.items()}
        return {**recorded["flags"]}, {one_line(name): cells(row) for name, row in recorded["results"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return {}, {}


def report(args: argparse.Namespace, pipe: StableDiffusion3Pipeline, text: dict, tests: dict, scorers: dict, models: dict,
           run: Path, rank: int = 0, world: int = 1) -> None:  # fmt: skip
    """The end of train_opd.py: {start: adapter, "student": adapter} on the same test prompts and noise, beside what
    MODEL/results.json recorded of the others; table.md, results.json and grid.png in `run` (all ranks participate)."""
    guidance = dict.fromkeys(models, args.guidance) | {"student": args.student_guidance}
    with tempfile.TemporaryDirectory(dir=run) as own:
        folder = common.gather(own)[0]  # rank 0's, where all see it: the grid takes pictures that other ranks painted
        how = (args.eval_steps, guidance, folder, 0, args.micro_batch, args.size, rank, world)
        scores, failed, files = score_models(pipe, text, models, tests, scorers, *how)
        if rank > 0:
            return
        save_grid(run / "grid.png", scores, files, tests, {task: range(min(2, len(tests[task][0]))) for task in tests})
    live, (flags, recorded) = summarise(scores, tests), read_recorded(args.model)
    lines, results = [], {name: row for name, row in recorded.items() if name != "merged"}  # it is the live start
    ours = {"guidance": args.guidance, "steps": args.eval_steps, "prompts": args.test_prompts}
    changed = [name for name, value in ours.items() if flags.get(name) != value]
    task, number = next((task, len(prompts)) for task, (prompts, _) in tests.items())
    changed += ["number of prompts"] if any(row[task]["n"] != number for row in results.values() if task in row) else []
    if results and changed:
        lines.append(f"The recorded rows were made with other settings ({', '.join(changed)}): not comparable.\n")
    notes = {name: "recorded" for name in results} | {"oracle": "recorded: each task asked of its own teacher"}
    lines += [table(results | live, notes), "", *(f"not scored: {metric}: {why}" for metric, why in failed.items())]
    if "average" in live["student"]:
        start = next(iter(models))
        gain, se = compare(scores["student"], scores[start], tests)
        lines.append(f"student - {start}: {gain:+.4f} ± {se:.4f} in Average (paired: same prompts, same noise)")
        mean, se = average(scores["student"], tests)
        if "average" in results.get("grpo_mix", ()) and not changed:
            other = results["grpo_mix"]["average"]
            lines.append(f"student - grpo_mix: {mean - other['mean']:+.4f} ± {(se**2 + other['se'] ** 2) ** 0.5:.4f}")
        if "average" in results.get("oracle", ()) and results["oracle"]["average"]["mean"] and not changed:
            lines.append(f"student / oracle: {mean / results['oracle']['average']['mean']:.1%}")
    (run / "table.md").write_text("\n".join(lines) + "\n")
    given_files.save_json(run / "results.json", {"flags": vars(args), "results": live})
    print("\n" + "\n".join(lines) + f"\n\n-> {run}/table.md, results.json, grid.png, curves.png, samples/, adapter/")


def save_grid(path: str | Path, scores: dict, files: dict, tests: dict, rows: dict) -> None:
    """A picture grid of the images `rows` {task: [number, …]}, a column per model, with each task's own score; no file
    where there is none, not even an older one."""
    Path(path).unlink(missing_ok=True)
    places = [(task, j) for task in tests for j in rows.get(task, ())]
    marks = {n: [row[task][j] if task in row else math.nan for task, j in places] for n, row in scores.items()}
    images = {name: read_pictures([files[name][task][j] for task, j in places]) for name in scores}
    if places:
        picture_grid(path, images, [tests[task][0][j] for task, j in places], marks)


def most_different(scores: dict, tests: dict, number: int = 3) -> dict[str, list[int]]:
    """{task: the prompts on which the models' scores lie furthest apart, at most so many, most different first}."""
    rows = {}
    for task in tests:
        values = [row[task] for row in scores.values() if task in row]
        if len(values) > 1:
            spread = torch.stack(values).amax(0) - torch.stack(values).amin(0)  # (N,)
            rows[task] = [j for j in spread.argsort(descending=True, stable=True)[:number].tolist() if spread[j] > 0]
    return rows


def load_models(transformer: torch.nn.Module, models: dict[str, str]) -> dict[str, str | None]:
    """Put every adapter of {name: path} on the backbone -> {name: adapter name or None}."""
    on = {}
    for i, (name, path) in enumerate(models.items()):
        on[name] = None if path == "base" else f"model_{i}"
        if on[name]:
            adapters.add_adapter(transformer, on[name], adapters.read_adapter(path, "--models"), path=path, flag="--models")
    return on


def paint_tests(args: argparse.Namespace, tests: dict, device: torch.device, rank: int, world: int) -> dict[str, dict]:
    """Fill OUT/images with what is not there yet -> files {name: {task: [file, …]}} (all ranks participate)."""
    pipe = load_pipeline(args.model, device, args.dtype, args.no_t5, size=args.size, compile=args.compile)
    on = load_models(pipe.transformer, args.models)
    guidance = {name: args.model_guidance.get(name, args.guidance) for name in on}
    folders = [Path(pipe.name_or_path) / part for part in ("transformer", "vae", "scheduler", *TEXT)]
    used = [folder for folder in folders if folder.is_dir() and not (args.no_t5 and folder.name.endswith("_3"))]
    base = common.gather([common.sha256(folder) for folder in used] if rank == 0 else None)[0]  # 15 GB of SD3.5: once
    how = {"base": base, "dtype": str(backbone_dtype(pipe.transformer)), "no_t5": args.no_t5, "text_length": args.text_length}
    how |= {"seed": args.seed, "steps": args.steps, "size": args.size}
    about = {}
    for name, path in args.models.items():
        adapter = path if path == "base" else common.sha256(given_files.fetch(path, "--models", given_files.ADAPTER))
        about[name] = how | {"adapter": adapter, "guidance": guidance[name]}
    files, todo = image_files(Path(args.out) / "images", tests, about, rank, world)
    own = [tests[task][0][j] for (_, task), marks in todo.items() for j in marks]
    text = embed_prompts(pipe, own, args.text_length, args.no_t5, args.cache_embeddings) if own else None
    settings = (args.steps, guidance, args.seed, args.batch, args.size, rank)
    paint_files(pipe, text, on, tests, files, todo, *settings)
    return files


def paint_prompts(args: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    """One's own prompts, side by side, nothing scored."""
    pipe = load_pipeline(args.model, device, args.dtype, args.no_t5, size=args.size, compile=args.compile)
    text = embed_prompts(pipe, args.prompt, args.text_length, args.no_t5, args.cache_embeddings)
    keys, columns = [(args.seed, "prompt", i) for i in range(len(args.prompt))], {}
    for name, on in load_models(pipe.transformer, args.models).items():
        guidance = args.model_guidance.get(name, args.guidance)
        with adapters.adapter(pipe.transformer, on):
            columns[name] = paint(pipe, text, args.prompt, keys, args.steps, guidance, args.batch, args.size)
    return columns


@memory.guarded
def main(args):
    rank, world, device = common.start_processes()
    out = Path(args.out)
    if args.prompt:
        columns = paint_prompts(args, device)
        if rank == 0:
            picture_grid(out / "prompts.png", columns, args.prompt)
            print(f"{len(args.prompt)} prompts x {len(columns)} models -> {out}/prompts.png")
        return common.stop_processes()

    scorers = load_scorers(args.rewards, args.tasks, args.reward_device or device)
    if args.scores_only:
        tests, files = find_tests(args)
    else:
        tests = {task: [p[: args.num_prompts or None] for p in given_files.read_prompts(file)] for task, file in args.prompts.items()}
    for task, metrics in scorers.items():
        check_prompts(metrics[task], *tests[task], args.prompts.get(task, f"prompts of {task}"))
    if not args.scores_only:
        files = paint_tests(args, tests, device, rank, world)  # the model is gone before the first scorer comes
    scores, failed = score_files(files, tests, scorers, args.batch, rank, world)
    if rank == 0:
        summary = summarise(scores, tests)
        rows = {f"{name} (published)": row for name, row in published().items()} if args.published else {}
        text = table(rows | summary)
        if any("geneval_tasks" in row for row in summary.values()):
            text += f"\n\nGenEval by its four names:\n\n{table(summary, columns=GENEVAL)}"
        text += "".join(f"\n\nnot scored: {metric}: {why}" for metric, why in failed.items())
        if not any(scores.values()):
            print(text.split("\n\n", 1)[1], flush=True)
            fail(f"--rewards {args.rewards}: nothing could be scored, for the reasons above; the images are kept")
        given_files.save_json(out / "results.json", {"flags": vars(args), "results": summary, "not_scored": failed})
        (out / "table.md").write_text(text + "\n")
        save_grid(out / "grid.png", scores, files, tests, {task: range(min(2, len(tests[task][0]))) for task in tests})
        save_grid(out / "differences.png", scores, files, tests, most_different(scores, tests))
        names = ["results.json", "table.md", "images/", "grid.png", "differences.png"]
        print(f"\n{text}\n\n-> {out}/" + ", ".join(name for name in names if (out / name).exists()))
    common.stop_processes()


if __name__ == "__main__":
    main(ARGS)
