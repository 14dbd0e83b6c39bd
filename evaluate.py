"""Evaluate any number of models side by side: the paper's table, one picture grid, or your own prompt.

    python evaluate.py --models base merged=toy/adapters/merged student=runs/opd/adapter    # table + grid, minutes
    python evaluate.py --models base toy/adapters/ocr --prompt "sign reads K T in red"      # pictures of one's own prompt
    torchrun --nproc_per_node=2 evaluate.py --models base                                   # the same table from two processes

A model is `base` or the directory of an adapter, written PATH or NAME=PATH. All models see the same prompts and
start from the same noise, so differences between them are paired. If the four tasks' teachers are among the models
under their tasks' names, a row `oracle` asks each task of its own teacher: what perfect routing would score.

Columns are the paper's: each metric on the test prompts of its own task, and
Average = (GenEval + OCR + DeQA / 5 + PickScore / 26) / 4, which fits all published rows.
Deterministic: the same flags give the same table; on another number of processes, the same up to rounding.
"""

import json
import math
from pathlib import Path

from cli import (
    TASKS,
    check_adapter,
    check_model,
    fail,
    make_parser,
    model_flags,
    pairs,
    positive,
    prompt_files,
    read_prompts,
    save_json,
)

COLUMNS = {"geneval": "GenEval", "ocr": "OCR", "deqa": "DeQA", "pickscore": "PickScore"}
SCALES = {"geneval": 1, "ocr": 1, "deqa": 5, "pickscore": 26}  # what Average divides each metric by


def parse_args():
    parser = make_parser(__doc__)
    model_flags(parser)
    flag = parser.add_argument
    flag("--models", nargs="+", default=["base"], metavar="[NAME=]PATH", help="`base` or adapter directories")
    flag("--prompt", action="append", help="paint this prompt instead of scoring; may be repeated")
    flag("--tasks", nargs="+", default=list(TASKS), help="whose test prompts to score")
    flag("--prompts", nargs="+", metavar="TASK=FILE", help="test prompts; default toy/prompts/TASK_test.txt")
    flag("--num_prompts", type=int, default=0, help="test prompts per task; 0 = all of the file")
    flag("--rewards", default="toy", help="Python module whose REWARDS holds the scorers by name")
    flag("--steps", type=positive, default=16, help="ODE steps (40 in the paper)")
    flag("--guidance", type=float, default=1.0, help="classifier-free guidance scale; 1 = off (4.5 for SD3.5)")
    flag("--model_guidance", nargs="+", metavar="NAME=SCALE", help="another scale for single models")
    flag("--seed", type=int, default=0, help="of the initial noise")
    flag("--batch", type=positive, default=128, help="images per forward pass; does not change the result beyond rounding")
    flag("--out", default="runs/evaluate", help="folder for results.json, table.md and grid.png")
    flag("--overwrite", action="store_true", help="replace the evaluation in --out")
    args = parser.parse_args()

    check_model(args.model)
    models = {}
    for item in args.models:
        name, equals, path = item.partition("=")
        name, path = (name, path) if equals else (Path(item.rstrip("/")).name, item)
        if name in models:
            fail(f"--models: two models are called {name!r}; write NAME=PATH")
        if path != "base":
            check_adapter(path, "--models")
        models[name] = path
    args.models = models
    args.model_guidance = pairs(args.model_guidance, "--model_guidance", number=True)
    for name in args.model_guidance:
        if name not in models:
            fail(f"--model_guidance: no model is called {name!r}; there are {', '.join(models)}")
    given = pairs(args.prompts, "--prompts")
    for task in args.tasks:
        if task not in TASKS and task not in given:
            fail(f"unknown task {task!r}: one of {', '.join(TASKS)}")
    args.prompts = {} if args.prompt else prompt_files(given, args.tasks, "test")
    name = "prompts.png" if args.prompt else "results.json"
    if (Path(args.out) / "args.json").exists() or ((Path(args.out) / name).exists() and not args.overwrite):
        fail(f"--out {args.out} holds a run or an evaluation: choose another folder, or --overwrite the evaluation")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import importlib

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import adapters
import common
import memory
from model import embed_prompts, load_pipeline, paint


