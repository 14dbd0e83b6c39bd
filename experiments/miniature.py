"""Every run behind RESULTS.md: the paper's tables in miniature, its open questions, all objectives.

    python experiments/miniature.py                    # run what is missing, most important first
    python experiments/miniature.py --only main        # one part
    python experiments/miniature.py --budget_hours 2   # start no run after two hours
    python experiments/miniature.py --report           # write RESULTS.md and the figures; no run
    python experiments/miniature.py --quick            # tiny versions of three runs, as a test

A run is a stock script with flags, in a process of its own. evaluate.py scores what it trained,
also by scores that no teacher was trained on (heldout.py). Its record is results/NAME_seedN.json:
flags, scores, a thinned curve, what it cost. A run whose record has the same flags is not repeated.
To score it again, delete its record; to train it again, delete NAME_seedN.stages as well.
gradients.py measures gradients; report.py writes RESULTS.md. Ctrl-C loses the current run alone.

Seeds vary the student's training. Base, teachers, merged start, test prompts and test noise are
those of toy/.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import heldout, report
from support.files import save_json
from support.flags import TASKS, above_0, make_parser, positive
from support.metrics import read_log
from toy.build import ADAPTERS

ROOT = Path(__file__).resolve().parents[1]
TEACHERS = [f"toy/adapters/{task}" for task in TASKS]
MERGED = ["--init", "toy/adapters/merged"]
# As GRPO-Mix in toy/build.py, for as many images as the student sees.
MIX = "--window 3 --window_end 3 --prompts_per_iteration 12 --lr 7e-4 --eval_every 0".split()
WEIGHTED = ["--mix", "geneval=3", "ocr=1", "pickscore=1", *MIX]
UNIFORM = ["--mix", *(f"{task}=1" for task in TASKS), *MIX]
# A quarter of the main job's images, as many optimizer steps: 32 images an iteration.
SMALL = "--prompts_per_iteration 8 --group_size 4".split()
EIGHTS = "--prompts_per_iteration 4 --group_size 8".split()  # the same, divisible into 8 updates
EPOCHS = ["--task_mix", *(f"{task}=8" for task in TASKS)]  # iterations of one task in turn
QUARTERS = (20, 40, 60, 80)  # iterations
SFT = 600  # iterations of 64 images

NO_REPORT = {  # evaluate.py scores the adapters
    "train_opd.py": "--sample_every 0 --eval_prompts 0".split(),
    "train_sft.py": "--eval_prompts 0".split(),
    "train_teacher.py": [],
}
TINY = "--prompts_per_iteration 4 --group_size 2 --steps 3 --eval_steps 2".split()
QUICK = {  # flags of --quick
    "train_opd.py": TINY,
    "train_teacher.py": [*TINY, "--window_end", "2", "--window", "1"],
}
QUICK_STAGES = {"opd_merge": (1, 2), "merge_mix": (2,), "merged": ()}
PARTS = "main objectives gradients MAR interference ablations staleness speed hacking repeat"


class Job(NamedTuple):
    part: str
    name: str
    seed: int
    script: str | None  # None: nothing to train, flags[0] is the adapter
    flags: list[str]
    stages: tuple[int, ...]  # the iterations after which it is scored


def parse_args():
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("--only", nargs="+", choices=PARTS.split(), metavar="PART", help=f"run these: {PARTS}")
    flag("--budget_hours", type=above_0, default=100, help="hours after which no run is started")
    flag("--threads", type=positive, default=1, help="CPU threads of a run; may change last digits")
    flag("--out", type=Path, default=Path("runs/miniature"), help="folder of the runs")
    results = Path("experiments/results")
    flag("--results", type=Path, default=results, help="folder of the records, below RESULTS.md")
    flag("--report", action="store_true", help="run nothing; write RESULTS.md and the figures")
    flag("--quick", action="store_true", help="tiny versions of three runs: runs/miniature_quick")
    args = parser.parse_args()
    if args.quick:
        args.out, args.results = Path("runs/miniature_quick"), Path("runs/miniature_quick/results")
    return args


# ---- The plan: every run, the most telling first


class Plan:
    def __init__(self, out):
        self.out, self.jobs = out, []
        self.from_sft = ["--init", f"{out}/sft_seed0/adapter"]

    def add(self, part, name, script, *flags, seed=0, at=()):
        self.jobs.append(Job(part, name, seed, script, list(flags), tuple(at)))

    def opd(self, part, name, *flags, seed=0, at=(80,)):
        self.add(part, name, "train_opd.py", *flags, seed=seed, at=at)

    def small(self, part, name, *flags, seed=0, at=(80,)):
        self.opd(part, name, *SMALL, *flags, seed=seed, at=at)

    def objective(self, objective, lr, seed=0, at=(80,)):
        flags = ["--objective", objective]
        if lr != "1e-3":  # the default
            flags += ["--lr", lr]
        self.small("objectives", f"{objective}_lr{lr}", *flags, seed=seed, at=at)

    def grpo(self, name, *flags, part="main", seed=0, at=(54,)):
        self.add(part, name, "train_teacher.py", *flags, seed=seed, at=at)

    def staleness(self, name, *flags):
        self.opd("staleness", name, *EIGHTS, *flags)


def plan(out):
    """Every job, in order."""
    jobs = Plan(out)
    plan_main_table(jobs)
    plan_one_seed_of_each_question(jobs)
    plan_more_seeds(jobs)
    plan_other_teachers(jobs)
    plan_reuse_and_ranks(jobs)
    return jobs.jobs


def plan_main_table(jobs):
    """The main table, and what else was recorded first."""
    for seed in (0, 1):
        jobs.opd("main", "opd_merge", seed=seed)
    jobs.opd("main", "opd_merge", seed=2, at=(5, 10, 20, 40, 60, 80))
    jobs.add("main", "base", None, "base")
    for name in (*TASKS, "grpo_mix", "merged"):  # as shipped in toy/
        jobs.add("main", name, None, f"toy/adapters/{name}")
    jobs.grpo("merge_mix", *WEIGHTED, *MERGED, at=(10, 30, 54))
    jobs.small("main", "opd_small")
    jobs.small("main", "opd_small", seed=1, at=QUARTERS)
    jobs.small("main", "opd_nomar", "--mar_weight", "0")
    others = ("kl", "ode", "trajectory", "ppo-public-code", "ppo-scalar", "ppo-published")
    for objective in others:  # ppo is opd_small
        jobs.objective(objective, "1e-3")
    for objective in ("ode", "ppo"):
        jobs.objective(objective, "3e-3")
    along = [f"{jobs.out}/opd_merge_seed2.stages", f"{jobs.out}/merge_mix_seed0.stages"]
    jobs.add("gradients", "gradients", "experiments/gradients.py", *along)
    # The paper's schedule: whole epochs of one task in turn, nine of ten steps, the public code's
    # objective.
    published = ["--objective", "ppo-public-code", "--steps", "10", *EPOCHS]
    jobs.small("speed", "published_schedule", *published, at=(40, 60, 80, 100, 120))


def plan_one_seed_of_each_question(jobs):
    every_prompt = [f"{task}={jobs.out}/prompts/all.txt" for task in TASKS]
    jobs.small("ablations", "routing_all", "--prompts", *every_prompt)
    jobs.add("main", "sft", "train_sft.py", at=(SFT,))
    jobs.small("main", "opd_sft", *jobs.from_sft)
    jobs.small("main", "opd_base", "--init", "base")
    for updates in ("8", "1"):
        plan_updates(jobs, updates)
    jobs.small("MAR", "anchor_base", "--anchor", "base")
    jobs.small("MAR", "mar0.1", "--mar_weight", "0.1")
    for objective in ("ppo-scalar", "ppo-published", "trajectory"):
        jobs.objective(objective, "3e-4")
    for method in ("ties", "dare", "factor-mean"):
        flags = ["--adapters", *TEACHERS, "--method", method]
        if method != "factor-mean":
            flags += ["--rank", "24"]
        jobs.add("ablations", f"merge_{method}", "merge.py", *flags)
        start = f"{jobs.out}/merge_{method}_seed0/adapter"
        jobs.small("ablations", f"opd_{method}", "--init", start)
    jobs.small("ablations", "alternate", *EPOCHS)
    taste = ["--reward", "pickscore", *MIX, "--lr", "1e-3"]  # most other scores pay for this one
    jobs.grpo("teacher_pickscore", *taste, part="hacking", at=(10, 20, 40, 60))


def plan_updates(jobs, updates):
    for objective in ("ppo", "kl"):
        flags = ["--objective", objective, "--updates", updates]
        jobs.staleness(f"{objective}_updates{updates}", *flags)


def plan_more_seeds(jobs):
    """More seeds and more rows in turn, then the rest of three seeds for the first parts."""
    jobs.small("main", "opd_small", seed=2, at=QUARTERS)
    jobs.objective("ode", "3e-3", seed=1, at=QUARTERS)
    jobs.objective("ode", "3e-3", seed=2)
    jobs.objective("kl", "3e-3")
    jobs.grpo("mix_short", *WEIGHTED)
    for seed in (1, 2):
        jobs.small("main", "opd_sft", *jobs.from_sft, seed=seed)
    jobs.small("ablations", "late", "--train_steps", "3,4")
    jobs.small("ablations", "noise0.3", "--noise", "0.3")
    jobs.small("ablations", "steps10", "--steps", "10")
    jobs.grpo("sft_mix", *WEIGHTED, *jobs.from_sft)
    for seed in (1, 2):
        jobs.small("main", "opd_nomar", "--mar_weight", "0", seed=seed)
        jobs.grpo("merge_mix", *WEIGHTED, *MERGED, seed=seed)
    jobs.small("ablations", "noise1.2", "--noise", "1.2")
    jobs.small("ablations", "early", "--train_steps", "0,1,2")
    jobs.small("ablations", "random2", "--train_steps", "random:2")
    groups = ["--prompts_per_iteration", "16", "--group_size", "2"]
    jobs.small("ablations", "groups2", *groups)
    jobs.objective("kl", "1e-3", seed=1, at=QUARTERS)
    jobs.objective("kl", "1e-3", seed=2)
    jobs.grpo("mix_uniform", *UNIFORM)
    for seed in (1, 2):
        jobs.small("main", "opd_base", "--init", "base", seed=seed)
    for seed in (1, 2):
        jobs.grpo("sft_mix", *WEIGHTED, *jobs.from_sft, seed=seed)
        jobs.grpo("mix_short", *WEIGHTED, seed=seed)
        jobs.grpo("mix_uniform", *UNIFORM, seed=seed)
        jobs.add("main", "sft", "train_sft.py", seed=seed, at=(SFT,))
    jobs.objective("ppo-public-code", "3e-3")
    for objective in ("ppo", "kl", "ode", "ppo-public-code"):
        jobs.objective(objective, "3e-4")
    best = {"kl": "3e-3", "ppo-public-code": "3e-3", "ppo-published": "3e-4"}
    best |= {"ppo-scalar": "3e-4", "trajectory": "3e-4", "ppo": "3e-3"}
    for seed in (1, 2):
        for objective, lr in best.items():
            jobs.objective(objective, lr, seed=seed)
        jobs.small("MAR", "mar0.1", "--mar_weight", "0.1", seed=seed)
        jobs.small("MAR", "anchor_base", "--anchor", "base", seed=seed)


def plan_other_teachers(jobs):
    """The main rows once more with other teachers, trained from the same base with seed 1."""
    # Stages: before the end, and the end. RESULTS.md section 7 shows them all.
    stages = {"geneval": (40, 120, 260), "ocr": (20, 45, 90), "deqa": (25, 60, 110)}
    stages["pickscore"] = (10, 20, 40, 60)
    other = {task: f"{jobs.out}/other_{task}_seed1/adapter" for task in TASKS}
    teachers = []
    for task in TASKS:
        *flags, _, iterations = ADAPTERS[task]  # ..., "--iterations", N
        assert int(iterations) == stages[task][-1]
        flags += ["--eval_every", "0"]
        jobs.grpo(f"other_{task}", *flags, part="repeat", seed=1, at=stages[task])
        teachers += ["--teacher", f"{task}={other[task]}"]
    merge = ["--adapters", *other.values(), "--rank", "24"]
    jobs.add("repeat", "other_merged", "merge.py", *merge, seed=1)
    merged = ["--init", f"{jobs.out}/other_merged_seed1/adapter"]
    sft = ["--init", f"{jobs.out}/other_sft_seed1/adapter"]
    anchor = ["--anchor", other["deqa"]]
    jobs.opd("repeat", "other_opd", *teachers, *anchor, *merged, seed=1)
    jobs.grpo("other_merge_mix", *WEIGHTED, *merged, part="repeat", seed=1)
    jobs.add("repeat", "other_sft", "train_sft.py", *teachers, seed=1, at=(SFT,))
    jobs.small("repeat", "other_opd_sft", *teachers, *anchor, *sft, seed=1)


def plan_reuse_and_ranks(jobs):
    """What the ratio and the clip do; and rows that came last."""
    jobs.staleness("ppo_updates8_clip0.02", "--updates", "8", "--clip_range", "0.02")
    for objective in ("ppo", "kl"):
        flags = ["--updates", "8", "--objective", objective, "--lr", "3e-3"]
        jobs.staleness(f"{objective}_updates8_lr3e-3", *flags)
    for clip in ("0.02", "100"):
        flags = ["--updates", "8", "--lr", "3e-3", "--clip_range", clip]
        jobs.staleness(f"ppo_updates8_lr3e-3_clip{clip}", *flags)
    for updates in ("2", "4"):
        plan_updates(jobs, updates)
    best = ["--eval_every", "20", "--final", "best"]
    jobs.grpo("mix_uniform_long", *UNIFORM, *best, part="speed", at=(460,))
    for rank, alpha in (("2", "4"), ("16", "32")):
        flags = ["--init", "base", "--rank", rank, "--alpha", alpha]
        jobs.small("ablations", f"base_rank{rank}", *flags)
    for seed in (1, 2):
        jobs.objective("ode", "1e-3", seed=seed)
        jobs.objective("ppo-public-code", "1e-3", seed=seed)


# ---- Running a job


def call(command, log, threads):
    """Run a command to its end, its output into `log`: minutes of (wall clock, CPU)."""
    words = [str(word) for word in command]
    began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "a") as file:
        streams = {"stdout": file, "stderr": file}
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, **streams)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(words)}\nits output is in {log}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (time.time() - began) / 60, seconds / 60


def evaluate(adapters, num_prompts, outside, folder, log, threads):
    """Score {name: adapter} with evaluate.py: {name: {metric: {"mean", "se", "n"}}}.

    num_prompts: test prompts per task, 0 for all. The held-out scores are always among them; with
    `outside` also those on prompts out of distribution."""
    files = heldout.write_prompts(folder.parent / "prompts")
    extra = list(files) if outside else ["variety"]
    models = [f"{name}={adapter}" for name, adapter in adapters.items()]
    flags = ["--rewards", "experiments.heldout", "--tasks", *TASKS, *extra]
    flags += ["--prompts", *(f"{task}={files[task]}" for task in extra)]
    flags += ["--num_prompts", num_prompts, "--out", folder / "scores", "--overwrite"]
    call(["evaluate.py", "--models", *models, *flags], log, threads)
    results = json.loads((folder / "scores" / "results.json").read_text())["results"]
    return {name: five_digits(results[name]) for name in adapters}


def five_digits(rows):
    rounded = {}
    for metric, row in rows.items():
        rounded[metric] = {key: float(f"{value:.5g}") for key, value in row.items()}
    return rounded


def cost(job, run, minutes):
    """What a run took: images sampled, forward passes (a backward pass counts twice), minutes."""
    args = json.loads((run / "args.json").read_text())
    if job.script == "train_sft.py":  # sample once, then one state of an image per iteration
        images = args["sft_images"]
        passes = images * args["eval_steps"] + 3 * args["iterations"] * args["batch"]
    else:
        images = args["iterations"] * args["prompts_per_iteration"] * args["group_size"]
        per_step = 3  # the student, forward and backward
        if job.script == "train_opd.py":
            per_step += 1 + bool(args["mar_weight"])  # teacher and anchor
        passes = images * (args["steps"] + per_step * args["trained_steps"])
    return {"images": images, "passes": passes, **minutes, "processor": processor()}


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return "unknown"


def curve(run):
    """metrics.jsonl, thinned to some 40 lines: KL of each task, cosines of their gradients,
    rewards, seconds so far."""
    log, seconds, lines = read_log(run), 0.0, []
    every = 1 + len(log) // 41
    for n, line in enumerate(log):
        seconds += line["seconds"]
        if n % every and n != len(log) - 1 and "test" not in line:
            continue
        point = {"iteration": n, "seconds": round(seconds, 1)}
        for name, value in line.items():
            wanted = name.split("/")[0] in ("kl", "cosine", "reward", "test", "clip_fraction")
            if wanted:
                point[name] = float(f"{value:.3g}")
        lines.append(point)
    return lines


def train(job, run, args):
    """Train up to every stage in turn and keep the adapter of each.

    Returns ({stage: adapter}, {stage: [wall, CPU minutes]}). A stage that is there is not trained
    again."""
    log, folder = args.out / f"{run.name}.log", args.out / f"{run.name}.stages"
    flags = [*job.flags, "--seed", job.seed, "--out", run, *NO_REPORT[job.script]]
    if args.quick:
        flags += QUICK[job.script]
    minutes_file, minutes = folder / "minutes.json", {}
    if minutes_file.exists():
        minutes = json.loads(minutes_file.read_text())
    for n, stage in enumerate(job.stages):
        if str(stage) in minutes:
            continue
        how = "--resume" if n else "--overwrite"
        command = [job.script, *flags, "--iterations", stage, how]
        minutes[str(stage)] = call(command, log, args.threads)
        shutil.rmtree(folder / str(stage), ignore_errors=True)
        shutil.copytree(run / "adapter", folder / str(stage))
        save_json(minutes_file, minutes)
    return {str(stage): folder / str(stage) for stage in job.stages}, minutes


def run_job(job, args):
    """Train, score every stage, write the record."""
    run = args.out / f"{job.name}_seed{job.seed}"
    log = args.out / f"{run.name}.log"
    if job.script == "experiments/gradients.py":  # writes its own record
        return call([job.script, *job.flags, "--results", args.results], log, args.threads)
    record = job._asdict()
    adapters = {"final": run / "adapter"}
    if job.stages:
        adapters, stage_minutes = train(job, run, args)
        wall, cpu = (round(sum(column), 2) for column in zip(*stage_minutes.values()))
        minutes = {"wall_minutes": wall, "cpu_minutes": cpu, "threads": args.threads}
        record["compute"] = cost(job, run, minutes)
        record |= {"stage_minutes": stage_minutes, "curve": curve(run)}
    elif job.script:
        command = [job.script, *job.flags, "--out", run / "adapter", "--overwrite"]
        call(command, log, args.threads)
    else:
        adapters = {"final": job.flags[0]}
    before, last = (4, 4) if args.quick else (128, 0)  # test prompts per task
    *earlier, final = adapters
    scores = {}
    if earlier:
        some = {name: adapters[name] for name in earlier}
        scores = evaluate(some, before, False, run, log, args.threads)
    outside = job.part == "main"
    scores |= evaluate({final: adapters[final]}, last, outside, run, log, args.threads)
    record |= {"final": final, "scores": scores}
    args.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, separators=(",", ":")).replace('},{"iteration', '},\n{"iteration')
    beside = args.results / f"{run.name}.tmp"
    beside.write_text(text + "\n")
    beside.replace(args.results / f"{run.name}.json")


def recorded(job, results):
    """Does this run have a record, made with the same flags?"""
    if job.script == "experiments/gradients.py":
        return (results / "gradients.json").exists()
    file = results / f"{job.name}_seed{job.seed}.json"
    if not file.exists():
        return False
    record = json.loads(file.read_text())
    made = (record["script"], record["flags"], record["stages"])
    if job.script == "train_sft.py" and record["script"] == "train_opd.py":
        return made[1:] == (earlier_sft_flags(job), [300])
    return made == (job.script, job.flags, list(job.stages))


def earlier_sft_flags(job):
    """The flags of train_sft.py as they were at commit 0fefbac, when the published records of SFT
    were made: an objective of train_opd.py, 300 iterations of two updates of 64 images."""
    flags = list(job.flags)
    for flag in job.flags:
        if flag.startswith("deqa="):  # with other teachers the anchor was named, and not used
            flags += ["--anchor", flag.removeprefix("deqa=")]
    return [*flags, "--objective", "sft", "--init", "base"]


def prepare(job, jobs, args):
    """Run again what this job starts from, if only its record is in this clone."""
    for start in jobs:
        run = f"{args.out}/{start.name}_seed{start.seed}"
        for made in (f"{run}/adapter", f"{run}.stages"):
            needed = any(made in flag for flag in job.flags)
            if needed and not Path(made).exists():
                prepare(start, jobs, args)
                run_job(start, args)


def main(args):
    os.chdir(ROOT)
    if args.report:
        return report.write(args.results)
    began, jobs = time.time(), plan(args.out)
    if args.quick:
        jobs = [job for job in jobs if job.name in QUICK_STAGES and job.seed == 0]
        jobs = [job._replace(stages=QUICK_STAGES[job.name]) for job in jobs]
    todo = [job for job in jobs if not recorded(job, args.results)]
    if args.only:
        todo = [job for job in todo if job.part in args.only]
    prompts = args.out / "prompts" / "all.txt"  # of all tasks, for routing_all
    prompts.parent.mkdir(parents=True, exist_ok=True)
    files = [Path(f"toy/prompts/{task}_train.txt") for task in TASKS]
    prompts.write_text("".join(file.read_text() for file in files))
    for n, job in enumerate(todo):
        hours = (time.time() - began) / 3600
        if hours > args.budget_hours:
            print(f"stopped before {job.name}, after {hours:.1f} hours; run the command again")
            break
        left = "time left unknown"
        if n:
            left = f"some {hours / n * (len(todo) - n):.1f} hours left"
        what = f"{n + 1} of {len(todo)}: {job.part}, {job.name} seed {job.seed}"
        print(f"{time.strftime('%H:%M')} {what}; {left}", flush=True)
        prepare(job, jobs, args)
        run_job(job, args)
    report.write(args.results)


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command to continue")
