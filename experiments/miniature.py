"""The paper's tables in miniature, its open questions, and the objectives side by side: every run behind RESULTS.md.

    python experiments/miniature.py                       # whatever has not been run yet, in the order of importance
    python experiments/miniature.py --only main           # one part
    python experiments/miniature.py --budget_hours 2      # starts no run after two hours; the same command goes on
    python experiments/miniature.py --report              # RESULTS.md and the figures from what is recorded, no run
    python experiments/miniature.py --quick               # a tiny version of three runs, to see that all of it works

A run is a stock script with flags, in a process of its own; evaluate.py scores what it trained, also by what no teacher was
trained on (heldout.py). What is kept of it is results/NAME_seedN.json: flags, scores, a thinned curve, what it cost. A run
whose file has the same flags is not repeated: delete the file to score it again, NAME_seedN.stages too to train it again.
gradients.py measures gradients; report.py writes RESULTS.md. Ctrl-C loses the run under way and nothing else.

Seeds vary the student's training; base, teachers, merged start, test prompts and test noise are those of toy/.
"""

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import support.run as common
import toy
from support.files import save_json
from support.flags import TASKS, Help, Parser, at_least, finite
from experiments import report

TEACHERS = [f"toy/adapters/{task}" for task in TASKS]
# As GRPO-Mix in toy.ADAPTERS, for as many images as the student sees.
MIX = "--window 3 --window_end 3 --prompts_per_iteration 12 --lr 7e-4 --eval_every 0".split()
# A quarter of the main job's images, as many optimizer steps: 32 images an iteration.
SMALL = "--prompts_per_iteration 8 --group_size 4".split()
EIGHTS = "--prompts_per_iteration 4 --group_size 8".split()  # the same, divisible into eight updates
OPD = "--sample_every 0 --eval_prompts 0".split()  # scored below
QUICK = "--prompts_per_iteration 4 --group_size 2 --steps 3 --eval_steps 2".split()
PARTS = ("main", "objectives", "gradients", "MAR", "interference", "ablations", "staleness", "speed", "hacking",
         "repeat")  # fmt: skip


class Job(NamedTuple):
    part: str
    name: str
    seed: int
    script: str | None  # None: nothing to train, flags[0] is the adapter
    flags: list[str]
    stages: tuple[int, ...]  # iterations after which it is scored


def parse_args():
    parser = Parser(description=__doc__, formatter_class=Help)
    flag = parser.add_argument
    flag("--only", nargs="+", choices=PARTS, metavar="PART", help=f"run these parts alone: {', '.join(PARTS)}")
    flag("--budget_hours", type=finite, default=100, help="hours after which no run is started")
    flag("--threads", type=at_least(1), default=1, help="CPU threads of a run; more or fewer may change last digits")
    flag("--out", type=Path, default=Path("runs/miniature"), help="folder of the runs themselves")
    flag("--results", type=Path, default=Path("experiments/results"), help="folder of what is kept; RESULTS.md is beside it")
    flag("--report", action="store_true", help="run nothing, write RESULTS.md and the figures")
    flag("--quick", action="store_true", help="tiny versions of three runs, into runs/miniature_quick")
    args = parser.parse_args()
    if args.quick:
        args.out, args.results = Path("runs/miniature_quick"), Path("runs/miniature_quick/results")
    return args


