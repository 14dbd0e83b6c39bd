"""The records of experiments/results as rows: a run's name in the tables, its scores, its cost.

Everywhere `runs` is {run's name: [record of each seed]}, and `found` is what gradients.py measured,
or None.
"""

import json
import math
import statistics

from rewards.tables import SCALES
from support.flags import TASKS

OUTSIDE = ("counts", "places", "three", "letters")
COLUMNS = {  # metric: (heading, digits)
    "geneval": ("GenEval", 3),
    "ocr": ("OCR", 3),
    "deqa": ("DeQA", 2),
    "pickscore": ("PickScore", 2),
    "average": ("Average", 4),
    "strict": ("Average, strict", 4),
    "geneval_strict": ("GenEval, strict", 3),
    "ocr_strict": ("OCR, strict", 3),
    "edges": ("edges", 3),
    "noise": ("noise", 2),
    "distance": ("distance", 2),
    "variety": ("variety", 3),
    "counts": ("one and three", 3),
    "places": ("places of several", 3),
    "three": ("three shapes", 3),
    "letters": ("text elsewhere", 3),
    "outside": ("mean of the four", 3),
    "kl": ("KL at the end", 4),
    "clipped": ("ratios clipped, %", 2),
    "seeds": ("seeds", 0),
    "images": ("images", 0),
    "passes": ("passes, 1000", 0),
    "cpu_minutes": ("CPU minutes", 1),
}
OBJECTIVES = ("ppo", "kl", "ode", "trajectory", "ppo-public-code", "ppo-scalar", "ppo-published")
SMALL = "32 images an iteration"
LABELS = {  # run: its name in the tables
    "clean": "clean drawings",
    "geneval": "teacher: GenEval",
    "ocr": "teacher: OCR",
    "deqa": "teacher: DeQA",
    "pickscore": "teacher: PickScore",
    "oracle": "oracle: each task by its own teacher",
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
RATES = ("3e-4", "1e-3", "3e-3")
for objective in OBJECTIVES:
    for rate in RATES:
        LABELS[f"{objective}_lr{rate}"] = f"{objective}, learning rate {rate}"
for objective in ("ppo", "kl"):
    LABELS[f"{objective}_updates1"] = f"{objective}, 1 update"
    for updates in (2, 4, 8):
        LABELS[f"{objective}_updates{updates}"] = f"{objective}, {updates} updates"
for name in (*TASKS, "oracle", "merged", "sft", "opd_sft", "merge_mix"):
    LABELS[f"other_{name}"] = LABELS[name]
LABELS["other_opd"] = LABELS["opd_merge"]
LABELS["other_default"] = "Flow-OPD by train_opd.py's default"
STARTS = {"base": "the base", "merge": "the merge", "merged": "the merge", "sft": "SFT"}
for start, words in STARTS.items():
    for kind, method in (("opd", "Flow-OPD"), ("mix", "GRPO-Mix")):
        LABELS[f"{kind}_from_{start}"] = f"{method} from {words}"
        LABELS[f"strict_{kind}_from_{start}"] = f"strict rewards: {method} from {words}"
for name in ("geneval", "ocr", "merged", "sft", "oracle"):
    LABELS[f"strict_{name}"] = f"strict rewards: {LABELS[name]}"
for kind, method in (("opd", "Flow-OPD"), ("mix", "GRPO-Mix")):
    for number, words in enumerate(("GenEval alone", "two tasks", "three tasks", "four tasks"), 1):
        LABELS[f"tasks{number}_{kind}"] = f"{method}, {words}"
CHANGES = {  # part later: what is changed
    "kl": "the KL's weights",
    "velocity": "velocity errors, one weight for all steps",
    "noisy": "velocity errors times t",
    "clean": "velocity errors times 1 - t",
    "extrapolate": "teachers 1.25 times as far from the base",
    "ode": "ODE states, the squared distance of a step",
    "ode_velocity": "ODE states, velocity errors",
    "uniform": "ODE states, one of five steps, any",
    "beta": "ODE states, one of five steps, late by Beta(5, 2), velocity errors",
}
for name, words in CHANGES.items():
    for rate in ("1e-3", "2e-3"):
        LABELS[f"later_{name}_lr{rate}"] = f"{words}, learning rate {rate}"
for rate in ("5e-4", "1e-3", "2e-3"):
    words = f"`ppo` with MAR, velocity errors, one weight for all steps, learning rate {rate}"
    LABELS[f"later_ppo_lr{rate}"] = words
LABELS["faster_default"] = "the default"
LABELS["faster_guided"] = "with teachers guided at 2"
LABELS["faster_published"] = "published schedule with its rewards, 32 images an iteration"
LABELS["beyond_merge_sft"] = "SFT from the merge"
LABELS["beyond_merge_sft_opd"] = "merge, SFT, Flow-OPD"
LABELS["beyond_opd_mix"] = "merge, Flow-OPD, GRPO-Mix"
LABELS["beyond_guided"] = "merge, Flow-OPD with teachers guided at 2"
LABELS["beyond_guided_equal"] = "guided, and `--step_weights equal --lr 1e-3`"
LABELS["beyond_guided_equal_long"] = "guided, equal weights, and `--iterations 320`"
WAYS = {
    "sum": "the guided velocity, as train_opd.py does",
    "branches": "v(prompt) and v(prompt) - v(empty)",
    "prompt_alone": "the guided velocity by the student's prompt branch alone",
}
for name, words in WAYS.items():
    LABELS[f"guidance_{name}"] = words
    LABELS[f"guidance_{name}_lr2e-3"] = f"{words}, learning rate 2e-3"
LABELS["guidance_off"] = "no guidance in training"
for name in (*TASKS, "oracle"):
    LABELS[f"guidance_{name}"] = LABELS[name]
for objective in ("ppo", "kl"):
    for size in (8, 16, 32, 64, 128):
        for updates in (1, 2):
            for rate in ("1e-3", "2e-3", "4e-3"):
                words = f"{objective}, {size} images, {updates} updates, learning rate {rate}"
                run = f"{objective}_b{size}_u{updates}_lr{rate}"
                LABELS[f"map_{run}"] = LABELS[f"default_{run}"] = words
                for more in ("decay", "warmup", "ema0.95", "ema0.97", "ema0.98"):
                    LABELS[f"map_{run}_{more}"] = f"{words}, {more}"
                LABELS[f"default_{run}_ema0.97"] = f"{words}, EMA .97"
LABELS["default_bf16"] = "the first row, backbone in bf16"
SHIPPED = {  # adapters by their flags in toy/build.py: iterations, images in one, passes per image
    "grpo_mix": (460, 192, 15),
    "geneval": (260, 192, 15),
    "pickscore": (60, 192, 15),
    "ocr": (90, 128, 21),
    "deqa": (110, 128, 21),
}
TEACHERS = {  # an oracle's prefix: its teachers, in the order of TASKS
    "": TASKS,  # toy/'s
    "other_": [f"other_{task}" for task in TASKS],  # trained once more
    "strict_": ["strict_geneval", "strict_ocr", "deqa", "pickscore"],
}
TEACHER_IMAGES = sum(n * size for n, size, _ in (SHIPPED[task] for task in TASKS))  # 87,040
SFT_IMAGES = 2048
MIX_BEST = 220  # the iteration of the shipped GRPO-Mix with the best test reward


def load(results):
    """{run's name: [record of each seed, in order]}.

    An oracle is put together from its teachers. ppo at the default learning rate is opd_small
    under another name."""
    runs = {}
    for file in sorted(results.glob("*_seed*.json")):
        record = json.loads(file.read_text())
        runs.setdefault(record["name"], []).append(record)
    if "opd_small" in runs:
        runs["ppo_lr1e-3"] = runs["opd_small"]
    for prefix, teachers in TEACHERS.items():
        if set(teachers) <= set(runs):
            rows = [scores(runs[name][0]) for name in teachers]
            runs[f"{prefix}oracle"] = [{"final": "all", "scores": {"all": oracle(rows)}}]
    for task in TASKS:  # the teachers sampled with guidance 2
        runs[f"{task}@2"] = [r | {"final": "final@2"} for r in runs.get(f"guidance_{task}", ())]
    guided = [runs.get(f"guidance_{task}") for task in TASKS]
    if all(guided):
        own = {}
        for scale in ("", "@2"):
            own[f"all{scale}"] = oracle([scores(record, f"final{scale}") for record, *_ in guided])
        runs["guidance_oracle"] = [{"final": "all", "scores": own}]
    if (results / "clean.json").exists():
        clean = json.loads((results / "clean.json").read_text())
        rows = {metric: {"mean": mean, "se": 0.0} for metric, mean in clean.items()}
        runs["clean"] = [{"final": "all", "scores": {"all": rows}}]
    return runs


def oracle(rows):
    """{metric: {"mean", "se"}}: each task by its own teacher. rows: in the order of TASKS."""
    own = {}
    for task, row in zip(TASKS, rows):
        own |= {metric: row[metric] for metric in (task, f"{task}_strict") if metric in row}
    return own | {"average": average(own)}


def average(rows):
    """The paper's Average of {task: {"mean", "se"}}."""
    means = [rows[task]["mean"] / SCALES[task] for task in TASKS]
    errors = [rows[task]["se"] / SCALES[task] for task in TASKS]
    return {"mean": sum(means) / 4, "se": math.hypot(*errors) / 4}


def scores(record, stage=None):
    """{metric: {"mean", "se"}} of a record's last stage or of another: what evaluate.py measured,
    the held-out scores averaged over the images of the four tasks, and what the training logged."""
    rows = dict(record["scores"][str(stage or record["final"])])
    if "ocr_strict" in rows:  # the Average of all or nothing
        strict = {task: rows.get(f"{task}_strict", rows[task]) for task in TASKS}
        rows["strict"] = average(strict)
    groups = {"outside": OUTSIDE}
    for name in ("edges", "noise", "distance"):
        groups[name] = [f"{task}_{name}" for task in TASKS]
    for name, parts in groups.items():
        if all(part in rows for part in parts):
            error = math.hypot(*(rows[part]["se"] for part in parts)) / len(parts)
            mean = statistics.mean(rows[part]["mean"] for part in parts)
            rows[name] = {"mean": mean, "se": error}
    lines, logged = record.get("curve", []), {"kl": []}
    logged["clipped"] = [100 * line["clip_fraction"] for line in lines if "clip_fraction" in line]
    if "ode" not in record.get("flags", ()):  # ode logs another distance
        for line in lines[-(len(lines) // 4) :]:
            logged["kl"] += [value for name, value in line.items() if name.startswith("kl/")]
    for name, values in logged.items():
        if values:
            rows[name] = {"mean": statistics.mean(values), "se": 0.0}
    return rows


def value(runs, name, metric):
    """(mean, standard error), or None where there is no run.

    One seed: the error over test prompts. n seeds: the error over seeds, but not less than that
    over prompts / sqrt(n), because two or three seeds may lie close together by chance."""
    records = runs.get(name, [])
    if metric in ("images", "passes", "cpu_minutes", "seeds"):
        cost = cost_of(name, records, metric)
        return None if cost is None else (cost, 0.0)
    found = [scores(record)[metric] for record in records if metric in scores(record)]
    if not found:
        return None
    return mean_of_seeds(found)


def mean_of_seeds(rows):
    """(mean, standard error) of {"mean", "se"} of each seed."""
    means, errors = [row["mean"] for row in rows], [row["se"] for row in rows]
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    return statistics.mean(means), max(spread, statistics.mean(errors)) / len(means) ** 0.5


def cost_of(name, records, metric):
    """Images, thousand passes or CPU minutes of a run, or how many seeds were trained; or None."""
    costs = [record["compute"] for record in records if "compute" in record]
    unit = 1000 if metric == "passes" else 1
    if metric == "seeds":
        return len(costs) or None
    if name == "oracle" and metric != "cpu_minutes":
        return sum(cost_of(task, [], metric) for task in TASKS)
    if name in SHIPPED and metric != "cpu_minutes":
        iterations, images, passes = SHIPPED[name]
        total = iterations * images
        return total if metric == "images" else total * passes / unit
    return statistics.mean(cost[metric] / unit for cost in costs) if costs else None


def stage_curve(record, start):
    """(CPU minutes, Average, its standard error) of a run that was scored at several stages, from
    the score of its start."""
    minutes, average, error = [0.0], [start["mean"]], [start["se"]]
    for stage in record["stages"]:
        minutes.append(minutes[-1] + record["stage_minutes"][str(stage)][1])
        average.append(record["scores"][str(stage)]["average"]["mean"])
        error.append(record["scores"][str(stage)]["average"]["se"])
    return minutes, average, error


def reached(runs, name, goal):
    """CPU minutes until each seed's Average first reaches `goal`: [minutes or None].

    On a straight line between its stages."""
    out = []
    start = scores(runs["merged"][0])["average"]
    for record in staged(runs, name):
        minutes, average, _ = stage_curve(record, start)
        above = [n for n in range(1, len(average)) if average[n] >= goal]
        if not above:
            out.append(None)
            continue
        n = above[0]
        part = (goal - average[n - 1]) / (average[n] - average[n - 1])
        out.append(minutes[n - 1] + (minutes[n] - minutes[n - 1]) * part)
    return out


def by_images(runs, name, metric="average"):
    """{images sampled: (mean, standard error, seeds)} of a run that was scored at several stages,
    over the seeds that have the stage."""
    found = {}
    for record in runs.get(name, ()):
        per_iteration = record["compute"]["images"] // record["stages"][-1]
        for stage in record["stages"]:
            found.setdefault(stage * per_iteration, []).append(scores(record, stage)[metric])
    return {images: (*mean_of_seeds(rows), len(rows)) for images, rows in sorted(found.items())}


def images_before(name):
    """Images that were sampled before a run began: for the teachers, unless it is GRPO-Mix from the
    base, and for SFT."""
    if name.endswith("mix_from_base"):
        return 0
    return TEACHER_IMAGES + SFT_IMAGES * name.endswith("sft")


def staged(runs, name):
    """The records of a run that were scored at several stages."""
    return [record for record in runs.get(name, ()) if len(record["stages"]) > 1]


def trainings(runs):
    """Every record of a training once."""
    names = [name for name in runs if name != "ppo_lr1e-3"]
    return [record for name in names for record in runs[name] if "compute" in record]


PAIRS = [f"{a}-{b}" for n, a in enumerate(TASKS) for b in TASKS[n + 1 :]]


def pair(name):
    return " and ".join(COLUMNS[task][0] for task in name.split("-"))


def at_stage(name):
    """ "distillation: Flow-OPD, iteration 40" -> ("OPD", 40); the merged start is iteration 0."""
    kind = "GRPO" if name.startswith("grpo") else "OPD"
    if "iteration" not in name:
        return kind, 0
    return kind, int(name.rsplit(" ", 1)[1])
