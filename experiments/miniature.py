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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import heldout, report
from experiments.plan import PARTS, VARIANT, plan
from support.files import save_json
from support.flags import TASKS, above_0, make_parser, positive
from support.metrics import read_log

ROOT = Path(__file__).resolve().parents[1]
SCALES = (1, 1.5, 2, 3)  # guidance at which the runs of part guidance are scored
HELD_BACK = 128  # training prompts of a task that the runs of part map do not see
NO_REPORT = {  # evaluate.py scores the adapters
    "train_opd.py": "--sample_every 0 --eval_prompts 0".split(),
    VARIANT: "--sample_every 0 --eval_prompts 0".split(),
    "train_sft.py": "--eval_prompts 0".split(),
    "train_teacher.py": [],
}
TINY = "--prompts_per_iteration 4 --group_size 2 --steps 3 --eval_steps 2".split()
QUICK = {  # flags of --quick
    "train_opd.py": TINY,
    "train_teacher.py": [*TINY, "--window_end", "2", "--window", "1"],
}
QUICK_STAGES = {"opd_merge": (1, 2), "merge_mix": (2,), "merged": ()}


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


def evaluate(adapters, num_prompts, part, folder, log, threads, guidance=1):
    """Score {name: adapter} with evaluate.py: {name: {metric: {"mean", "se", "n"}}}.

    num_prompts: test prompts per task, 0 for all. The held-out scores are always among them; in
    part main also those on prompts out of distribution. Part map has prompts of its own."""
    models = [f"{name}={adapter}" for name, adapter in adapters.items()]
    if part == "map":
        flags = [
            "--prompts",
            *(f"{task}={folder.parent}/prompts/{task}_held.txt" for task in TASKS),
        ]
    else:
        files = heldout.write_prompts(folder.parent / "prompts")
        extra = list(files) if part == "main" else ["variety"]
        flags = ["--rewards", "experiments.heldout", "--tasks", *TASKS, *extra]
        flags += ["--prompts", *(f"{task}={files[task]}" for task in extra)]
    flags += ["--num_prompts", num_prompts, "--guidance", guidance]
    flags += ["--out", folder / "scores", "--overwrite"]
    call(["evaluate.py", "--models", *models, *flags], log, threads)
    results = json.loads((folder / "scores" / "results.json").read_text())["results"]
    return {name: six_digits(results[name]) for name in adapters}


def six_digits(rows):
    rounded = {}
    for metric, row in rows.items():
        rounded[metric] = {key: float(f"{value:.6g}") for key, value in row.items()}
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
        if job.script in ("train_opd.py", VARIANT):
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
        part = "map" if job.part == "map" else ""
        scores = evaluate(some, before, part, run, log, args.threads)
    only = {final: adapters[final]}
    scores |= evaluate(only, last, job.part, run, log, args.threads)
    if job.part == "guidance":
        for scale in SCALES[1:] if job.script else job.flags[1:]:
            found = evaluate(only, last, "", run, log, args.threads, scale)
            scores[f"{final}@{scale}"] = found[final]
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
    return made == (job.script, job.flags, list(job.stages))


def prepare(job, jobs, args):
    """Run again what this job starts from, if only its record is in this clone."""
    for start in jobs:
        run = f"{args.out}/{start.name}_seed{start.seed}"
        for made in (f"{run}/adapter", f"{run}.stages"):
            needed = any(made in flag for flag in job.flags)
            if needed and not Path(made).exists():
                prepare(start, jobs, args)
                run_job(start, args)


def write_prompts(folder):
    """all.txt: the training prompts of all tasks, for routing_all. TASK_map.txt and TASK_held.txt:
    those of a task in two parts, for part map."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = ""
    for task in TASKS:
        text = Path(f"toy/prompts/{task}_train.txt").read_text()
        everything += text
        lines = text.splitlines()  # distinct, in random order
        (folder / f"{task}_map.txt").write_text("\n".join(lines[HELD_BACK:]) + "\n")
        (folder / f"{task}_held.txt").write_text("\n".join(lines[:HELD_BACK]) + "\n")
    (folder / "all.txt").write_text(everything)


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
    write_prompts(args.out / "prompts")
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
