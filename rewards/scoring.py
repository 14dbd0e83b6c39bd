"""Scoring: the scorers of a module, their queries, and the report at the end of a training run."""

import argparse
import importlib
import json
import math
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from recipes.model_card import write_card
from rewards.pictures import (
    as_picture,
    find_images,
    is_kept,
    read_pictures,
    sample_images,
    save_grid,
    save_picture,
)
from rewards.tables import QUALITY, average, compare, summarise, table
from support.files import read_json, read_prompts, save_json
from support.flags import TASKS, fail, one_line, reason
from support.lora import load_adapter, use
from support.metrics import read_log
from support.run import gather, rank_and_world, share


def load_rewards(module: str, device: torch.device | str = "cpu") -> dict[str, Callable]:
    """{name: scorer}, a module's REWARDS. A scorer with weights loads them onto `device` when it is
    first called."""
    try:
        rewards = dict(importlib.import_module(module).REWARDS)
    except (ImportError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        fail(f"--rewards {module}: not a module (a name without .py) with REWARDS in it ({error})")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--reward_device {device}: {reason(error)}")
    for scorer in rewards.values():
        if hasattr(scorer, "device"):
            scorer.device = device
    return rewards


def load_scorers(
    module: str, tasks: Iterable[str], device: torch.device | str = "cpu", which: str = "main"
) -> dict:
    """{task: {metric: scorer}}: the task's own, and variants such as geneval_strict. In the table
    quality each task is a set of prompts, and TASK_METRIC all of the table's metrics on it."""
    if not tasks:
        return {}
    rewards, scorers = load_rewards(module, device), {}
    for task in tasks:
        if which == "quality":
            names = [name for name in rewards if name.split("@")[0] in QUALITY]
            if not names:
                wanted = ", ".join(QUALITY)
                fail(f"--table quality: {module} has none of {wanted}; give --rewards rewards")
            scorers[task] = {f"{task}_{name}": rewards[name] for name in names}
            continue
        if task not in rewards:
            known = ", ".join(rewards)
            fail(f"task {task!r} has no scorer of its name in {module}: there are {known}")
        names = [name for name in rewards if name == task or name.startswith(task + "_")]
        scorers[task] = {name: rewards[name] for name in names}
    return scorers


def check_prompts(scorer: Callable, prompts: list[str], metadata: list[dict], file: str) -> None:
    """Find a prompt that a scorer could never score before hours of sampling, not after them."""
    try:
        if hasattr(scorer, "check"):
            scorer.check(prompts, metadata)
    except ValueError as error:
        fail(f"{file}: {error}")


def try_scorers(scorers: dict[str, dict[str, Callable]]) -> None:
    """Name the metrics whose scorer cannot be loaded before hours of sampling, not after them."""
    if rank_and_world()[0] > 0:
        return
    for task, metrics in scorers.items():
        for metric, scorer in metrics.items():
            if not (hasattr(scorer, "load") and hasattr(scorer, "model")):
                continue
            try:
                scorer.load()
            except Exception as error:  # also too little memory: scoring says the same again
                why = without_name(first_line(error), scorer, task)
                print(f"will not be scored: {metric}: {why}", flush=True)
            scorer.model = None


def first_line(error: Exception) -> str:
    """Of an error's text, uncut: it may end with the command that fetches the weights."""
    return (str(error).splitlines() or ["no message"])[0]


def without_name(why: str, scorer: Callable, task: str) -> str:
    """An error's text without the scorer's name, for lines that begin with the metric."""
    return why.removeprefix(f"{getattr(scorer, 'name', task)}: ")


def query(scorer: Callable, images, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """A scorer's scores (B,), float64 on the CPU. images (B, 3, H, W) in [0, 1], or PIL pictures.

    ValueError, one line, whatever goes wrong in it: any exception, a number that is not finite,
    another shape. An error is never a score."""
    try:
        scores = scorer(images, prompts, metadata)
        if torch.is_tensor(scores):
            scores = scores.detach().double().cpu()
    except Exception as error:
        what = first_line(error)
        if not isinstance(error, ValueError):  # a fault in the scorer's own code: tell where
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}, line {where.lineno}"
            what = f"{type(error).__name__}: {what} ({place})"
        raise ValueError(what) from error
    shape = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
    if shape != (len(prompts),):
        raise ValueError(f"it gave {shape}, not a tensor of shape ({len(prompts)},)")
    if not scores.isfinite().all():
        raise ValueError(f"it gave {scores.tolist()[:4]}..., which are not all finite numbers")
    return scores


def make_reward(args: argparse.Namespace, device, train: dict, tests: dict) -> Callable:
    """-> reward(images (B, 3, H, W), slots of (task, prompt, metadata)): (B,), float64.

    The weighted mean of --reward, or with --mix of the task's own score and deqa; each score is put
    on 0..1 by its range. A scorer that fails ends the run, or with --on_reward_error skip its batch
    gets nan, and a nan gradient skips the update. Prompts {task: (prompts, metadata)} that no
    scorer can score end the run now."""
    rewards = load_rewards(args.rewards, args.reward_device or device)
    for name in args.reward or [*args.tasks, "deqa"]:
        if name not in rewards:
            fail(f"unknown reward {name!r}: {args.rewards} has {', '.join(rewards)}")
        limits = getattr(rewards[name], "range", None)
        known = isinstance(limits, tuple | list) and len(limits) == 2 and limits[0] < limits[1]
        if not known:
            fail(f"reward {name!r} of {args.rewards} needs .range = (score for 0, score for 1)")

    for flag, files, sets in (
        ("--prompts", args.prompts, train),
        ("--test_prompts", args.test_prompts, tests),
    ):
        for task, (prompts, metadata) in sets.items():
            for name in args.reward or [task]:
                check_prompts(rewards[name], prompts, metadata, f"{flag} {files[task]}")

    def reward_of_task(task, images, prompts, metadata):
        weights = args.reward or {task: 1 - args.mix_quality, "deqa": args.mix_quality}
        if args.mix and task == "deqa":
            weights = {"deqa": 1.0}
        total = torch.zeros(len(images), dtype=torch.float64)
        for name, weight in weights.items():
            low, high = rewards[name].range
            try:
                scores = query(rewards[name], images, prompts, metadata)
            except ValueError as error:
                why = f"reward {name} cannot score: {str(error).removeprefix(f'{name}: ')}"
                if args.on_reward_error == "stop":
                    print(file=sys.stderr)  # ends the progress bar's line
                    fail(why)
                tqdm.write(f"batch dropped: {why}", file=sys.stderr)
                return torch.full_like(total, math.nan)
            total += weight * (scores.float() - low) / (high - low)
        return total / sum(weights.values())

    def reward(images, slots):
        values = torch.zeros(len(slots), dtype=torch.float64)
        for task in sorted({task for task, *_ in slots}):
            own = [n for n, slot in enumerate(slots) if slot[0] == task]
            prompts, metadata = [slots[n][1] for n in own], [slots[n][2] for n in own]
            values[own] = reward_of_task(task, images[own], prompts, metadata)
        return values

    return reward


def reward_log(rewards: torch.Tensor, G: int, of_slot: list[str]) -> dict[str, float]:
    """Means of rewards (B,), over all and per task, and the share of groups whose G rewards are all
    equal: those carry no signal."""
    groups = rewards.view(-1, G)  # (prompts, G)
    log = {"reward": rewards.mean().item()}
    for task in sorted(set(of_slot)):
        log[f"reward/{task}"] = groups[[other == task for other in of_slot]].mean().item()
    return log | {"flat_groups": (groups.std(1) < 1e-6).double().mean().item()}


def find_tests(args: argparse.Namespace) -> tuple[dict, dict]:
    """--scores_only: tests {task: (prompts, metadata)}, an entry per image, and the files."""
    tests, files = {}, {name: {} for name in args.models}
    for task in args.tasks:
        for name, path in args.models.items():
            where = (path, task, args.tasks, args.model, args.prompts.get(task), args.num_prompts)
            files[name][task], *test = find_images(*where)
            if tests.setdefault(task, test) != test:
                fail(f"--scores_only {path}: its {task} prompts are not those of the first folder")
    return tests, files


def score_files(files: dict, tests: dict, scorers: dict, batch: int = 128) -> tuple[dict, dict]:
    """Score the images of every model; every process scores its share. All processes call it.

    files {model: {task: [file, ...]}}, tests {task: (prompts, metadata)}, scorers {task: {metric:
    scorer}}. One scorer at a time is on the device. One that fails is left out of every row.
    Returns scores {model: {metric: (N,) float64}} and the failures {metric: reason}."""
    rank, world = rank_and_world()
    scores, failed = {name: {} for name in files}, {}
    number = sum(len(prompts) * len(scorers[task]) for task, (prompts, _) in tests.items())
    total = number * len(files)
    bar = tqdm(total=total, desc="scoring", unit="image", disable=rank > 0, dynamic_ncols=True)
    for task, (prompts, metadata) in tests.items():
        own = share(len(prompts), rank, world)
        for metric, scorer in scorers[task].items():
            for name in files:
                if metric in failed:
                    continue
                values, why = [], None
                for i in range(0, len(own), batch):
                    part = own[i : i + batch]
                    try:
                        images = read_pictures(files[name][task][j] for j in part)
                    except ValueError as error:  # of the image: no scorer can score it
                        bar.close()
                        fail(str(error))
                    if len({image.shape for image in images}) == 1:
                        images = torch.stack(images)
                    else:
                        images = [as_picture(image) for image in images]
                    words, about = [prompts[j] for j in part], [metadata[j] for j in part]
                    try:
                        values += query(scorer, images, words, about).tolist()
                    except ValueError as error:
                        why = without_name(str(error), scorer, task)
                        break
                    bar.update(len(part) * world)
                parts = gather((values, why))
                reasons = [why for _, why in parts if why]
                if reasons:
                    failed[metric] = reasons[0]
                values = [value for values, _ in parts for value in values]
                scores[name][metric] = torch.tensor(values, dtype=torch.float64)
            if hasattr(scorer, "model"):
                scorer.model = None
    bar.close()
    for row in scores.values():
        for metric in failed:
            row.pop(metric, None)
    return scores, failed


def find_missing(folder: Path, tests: dict, marks: dict[str, dict]) -> tuple[dict, list]:
    """Where every model's images are or will be, and which of the missing ones this process makes.

    What is missing is dealt out, not what there is: after a crash no process waits long for
    another. marks {model: all that its images depend on, besides prompt and noise}. Returns files
    {model: {task: [file, ...]}} and missing [(model, task, number, mark), ...]."""
    rank, world = rank_and_world()
    files, missing = {name: {} for name in marks}, []
    for name in marks:
        for task, (prompts, _) in tests.items():
            own = folder / name / task
            files[name][task] = [own / f"{j:05d}.png" for j in range(len(prompts))]
            for j in share(len(prompts), rank, world):
                about = marks[name] | {"task": task, "number": j, "prompt": prompts[j]}
                mark = json.dumps(about)
                if not is_kept(files[name][task][j], mark):
                    missing.append((name, task, j, mark))
    missing = [image for part in gather(missing) for image in part]  # of all processes
    return files, [missing[i] for i in share(len(missing), rank, world)]


def sample_missing(
    pipe, text: dict, loras: dict, guidance: dict, tests: dict, files: dict, missing: list, *how
) -> None:
    """Generate this process's missing images. loras {model: LoRA or None}, guidance {model: scale}.

    how: seed, ODE steps, batch. Number j of a task has the same noise for every model."""
    seed, steps, batch = how
    bar = tqdm(total=len(missing), desc="generating", unit="image", disable=rank_and_world()[0] > 0)
    for name in loras:
        own = [image for image in missing if image[0] == name]
        for i in range(0, len(own), batch):
            part = own[i : i + batch]
            prompts = [tests[task][0][j] for _, task, j, _ in part]
            keys = [(seed, "evaluate", task, j) for _, task, j, _ in part]
            scale = guidance[name]
            with use(pipe.transformer, loras[name]):
                images = sample_images(pipe, text, prompts, keys, steps, scale, batch)
            for (_, task, j, mark), image in zip(part, images):
                save_picture(files[name][task][j], image, mark)
            bar.update(len(part))
    bar.close()
    gather(None)  # all files are there


def read_recorded(model: str | Path) -> tuple[dict, dict]:
    """Flags and results in MODEL/results.json; ({}, {}) where there are none that fit."""
    try:
        text = (Path(model) / "results.json").read_text(encoding="utf-8")
        recorded, results = read_json(text), {}
        for name, row in recorded["results"].items():
            results[one_line(name)] = {
                metric: {"mean": float(cell["mean"]), "se": float(cell["se"]), "n": cell.get("n")}
                for metric, cell in row.items()
            }
        return {**recorded["flags"]}, results
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return {}, {}


def report(args, pipe, text: dict, tests: dict, scorers: dict) -> None:
    """The end of a distillation: start and averaged student on the test prompts, beside what
    MODEL/results.json recorded of the other models. Writes table.md, results.json and grid.png into
    --out. All processes call it."""
    run, (rank, _) = Path(args.out), rank_and_world()
    if not tests:
        if rank == 0:
            print(next_command(args, ["base", f"student={run}/adapter"]), flush=True)
        return
    start = "merged start" if Path(args.init).name == "merged" else "start"
    loras = {start: None, "student": "average"}
    if args.init != "base":
        load_adapter(pipe.transformer, "start", args.init, "--init")
        loras[start] = "start"
    student_guidance = getattr(args, "student_guidance", args.guidance)
    guidance = {start: args.guidance, "student": student_guidance}
    with tempfile.TemporaryDirectory(dir=run) as own:
        folder = Path(gather(own)[0])  # rank 0's: its grid shows images of all processes
        files, missing = find_missing(folder, tests, {name: {} for name in loras})
        how = (0, args.eval_steps, args.label_batch)
        sample_missing(pipe, text, loras, guidance, tests, files, missing, *how)
        scores, failed = score_files(files, tests, scorers, args.label_batch)
        if rank > 0:
            return
        rows = {task: range(min(2, len(prompts))) for task, (prompts, _) in tests.items()}
        save_grid(run / "grid.png", scores, files, tests, rows)
    live, (flags, recorded) = summarise(scores, tests), read_recorded(args.model)
    results = {name: row for name, row in recorded.items() if name != "merged"}  # the live start
    ours = {"guidance": args.guidance, "steps": args.eval_steps}
    changed = [name for name, value in ours.items() if flags.get(name) != value]
    files_of = flags.get("prompts", {})
    if any(files_of.get(task, file) != file for task, file in args.test_prompts.items()):
        changed.append("prompts")
    numbers = {task: len(prompts) for task, (prompts, _) in tests.items()}
    if any(row[t]["n"] != n for row in results.values() for t, n in numbers.items() if t in row):
        changed.append("number of prompts")
    lines = []
    if results and changed:
        how = ", ".join(changed)
        lines.append(f"The recorded rows have other settings ({how}): not comparable.\n")
    notes = dict.fromkeys(results, "recorded")
    notes["oracle"] = "recorded: each task by its own teacher"
    lines += [table(results | live, notes), ""]
    lines += [f"not scored: {metric}: {why}" for metric, why in failed.items()]
    lines += last_kl(run)
    if "average" in live["student"]:
        gain, se = compare(scores["student"], scores[start], tests)
        paired = "in Average (paired: same prompts, same noise)"
        lines.append(f"student - {start}: {gain:+.4f} ± {se:.4f} {paired}")
        mean, se = average(scores["student"], tests)
        if "average" in results.get("grpo_mix", ()) and not changed:
            mix = results["grpo_mix"]["average"]
            error = math.hypot(se, mix["se"])
            lines.append(f"student - grpo_mix: {mean - mix['mean']:+.4f} ± {error:.4f}")
        oracle = results.get("oracle", {}).get("average", {}).get("mean")
        if oracle and not changed:  # a stranger's file may hold 0
            lines.append(f"student / oracle: {mean / oracle:.1%}")
    (run / "table.md").write_text("\n".join(lines) + "\n")
    save_json(run / "results.json", {"flags": vars(args), "results": live})
    write_card(run / "adapter", args, "\n".join(lines))
    print("\n" + "\n".join(lines) + f"\n\n-> {run}/: {list_made(run)}")
    example = tests[next(iter(tests))][0][0]
    models = ["base", f"student={run}/adapter"]
    print(next_command(args, models, "--prompt", example, "--out", f"{run}/prompt"), flush=True)


def last_kl(run: Path) -> list[str]:
    """The KL to each task's teacher over the last quarter of the iterations, as a line; [] without
    one. It tells how far a run has come, not which loss is better: experiments/RESULTS.md, 13."""
    log = read_log(run)
    last = log[-max(len(log) // 4, 1) :]
    logged = dict.fromkeys(name for line in last for name in line if name.startswith("kl/"))
    means = []
    for name in logged:
        values = [line[name] for line in last if name in line]
        means.append(f"{name.removeprefix('kl/')} {sum(values) / len(values):.3f}")
    return ["KL to its teacher, last quarter: " + ", ".join(means)] if means else []


def list_made(folder: Path) -> str:
    """What a run or an evaluation has left, for its last line."""
    names = "adapter table.md results.json grid.png differences.png curves.png samples images"
    return ", ".join(name for name in names.split() if (folder / name).exists())


def next_command(args: argparse.Namespace, models: list[str], *more: str) -> str:
    """The complete evaluate.py command for what this run trained: a table, or with `more` what
    these words ask for."""
    words = ["python", "evaluate.py"]
    given = vars(args) | {"steps": args.eval_steps, "batch": args.label_batch}
    defaults = {"model": "toy", "dtype": None, "text_length": 128, "size": None, "steps": 16}
    defaults |= {"time_grid": "double", "guidance": 1.0, "rewards": "toy", "reward_device": None}
    defaults |= {"batch": 128, "cache_embeddings": None}
    for name, default in defaults.items():
        if given[name] != default:
            words += [f"--{name}", str(given[name])]
    if args.no_t5:
        words.append("--no_t5")
    words += ["--models", *models]
    if getattr(args, "student_guidance", args.guidance) != args.guidance:
        words += ["--model_guidance", f"student={args.student_guidance}"]
    if not more:
        more = (*table_flags(args), "--out", f"{args.out}/evaluate")
    return "next: " + shlex.join([*words, *more])


def table_flags(args: argparse.Namespace) -> list[str]:
    """evaluate.py's tasks and test prompts. Without a scorer for a task: a prompt to look at."""
    own, tasks = [], list(args.prompts)
    for task in tasks:
        default = f"{args.model}/prompts/{task}_test.txt"
        file = args.test_prompts.get(task, default)
        if not Path(file).is_file():  # a run without test prompts
            file = args.prompts[task]
        if file != default or task not in TASKS:
            own.append(f"{task}={file}")
    try:
        scorers = importlib.import_module(args.rewards).REWARDS
    except Exception:  # a run without scores needs no such module
        scorers = tasks
    if not all(task in scorers for task in tasks):  # trained by rewards of another name
        return ["--prompt", read_prompts(args.prompts[tasks[0]])[0][0]]
    flags = []
    if tasks != list(TASKS):
        flags = ["--tasks", *tasks]
    if own:
        flags += ["--prompts", *own]
    return flags