def plan(out):
    """Every run, the most telling first."""

    def train(script, part, name, seed, *flags, at):
        jobs.append(Job(part, name, seed, script, list(flags), at))

    opd = functools.partial(train, "train_opd.py", at=(80,))
    mix = functools.partial(train, "train_teacher.py", at=(54,))
    small = lambda part, name, *flags, seed=0: opd(part, name, seed, *SMALL, *flags)
    jobs, weighted = [], ("--mix", "geneval=3", "ocr=1", "pickscore=1", *MIX)
    sft, quarters = f"{out}/sft_seed0/adapter", (20, 40, 60, 80)

    # The main table, and what else was recorded first.
    for seed in (0, 1):
        opd("main", "opd_merge", seed)
    opd("main", "opd_merge", 2, at=(5, 10, 20, 40, 60, 80))
    for name in ("base", *TASKS, "grpo_mix", "merged"):  # as shipped in toy/
        jobs.append(Job("main", name, 0, None, ["base" if name == "base" else f"toy/adapters/{name}"], ()))
    mix("main", "merge_mix", 0, *weighted, "--init", "toy/adapters/merged", at=(10, 30, 54))
    opd("main", "opd_small", 0, *SMALL)
    opd("main", "opd_small", 1, *SMALL, at=quarters)
    small("main", "opd_nomar", "--mar_weight", "0")
    for objective in ("kl", "ode", "trajectory", "ppo-public-code", "ppo-scalar", "ppo-published"):  # ppo: opd_small
        small("objectives", f"{objective}_lr1e-3", "--objective", objective)
    for objective in ("ode", "ppo"):
        small("objectives", f"{objective}_lr3e-3", "--objective", objective, "--lr", "3e-3")
    along = [f"{out}/opd_merge_seed2.stages", f"{out}/merge_mix_seed0.stages"]
    jobs.append(Job("gradients", "gradients", 0, "experiments/gradients.py", along, ()))
    # The paper's schedule: whole epochs of one task in turn, nine of ten steps, the objective of the public code.
    published = ("--objective", "ppo-public-code", "--steps", "10", "--task_mix", *(f"{t}=8" for t in TASKS))
    opd("speed", "published_schedule", 0, *SMALL, *published, at=(40, 60, 80, 100, 120))

    # One seed of every other question.
    small("ablations", "routing_all", "--prompts", *(f"{task}={out}/prompts/all.txt" for task in TASKS))
    opd("main", "sft", 0, "--objective", "sft", "--init", "base", at=(300,))
    small("main", "opd_sft", "--init", sft)
    small("main", "opd_base", "--init", "base")
    for updates in ("8", "1"):
        for objective in ("ppo", "kl"):
            opd("staleness", f"{objective}_updates{updates}", 0, *EIGHTS, "--objective", objective, "--updates", updates)
    small("MAR", "anchor_base", "--anchor", "base")
    small("MAR", "mar0.1", "--mar_weight", "0.1")
    for objective in ("ppo-scalar", "ppo-published", "trajectory"):
        small("objectives", f"{objective}_lr3e-4", "--objective", objective, "--lr", "3e-4")
    for method in ("ties", "dare", "factor-mean"):
        flags = ["--adapters", *TEACHERS, "--method", method, *(["--rank", "24"] if method != "factor-mean" else [])]
        jobs.append(Job("ablations", f"merge_{method}", 0, "merge.py", flags, ()))
        small("ablations", f"opd_{method}", "--init", f"{out}/merge_{method}_seed0/adapter")
    small("ablations", "alternate", "--task_mix", *(f"{t}=8" for t in TASKS))
    taste = ("--reward", "pickscore", *MIX, "--lr", "1e-3")  # the teacher that most other scores pay for
    mix("hacking", "teacher_pickscore", 0, *taste, at=(10, 20, 40, 60))

    # More seeds and more rows in turn.
    extra = {"late": ("--train_steps", "3,4"), "noise0.3": ("--noise", "0.3"), "steps10": ("--steps", "10"),
             "noise1.2": ("--noise", "1.2"), "early": ("--train_steps", "0,1,2"), "random2": ("--train_steps", "random:2"),
             "groups2": ("--prompts_per_iteration", "16", "--group_size", "2")}  # fmt: skip
    opd("main", "opd_small", 2, *SMALL, at=quarters)
    for seed, at in ((1, quarters), (2, (80,))):
        opd("objectives", "ode_lr3e-3", seed, *SMALL, "--objective", "ode", "--lr", "3e-3", at=at)
    small("objectives", "kl_lr3e-3", "--objective", "kl", "--lr", "3e-3")
    mix("main", "mix_short", 0, *weighted)
    for seed in (1, 2):
        small("main", "opd_sft", "--init", sft, seed=seed)
    for name in ("late", "noise0.3", "steps10"):
        small("ablations", name, *extra.pop(name))
    mix("main", "sft_mix", 0, *weighted, "--init", sft)
    for seed in (1, 2):
        small("main", "opd_nomar", "--mar_weight", "0", seed=seed)
        mix("main", "merge_mix", seed, *weighted, "--init", "toy/adapters/merged")
    for name, flags in extra.items():
        small("ablations", name, *flags)
    for seed, at in ((1, quarters), (2, (80,))):
        opd("objectives", "kl_lr1e-3", seed, *SMALL, "--objective", "kl", at=at)
    mix("main", "mix_uniform", 0, "--mix", *(f"{t}=1" for t in TASKS), *MIX)
    for seed in (1, 2):
        small("main", "opd_base", "--init", "base", seed=seed)
    # The rest of three seeds for the first parts.
    for seed in (1, 2):
        mix("main", "sft_mix", seed, *weighted, "--init", sft)
        mix("main", "mix_short", seed, *weighted)
        mix("main", "mix_uniform", seed, "--mix", *(f"{t}=1" for t in TASKS), *MIX)
        opd("main", "sft", seed, "--objective", "sft", "--init", "base", at=(300,))
    grid = (("ppo-public-code", "3e-3"), ("ppo", "3e-4"), ("kl", "3e-4"), ("ode", "3e-4"), ("ppo-public-code", "3e-4"))
    for objective, lr in grid:
        small("objectives", f"{objective}_lr{lr}", "--objective", objective, "--lr", lr)
    for seed in (1, 2):
        for objective, lr in (("kl", "3e-3"), ("ppo-public-code", "3e-3"), ("ppo-published", "3e-4"), ("ppo-scalar", "3e-4"),
                              ("trajectory", "3e-4"), ("ppo", "3e-3")):  # fmt: skip
            small("objectives", f"{objective}_lr{lr}", "--objective", objective, "--lr", lr, seed=seed)
        small("MAR", "mar0.1", "--mar_weight", "0.1", seed=seed)
        small("MAR", "anchor_base", "--anchor", "base", seed=seed)

    # All of it once more with other teachers, from the same base.
    other = {task: f"{out}/other_{task}_seed1/adapter" for task in TASKS}
    at = {"geneval": (40, 120), "ocr": (20, 45), "deqa": (25, 60), "pickscore": (10, 20, 40)}  # and the end, for section 7
    for task in TASKS:
        *flags, _, iterations = toy.ADAPTERS[task]
        stages = (*at[task], int(iterations))
        train("train_teacher.py", "repeat", f"other_{task}", 1, *flags, "--eval_every", "0", at=stages)
    flags = ["--adapters", *other.values(), "--rank", "24"]
    jobs.append(Job("repeat", "other_merged", 1, "merge.py", flags, ()))
    others = (*(f for task, path in other.items() for f in ("--teacher", f"{task}={path}")), "--anchor", other["deqa"])
    opd("repeat", "other_opd", 1, *others, "--init", f"{out}/other_merged_seed1/adapter")
    mix("repeat", "other_merge_mix", 1, *weighted, "--init", f"{out}/other_merged_seed1/adapter")
    opd("repeat", "other_sft", 1, *others, "--objective", "sft", "--init", "base", at=(300,))
    small("repeat", "other_opd_sft", *others, "--init", f"{out}/other_sft_seed1/adapter", seed=1)

    # What the ratio and the clip do.
    reuse = lambda name, *flags: opd("staleness", name, 0, *EIGHTS, "--updates", *flags)
    reuse("ppo_updates8_clip0.02", "8", "--clip_range", "0.02")
    for objective in ("ppo", "kl"):
        reuse(f"{objective}_updates8_lr3e-3", "8", "--objective", objective, "--lr", "3e-3")
    for clip in ("0.02", "100"):
        reuse(f"ppo_updates8_lr3e-3_clip{clip}", "8", "--lr", "3e-3", "--clip_range", clip)
    for updates in ("2", "4"):
        for objective in ("ppo", "kl"):
            opd("staleness", f"{objective}_updates{updates}", 0, *EIGHTS, "--objective", objective, "--updates", updates)
    uniform = ("--mix", *(f"{t}=1" for t in TASKS), *MIX, "--eval_every", "20", "--final", "best")
    mix("speed", "mix_uniform_long", 0, *uniform, at=(460,))
    for rank in ("2", "16"):
        small("ablations", f"base_rank{rank}", "--init", "base", "--rank", rank, "--alpha", str(2 * int(rank)))
    for seed in (1, 2):
        small("objectives", "ode_lr1e-3", "--objective", "ode", seed=seed)
        small("objectives", "ppo-public-code_lr1e-3", "--objective", "ppo-public-code", seed=seed)
    return jobs


