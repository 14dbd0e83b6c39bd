"""RESULTS.md and its figures, from results/*.json alone: python experiments/miniature.py --report

Every number in a sentence is computed from the records; what a sentence says of them is chosen by `verdict`, which calls a
difference of less than two standard errors none.
"""

import json
import math
import statistics
from pathlib import Path

TASKS = ("geneval", "ocr", "deqa", "pickscore")
SCALES = {"geneval": 1, "ocr": 1, "deqa": 5, "pickscore": 26}
NAMES = {"geneval": "GenEval", "ocr": "OCR", "deqa": "DeQA", "pickscore": "PickScore", "average": "Average"}
DIGITS = {"geneval": 3, "ocr": 3, "deqa": 2, "pickscore": 2, "average": 4, "variety": 3, "edges": 3, "noise": 2, "distance": 2}
# Okabe and Ito's palette, told apart by colour-blind eyes; and a marker each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "x")
MAIN = {  # name of the run: how the paper calls it
    "base": "base",
    "geneval": "teacher: GenEval",
    "ocr": "teacher: OCR",
    "deqa": "teacher: DeQA",
    "pickscore": "teacher: PickScore",
    "oracle": "oracle: each task asked of its own teacher",
    "grpo_mix": "GRPO-Mix 3:1:1, long, best of its checkpoints",
    "mix_short": "GRPO-Mix 3:1:1, the student's images",
    "mix_uniform": "GRPO-Mix uniform, the student's images",
    "sft_mix": "SFT + GRPO-Mix",
    "merge_mix": "merge + GRPO-Mix",
    "merged": "merge alone",
    "sft": "SFT alone",
    "opd_base": "Flow-OPD from the base, 32 images an iteration",
    "opd_sft": "Flow-OPD from SFT, 32 images an iteration",
    "opd_nomar": "Flow-OPD from merge, without MAR, 32 images an iteration",
    "opd_small": "Flow-OPD from merge, 32 images an iteration",
    "opd_merge": "Flow-OPD from merge, the main job (128 images an iteration)",
}


# ----------------------------------------------------------------------------------------------------------
# Reading the records
# ----------------------------------------------------------------------------------------------------------


def load(results):
    """{run's name: [record of each seed, in order]}."""
    runs = {}
    for file in sorted(Path(results).glob("*_seed*.json")):
        record = json.loads(file.read_text())
        runs.setdefault(record["name"], []).append(record)
    return runs


def final(record):
    """{metric: {"mean", "se"}} of a record's last stage, with the held-out scores averaged over the four tasks' images."""
    scores = dict(record["scores"][record["final"]])
    for name in ("edges", "noise", "distance"):
        parts = [scores[f"{task}_{name}"] for task in TASKS if f"{task}_{name}" in scores]
        if parts:
            se = math.sqrt(sum(p["se"] ** 2 for p in parts)) / len(parts)
            scores[name] = {"mean": sum(p["mean"] for p in parts) / len(parts), "se": se}
    return scores


def value(runs, name, metric):
    """(mean, standard error, seeds) of a run's metric: over seeds if there are several, else over test prompts. Or None."""
    found = [final(r)[metric] for r in runs.get(name, ()) if metric in final(r)]
    if not found:
        return None
    means = [f["mean"] for f in found]
    se = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else found[0]["se"]
    return sum(means) / len(means), se, len(means)


def cell(got, metric="average"):
    digits = DIGITS.get(metric, 3)
    return f"{got[0]:.{digits}f} ± {got[1]:.{digits}f}" if got else "–"


def verdict(a, b, more="ahead of", less="behind", same="not to be told apart from", digits=4):
    """ "ahead of … (+0.0120 ± 0.0040)" as a pair of words and numbers; two standard errors of the difference decide."""
    if not a or not b:
        return "not run yet beside", ""
    difference, se = a[0] - b[0], math.hypot(a[1], b[1])
    word = same if abs(difference) < 2 * se else more if difference > 0 else less
    return word, f" ({difference:+.{digits}f} ± {se:.{digits}f})"


def table(head, rows):
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    )


def effort(runs, name):
    """Images drawn, forward passes in thousands, CPU minutes: cells of the table, means over seeds."""
    found = [r["compute"] for r in runs.get(name, ()) if "compute" in r]
    if not found:
        return ["–", "–", "–"]
    mean = lambda key: sum(c[key] for c in found) / len(found)
    return [f"{mean('images'):,.0f}", f"{mean('passes') / 1000:,.0f}", f"{mean('cpu_minutes'):.1f}"]


