"""RESULTS.md and its figures from results/*.json alone: python experiments/miniature.py --report

The prose is RESULTS.template.md. What stands there in double braces is the name of a function below and its arguments, as on a
command line: {{score opd_merge variety}}, {{table "base ocr" "geneval average"}}.
"""

import functools
import json
import math
import re
import shlex
import statistics
from pathlib import Path

TASKS = ("geneval", "ocr", "deqa", "pickscore")
SCALES = {"geneval": 1, "ocr": 1, "deqa": 5, "pickscore": 26}
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
    "ppo": "C' ppo",
    "kl": "D kl",
    "ode": "F ode",
    "trajectory": "E trajectory",
    "ppo-public-code": "B ppo-public-code",
    "ppo-scalar": "C ppo-scalar",
    "ppo-published": "A ppo-published",
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
    "mix_curve": "the same, another seed, 240 iterations at most",
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
    "ppo_updates8_clip0.02": "C' ppo, clip 0.02, 8 updates",
}
LABELS |= {f"{n}_updates{u}": f"{OBJECTIVES[n]}, {u} update{'s' * (u > 1)}" for n in ("ppo", "kl") for u in (1, 2, 4, 8)}
RATES = ("3e-4", "1e-3", "3e-3")
LABELS |= {f"{n}_lr{lr}": f"{label}, learning rate {lr}" for n, label in OBJECTIVES.items() for lr in RATES}
# What the shipped adapters cost by their flags in toy.py: iterations, images an iteration, passes of an image.
SHIPPED = {"grpo_mix": (460, 192, 15), "geneval": (260, 192, 15), "pickscore": (60, 192, 15), "ocr": (90, 128, 21),
           "deqa": (110, 128, 21)}  # fmt: skip
MIX_BEST = 220  # the iteration of the shipped GRPO-Mix with the best test reward
# Okabe and Ito's palette, told apart by colour-blind eyes; and a marker each.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "x", "P")
STYLES = ("-", "-", "-", "--", "-", "-.", ":")  # where two lines lie on each other, the lower one shows through
MISSING = "not run yet"


# ----------------------------------------------------------------------------------------------------------
# The records
# ----------------------------------------------------------------------------------------------------------


def load(results):
    """{run's name: [record of each seed, in order]}. The oracle is put together from the teachers; C' at the default learning
    rate is opd_small under another name."""
    runs = {}
    for file in sorted(results.glob("*_seed*.json")):
        record = json.loads(file.read_text())
        runs.setdefault(record["name"], []).append(record)
    if "opd_small" in runs:
        runs["ppo_lr1e-3"] = runs["opd_small"]
    if all(task in runs for task in TASKS):
        own = {task: scores(runs[task][0])[task] for task in TASKS}
        mean = sum(own[t]["mean"] / SCALES[t] for t in TASKS) / 4
        se = math.hypot(*(own[t]["se"] / SCALES[t] for t in TASKS)) / 4
        runs["oracle"] = [{"final": "all", "scores": {"all": own | {"average": {"mean": mean, "se": se}}}}]
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
            mean, se = (
                statistics.mean(out[part]["mean"] for part in parts),
                math.hypot(*(out[part]["se"] for part in parts)) / 4,
            )
            out[name] = {"mean": mean, "se": se}
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


# ----------------------------------------------------------------------------------------------------------
# What the template calls
# ----------------------------------------------------------------------------------------------------------


def shown(got, digits, sign=""):
    if not got:
        return "–"
    return f"{got[0]:{sign},.{digits}f}" + (f" ± {got[1]:.{digits}f}" if got[1] else "")


def score(runs, name, metric="average"):
    """ "0.9275 ± 0.0022" """
    return shown(value(runs, name, metric), COLUMNS[metric][1]) if value(runs, name, metric) else MISSING


def gap(runs, name, other, metric="average"):
    """The difference of two runs, "+0.0120 ± 0.0040"; the two errors are added as if independent."""
    a, b = value(runs, name, metric), value(runs, other, metric)
    return shown((a[0] - b[0], math.hypot(a[1], b[1])), COLUMNS[metric][1], "+") if a and b else MISSING