def call(command, log, threads):
    """Run a command to its end; (minutes of wall clock, minutes of CPU). Its output goes to `log`."""
    began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(log, "a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}\nits output is in {log}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (time.time() - began) / 60, (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60


def evaluate(adapters, num_prompts, outside, folder, log, threads):
    """Score {name: adapter} by evaluate.py on `num_prompts` test prompts a task (0: all), also by the held-out scores;
    `outside`: and on prompts out of distribution. -> {name: {metric: {"mean", "se", "n"}}}."""
    from experiments import heldout

    files = heldout.write_prompts(folder.parent / "prompts")
    extra = list(files) if outside else ["variety"]
    flags = ["--rewards", "experiments.heldout", "--tasks", *TASKS, *extra, "--prompts", *(f"{t}={files[t]}" for t in extra)]
    flags += ["--num_prompts", num_prompts, "--out", folder / "scores", "--overwrite"]
    call(["evaluate.py", "--models", *(f"{n}={a}" for n, a in adapters.items()), *flags], log, threads)
    results = json.loads((folder / "scores" / "results.json").read_text())["results"]
    short = lambda row: {k: float(f"{v:.5g}") for k, v in row.items()}
    return {name: {metric: short(row) for metric, row in results[name].items()} for name in adapters}


def cost(run, minutes):
    """What a run took: images drawn, forward passes (a backward pass counts as two), minutes."""
    args = json.loads((run / "args.json").read_text())
    images = passes = args["iterations"] * args["prompts_per_iteration"] * args["group_size"]
    if args.get("objective") == "sft":  # paint once, then one state of an image per step
        images, passes = args["sft_images"], args["sft_images"] * args["eval_steps"] + 3 * passes
    elif "objective" in args:  # rollout; teacher, anchor and student (forward and backward) on the trained steps
        passes *= args["steps"] + args["trained_steps"] * (1 + bool(args["mar_weight"]) + 3)
    else:
        passes *= args["steps"] + 3 * (args["window"] or args["steps"] - 1)
    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                      if line.startswith("model name")), "unknown")  # fmt: skip
    return {"images": images, "passes": passes, **minutes, "processor": processor}


