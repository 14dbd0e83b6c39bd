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
    "opd_base": "Flow-OPD from the base",
    "opd_sft": "Flow-OPD from SFT",
    "opd_nomar": "Flow-OPD from merge, without MAR",
    "opd_merge": "**Flow-OPD from merge**",
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


def compare(runs, first, second, metric="average", **words):
    """ "X is ahead of Y (+0.0120 ± 0.0040)" for two runs."""
    word, numbers = verdict(value(runs, first, metric), value(runs, second, metric), digits=DIGITS.get(metric, 3), **words)
    return f"{LABELS[first]} is {word} {LABELS[second]}{numbers}"


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
    """Mean over the four sets of prompts out of distribution: (mean, standard error, seeds), over seeds or prompts as value()."""
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