def differences(runs, pairs):
    """A table of gaps in Average, "one:other two:other": ahead, behind, or not to be told apart at two standard errors."""
    lines = []
    for name, other in (p.split(":") for p in pairs.split()):
        a, b = value(runs, name, "average"), value(runs, other, "average")
        if a and b:
            clear = abs(a[0] - b[0]) > 2 * math.hypot(a[1], b[1])
            word = "not to be told apart" if not clear else "ahead" if a[0] > b[0] else "behind"
            lines.append([LABELS[name], LABELS[other], gap(runs, name, other), word])
    return markdown(["", "minus", "difference in Average", ""], lines)


def table(runs, names, metrics, against=None):
    """A row for every run of `names`, a column for every metric; `against`: and the Average's difference to that run."""
    metrics, lines = metrics.split(), []
    for name in names.split():
        cells = [shown(value(runs, name, m), COLUMNS[m][1]) for m in metrics]
        cells += [gap(runs, name, against) if name != against else ""] if against else []
        lines.append([LABELS.get(name, name), *(cells if name in runs else [MISSING] + [""] * (len(cells) - 1))])
    head = ["", *(COLUMNS[m][0] for m in metrics), *(["against the first row"] if against else [])]
    return markdown(head, lines)


def learning_rates(runs, metrics):
    """The same for every objective at every learning rate of the grid that has run."""
    names = [f"{objective}_lr{lr}" for objective in OBJECTIVES for lr in RATES]
    return table(runs, " ".join(name for name in names if name in runs), metrics)


def markdown(head, lines):
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in lines)]
    )


def stages(runs, name, seed, metrics):
    """A run's scores at every iteration it was scored at."""
    record = next((r for r in runs.get(name, ()) if r["seed"] == int(seed)), None)
    if not record:
        return MISSING
    metrics = metrics.split()
    at = [[str(s), *(f"{scores(record, s)[m]['mean']:.{COLUMNS[m][1]}f}" for m in metrics)] for s in record["stages"]]
    return markdown(["iteration", *(COLUMNS[m][0] for m in metrics)], at)


def picture(folder, name, text):
    """A figure, if there was data for it."""
    return f"![{text}](figures/{name}.png)" if (folder / f"{name}.png").exists() else MISSING


def gradients(runs, found):
    """Every objective's gradient over all five steps beside the exact one."""
    if not found:
        return MISSING
    last = {name: found["objectives"][name][-1] for name in OBJECTIVES}
    lines = []
    for name, label in OBJECTIVES.items():
        cosines = [f"{c:.3f}" for c in last[name]["cosine"].values()]
        own = [f"{last[name]['length']:.2f}", f"{last[name]['variance']:,.0f}"] if name != "ode" else ["–", "–"]
        lines.append([label, *cosines, *own])
    return markdown(["", *(f"cosine, {b} images" for b in last["kl"]["cosine"]), "length", "variance"], lines)


def of_objective(found, name):
    return found["objectives"][name][-1] if found else None


def cosine(runs, found, name, batch):
    """Of an objective's gradient over so many images to the exact one."""
    last = of_objective(found, name)
    return f"{last['cosine'][batch]:.2f}" if last else MISSING


def length(runs, found, name):
    last = of_objective(found, name)
    return f"{last['length']:.3f}" if last else MISSING


def times(runs, found, name, other):
    """How many times another objective's variance."""
    a, b = of_objective(found, name), of_objective(found, other)
    return f"{a['variance'] / b['variance']:,.{0 if a['variance'] > 100 * b['variance'] else 1}f}" if a else MISSING


def signed(cosine):
    return f"{round(cosine, 2) + 0.0:+.2f}"  # no -0.00


def measured(runs, found, stage, tasks):
    return signed(found["tasks"][stage]["cosine"][tasks]) if found else MISSING


def images(runs, found):
    return str(found["units"] * found["unit"]) if found else MISSING