def curve(run):
    """metrics.jsonl, thinned to some 40 lines: KL of each task, cosines of their gradients, rewards, seconds so far."""
    log, seconds, lines = common.read_log(run), 0.0, []
    for n, line in enumerate(log):
        seconds += line["seconds"]
        if n % (1 + len(log) // 41) == 0 or n == len(log) - 1 or "test" in line:
            kept = {
                k: v for k, v in line.items() if k.split("/")[0] in ("kl", "cosine", "reward", "test") or k == "clip_fraction"
            }
            lines.append({"iteration": n, "seconds": round(seconds, 1)} | {k: float(f"{v:.3g}") for k, v in kept.items()})
    return lines


def train(job, run, args):
    """Train up to every stage in turn and keep the adapter of each: ({stage: adapter}, {stage: [wall, CPU minutes]}). A stage
    that is there is not trained again."""
    log, kept = args.out / f"{run.name}.log", args.out / f"{run.name}.stages"
    flags = [*job.flags, "--seed", job.seed, "--out", run, *(OPD if job.script == "train_opd.py" else [])]
    flags += [*QUICK, *(["--window_end", 2, "--window", 1] if job.script == "train_teacher.py" else [])] if args.quick else []
    done = json.loads((kept / "minutes.json").read_text()) if (kept / "minutes.json").exists() else {}
    for n, stage in enumerate(job.stages):
        if str(stage) not in done:
            command = [job.script, *flags, "--iterations", stage, "--resume" if n else "--overwrite"]
            done[str(stage)] = call(command, log, args.threads)
            shutil.rmtree(kept / str(stage), ignore_errors=True)
            shutil.copytree(run / "adapter", kept / str(stage))
            save_json(kept / "minutes.json", done)
    return {str(stage): kept / str(stage) for stage in job.stages}, done


def run_job(job, args):
    """Train, score every stage, record."""
    run, log = args.out / f"{job.name}_seed{job.seed}", args.out / f"{job.name}_seed{job.seed}.log"
    record = job._asdict()
    if job.script == "experiments/gradients.py":  # keeps its own record
        return call([job.script, *job.flags, "--results", args.results], log, args.threads)
    if job.stages:
        adapters, done = train(job, run, args)
        wall, cpu = (round(sum(column), 2) for column in zip(*done.values()))
        minutes = {"wall_minutes": wall, "cpu_minutes": cpu, "threads": args.threads}
        record |= {"compute": cost(run, minutes), "stage_minutes": done, "curve": curve(run)}
    elif job.script:
        call([job.script, *job.flags, "--out", run / "adapter", "--overwrite"], log, args.threads)
        adapters = {"final": run / "adapter"}
    else:
        adapters = {"final": job.flags[0]}
    final = list(adapters)[-1]
    before, last = (4, 4) if args.quick else (128, 0)
    stages = {n: adapter for n, adapter in adapters.items() if n != final}
    scores = evaluate(stages, before, False, run, log, args.threads) if stages else {}
    scores |= evaluate({final: adapters[final]}, last, job.part == "main", run, log, args.threads)
    record |= {"final": final, "scores": scores}
    args.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, separators=(",", ":")).replace('},{"iteration', '},\n{"iteration')
    beside = args.results / f"{run.name}.tmp"
    beside.write_text(text + "\n")
    beside.replace(args.results / f"{run.name}.json")


