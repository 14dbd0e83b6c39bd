"""The paper's tables in miniature, its open questions, and the objectives side by side: every run behind RESULTS.md.

    python experiments/miniature.py                       # whatever has not been run yet, in the order of importance
    python experiments/miniature.py --only main           # one part: main, objectives, gradients, ablations …
    python experiments/miniature.py --budget_hours 2      # no new run after two hours; the same command goes on
    python experiments/miniature.py --report              # RESULTS.md and the figures from what is recorded, no run
    python experiments/miniature.py --quick               # a tiny version of three runs, to see that all of it works

A run is a stock script with flags, in a process of its own; evaluate.py scores what it trained, also by what no teacher was
trained on (heldout.py). What is kept of it is results/NAME_seedN.json: flags, scores, a thinned curve, what it cost. A run
whose file has the same flags is not repeated. gradients.py measures gradients; report.py writes RESULTS.md.

Seeds vary the student's training; base, teachers, merged start, test prompts and test noise are those of toy/.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common
from cli import TASKS, Help, save_json
from experiments import report

TEACHERS = [f"toy/adapters/{task}" for task in TASKS]
# As GRPO-Mix in toy.ADAPTERS, for as many images as the student sees.
MIX = "--window 3 --window_end 3 --prompts_per_iteration 12 --lr 7e-4 --eval_every 0".split()
UNION = [f"{task}=runs/miniature/prompts/all.txt" for task in TASKS]
# A quarter of the main job's images, as many optimizer steps: 32 images an iteration.
SMALL = "--prompts_per_iteration 8 --group_size 4".split()
EIGHTS = "--prompts_per_iteration 4 --group_size 8".split()  # the same, divisible into eight updates


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    flag = parser.add_argument
    flag("--only", nargs="+", metavar="PART", help="run these parts alone")
    flag("--budget_hours", type=float, default=100, help="start no run after so many hours")
    flag("--threads", type=int, default=1, help="CPU threads of a run; more or fewer may change last digits")
    flag("--out", type=Path, default=Path("runs/miniature"), help="folder of the runs themselves")
    flag("--results", type=Path, default=Path("experiments/results"), help="what is kept; RESULTS.md is written beside it")
    flag("--report", action="store_true", help="run nothing, write RESULTS.md and the figures")
    flag("--quick", action="store_true", help="tiny versions of three runs, into runs/miniature_quick")
    args = parser.parse_args()
    if args.quick:
        args.out, args.results = Path("runs/miniature_quick"), Path("runs/miniature_quick/results")
    return args


def plan(out):
    """Every run, the most telling first: (part, name, seed, script, flags, iterations after which it is scored, how)."""
    opd = lambda part, name, seed, *flags, at=(80,), how="full": jobs.append((part, name, seed, "train_opd.py", flags, at, how))
    mix = lambda part, name, seed, *flags, at=(54,), how="full": jobs.append(
        (part, name, seed, "train_teacher.py", flags, at, how)
    )
    small = lambda part, name, *flags, seed=0: opd(part, name, seed, *SMALL, *flags, at=(80,), how="small")
    jobs, weighted = [], ("--mix", "geneval=3", "ocr=1", "pickscore=1", *MIX)
    sft = f"{out}/sft_seed0/adapter"
    rows = {"opd_nomar": ("--mar_weight", "0"), "opd_sft": ("--init", sft), "opd_base": ("--init", "base")}

    for seed in (0, 1):
        opd("main", "opd_merge", seed)
    opd("main", "opd_merge", 2, at=(5, 10, 20, 40, 60, 80))
    for name in ("base", *TASKS, "grpo_mix", "merged"):  # recorded in toy/, scored again for the held-out columns
        jobs.append(("main", name, 0, None, ["base" if name == "base" else f"toy/adapters/{name}"], (), "full"))
    for objective in ("ppo", "kl", "ode", "trajectory", "ppo-public-code", "ppo-scalar", "ppo-published"):
        small("objectives", f"{objective}_lr1e-3", "--objective", objective)
    for objective in ("ode", "ppo"):
        small("objectives", f"{objective}_lr3e-3", "--objective", objective, "--lr", "3e-3")
    mix("main", "merge_mix", 0, *weighted, "--init", "toy/adapters/merged", at=(10, 30, 54))
    opd("main", "opd_small", 0, *SMALL)
    jobs.append(("gradients", "gradients", 0, "experiments/gradients.py", [], (), None))
    opd("main", "opd_nomar", 0, *SMALL, *rows["opd_nomar"])
    # The paper's schedule: whole epochs of one task in turn, nine of ten steps, the objective of the public code.
    published = ("--objective", "ppo-public-code", "--steps", "10", "--task_mix", *(f"{t}=8" for t in TASKS))
    opd("speed", "published_schedule", 0, *SMALL, *published, at=(40, 60, 80), how="small")
    opd("main", "opd_small", 1, *SMALL, at=(20, 40, 60, 80))
    small("ablations", "routing_all", "--prompts", *UNION)
    opd("main", "opd_base", 0, *SMALL, *rows["opd_base"])
    small("objectives", "ode_lr3e-3", "--objective", "ode", "--lr", "3e-3", seed=1)
    small("objectives", "ppo_lr1e-3", "--objective", "ppo", seed=1)
    for updates in ("8", "1", "2", "4"):
        for objective in ("ppo", "kl"):
            flags = (*EIGHTS, "--objective", objective, "--updates", updates)
            opd("staleness", f"{objective}_updates{updates}", 0, *flags, how="small")
    opd("main", "sft", 0, "--objective", "sft", "--init", "base", at=(300,))
    opd("main", "opd_sft", 0, *SMALL, *rows["opd_sft"])
    mix("main", "sft_mix", 0, *weighted, "--init", sft)
    opd("MAR", "mar0.1", 0, *SMALL, "--mar_weight", "0.1")
    opd("MAR", "anchor_base", 0, *SMALL, "--anchor", "base")
    opd("main", "opd_small", 2, *SMALL, at=(20, 40, 60, 80))
    for seed in (1, 2):
        mix("main", "merge_mix", seed, *weighted, "--init", "toy/adapters/merged")
    for objective, lr in (("kl", "3e-3"), ("ppo-scalar", "3e-4"), ("ppo-published", "3e-4"), ("trajectory", "3e-3"),
                          ("ppo-public-code", "3e-3")):  # fmt: skip
        small("objectives", f"{objective}_lr{lr}", "--objective", objective, "--lr", lr)
    mix("speed", "mix_curve", 1, *weighted, "--eval_every", "20", "--keep", "best", at=(240,))
    taste = ("--reward", "pickscore", *MIX, "--lr", "1e-3")  # the teacher that most other scores pay for
    mix("hacking", "teacher_pickscore", 0, *taste, at=(10, 20, 40, 60), how="small")
    for method in ("ties", "dare", "factor-mean"):
        flags = ["--adapters", *TEACHERS, "--method", method, *(["--rank", "24"] if method != "factor-mean" else [])]
        jobs.append(("ablations", f"merge_{method}", 0, "merge.py", flags, (0,), "small"))
        small("ablations", f"opd_{method}", "--init", f"{out}/merge_{method}_seed0/adapter")
    small("ablations", "alternate", "--task_mix", *(f"{t}=8" for t in TASKS))
    for rank in ("2", "16"):
        small("interference", f"base_rank{rank}", "--init", "base", "--rank", rank, "--alpha", str(2 * int(rank)))
    for seed in (1, 2):
        for objective in ("kl", "ode"):
            small("objectives", f"{objective}_lr1e-3", "--objective", objective, seed=seed)
    small("objectives", "ode_lr3e-3", "--objective", "ode", "--lr", "3e-3", seed=2)
    small("objectives", "ppo_lr1e-3", "--objective", "ppo", seed=2)
    for seed in (1, 2):
        for name, flags in rows.items():
            opd("main", name, seed, *SMALL, *flags)
    for name, flags in (("noise0.3", ("--noise", "0.3")), ("noise1.2", ("--noise", "1.2")), ("steps10", ("--steps", "10")),
                        ("late", ("--train_steps", "3,4")), ("early", ("--train_steps", "0,1,2")),
                        ("random2", ("--train_steps", "random:2"))):  # fmt: skip
        small("ablations", name, *flags)
    small("ablations", "groups2", "--prompts_per_iteration", "16", "--group_size", "2")
    mix("main", "mix_short", 0, *weighted)
    mix("main", "mix_uniform", 0, "--mix", *(f"{t}=1" for t in TASKS), *MIX)
    opd("staleness", "ppo_updates8_clip0.02", 0, *EIGHTS, "--updates", "8", "--clip_range", "0.02", how="small")
    for objective in ("ppo", "kl", "ode", "trajectory", "ppo-public-code"):
        small("objectives", f"{objective}_lr3e-4", "--objective", objective, "--lr", "3e-4")
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


def evaluate(adapters, how, folder, log, threads, quick):
    """Score {name: adapter} by evaluate.py. how: "full" = all test prompts, held-out scores, prompts out of distribution;
    "small" = 128 test prompts a task and held-out scores. -> {name: {metric: {"mean", "se", "n"}}}."""
    from experiments import heldout

    files = heldout.write_prompts(folder.parent / "prompts")
    extra = list(files) if how == "full" else ["variety"]
    flags = ["--rewards", "experiments.heldout", "--tasks", *TASKS, *extra, "--prompts", *(f"{t}={files[t]}" for t in extra)]
    flags += ["--num_prompts", "4" if quick else "0" if how == "full" else "128", "--out", folder / "scores", "--overwrite"]
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
    """metrics.jsonl, thinned: per-task KL, cosines of the tasks' gradients, rewards, seconds since the start."""
    log, seconds, lines = common.read_log(run), 0.0, []
    for n, line in enumerate(log):
        seconds += line["seconds"]
        names = [
            k for k in line if k.split("/")[0] in ("kl", "cosine", "grad_norm", "reward", "test", "clip_fraction", "ratio_gap")
        ]
        if n % (1 + len(log) // 41) == 0 or n == len(log) - 1 or "test" in line:
            kept = {
                k: float(f"{line[k]:.3g}")
                for k in names
                if k.count("/") <= 1 and not k.startswith(("clip_fraction/", "ratio_gap/"))
            }
            lines.append({"iteration": line["iteration"], "seconds": round(seconds, 1)} | kept)
    return lines


def run_job(job, args):
    """Train stage by stage, score every stage, record. A stage that is there already is not trained again."""
    part, name, seed, script, flags, stages, how = job
    if script == "experiments/gradients.py":  # keeps its own record
        return call([script, "--runs", args.out, "--results", args.results], args.out / f"{name}.log", args.threads)
    run = args.out / f"{name}_seed{seed}"
    run.parent.mkdir(parents=True, exist_ok=True)
    log, kept = args.out / f"{run.name}.log", args.out / f"{run.name}.stages"
    adapters, minutes = {}, {"wall_minutes": 0.0, "cpu_minutes": 0.0, "threads": args.threads}
    if script is None:
        adapters["final"] = flags[0]
    elif script == "merge.py":
        call([script, *flags, "--out", run / "adapter", "--overwrite"], log, args.threads)
        adapters["final"] = run / "adapter"
    else:
        tiny = "--prompts_per_iteration 4 --group_size 2 --steps 3 --window_end 2 --window 1 --eval_steps 2".split()
        tiny = [] if not args.quick else tiny[:6] + tiny[-2:] if script == "train_opd.py" else tiny
        common_flags = [
            "--seed",
            seed,
            "--out",
            run,
            *(["--sample_every", 0, "--eval_prompts", 0] if "opd" in script else []),
            *tiny,
        ]
        done = json.loads((kept / "minutes.json").read_text()) if (kept / "minutes.json").exists() else {}
        for n, stage in enumerate(stages):
            if str(stage) not in done:
                how_to_start = "--resume" if n else "--overwrite"
                command = [script, *flags, *common_flags, "--iterations", stage, how_to_start]
                done[str(stage)] = call(command, log, args.threads)
                shutil.rmtree(kept / str(stage), ignore_errors=True)
                shutil.copytree(run / "adapter", kept / str(stage))
                save_json(kept / "minutes.json", done)
            minutes["wall_minutes"] += done[str(stage)][0]
            minutes["cpu_minutes"] += done[str(stage)][1]
            adapters[str(stage)] = kept / str(stage)
    names = list(adapters)
    scores = evaluate({names[-1]: adapters[names[-1]]}, how, run, log, args.threads, args.quick)
    if names[:-1]:
        scores = evaluate({n: adapters[n] for n in names[:-1]}, "small", run, log, args.threads, args.quick) | scores
    record = {"part": part, "name": name, "seed": seed, "script": script, "flags": list(flags), "stages": list(stages)}
    record |= {"final": names[-1], "scores": scores}
    if stages and script != "merge.py":
        minutes = {k: round(v, 2) for k, v in minutes.items()}
        record |= {"compute": cost(run, minutes), "stage_minutes": done, "curve": curve(run)}
    args.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=None, separators=(",", ":")).replace('},{"iteration', '},\n{"iteration')
    beside = args.results / f"{run.name}.tmp"
    beside.write_text(text + "\n")
    beside.replace(args.results / f"{run.name}.json")