def kl_at_end(runs, name):
    """Mean over tasks of the KL to the routed teacher, over the last quarter of the recorded iterations."""
    out = []
    for record in runs.get(name, ()):
        lines = record["curve"][-len(record["curve"]) // 4 :]
        out.append(statistics.mean(v for line in lines for k, v in line.items() if k.startswith("kl/")))
    return sum(out) / len(out) if out else None


# ----------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------


def figure(path, panels, width=4.2):
    """panels: [(title, x label, y label, log axes, [(label, x, y, half width of the band or None)], {x: note})]"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(1, len(panels), figsize=(width * len(panels), 3.3), layout="constrained", squeeze=False)
    for axis, (title, xlabel, ylabel, log, lines, level) in zip(axes[0], panels):
        for n, (label, x, y, band) in enumerate(lines):
            colour = COLOURS[n % len(COLOURS)]
            marker = {"marker": MARKERS[n % len(MARKERS)], "markersize": 4} if len(x) < 15 else {}
            axis.plot(x, y, color=colour, label=label, linewidth=1.4, **marker)
            if band:
                low, high = [v - b for v, b in zip(y, band)], [v + b for v, b in zip(y, band)]
                axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        for height, label in level.items():
            axis.axhline(label, color="gray", linewidth=0.9, linestyle="--")
            axis.annotate(height, (0.99, label), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
        axis.set_xscale("log" if "x" in log else "linear")
        axis.set_yscale("log" if "y" in log else "linear")
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
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


def stage_curve(record, against="minutes", start=None):
    """(x, Average, its standard error) of a run scored at several stages; x in CPU minutes or iterations."""
    x, y, se, minutes = [], [], [], 0.0
    if start:
        x, y, se = [0], [start["mean"]], [start["se"]]
    for stage in record["stages"]:
        minutes += record["stage_minutes"][str(stage)][1]
        score = record["scores"][str(stage)]["average"]
        x.append(minutes if against == "minutes" else stage)
        y.append(score["mean"])
        se.append(score["se"])
    return x, y, se


# ----------------------------------------------------------------------------------------------------------
# Sections: each returns Markdown
# ----------------------------------------------------------------------------------------------------------


def main_table(runs):
    rows = []
    for name, label in MAIN.items():
        get = lambda metric: value(runs, name, metric)
        seeds = len(runs.get(name, ())) if effort(runs, name)[0] != "–" else "shipped"
        if name == "oracle":
            own = [value(runs, task, task) for task in TASKS]
            if not all(own):
                continue
            mean = sum(v[0] / SCALES[t] for v, t in zip(own, TASKS)) / 4
            se = math.sqrt(sum((v[1] / SCALES[t]) ** 2 for v, t in zip(own, TASKS))) / 4
            rows.append([label, *(cell(v, t) for v, t in zip(own, TASKS)), cell((mean, se, 1)), "shipped", "–", "–", "–"])
        elif get("average"):
            rows.append([label, *(cell(get(m), m) for m in (*TASKS, "average")), str(seeds), *effort_of(runs, name)])
        else:
            rows.append([label, "not run yet", *[""] * 8])
    head = ["model", "GenEval", "OCR", "DeQA", "PickScore", "Average", "seeds", "images", "passes, 1000", "CPU minutes"]
    return table(head, rows)


def effort_of(runs, name):
    """As effort(), and for the shipped adapters what their flags in toy.py say (their minutes were not recorded)."""
    known = effort(runs, name)
    shipped = {"grpo_mix": (460, 192, 15), "geneval": (260, 192, 15), "pickscore": (60, 192, 15), "ocr": (90, 128, 21)}
    shipped["deqa"] = (110, 128, 21)  # iterations, images an iteration, forward passes of an image
    if name in shipped:
        iterations, images, passes = shipped[name]
        return [f"{iterations * images:,}", f"{iterations * images * passes / 1000:,.0f}", "–"]
    return known


def oracle(runs):
    """The oracle's Average, or None."""
    own = [value(runs, task, task) for task in TASKS]
    return sum(v[0] / SCALES[t] for v, t in zip(own, TASKS)) / 4 if all(own) else None


OBJECTIVES = {
    "ppo": "C' ppo (default)",
    "kl": "D kl",
    "ode": "F ode",
    "trajectory": "E trajectory",
    "ppo-public-code": "B ppo-public-code",
    "ppo-scalar": "C ppo-scalar",
    "ppo-published": "A ppo-published",
}
RATES = ("3e-4", "1e-3", "3e-3")


def best_rate(runs, objective):
    found = [(value(runs, f"{objective}_lr{lr}", "average"), lr) for lr in RATES]
    found = [(got[0], lr) for got, lr in found if got]
    return max(found)[1] if found else None


def objectives_table(runs):
    rows = []
    for name, label in OBJECTIVES.items():
        best = best_rate(runs, name)
        cells = [cell(value(runs, f"{name}_lr{lr}", "average")) for lr in RATES]
        kls = [kl_at_end(runs, f"{name}_lr{lr}") for lr in (best,)] if best and name != "ode" else [None]
        minutes = effort(runs, f"{name}_lr{best}")[2] if best else "–"
        seeds = str(len(runs.get(f"{name}_lr{best}", ()))) if best else "0"
        cells = [f"**{c}**" if lr == best else c for c, lr in zip(cells, RATES)]
        rows.append([label, *cells, f"{kls[0]:.4f}" if kls[0] else "–", minutes, seeds])
    return table(["objective", *(f"Average, LR {lr}" for lr in RATES), "KL at the end", "CPU minutes", "seeds"], rows)


def gradient_table(found):
    rows = []
    for name, label in OBJECTIVES.items():
        every = found["objectives"][name][-1]
        cosines = [f"{every['cosine'][b]:.3f}" for b in every["cosine"]]
        length = "–" if name == "ode" else f"{every['length']:.2f}"
        rows.append([label, *cosines, length, "–" if name == "ode" else f"{every['variance']:.3g}"])
    batches = list(found["objectives"]["kl"][-1]["cosine"])
    return table(["objective", *(f"cosine, {b} images" for b in batches), "length", "variance of one image"], rows)


def staleness_table(runs):
    rows = []
    for kind, label in (
        ("ppo_updates{}", "C' ppo, clip 0.2"),
        ("ppo_updates{}_clip0.02", "C' ppo, clip 0.02"),
        ("kl_updates{}", "D kl"),
    ):
        rows.append([label, *(cell(value(runs, kind.format(n), "average")) for n in (1, 2, 4, 8))])
        clipped = [runs[kind.format(n)][0]["curve"] if kind.format(n) in runs and "ppo" in kind else None for n in (1, 2, 4, 8)]
        share = ["–" if c is None else f"{100 * statistics.mean(line['clip_fraction'] for line in c):.2g} %" for c in clipped]
        if "ppo" in kind:
            rows.append([f"{label}: ratios clipped", *share])
    return table(["", *(f"{n} update{'s' * (n > 1)} a rollout" for n in (1, 2, 4, 8))], rows)


def heldout_table(runs, names, clean):
    metrics = ("average", "edges", "noise", "distance", "variety")
    rows = [["clean drawings", "–", *(f"{clean[m]:.{DIGITS[m]}f}" for m in metrics[1:]), ""]]
    for name in names:
        seeds = str(len(runs.get(name, ())))
        rows.append([LABELS[name], *(cell(value(runs, name, m), m) for m in metrics), seeds if name in runs else "not run yet"])
    return table(
        ["model", "Average", "edges", "noise (lower is better)", "distance (lower is better)", "variety", "seeds"], rows
    )


def outside_table(runs, clean):
    metrics = ("counts", "places", "three", "letters")
    rows = []
    for name in (
        "base",
        "merged",
        "grpo_mix",
        "mix_short",
        "merge_mix",
        "sft_mix",
        "opd_base",
        "opd_sft",
        "opd_nomar",
        "opd_merge",
    ):
        got = [value(runs, name, m) for m in metrics]
        if all(got):
            mean = outside(runs, name)
            rows.append([LABELS[name], *map(cell, got, metrics), cell(mean, "variety"), str(mean[2])])
        else:
            rows.append([LABELS[name], "not run yet", "", "", "", "", ""])
    return table(["model", "one and three", "places of several", "three shapes", "text elsewhere", "mean", "seeds"], rows)


def outside(runs, name):
    """Mean over the four sets of prompts out of distribution, as value() gives it."""
    metrics = ("counts", "places", "three", "letters")
    rows = [[final(r)[m] for m in metrics] for r in runs.get(name, ()) if "counts" in final(r)]
    if not rows:
        return None
    means = [statistics.mean(m["mean"] for m in row) for row in rows]
    prompts = math.sqrt(sum(m["se"] ** 2 for m in rows[0])) / 4
    return statistics.mean(means), statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else prompts, len(means)


def ablation_table(runs, baseline, names):
    rows = []
    base = value(runs, baseline, "average")
    for name, label in [(baseline, "default, a quarter of the images"), *names.items()]:
        got = value(runs, name, "average")
        if not got:
            rows.append([label, "not run yet", *[""] * 6])
            continue
        difference = "" if name == baseline else "{0}{1}".format(*verdict(got, base, "better", "worse", "no difference"))
        rows.append([label, *(cell(value(runs, name, m), m) for m in (*TASKS, "average")), difference, effort(runs, name)[2]])
    return table(["", "GenEval", "OCR", "DeQA", "PickScore", "Average", "against the default", "CPU minutes"], rows)


def pair(name):
    a, b = name.removeprefix("cosine/").split("-")
    return f"{NAMES[a]} and {NAMES[b]}"


PAIRS = [f"cosine/{a}-{b}" for n, a in enumerate(TASKS) for b in TASKS[n + 1 :]]


def interference_table(runs, found):
    """Cosines between tasks: during Flow-OPD, and as gradients.py measured them with more samples."""
    records = runs.get("opd_merge", [])

    def during(metric, part):
        lines = [line for r in records for line in r["curve"] if part(line["iteration"]) and metric in line]
        return f"{statistics.mean(line[metric] for line in lines):+.2f}" if lines else "–"

    kinds = list(found["tasks"]) if found else []
    head = ["", "Flow-OPD, iterations 0 to 9", "70 to 79", *kinds]
    rows = [
        [pair(m), during(m, lambda i: i < 10), during(m, lambda i: i >= 70)]
        + [f"{found['tasks'][k]['cosine'][m.removeprefix('cosine/')]:+.2f}" for k in kinds]
        for m in PAIRS
    ]
    for task in TASKS:
        cells = [f"{found['tasks'][k]['reliability'][task]:+.2f}" for k in kinds]
        rows.append([f"{NAMES[task]} with itself, other samples", "", "", *cells])
    return table(head, rows)


def figures(runs, found, folder):
    """Every figure there is data for: {name: file}."""
    made = {}

    def draw(name, panels, width=4.6):
        panels = [p for p in panels if p[4]]
        if panels:
            figure(folder / f"{name}.png", panels, width)
            made[name] = f"figures/{name}.png"

    top = oracle(runs)
    start = final(runs["merged"][0])["average"] if "merged" in runs else None
    lines = []
    for name, label in (("opd_small", "Flow-OPD, 32 images an iteration"), ("opd_merge", "Flow-OPD, 128 images an iteration"),
                        ("published_schedule", "published schedule, 32 images"), ("merge_mix", "merge + GRPO-Mix")):  # fmt: skip
        staged = [stage_curve(r, start=start) for r in runs.get(name, ()) if len(r["stages"]) > 1]
        if staged:
            mean = [[statistics.mean(column) for column in zip(*part)] for part in zip(*staged)]
            lines.append((label, *mean))
    levels = {"oracle": top, "97 % of it": 0.97 * top} if top else {}
    draw("average", [("", "CPU minutes of training, one thread", "Average", "", lines, levels)], 6)

    shown = [n for n in OBJECTIVES if n != "ode"]
    lines = []
    for name in shown:
        records = [r | {"curve": [mean_kl(line) for line in r["curve"]]} for r in runs.get(f"{name}_lr1e-3", ())]
        if records:
            lines.append((OBJECTIVES[name], *over_seeds(records, "kl")))
    rates = [float(r) for r in RATES]
    by_rate = []
    for name in ("ppo", "kl", "ode", "ppo-scalar", "ppo-published", "ppo-public-code"):
        got = [(lr, value(runs, f"{name}_lr{r}", "average")) for lr, r in zip(rates, RATES)]
        got = [(lr, v) for lr, v in got if v]
        if got:
            by_rate.append((OBJECTIVES[name], [g[0] for g in got], [g[1][0] for g in got], [g[1][1] for g in got]))
    draw("objectives", [("learning rate 1e-3", "iteration (32 images each)", "KL to the routed teacher, per dimension", "y", lines, {}),
                        ("after 80 iterations", "learning rate", "Average", "x", by_rate, {})])  # fmt: skip

    if found:
        at = lambda name: found["objectives"][name]
        by_batch = [
            (OBJECTIVES[n], [int(b) for b in at(n)[-1]["cosine"]], list(at(n)[-1]["cosine"].values()), None) for n in shown
        ]
        by_step = [(OBJECTIVES[n], [e["t"] for e in at(n)[:-1]], [e["variance"] for e in at(n)[:-1]], None) for n in shown]
        draw("gradients", [("all five steps", "images in the batch", "cosine to the exact gradient of the KL", "x", by_batch, {}),
                           ("one image's gradient", "time t of the step (1 = noise)", "variance / squared exact gradient", "y",
                            by_step, {})])  # fmt: skip

    lines = [(pair(m), *over_seeds(runs.get("opd_merge", []), m)) for m in PAIRS] if "opd_merge" in runs else []
    mixed = []
    if found:
        stages = [k for k in found["tasks"] if k.startswith("grpo")]
        x = [int(k.rsplit(" ", 1)[1]) if "iteration" in k else 0 for k in stages]
        mixed = [(pair(m), x, [found["tasks"][k]["cosine"][m.removeprefix("cosine/")] for k in stages], None) for m in PAIRS]
    draw("interference", [("Flow-OPD from merge", "iteration", "cosine of two tasks' gradients", "", lines, {}),
                          ("merge + GRPO-Mix", "iteration", "cosine of two tasks' gradients", "", mixed, {})])  # fmt: skip

    records = runs.get("opd_merge", [])
    lines = [(NAMES[t], *over_seeds(records, f"kl/{t}")) for t in TASKS] if records else []
    scores = []
    staged = [r for r in records if len(r["stages"]) > 1]
    if staged and "merged" in runs and top:
        record = staged[0]
        for t in TASKS:
            begin, goal = final(runs["merged"][0])[t]["mean"], value(runs, t, t)[0]
            got = [record["scores"][str(s)][t] for s in record["stages"]]
            y = [begin / goal, *(g["mean"] / goal for g in got)]
            scores.append((NAMES[t], [0, *record["stages"]], y, [0, *(g["se"] / goal for g in got)]))
    draw("tasks", [("three seeds", "iteration", "KL to the routed teacher, per dimension", "y", lines, {}),
                   ("seed 2", "iteration", "score / score of the task's own teacher", "", scores, {})])  # fmt: skip

    if "teacher_pickscore" in runs and "base" in runs:
        record, base = runs["teacher_pickscore"][0], final(runs["base"][0])
        lines = []
        for metric in ("pickscore", "deqa", "edges", "noise", "distance", "variety"):
            stages = [final(record | {"final": str(s)})[metric]["mean"] for s in record["stages"]]
            label = {"pickscore": "PickScore: the reward", "deqa": "DeQA"}.get(metric, metric)
            lines.append((label, [0, *record["stages"]], [1, *(y / base[metric]["mean"] for y in stages)], None))
        draw(
            "hacking",
            [("the PickScore teacher trains", "GRPO iteration (192 images each)", "relative to the base", "y", lines, {})],
            6,
        )
    return made


def mean_kl(line):
    kls = [v for k, v in line.items() if k.startswith("kl/")]
    return {"iteration": line["iteration"], "kl": statistics.mean(kls)} if kls else {"iteration": line["iteration"]}


# ----------------------------------------------------------------------------------------------------------
# The document
# ----------------------------------------------------------------------------------------------------------

LABELS = MAIN | {
    "routing_all": "every prompt asked of every teacher (the same as their average velocity)",
    "alternate": "epochs of one task in turn (8 prompts each)",
    "mar0": "MAR weight 0",
    "mar0.1": "MAR weight 0.1",
    "anchor_base": "MAR's anchor the base, weight 0.02",
    "opd_ties": "start: TIES merge",
    "opd_dare": "start: DARE merge",
    "opd_factor-mean": "start: mean of the factors (public code)",
    "noise0.3": "noise a = 0.3",
    "noise1.2": "noise a = 1.2",
    "steps10": "T = 10 steps, nine trained",
    "late": "only the two latest of the five steps trained",
    "early": "only the three earliest steps trained",
    "random2": "two of the five steps, drawn each iteration",
    "groups2": "16 prompts x 2 samples",
    "ppo_updates2": "4 prompts x 8 samples",
    "merge_ties": "TIES merge alone",
    "merge_dare": "DARE merge alone",
    "merge_factor-mean": "mean of the factors alone",
    "ppo_lr1e-3": "default",
    "base_rank2": "from the base, LoRA rank 2",
    "base_rank16": "from the base, LoRA rank 16",
}


def text_objectives(runs, found):
    tested = [n for n in OBJECTIVES if n != "ppo" and value(runs, f"{n}_lr{best_rate(runs, n)}", "average")]
    default = value(runs, f"ppo_lr{best_rate(runs, 'ppo')}", "average")
    if not default or not tested:
        return ""
    out = []
    for n in tested:
        word, numbers = verdict(value(runs, f"{n}_lr{best_rate(runs, n)}", "average"), default)
        out.append(f"{OBJECTIVES[n]} is {word} C'{numbers}")
    return "Each at its best learning rate of those tried: " + "; ".join(out) + "."


def document(runs, found, clean, made):
    minutes = sum(r["compute"]["cpu_minutes"] for records in runs.values() for r in records if "compute" in r)
    processors = sorted({r["compute"]["processor"] for records in runs.values() for r in records if "compute" in r})
    show = lambda name, text: f"![{text}]({made[name]})" if name in made else f"({text}: not run yet)"
    parts = [
        f"""# Results of the miniature

Written by `python experiments/miniature.py --report` from `results/*.json`; `python experiments/miniature.py` runs what is not run
yet and goes on where it stopped. {sum(map(len, runs.values()))} records, {minutes / 60:.1f} hours of CPU time for the training in
them, one thread at a time on {", ".join(processors) or "no processor yet"}. Other programs shared the machine, so minutes here are
minutes of CPU time.

What is fixed: base, four teachers, merged start, 256 test prompts a task, test noise. What a seed varies: the student's
prompts, noise and fresh weights. ± is one standard error: over seeds where a row has several, over test prompts where it has one
(that spread is the larger one, and most of it is common to two rows, which saw the same prompts and noise). A difference is called
one from two standard errors on. There is no repeat with other teachers: **not run yet**.""",
        f"""## 1. The paper's table

{main_table(runs)}

A *pass* is one image through the transformer once; a backward pass counts as two. The teachers' own cost, which Flow-OPD needs
and GRPO-Mix does not, stands in their rows. SFT: 2048 images painted by the teachers, 300 iterations of flow matching.

{bullets(main_answers(runs))}""",
        f"""## 2. Objectives

A quarter of the main job's images ({compute_note(runs)}), the same number of optimizer steps, 128 test prompts a task. All rows see
the same number of images; at equal images the minutes hardly differ.

{objectives_table(runs)}

{show("objectives", "KL against iterations at one learning rate; Average against the learning rate")}

{text_objectives(runs, found)}""",
    ]
    if found:
        parts.append(f"""### The measured gradient

At the merged start, {found["units"] * found["unit"]} images for each measure and as many others for the exact gradient
(`gradients.py`). *Length* is the part of the mean gradient along the exact one, in its units: 1 is unbiased. *Variance* is that of
one image's gradient, in units of the exact gradient squared. `ode` is another gradient on other states, so its cosine alone is given.

{gradient_table(found)}

{show("gradients", "cosine against batch size; variance per step")}

{bullets(gradient_answers(found))}""")
    parts += [
        f"""### What the ratio and the clip are for

`--updates N` spends a rollout on N optimizer steps, each on its own share of the samples, so a sample is used once and the policy has
moved N - 1 steps when the last share is used. (No script uses a sample twice; that is **not run yet**.) 32 images an iteration, 80
iterations: more updates are also more optimizer steps on fewer images each.

{staleness_table(runs)}

{bullets(staleness_answers(runs))}""",
        f"""## 3. MAR, by scores that no teacher was trained on

`heldout.py` defines them: *edges* (hardness of edges, 1 = from one pixel to the next), *noise* (differences of neighbouring background
pixels, 8-bit levels), *distance* (mean squared z-score of 12 colour and gradient statistics against clean drawings of the same
prompts), *variety* (RMS distance between samples of one prompt).

{heldout_table(runs, ("base", "deqa", "pickscore", "merged", "grpo_mix", "opd_merge", "opd_small", "opd_nomar"), clean)}

The same on 128 prompts a task, 32 images an iteration:

{heldout_table(runs, ("ppo_lr1e-3", "mar0", "mar0.1", "anchor_base"), clean)}

{bullets(mar_answers(runs))}""",
        f"""## 4. Do the tasks interfere?

{show("interference", "cosine of every pair of tasks' gradients, Flow-OPD and GRPO-Mix")}

{interference_table(runs, found)}

{bullets(interference_answers(runs, found))}

{show("tasks", "per task: KL to the teacher, and score beside the teacher's")}

{bullets(task_answers(runs))}""",
        f"""## 5. Ablations

One seed each; 32 images an iteration, 80 iterations, 128 test prompts a task.

{ablation_table(runs, "ppo_lr1e-3", {n: LABELS[n] for n in ABLATIONS})}

Merges without any training: {merges(runs)}.

{bullets(ablation_answers(runs, found))}""",
        f"""## 6. Out of distribution

Prompt forms that neither the base nor any teacher was trained on (64 prompts each, `heldout.py`): "one red circle and three blue
squares", "two red circles above one blue square", "red circle and blue square and triangle", "photo reads K T in red".

{outside_table(runs, clean)}

{bullets(outside_answers(runs))}""",
        f"""## 7. Reward hacking, seen happen

{show("hacking", "the PickScore teacher's reward and what pays for it")}

{bullets(hacking_answers(runs))}""",
        f"""## 8. Speed

{show("average", "Average against CPU minutes")}

{bullets(speed_answers(runs))}""",
        CLOSING,
    ]
    return "\n\n".join(parts) + "\n"


ABLATIONS = ("routing_all", "alternate", "mar0", "mar0.1", "anchor_base", "opd_ties", "opd_dare", "opd_factor-mean", "noise0.3",
             "noise1.2", "steps10", "late", "early", "random2", "groups2", "ppo_updates2", "base_rank2", "base_rank16")  # fmt: skip


def short(name):
    return LABELS[name].replace(", 32 images an iteration", "").replace("**", "")


def sentence(runs, first, second, metric="average", what="", **words):
    """ "X is ahead of Y (+0.0120 ± 0.0040) in what." or nothing, where a run is missing."""
    a, b = value(runs, first, metric), value(runs, second, metric)
    if not a or not b:
        return ""
    word, numbers = verdict(a, b, digits=DIGITS.get(metric, 3), **words)
    return f"{short(first)} is {word} {short(second)}{numbers}{what}."


def main_answers(runs):
    top, student = oracle(runs), value(runs, "opd_merge", "average")
    out = []
    if top and student:
        out.append(f"Of the oracle the student reaches {student[0] / top:.1%}, in {student[2]} seed(s).")
    out += [sentence(runs, a, b) for a, b in (("opd_merge", "merged"), ("opd_merge", "opd_small"), ("opd_merge", "merge_mix"),
            ("opd_small", "merge_mix"), ("opd_merge", "grpo_mix"), ("opd_small", "opd_sft"), ("opd_small", "opd_base"),
            ("opd_small", "opd_nomar"), ("merge_mix", "sft_mix"), ("merged", "sft"))]  # fmt: skip
    passed = [
        f"{NAMES[t]} {cell(value(runs, 'opd_merge', t), t)} beside {cell(value(runs, t, t), t)}, student {verdict(value(runs, 'opd_merge', t), value(runs, t, t), 'ahead', 'behind', 'level')[0]}"
        for t in TASKS
        if value(runs, "opd_merge", t) and value(runs, t, t)
    ]
    if passed:
        out.append(f"Does the student pass its teachers? {'; '.join(passed)}.")
    return out


def gradient_answers(found):
    last = {name: found["objectives"][name][-1] for name in OBJECTIVES}
    most = max(last["kl"]["cosine"], key=int)
    ppo, kl, scalar, published = (last[n] for n in ("ppo", "kl", "ppo-scalar", "ppo-published"))
    return [
        f"The exact gradient is itself estimated: the direct KL, which is unbiased, reaches a cosine of "
        f"{kl['cosine'][most]:.3f} to it at {most} images. That is the ceiling.",
        f"C' reaches {ppo['cosine'][most]:.3f}: per image its variance is {ppo['variance'] / kl['variance']:.2f} times that of the "
        f"direct KL. The noise of the sampled action costs that much.",
        f"C, one reward per image, has {scalar['variance'] / kl['variance']:,.0f} times the direct KL's variance, and a cosine of "
        f"{scalar['cosine'][most]:.3f} at {most} images; at that number of images its length along the exact gradient, "
        f"{scalar['length']:.2f}, says little.",
        f"A, as published, has a cosine of {published['cosine'][most]:.3f} and a length of {published['length']:.2f}: no part of the "
        f"exact gradient is in it.",
    ]


def staleness_answers(runs):
    out = []
    for n in (1, 4, 8):
        out.append(_pair(runs, f"ppo_updates{n}", f"kl_updates{n}", f"With {n} update{'s' * (n > 1)} a rollout C' is", "D"))
    for name, label in (("ppo", "C'"), ("kl", "D")):
        out.append(
            _pair(runs, f"{name}_updates8", f"{name}_updates1", f"{label} with eight updates a rollout is", "itself with one")
        )
    return out


def _pair(runs, a, b, start, end):
    if not value(runs, a, "average") or not value(runs, b, "average"):
        return ""
    word, numbers = verdict(value(runs, a, "average"), value(runs, b, "average"))
    return f"{start} {word} {end}{numbers}."


def mar_answers(runs):
    lower = {"more": "higher than", "less": "lower than"}
    out = []
    for metric in ("average", "edges", "noise", "distance", "variety"):
        words = {} if metric == "average" else lower
        for a, b in (("opd_small", "opd_nomar"), ("ppo_lr1e-3", "mar0"), ("mar0.1", "mar0"), ("anchor_base", "ppo_lr1e-3")):
            got = value(runs, a, metric), value(runs, b, metric)
            if all(got):
                word, numbers = verdict(*got, digits=DIGITS[metric], **words)
                out.append((metric, f"{LABEL_MAR[a]} {word} {LABEL_MAR[b]}{numbers}"))
    grouped = {}
    for metric, line in out:
        grouped.setdefault(metric, []).append(line)
    return [f"{NAMES.get(metric, metric)}: {'; '.join(lines)}." for metric, lines in grouped.items()]


LABEL_MAR = {
    "opd_small": "with MAR (256 prompts)",
    "opd_nomar": "without (256 prompts)",
    "ppo_lr1e-3": "weight 0.02",
    "mar0": "weight 0",
    "mar0.1": "weight 0.1",
    "anchor_base": "the base as anchor",
}


def interference_answers(runs, found):
    out = []
    records = runs.get("opd_merge", [])
    if records:
        mean = lambda part: {
            m: statistics.mean(line[m] for r in records for line in r["curve"] if m in line and part(line["iteration"]))
            for m in PAIRS
        }
        early, late = mean(lambda i: i < 10), mean(lambda i: i >= 70)
        worst = min(early, key=early.get)
        out.append(
            f"Flow-OPD's tasks do pull against each other at first: {pair(worst)} have a cosine of {early[worst]:+.2f} over the first "
            f"ten iterations. Over the last ten the most opposed pair is {pair(min(late, key=late.get))}, {min(late.values()):+.2f}; "
            f"the mean over all pairs goes from {statistics.mean(early.values()):+.2f} to {statistics.mean(late.values()):+.2f}."
        )
    if found:
        within = lambda kind: [v for k, t in found["tasks"].items() if k.startswith(kind) for v in t["reliability"].values()]
        between = lambda kind: [v for k, t in found["tasks"].items() if k.startswith(kind) for v in t["cosine"].values()]
        if within("grpo"):
            out.append(
                f"With {found['images_per_task'] // 2} images a task, a distillation gradient agrees with itself on other samples at a "
                f"cosine of {min(within('distillation')):.2f} to {max(within('distillation')):.2f}; a GRPO gradient of "
                f"{found['images_per_task']} images at {min(within('grpo')):.2f} to {max(within('grpo')):.2f}. So what GRPO-Mix shows "
                f"between tasks ({min(between('grpo')):+.2f} to {max(between('grpo')):+.2f}) is mostly noise: its tasks do not fight "
                f"because each is hardly heard. Dense labels are what makes interference visible, and they get past it."
            )
    return out


def task_answers(runs):
    staged = [r for r in runs.get("opd_merge", ()) if len(r["stages"]) > 1]
    if not staged or "merged" not in runs:
        return []
    record, start = staged[0], final(runs["merged"][0])
    lines = []
    for t in TASKS:
        row = [start[t]["mean"], *(record["scores"][str(s)][t]["mean"] for s in record["stages"])]
        lines.append(f"{NAMES[t]} {' '.join(f'{v:.{DIGITS[t]}f}' for v in row)}")
    averages = [start["average"]["mean"], *(record["scores"][str(s)]["average"]["mean"] for s in record["stages"])]
    at = ", ".join(map(str, [0, *record["stages"]]))
    return [
        f"Scores at iterations {at} (seed {record['seed']}; 128 prompts a task but for the first and last): {'; '.join(lines)}.",
        f"The Average goes {' '.join(f'{v:.3f}' for v in averages)}: it falls before it rises, while the KL falls all the time. The "
        f"student first follows the teacher whose KL is largest in the late steps, and GenEval, which the early steps decide, "
        f"comes last.",
    ]


def ablation_answers(runs, found):
    out = [
        "Routing: with a teacher drawn at random for every prompt the expected gradient is that of the KL to the average velocity of all "
        "teachers, since E|v - v_k|² = |v - mean v_k|² + a constant"
        + (f" (measured: the two gradients differ by {found['routing']:.0e} of their length)" if found else "")
        + ". One run stands for both."
    ]
    base = value(runs, "ppo_lr1e-3", "average")
    if base:
        words = {}
        for name in ABLATIONS:
            got = value(runs, name, "average")
            if got:
                words.setdefault(verdict(got, base, "better", "worse", "no difference")[0], []).append(short(name))
        for word, names in words.items():
            out.append(f"Against the default, {word}: {'; '.join(names)}.")
    return out


def merges(runs):
    names = ("merge_ties", "merge_dare", "merge_factor-mean")
    got = [f"{short(n)} {cell(value(runs, n, 'average'))}" for n in names if value(runs, n, "average")]
    start = value(runs, "merged", "average")
    return "; ".join([f"the mean, cut to rank 24, {cell(start)} (256 prompts)"] * bool(start) + got) or "not run yet"


def outside_answers(runs):
    out = []
    for a, b in (("opd_merge", "grpo_mix"), ("opd_merge", "merge_mix"), ("opd_small", "merge_mix"), ("opd_merge", "merged")):
        got = outside(runs, a), outside(runs, b)
        if all(got):
            word, numbers = verdict(*got)
            out.append(f"On the mean of the four, {short(a)} is {word} {short(b)}{numbers}.")
    return out


def hacking_answers(runs):
    if "teacher_pickscore" not in runs or "base" not in runs:
        return []
    record, base = runs["teacher_pickscore"][0], final(runs["base"][0])
    last = final(record)
    show = lambda m: f"{m if m not in NAMES else NAMES[m]} {base[m]['mean']:.{DIGITS[m]}f} to {last[m]['mean']:.{DIGITS[m]}f}"
    return [
        f"From the base to iteration {record['stages'][-1]} the reward rises, {show('pickscore')}, and is paid for: "
        + "; ".join(show(m) for m in ("geneval", "ocr", "deqa", "edges", "noise", "distance", "variety"))
        + ". One seed."
    ]


def reach(record, goal, start):
    """CPU minutes and thousands of passes until the Average first reaches `goal`, interpolated between stages; or None."""
    x, y, _ = stage_curve(record, start=start)
    for n in range(1, len(x)):
        if y[n] >= goal:
            share = (goal - y[n - 1]) / (y[n] - y[n - 1]) if y[n] > y[n - 1] else 1
            return x[n - 1] + max(share, 0) * (x[n] - x[n - 1])
    return None


def speed_answers(runs):
    top = oracle(runs)
    start = final(runs["merged"][0])["average"] if "merged" in runs else None
    if not top or not start:
        return []
    out, minutes = [], {}
    for name in ("opd_small", "opd_merge", "published_schedule", "merge_mix"):
        staged = [r for r in runs.get(name, ()) if len(r["stages"]) > 1]
        times = [reach(r, 0.97 * top, start) for r in staged]
        if staged and all(times):
            minutes[name] = statistics.mean(times)
            out.append(f"{SPEED[name]} reaches 97 % of the oracle ({0.97 * top:.4f}) after {minutes[name]:.1f} CPU minutes "
                       f"({len(times)} seed(s)).")  # fmt: skip
        elif staged:
            best = max(max(stage_curve(r)[1]) for r in staged)
            total = statistics.mean(stage_curve(r)[0][-1] for r in staged)
            out.append(f"{SPEED[name]} does not reach it in its {total:.1f} CPU minutes: at best {best:.4f}.")
    if "published_schedule" in runs and "opd_small" in runs:
        record = runs["published_schedule"][0]
        x, y, _ = stage_curve(record)
        goal = max(y)
        ours = [reach(r, goal, start) for r in runs["opd_small"] if len(r["stages"]) > 1]
        if ours and all(ours):
            theirs = x[y.index(goal)]
            out.append(
                f"The published schedule's best Average, {goal:.4f}, takes it {theirs:.1f} CPU minutes; the default objective and "
                f"schedule, with as many images, {statistics.mean(ours):.1f}: {theirs / statistics.mean(ours):.1f} times faster. (No "
                f"reward was computed in either; the public code computes them, which would add to its time.)"
            )
    if "mix_curve" in runs:
        record = runs["mix_curve"][0]
        tests = [(line["test"], line["seconds"] / 60) for line in record["curve"] if "test" in line]
        best, at = max(tests)
        scale = record["compute"]["cpu_minutes"] / record["compute"]["wall_minutes"]
        average = final(record)["average"]["mean"]
        out.append(
            f"GRPO-Mix from the base, {record['compute']['images']:,} images at most, has its best test reward after {at * scale:.1f} CPU "
            f"minutes; that checkpoint's Average is {average:.4f}."
        )
        if "opd_small" in minutes:
            out.append(f"So Flow-OPD reaches 97 % of the oracle in 1/{at * scale / minutes['opd_small']:.0f} of the time (the teachers' "
                       f"training, which GRPO-Mix does not need, is not counted).")  # fmt: skip
    else:
        out.append("GRPO-Mix's minutes to its own best: not run yet.")
    return out


SPEED = {
    "opd_small": "Flow-OPD with 32 images an iteration",
    "opd_merge": "Flow-OPD with 128 images an iteration",
    "published_schedule": "The published schedule (alternating epochs, row B, nine of ten steps), 32 images an iteration,",
    "merge_mix": "merge + GRPO-Mix",
}

CLOSING = """## What the miniature cannot tell

- Four teachers from one seed, one base, 256 test prompts a task, pictures of 32 x 32. Scorers are programs that know what a drawing
  is made of. Nothing here is a claim about Stable Diffusion.
- A prompt's words tell its task, and a LoRA of rank 24 in a transformer of width 128 has room for all of them: interference may be
  smaller here than in a large model that serves overlapping prompts.
- The base was spoilt on purpose, so that GRPO mends it in minutes; how long reinforcement learning takes elsewhere, and so every ratio
  of minutes above, does not carry over.
- Guidance is off here and 4.5 there; the first-step weights, T and the noise level would have to be tried again.

On Stable Diffusion 3.5 Medium the same questions are asked by (**not run here**):

```
python merge.py @recipes/sd35m_merge.args
torchrun --nproc_per_node=8 train_opd.py @recipes/sd35m_opd.args                                       # and --seed 1, 2
torchrun --nproc_per_node=8 train_opd.py @recipes/sd35m_opd.args --objective kl --out runs/sd35m_kl    # the objectives
torchrun --nproc_per_node=8 train_opd.py @recipes/sd35m_opd.args --mar_weight 0 --out runs/sd35m_nomar
torchrun --nproc_per_node=8 train_opd.py @recipes/sd35m_opd.args --prompts_per_iteration 8 --group_size 4 --out runs/sd35m_small
torchrun --nproc_per_node=8 train_teacher.py @recipes/sd35m_grpo_mix.args
torchrun --nproc_per_node=8 evaluate.py @recipes/sd35m_eval.args
```"""


def compute_note(runs):
    found = runs.get("ppo_lr1e-3")
    return f"{found[0]['compute']['images']:,}" if found else "2,560"


def bullets(lines):
    return "\n".join(f"- {line}" for line in lines if line) or "- not run yet"


def write(results):
    """RESULTS.md beside the folder `results`, figures in figures/."""
    results = Path(results)
    runs = load(results)
    found = json.loads((results / "gradients.json").read_text()) if (results / "gradients.json").exists() else None
    clean = json.loads((Path(__file__).parent / "results" / "clean.json").read_text())
    made = figures(runs, found, results.parent / "figures")
    (results.parent / "RESULTS.md").write_text(document(runs, found, clean, made))
    print(f"{sum(map(len, runs.values()))} records -> {results.parent}/RESULTS.md, figures/")