def recorded(job, results):
    """Whether this run's file is there, made with the same flags."""
    if job.script == "experiments/gradients.py":
        return (results / "gradients.json").exists()
    file = results / f"{job.name}_seed{job.seed}.json"
    record = json.loads(file.read_text()) if file.exists() else None
    return record and [record["script"], record["flags"], record["stages"]] == [job.script, job.flags, list(job.stages)]


def prepare(job, jobs, args):
    """Run again what this job starts from, where its record came from another clone and its weights are not in this one."""
    for start in jobs:
        made = [f"{args.out}/{start.name}_seed{start.seed}{end}" for end in ("/adapter", ".stages")]
        if any(path in flag and not Path(path).exists() for path in made for flag in job.flags):
            prepare(start, jobs, args)
            run_job(start, args)


def main(args):
    os.chdir(ROOT)
    if args.report:
        return report.write(args.results)
    began, jobs = time.time(), plan(args.out)
    if args.quick:
        tiny = {"opd_merge": (1, 2), "merge_mix": (2,), "merged": ()}
        jobs = [job._replace(stages=tiny[job.name]) for job in jobs if job.name in tiny and job.seed == 0]
    todo = [job for job in jobs if not recorded(job, args.results) and (not args.only or job.part in args.only)]
    prompts = args.out / "prompts" / "all.txt"  # of all tasks, for routing_all
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(Path(f"toy/prompts/{task}_train.txt").read_text() for task in TASKS))
    for n, job in enumerate(todo):
        hours = (time.time() - began) / 3600
        if hours > args.budget_hours:
            print(f"{hours:.1f} hours gone: stopped before {job.name}; the same command goes on", flush=True)
            break
        left = f"some {hours / n * (len(todo) - n):.1f} hours left" if n else "time left unknown"
        print(f"{time.strftime('%H:%M')} {n + 1} of {len(todo)}: {job.part}, {job.name} seed {job.seed}; {left}", flush=True)
        prepare(job, jobs, args)
        run_job(job, args)
    report.write(args.results)


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
