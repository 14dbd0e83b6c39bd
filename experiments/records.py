"""The records of experiments/results as rows: what a run is called, what it scored, what it cost.

`runs` is everywhere {run's name: [record of each seed]}, `found` what gradients.py measured, or None.
"""

import json
import math
import statistics

from support.flags import TASKS
from support.tables import SCALES

OUTSIDE = ("counts", "places", "three", "letters")
COLUMNS = {  # metric: heading, digits
    "geneval": ("GenEval", 3), "ocr": ("OCR", 3), "deqa": ("DeQA", 2), "pickscore": ("PickScore", 2), "average": ("Average", 4),
    "edges": ("edges", 3), "noise": ("noise", 2), "distance": ("distance", 2), "variety": ("variety", 3),
    "counts": ("one and three", 3), "places": ("places of several", 3), "three": ("three shapes", 3),
    "letters": ("text elsewhere", 3), "outside": ("mean of the four", 3), "kl": ("KL at the end", 4),
    "clipped": ("ratios clipped, %", 2), "seeds": ("seeds", 0), "images": ("images", 0), "passes": ("passes, 1000", 0),
    "cpu_minutes": ("CPU minutes", 1),
}  # fmt: skip
OBJECTIVES = {
    "ppo": "ppo",
    "kl": "kl",
    "ode": "ode",
    "trajectory": "trajectory",
    "ppo-public-code": "ppo-public-code",
    "ppo-scalar": "ppo-scalar",
    "ppo-published": "ppo-published",
}
SMALL = "32 images an iteration"
LABELS = {
    "clean": "clean drawings",
    "geneval": "teacher: GenEval",
    "ocr": "teacher: OCR",
    "deqa": "teacher: DeQA",
    "pickscore": "teacher: PickScore",
    "oracle": "oracle: each task asked of its own teacher",
    "grpo_mix": "GRPO-Mix 3:1:1, long, best of its checkpoints",
    "mix_short": "GRPO-Mix 3:1:1, as many images as the main job",
    "mix_uniform": "GRPO-Mix uniform, as many images as the main job",
    "sft_mix": "SFT + GRPO-Mix",
    "merge_mix": "merge + GRPO-Mix",
    "merged": "merge alone",
    "sft": "SFT alone",
    "opd_base": f"Flow-OPD from the base, {SMALL}",
    "opd_sft": f"Flow-OPD from SFT, {SMALL}",
    "opd_nomar": f"Flow-OPD from merge without MAR, {SMALL}",
    "opd_small": f"Flow-OPD from merge, {SMALL}",
    "opd_merge": "**Flow-OPD from merge: the main job**, 128 images an iteration",
    "published_schedule": f"published schedule, {SMALL}",
    "routing_all": "routing: every teacher for every prompt",
    "alternate": "epochs of one task in turn (8 prompts each)",
    "mar0.1": f"Flow-OPD from merge, MAR weight 0.1, {SMALL}",
    "anchor_base": f"Flow-OPD from merge, the base as MAR's anchor, {SMALL}",
    "merge_ties": "TIES merge alone",
    "merge_dare": "DARE merge alone",
    "merge_factor-mean": "mean of the factors alone",
    "opd_ties": "start: TIES merge",
    "opd_dare": "start: DARE merge",
    "opd_factor-mean": "start: mean of the factors (public code)",
    "noise0.3": "noise a = 0.3",
    "noise1.2": "noise a = 1.2",
    "steps10": "T = 10, nine steps trained",
    "late": "the last two of the five steps trained",
    "early": "the first three of the five steps trained",
    "random2": "two of the five steps, drawn each iteration",
    "groups2": "16 prompts x 2 samples",
    "base_rank2": "from the base, LoRA rank 2",
    "base_rank16": "from the base, LoRA rank 16",
    "ppo_updates8_clip0.02": "ppo, 8 updates, clip 0.02",
    "ppo_updates8_lr3e-3": "ppo, 8 updates, learning rate 3e-3",
    "ppo_updates8_lr3e-3_clip0.02": "ppo, 8 updates, learning rate 3e-3, clip 0.02",
    "ppo_updates8_lr3e-3_clip100": "ppo, 8 updates, learning rate 3e-3, no clip",
    "kl_updates8_lr3e-3": "kl, 8 updates, learning rate 3e-3",
    "mix_uniform_long": "GRPO-Mix uniform, long, best of its checkpoints",
}
LABELS |= {f"{n}_updates{u}": f"{OBJECTIVES[n]}, {u} update{'s' * (u > 1)}" for n in ("ppo", "kl") for u in (1, 2, 4, 8)}
RATES = ("3e-4", "1e-3", "3e-3")
LABELS |= {f"{n}_lr{lr}": f"{label}, learning rate {lr}" for n, label in OBJECTIVES.items() for lr in RATES}
LABELS |= {f"other_{name}": LABELS[name] for name in (*TASKS, "oracle", "merged", "sft", "opd_sft", "merge_mix")}
LABELS["other_opd"] = LABELS["opd_merge"]
# What the shipped adapters cost by their flags in toy.py: iterations, images an iteration, passes of an image.
SHIPPED = {"grpo_mix": (460, 192, 15), "geneval": (260, 192, 15), "pickscore": (60, 192, 15), "ocr": (90, 128, 21),
           "deqa": (110, 128, 21)}  # fmt: skip