def load_rewards(module, device="cpu"):
    """{name: scorer} of a Python module's REWARDS; a scorer with weights gets the device, and loads them when first called."""
    try:
        rewards = importlib.import_module(module).REWARDS
    except (ImportError, AttributeError) as error:
        fail(f"--rewards {module}: no such module with REWARDS in it ({error})")
    for scorer in rewards.values():
        if hasattr(scorer, "device"):
            scorer.device = device
    return rewards


def load_scorers(module, tasks, device="cpu"):
    """{task: {metric: scorer}}: the task's own, and variants such as geneval_strict where the module has them."""
    rewards = load_rewards(module, device)
    for task in tasks:
        if task not in rewards:
            fail(f"task {task!r} has no scorer of its name in {module}: there are {', '.join(rewards)}")
    return {task: {n: f for n, f in rewards.items() if n == task or n.startswith(task + "_")} for task in tasks}


def score_models(pipe, text, models, tests, scorers, steps, guidance, seed=0, batch=128, size=None, rank=0, world=1):
    """Paint and score the test prompts of every task with every model (all ranks participate, each with its part).

    models {name: adapter name on the backbone, or None for the base}; guidance {name: scale};
    tests {task: (prompts, metadata)}. A scorer that raises ValueError (weights missing, say) is left out from then on,
    for every model, and its reason printed: an error is never a score.
    Returns scores {name: {metric: (N,) tensor}} and pictures {task: {name: (2, 3, H, W)}} for the grid (rank 0)."""
    scores, pictures, failed = {name: {} for name in models}, {task: {} for task in tests}, {}
    total = len(models) * sum(len(prompts) for prompts, _ in tests.values())
    bar = tqdm(total=total, desc="evaluating", unit="image", disable=rank > 0, dynamic_ncols=True)
    for name, on in models.items():
        with adapters.adapter(pipe.transformer, on):
            for task, (prompts, metadata) in tests.items():
                own = common.share(len(prompts), rank, world)
                parts, values = [], {metric: [] for metric in scorers[task]}
                for i in range(0, len(own), batch):
                    part = own[i : i + batch]
                    asked = [prompts[j] for j in part]
                    keys = [(seed, "evaluate", task, j) for j in part]
                    images = paint(pipe, text, asked, keys, steps, guidance[name], batch, size)
                    for metric in values:
                        if metric in failed:
                            continue
                        try:
                            values[metric] += scorers[task][metric](images, asked, [metadata[j] for j in part]).tolist()
                        except ValueError as error:
                            failed[metric] = str(error).splitlines()[0].removeprefix(f"{task}: ")
                    parts.append(images[: 2 if i == 0 else 0])
                    bar.update(len(part) * world)
                failed = dict(item for other in common.gather(failed) for item in other.items())  # all ranks participate
                for metric in values:
                    if metric not in failed:
                        got = [v for part in common.gather(values[metric]) for v in part]
                        scores[name][metric] = torch.tensor(got, dtype=torch.float64)
                pictures[task][name] = torch.cat(parts) if parts else torch.empty(0)
    bar.close()
    for metric, why in failed.items() if rank == 0 else ():
        print(f"not scored: {metric}: {why}", flush=True)
    return {name: {m: s for m, s in row.items() if m not in failed} for name, row in scores.items()}, pictures


def average(scores):
    """The paper's Average and its standard error from {metric: (N,) scores}; nan unless all four tasks are there."""
    if any(task not in scores for task in TASKS):
        return math.nan, math.nan
    mean = sum(scores[t].mean().item() / SCALES[t] for t in TASKS) / 4
    variance = sum((scores[t].std().item() / SCALES[t]) ** 2 / len(scores[t]) for t in TASKS) / 16
    return mean, variance**0.5


def compare(scores, other):
    """The difference of two models' Averages and its paired standard error: the same prompts and noise for both."""
    return average({task: scores[task] - other[task] for task in TASKS})