def routing(runs, found):
    return f"{found['routing']:.0e}" if found else MISSING


PAIRS = [f"{a}-{b}" for n, a in enumerate(TASKS) for b in TASKS[n + 1 :]]


def pair(name):
    return " and ".join(COLUMNS[task][0] for task in name.split("-"))


def at_stage(name):
    """ "distillation: Flow-OPD, iteration 40" -> ("OPD", 40); the merged start is iteration 0."""
    return "GRPO" if name.startswith("grpo") else "OPD", int(name.rsplit(" ", 1)[1]) if "iteration" in name else 0


def cosines(runs, found):
    """Cosines of the tasks' gradients: as every iteration of the main job logged them, and as gradients.py measured them."""
    measured = {at_stage(name): m for name, m in (found["tasks"] if found else {}).items()}
    measured = dict(sorted(measured.items(), key=lambda item: (item[0][0] == "GRPO", item[0][1])))

    def logged(name, low, high):
        lines = [r for record in runs.get("opd_merge", ()) for r in record["curve"] if low <= r["iteration"] < high]
        return signed(statistics.mean(r[f"cosine/{name}"] for r in lines)) if lines else "–"

    lines = [
        [pair(p), logged(p, 0, 10), logged(p, 70, 80), *(signed(m["cosine"][p]) for m in measured.values())] for p in PAIRS
    ]
    for t in TASKS:
        lines.append([f"{COLUMNS[t][0]} with itself", "", "", *(signed(m["reliability"][t]) for m in measured.values())])
    return markdown(["", "logged, 0 to 9", "logged, 70 to 79", *(f"{kind}, {n}" for kind, n in measured)], lines)


def reached(runs, name, goal):
    """CPU minutes until each seed's Average first reaches `goal`, on a straight line between its stages: [minutes or None]."""
    out = []
    for record in (r for r in runs.get(name, ()) if len(r["stages"]) > 1):
        x, y, _ = stage_curve(record, scores(runs["merged"][0])["average"])
        n = next((n for n in range(1, len(y)) if y[n] >= goal), None)
        out.append(x[n - 1] + (x[n] - x[n - 1]) * (goal - y[n - 1]) / (y[n] - y[n - 1]) if n else None)
    return out


def minutes(runs, name):
    """CPU minutes to 97 % of the oracle, one number per seed."""
    if not {"oracle", "merged", name} <= set(runs):
        return MISSING
    found = reached(runs, name, 0.97 * value(runs, "oracle", "average")[0])
    total = value(runs, name, "cpu_minutes")[0]
    return ", ".join(f"{m:.1f}" if m else f"not in {total:.1f}" for m in found) or MISSING


def speedup(runs, slow, fast):
    """How many times longer `slow` takes to the best Average that it reaches, means over seeds."""
    if not {"merged", slow, fast} <= set(runs):
        return MISSING
    best = statistics.mean(max(stage_curve(r, scores(runs["merged"][0])["average"])[1]) for r in runs[slow])
    times = [[m for m in reached(runs, name, best) if m] for name in (slow, fast)]
    if not all(times):
        return MISSING
    long, short = map(statistics.mean, times)
    return f"{long:.1f} against {short:.1f} minutes, {long / short:.1f} times"


def mix_minutes(runs):
    """CPU minutes of the shipped GRPO-Mix to its best iteration, at what an iteration of the same size took here."""
    if "merge_mix" not in runs:
        return MISSING
    one = statistics.mean(r["compute"]["cpu_minutes"] / r["compute"]["images"] for r in runs["merge_mix"])
    return f"{one * MIX_BEST * SHIPPED['grpo_mix'][1]:.1f}"


def trainings(runs):
    """Every record of a training once."""
    return [r for name in runs if name != "ppo_lr1e-3" for r in runs[name] if "compute" in r]


def hours(runs):
    costs = [r["compute"] for r in trainings(runs)]
    return f"{len(costs)} trainings, {sum(c['cpu_minutes'] for c in costs) / 60:.1f} hours of CPU time"