MIX_BEST = 220  # the iteration of the shipped GRPO-Mix with the best test reward


def load(results):
    """{run's name: [record of each seed, in order]}. The oracle is put together from the teachers; ppo at the default learning
    rate is opd_small under another name."""
    runs = {}
    for file in sorted(results.glob("*_seed*.json")):
        record = json.loads(file.read_text())
        runs.setdefault(record["name"], []).append(record)
    if "opd_small" in runs:
        runs["ppo_lr1e-3"] = runs["opd_small"]
    for name in ("", "other_"):  # toy/'s teachers, and those trained once more
        if all(name + task in runs for task in TASKS):
            own = {task: scores(runs[name + task][0])[task] for task in TASKS}
            mean = sum(own[t]["mean"] / SCALES[t] for t in TASKS) / 4
            se = math.hypot(*(own[t]["se"] / SCALES[t] for t in TASKS)) / 4
            runs[f"{name}oracle"] = [{"final": "all", "scores": {"all": own | {"average": {"mean": mean, "se": se}}}}]
    if (results / "clean.json").exists():
        clean = json.loads((results / "clean.json").read_text())
        runs["clean"] = [{"final": "all", "scores": {"all": {k: {"mean": v, "se": 0.0} for k, v in clean.items()}}}]
    return runs


def scores(record, stage=None):
    """{metric: {"mean", "se"}} of a record's last stage or of another: what evaluate.py measured, the held-out scores averaged
    over the four tasks' images, and what the training itself logged."""
    out = dict(record["scores"][str(stage or record["final"])])
    groups = {name: [f"{task}_{name}" for task in TASKS] for name in ("edges", "noise", "distance")} | {"outside": OUTSIDE}
    for name, parts in groups.items():
        if all(part in out for part in parts):
            mean = statistics.mean(out[part]["mean"] for part in parts)
            out[name] = {"mean": mean, "se": math.hypot(*(out[part]["se"] for part in parts)) / len(parts)}
    lines = record.get("curve", [])
    late = lines[-(len(lines) // 4) :] if "ode" not in record.get("flags", ()) else []  # ode logs another distance
    shown = {"kl": [v for line in late for k, v in line.items() if k.startswith("kl/")],
             "clipped": [100 * line["clip_fraction"] for line in lines if "clip_fraction" in line]}  # fmt: skip
    return out | {k: {"mean": statistics.mean(v), "se": 0.0} for k, v in shown.items() if v}


def value(runs, name, metric):
    """(mean, standard error) or None where there is no run. One seed: the error over test prompts. n seeds: that over seeds,
    but not less than that over prompts / sqrt(n), for two or three seeds may lie close together by chance."""
    records = runs.get(name, [])
    if metric in ("images", "passes", "cpu_minutes"):
        if name in SHIPPED and metric != "cpu_minutes":
            iterations, images, passes = SHIPPED[name]
            return iterations * images * (passes / 1000 if metric == "passes" else 1), 0.0
        costs = [r["compute"][metric] / (1000 if metric == "passes" else 1) for r in records if "compute" in r]
        return (statistics.mean(costs), 0.0) if costs else None
    if metric == "seeds":
        return (sum("compute" in r for r in records), 0.0) if any("compute" in r for r in records) else None
    found = [scores(r)[metric] for r in records if metric in scores(r)]
    if not found:
        return None
    means = [f["mean"] for f in found]
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    return statistics.mean(means), max(spread, statistics.mean(f["se"] for f in found)) / len(means) ** 0.5


def stage_curve(record, start):
    """(CPU minutes, Average, its standard error) of a run that was scored at several stages, from the score of its start."""
    x, y, se = [0.0], [start["mean"]], [start["se"]]
    for stage in record["stages"]:
        x.append(x[-1] + record["stage_minutes"][str(stage)][1])
        y.append(record["scores"][str(stage)]["average"]["mean"])
        se.append(record["scores"][str(stage)]["average"]["se"])
    return x, y, se


def reached(runs, name, goal):
    """CPU minutes until each seed's Average first reaches `goal`, on a straight line between its stages: [minutes or None]."""
    out = []
    for record in (r for r in runs.get(name, ()) if len(r["stages"]) > 1):
        x, y, _ = stage_curve(record, scores(runs["merged"][0])["average"])
        n = next((n for n in range(1, len(y)) if y[n] >= goal), None)
        out.append(x[n - 1] + (x[n] - x[n - 1]) * (goal - y[n - 1]) / (y[n] - y[n - 1]) if n else None)
    return out


def trainings(runs):
    """Every record of a training once."""
    return [r for name in runs if name != "ppo_lr1e-3" for r in runs[name] if "compute" in r]


PAIRS = [f"{a}-{b}" for n, a in enumerate(TASKS) for b in TASKS[n + 1 :]]


def pair(name):
    return " and ".join(COLUMNS[task][0] for task in name.split("-"))


def at_stage(name):
    """ "distillation: Flow-OPD, iteration 40" -> ("OPD", 40); the merged start is iteration 0."""
    return "GRPO" if name.startswith("grpo") else "OPD", int(name.rsplit(" ", 1)[1]) if "iteration" in name else 0