def recorded(job, results):
    """Whether this run's file is there, made with the same flags."""
    _, name, seed, script, flags, stages, _ = job
    if script == "experiments/gradients.py":
        return (results / "gradients.json").exists()
    file = results / f"{name}_seed{seed}.json"
    if not file.exists():
        return False
    record = json.loads(file.read_text())
    return [record["script"], record["flags"], record["stages"]] == [script, list(flags), list(stages)]


def main(args):
    os.chdir(ROOT)
    began, jobs = time.time(), plan(args.out)
    if args.quick:
        tiny = {"opd_merge": (1, 2), "merge_mix": (2,), "merged": ()}
        jobs = [(*job[:5], tiny[job[1]], job[6]) for job in jobs if job[1] in tiny and job[2] == 0]
    todo = [job for job in jobs if not recorded(job, args.results) and (not args.only or job[0] in args.only)]
    prompts = args.out / "prompts" / "all.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(Path(f"toy/prompts/{task}_train.txt").read_text() for task in TASKS))
    for n, job in enumerate(todo if not args.report else ()):
        hours = (time.time() - began) / 3600
        if hours > args.budget_hours:
            print(f"{hours:.1f} hours gone: stopped before {job[1]}; the same command goes on", flush=True)
            break
        left = f"some {hours / n * (len(todo) - n):.1f} hours left" if n else "time left unknown"
        print(f"{time.strftime('%H:%M')} {n + 1} of {len(todo)}: {job[0]}, {job[1]} seed {job[2]}; {left}", flush=True)
        run_job(job, args)
    report.write(args.results)


if __name__ == "__main__":
    main(parse_args())