def parts(runs):
    """What has been trained for every part, and what that took."""
    lines = []
    for part in dict.fromkeys(r["part"] for r in trainings(runs)):
        records = [r for r in trainings(runs) if r["part"] == part]
        seeds = [sum(r["name"] == name for r in records) for name in dict.fromkeys(r["name"] for r in records)]
        cpu = sum(r["compute"]["cpu_minutes"] for r in records) / 60
        by_seeds = ", ".join(f"{seeds.count(n)} with {n} seed{'s' * (n > 1)}" for n in sorted(set(seeds), reverse=True))
        lines.append([part, by_seeds, str(len(records)), f"{cpu:.2f}"])
    return markdown(["part", "rows", "trainings", "hours on one core"], lines)


# ----------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------


def figure(path, panels, width=4.2):
    """panels: [(title, x label, y label, log axes, [(label, x, y, half width of the band or None)], {note: height})].
    Where x are words, points with error bars side by side instead of lines with bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    same = len({panel[2] for panel in panels}) == 1  # one quantity, one scale
    size = {"figsize": (width * len(panels), 3.3), "layout": "constrained"}
    picture, axes = plt.subplots(1, len(panels), squeeze=False, sharey=same, **size)
    names = list(dict.fromkeys(line[0] for panel in panels for line in panel[4]))  # one colour in all panels
    told = set()
    for axis, (title, xlabel, ylabel, log, lines, level) in zip(axes[0], panels):
        for n, (label, x, y, band) in enumerate(lines):
            at = names.index(label)
            look = {"color": PALETTE[at], "linewidth": 1.4, "label": label}
            look |= {"marker": MARKERS[at], "markersize": 4} if len(x) < 15 else {}
            if isinstance(x[0], str):
                beside = [place + 0.15 * (n - (len(lines) - 1) / 2) for place in range(len(x))]
                axis.errorbar(beside, y, band, linestyle="", capsize=2, **look)
                axis.set_xticks(range(len(x)), x)
                continue
            axis.plot(x, y, linestyle=STYLES[at], **look)
            if band:
                low, high = [v - b for v, b in zip(y, band)], [v + b for v, b in zip(y, band)]
                axis.fill_between(x, low, high, color=PALETTE[at], alpha=0.2, linewidth=0)
        for height, label in level.items():
            axis.axhline(label, color="gray", linewidth=0.9, linestyle="--")
            axis.annotate(height, (0.99, label), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
        if "x" in log:
            ticks = sorted({v for line in lines for v in line[1]})
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{v:g}" for v in ticks])
            axis.minorticks_off()
        axis.set_yscale("log" if "y" in log else "linear")
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.title.set_fontsize(10)
        axis.margins(y=0.08)
        axis.grid(alpha=0.3)
        if not {line[0] for line in lines} <= told:
            axis.legend(fontsize=7)
        told |= {line[0] for line in lines}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=100)
    plt.close(picture)


def smooth(values, width=5):
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def over_seeds(records, metric):
    """(iterations, mean over seeds, half width of one standard deviation over seeds or None) of a metric of the curves."""
    by_iteration = {}
    for record in records:
        lines = [line for line in record["curve"] if metric in line]
        for line, y in zip(lines, smooth([line[metric] for line in lines])):
            by_iteration.setdefault(line["iteration"], []).append(y)
    full = {x: ys for x, ys in by_iteration.items() if len(ys) == max(map(len, by_iteration.values()))}
    band = [statistics.stdev(ys) for ys in full.values()] if records and len(records) > 1 else None
    return list(full), [statistics.mean(ys) for ys in full.values()], band


def stage_curve(record, start):
    """(CPU minutes, Average, its standard error) of a run that was scored at several stages, from the score of its start."""
    x, y, se = [0.0], [start["mean"]], [start["se"]]
    for stage in record["stages"]:
        x.append(x[-1] + record["stage_minutes"][str(stage)][1])
        y.append(record["scores"][str(stage)]["average"]["mean"])
        se.append(record["scores"][str(stage)]["average"]["se"])
    return x, y, se


def mean_kl(records):
    """The records with one KL a line, the mean over its tasks."""
    merge = lambda line: line | {"kl": statistics.mean(v for k, v in line.items() if k.startswith("kl/"))}
    return [record | {"curve": [merge(line) for line in record["curve"]]} for record in records]


def average_line(runs, name, label, x="minutes"):
    """[the Average of a run's stages, mean over the seeds that were scored at several] or [], as lines of a figure."""
    start = scores(runs["merged"][0])["average"]
    staged = [r for r in runs.get(name, ()) if len(r["stages"]) > 1]
    if not staged:
        return []
    x_minutes, y, se = (
        [statistics.mean(column) for column in zip(*part)] for part in zip(*(stage_curve(r, start) for r in staged))
    )
    return [(label, x_minutes if x == "minutes" else [0, *staged[0]["stages"]], y, se)]


def to_teacher(runs, found):
    """{task: (score, error)} -> both over the score of the task's own teacher: (scores, errors), in the order of TASKS."""
    goals = [value(runs, t, t)[0] for t in TASKS]
    return [found[t][0] / goal for t, goal in zip(TASKS, goals)], [found[t][1] / goal for t, goal in zip(TASKS, goals)]


def figures(runs, found, folder):
    """Every figure that there is data for, as folder/NAME.png."""

    def draw(name, *panels, width=4.6):
        panels = [p for p in panels if p[4]]
        if panels:
            figure(folder / f"{name}.png", panels, width)

    complete = {"oracle", "merged", "base"} <= set(runs)  # what the scores of others are compared with
    main = runs.get("opd_merge", [])

    if complete:
        names = {"opd_small": "Flow-OPD, 32 images an iteration", "opd_merge": "Flow-OPD, 128 images an iteration",
                 "published_schedule": "published schedule, 32 images an iteration",
                 "merge_mix": "merge + GRPO-Mix, 192 images an iteration"}  # fmt: skip
        lines = [line for name, label in names.items() for line in average_line(runs, name, label)]
        top = value(runs, "oracle", "average")[0]
        levels = {"oracle": top, "97 % of the oracle": 0.97 * top}
        draw("average", ("", "CPU minutes of training, one thread", "Average (0 to 1)", "", lines, levels), width=6)

    six = [n for n in OBJECTIVES if n != "ode"]  # whose KL is another quantity, on other states
    lines = [(OBJECTIVES[n], *over_seeds(mean_kl(runs[f"{n}_lr1e-3"]), "kl")) for n in six if f"{n}_lr1e-3" in runs]
    points = []
    for n in OBJECTIVES:
        got = [(float(lr), *value(runs, f"{n}_lr{lr}", "average")) for lr in RATES if f"{n}_lr{lr}" in runs]
        points += [(OBJECTIVES[n], *zip(*got))] if got and n != "ppo-public-code" else []  # B lies on D
    best = {"opd_small": OBJECTIVES["ppo"], "kl_lr1e-3": OBJECTIVES["kl"], "ode_lr3e-3": OBJECTIVES["ode"]}
    curves = [line for n, label in best.items() for line in average_line(runs, n, label, "iterations")] if complete else []
    draw("objectives", ("learning rate 1e-3", "iteration (32 images each)", "KL to the routed teacher", "y", lines, {}),
         ("after 80 iterations", "learning rate", "Average (0 to 1)", "x", points, {}),
         ("best learning rate", "iteration (32 images each)", "Average (0 to 1)", "", curves, {}))  # fmt: skip

    if found:
        at = found["objectives"]
        by_batch = [(OBJECTIVES[n], *zip(*((int(b), c) for b, c in at[n][-1]["cosine"].items())), None) for n in six]
        by_step = [(OBJECTIVES[n], *zip(*((e["t"], e["variance"]) for e in at[n][:-1])), None) for n in six]
        draw("gradients", ("all five steps", "images in the batch", "cosine to the exact gradient", "x", by_batch, {}),
             ("one image", "time t of the step, 1 = noise", "variance / exact gradient squared", "y", by_step, {}))  # fmt: skip

    logged, mixed = [(pair(p), *over_seeds(main, f"cosine/{p}")) for p in PAIRS if main], []
    if found:
        kinds = {at_stage(k)[1]: m["cosine"] for k, m in found["tasks"].items() if k.startswith("grpo")}
        mixed = [(pair(p), list(kinds), [cosine[p] for cosine in kinds.values()], None) for p in PAIRS]
    draw("interference", ("Flow-OPD from merge, three seeds", "iteration", "cosine of two tasks' gradients", "", logged, {}),
         ("merge + GRPO-Mix, one seed", "iteration", "cosine of two tasks' gradients", "", mixed, {}))  # fmt: skip

    lines, relative = [(COLUMNS[t][0], *over_seeds(main, f"kl/{t}")) for t in TASKS if main], []
    staged = [r for r in main if len(r["stages"]) > 1]
    if staged and complete:
        at = [scores(runs["merged"][0]), *(scores(staged[0], stage) for stage in staged[0]["stages"])]
        y, se = zip(*(to_teacher(runs, {t: (one[t]["mean"], one[t]["se"]) for t in TASKS}) for one in at))  # (stages, tasks)
        relative = [(COLUMNS[t][0], [0, *staged[0]["stages"]], *part) for t, *part in zip(TASKS, zip(*y), zip(*se))]
    draw("tasks", ("three seeds", "iteration", "KL to the routed teacher", "y", lines, {}),
         ("seed 2", "iteration", "score / score of the task's own teacher", "", relative, {}))  # fmt: skip

    rows = {
        "merged": "merged start",
        "opd_small": "own teacher for every prompt",
        "routing_all": "all teachers for every prompt",
    }
    if complete and set(rows) <= set(runs):
        heads = [COLUMNS[t][0] for t in TASKS]
        lines = [(label, heads, *to_teacher(runs, {t: value(runs, n, t) for t in TASKS})) for n, label in rows.items()]
        draw("routing", ("", "task", "score / score of its own teacher", "", lines, {}), width=6)

    for record in runs.get("teacher_pickscore", ()) if complete else ():
        lines = []
        for metric in ("pickscore", "deqa", "edges", "noise", "distance", "variety"):
            at = [scores(runs["base"][0])[metric], *(scores(record, stage)[metric] for stage in record["stages"])]
            label = "PickScore, the reward" if metric == "pickscore" else COLUMNS[metric][0]
            relative = [[one[k] / at[0]["mean"] for one in at] for k in ("mean", "se")]
            lines.append((label, [0, *record["stages"]], *relative))
        draw("hacking", ("", "GRPO iteration (192 images each)", "score / score of the base", "y", lines, {}), width=6)


def write(results):
    """RESULTS.md beside the folder `results`, the figures in figures/."""
    results = Path(results)
    runs = load(results)
    file = results / "gradients.json"
    found = json.loads(file.read_text()) if file.exists() else None
    of_runs, of_both = (
        (score, gap, differences, table, learning_rates, stages, minutes, speedup, mix_minutes, hours, parts),
        (gradients, cosine, length, times, measured, images, routing, cosines),
    )
    calls = {f.__name__: functools.partial(f, runs) for f in of_runs}
    calls |= {f.__name__: functools.partial(f, runs, found) for f in of_both}
    calls["picture"] = functools.partial(picture, results.parent / "figures")
    figures(runs, found, results.parent / "figures")
    template = Path(__file__).with_name("RESULTS.template.md").read_text()
    text = re.sub(r"\{\{(\w+)(.*?)\}\}", lambda call: calls[call[1]](*shlex.split(call[2])), template, flags=re.S)
    (results.parent / "RESULTS.md").write_text(text)
    print(f"{sum(map(len, runs.values()))} records -> {results.parent}/RESULTS.md and figures/")