def summarise(scores):
    """{name: {metric: {"mean", "se", "n"}, "average": {...}}}, with the oracle's row if all teachers are there."""
    if all(task in scores and task in scores[task] for task in TASKS):
        scores = scores | {"oracle": {task: scores[task][task] for task in TASKS}}
    summary = {}
    for name, metrics in scores.items():
        summary[name] = {
            m: {"mean": s.mean().item(), "se": s.std().item() / len(s) ** 0.5, "n": len(s)} for m, s in metrics.items()
        }
        mean, se = average(metrics)
        if not math.isnan(mean):
            summary[name]["average"] = {"mean": mean, "se": se}
    return summary


def table(summary, notes=None):
    """A Markdown table in the paper's columns; `notes` {name: text} go behind the name."""
    digits = {"geneval": 3, "ocr": 3, "deqa": 2, "pickscore": 2, "average": 4}
    tasks = [task for task in COLUMNS if any(task in row for row in summary.values())]
    head = ["model", *(COLUMNS[t] for t in tasks), *(["Average"] if len(tasks) == 4 else [])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in summary.items():
        cells = [name + (f" ({notes[name]})" if notes and name in notes else "")]
        for metric in [*tasks, *(["average"] if len(tasks) == 4 else [])]:
            value = row.get(metric)
            cells.append(f"{value['mean']:.{digits[metric]}f} ± {value['se']:.{digits[metric]}f}" if value else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture_grid(path, images, prompts, scores=None):
    """A column per model, a row per prompt, the prompt above each row and the score under each image.

    images {column: (N, 3, H, W) in [0, 1]}, scores {column: N numbers}."""
    side = max(112, next(iter(images.values())).shape[-1])
    font, pad, line = ImageFont.load_default(12), 8, 16
    height = line + side + (line if scores else 0) + pad
    width = max(pad + (side + pad) * len(images), 2 * pad + int(max(font.getlength(p[:120]) for p in prompts)))
    page = Image.new("RGB", (width, line + pad + height * len(prompts)), "white")
    pen = ImageDraw.Draw(page)
    for column, (name, pictures) in enumerate(images.items()):
        x = pad + (side + pad) * column
        pen.text((x, 4), name[: side // 7], "black", font)
        for row in range(len(prompts)):
            y = line + pad + height * row
            if column == 0:
                pen.text((x, y), prompts[row][:120], "black", font)
            picture = (pictures[row] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            page.paste(Image.fromarray(picture).resize((side, side), Image.NEAREST), (x, y + line))
            if scores:
                pen.text((x, y + line + side), f"{float(scores[name][row]):.2f}", "dimgray", font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def report(args, pipe, text, tests, scorers, models, run, rank=0, world=1):
    """The end of train_opd.py: {start: adapter, "student": adapter} on the same test prompts and noise, beside what
    MODEL/results.json recorded of the others; table.md, results.json and grid.png in `run` (all ranks participate)."""
    guidance = dict.fromkeys(models, args.guidance) | {"student": args.student_guidance}
    how = (args.eval_steps, guidance, 0, args.micro_batch, args.size, rank, world)
    scores, pictures = score_models(pipe, text, models, tests, scorers, *how)
    if rank > 0:
        return
    live, file = summarise(scores), Path(args.model) / "results.json"
    recorded = json.loads(file.read_text()) if file.exists() else {"flags": {}, "results": {}}
    lines, results = [], {name: row for name, row in recorded["results"].items() if name != "merged"}  # it is the live start
    ours = {"guidance": args.guidance, "steps": args.eval_steps, "prompts": args.test_prompts}
    changed = [name for name, value in ours.items() if recorded["flags"].get(name) != value]
    task, number = next((task, len(prompts)) for task, (prompts, _) in tests.items())
    changed += ["number of prompts"] if any(row[task]["n"] != number for row in results.values() if task in row) else []
    if results and changed:
        lines.append(f"The recorded rows were made with other settings ({', '.join(changed)}): not comparable.\n")
    notes = {name: "recorded" for name in results} | {"oracle": "recorded: each task asked of its own teacher"}
    lines += [table(results | live, notes), ""]
    if "average" in live["student"]:
        start = next(iter(models))
        gain, se = compare(scores["student"], scores[start])
        lines.append(f"student - {start}: {gain:+.4f} ± {se:.4f} in Average (paired: same prompts, same noise)")
        mean, se = average(scores["student"])
        if "grpo_mix" in results and not changed:
            other = results["grpo_mix"]["average"]
            lines.append(f"student - grpo_mix: {mean - other['mean']:+.4f} ± {(se**2 + other['se'] ** 2) ** 0.5:.4f}")
        if "oracle" in results and not changed:
            lines.append(f"student / oracle: {mean / results['oracle']['average']['mean']:.1%}")
    (run / "table.md").write_text("\n".join(lines) + "\n")
    save_json(run / "results.json", {"flags": vars(args), "results": live})
    save_grid(run / "grid.png", scores, pictures, tests)
    print("\n" + "\n".join(lines) + f"\n\n-> {run}/table.md, results.json, grid.png, curves.png, samples/, adapter/")


def save_grid(path, scores, pictures, tests):
    """The first test prompts of every task, a column per model."""
    columns = {name: torch.cat([pictures[task][name] for task in tests]) for name in scores}
    prompts = [p for task, (ps, _) in tests.items() for p in ps[: len(next(iter(pictures[task].values())))]]
    marks = {}
    for name, row in scores.items():
        kept = [(row.get(task), len(pictures[task][name])) for task in tests]
        marks[name] = [mark for score, n in kept for mark in ([math.nan] * n if score is None else score[:n])]
    picture_grid(path, columns, prompts, marks)


def load_models(transformer, models):
    """Put every adapter of {name: path} on the backbone -> {name: adapter name or None}."""
    on = {}
    for i, (name, path) in enumerate(models.items()):
        on[name] = None if path == "base" else f"model_{i}"
        if on[name]:
            adapters.add_adapter(transformer, on[name], adapters.read_adapter(path, "--models"), path=path, flag="--models")
    return on


@memory.guarded
def main(args):
    rank, world, device = common.start_processes()
    scorers = {} if args.prompt else load_scorers(args.rewards, args.tasks, device)
    tests = {task: [part[: args.num_prompts or None] for part in read_prompts(file)] for task, file in args.prompts.items()}
    pipe = load_pipeline(args.model, device, args.dtype, args.no_t5, compile=args.compile)
    on = load_models(pipe.transformer, args.models)
    guidance = {name: args.model_guidance.get(name, args.guidance) for name in on}
    own = [prompts[i] for prompts, _ in tests.values() for i in common.share(len(prompts), rank, world)]
    text = embed_prompts(pipe, args.prompt or own, args.text_length, args.no_t5, args.cache_embeddings)
    out = Path(args.out)

    if args.prompt:  # one's own prompts, side by side, nothing scored
        columns = {}
        for name, adapter in on.items():
            with adapters.adapter(pipe.transformer, adapter):
                keys = [(args.seed, "prompt", i) for i in range(len(args.prompt))]
                columns[name] = paint(pipe, text, args.prompt, keys, args.steps, guidance[name], args.batch, args.size)
        if rank == 0:
            picture_grid(out / "prompts.png", columns, args.prompt)
            print(f"{len(args.prompt)} prompts x {len(columns)} models -> {out}/prompts.png")
        common.stop_processes()
        return

    scores, pictures = score_models(
        pipe, text, on, tests, scorers, args.steps, guidance, args.seed, args.batch, args.size, rank, world
    )
    if rank == 0:
        summary = summarise(scores)
        save_json(out / "results.json", {"flags": vars(args), "results": summary})
        (out / "table.md").write_text(table(summary) + "\n")
        save_grid(out / "grid.png", scores, pictures, tests)
        print(f"\n{table(summary)}\n\n-> {out}/results.json, table.md, grid.png")
    common.stop_processes()


if __name__ == "__main__":
    main(ARGS)
