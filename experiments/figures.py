"""The figures of RESULTS.md, drawn from the records: see report.py."""

import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker

from experiments.records import (
    COLUMNS,
    LABELS,
    OBJECTIVES,
    PAIRS,
    RATES,
    STARTS,
    TASKS,
    at_stage,
    by_images,
    images_before,
    pair,
    scores,
    stage_curve,
    staged,
    value,
)

plt.rc("figure.constrained_layout", w_pad=0.08, h_pad=0.08)  # inches of margin
# Okabe and Ito's palette, which colour-blind readers tell apart, and a grey; and a marker each.
PALETTE = ("#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#000000", "#777777")
LOOKS = list(zip(PALETTE, ("o", "s", "P", "^", "D", "v", "x", "<")))
# A method or a metric looks the same in every figure. Objectives: as in examples/flow2d.py.
METRICS = (*TASKS, "edges", "noise", "distance", "variety")
FIXED = dict(zip((*OBJECTIVES, "merge + GRPO-Mix"), LOOKS))
FIXED |= {COLUMNS[metric][0]: style for metric, style in zip(METRICS, LOOKS)}
DASHES = {"ppo-public-code": "--", "ode": ":", "ppo, 128 images": "--"}  # they lie on other lines


class Panel(NamedTuple):
    title: str
    xlabel: str
    ylabel: str
    log: str  # the logarithmic axes: "", "x", "y"
    lines: list[tuple]  # (label, x, y, half width of the band or None)
    levels: dict[str, float] = {}  # {note: height} of horizontal lines


def figure(path, panels, width):
    """Draw panels side by side. Where x are words, points with error bars in place of lines with
    bands."""
    same = len({panel.ylabel for panel in panels}) == 1  # one quantity, one scale
    size = {"figsize": (width * len(panels), 3.8), "layout": "constrained"}
    picture, axes = plt.subplots(1, len(panels), squeeze=False, sharey=same, **size)
    names = list(dict.fromkeys(line[0] for panel in panels for line in panel.lines))
    in_legend = {}
    for axis, panel in zip(axes[0], panels):
        for n, line in enumerate(panel.lines):
            shift = 0.15 * (n - (len(panel.lines) - 1) / 2)
            draw_line(axis, line, look(line[0], names), shift)
        for note, height in panel.levels.items():
            axis.axhline(height, color="gray", linewidth=0.9, linestyle="--")
            place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
            axis.annotate(note, (0.99, height), fontsize=9, **place)
        if panel.log == "x":
            log_x(axis, panel)
        elif panel.xlabel.startswith("images"):
            axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
            axis.xaxis.set_major_formatter("{x:,g}")
        if panel.log == "y":
            log_y(axis, panel)
        axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        axis.margins(y=0.08)
        axis.grid(alpha=0.3)
        in_legend |= {handle.get_label(): handle for handle in axis.get_legend_handles_labels()[0]}
    columns = -(-len(names) // 2)  # two rows
    picture.legend(handles=in_legend.values(), loc="outside lower center", ncols=columns)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=100)
    plt.close(picture)


def look(label, names):
    """The style of a line. names: all labels of the figure. "ppo, 32 images" looks like "ppo"."""
    name = label.split(",")[0]
    colour, marker = FIXED.get(name, LOOKS[names.index(label)])
    style = {"label": label, "color": colour, "marker": marker, "linewidth": 2.2}
    dashes = DASHES.get(label, DASHES.get(name))
    if dashes:  # thin and hollow: what lies below can be seen
        style |= {"linestyle": dashes, "linewidth": 1.5, "markerfacecolor": "none"}
    return style


def draw_line(axis, line, style, shift):
    """shift: to the side, for points over words."""
    _, x, y, band = line
    if isinstance(x[0], str):
        places = range(len(x))
        moved = [place + shift for place in places]
        axis.errorbar(moved, y, band, capsize=2, **style | {"linestyle": ""})
        axis.set_xticks(places, x)
        return
    if len(x) >= 15:
        style["marker"] = ""
    axis.plot(x, y, markersize=5, **style)
    if band:
        low = [value - half for value, half in zip(y, band)]
        high = [value + half for value, half in zip(y, band)]
        axis.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def log_x(axis, panel):
    ticks = sorted({x for line in panel.lines for x in line[1]})
    axis.set_xscale("log")
    if ticks[-1] > 5000:  # images
        low, high = ticks[0] / 2, 1.2 * ticks[-1]
        ticks = [x for x in (300, 1000, 3000, 10000, 30000, 100000) if low <= x <= high]
    words = [f"{x:,g}" for x in ticks]
    if ticks[0] < 1:  # learning rates, as a flag has them
        words = [f"{x:.0e}".replace("e-0", "e-") for x in ticks]
    axis.set_xticks(ticks, words)
    axis.minorticks_off()


def log_y(axis, panel):
    """Over few decades 0.2 and not 2 x 10^-1."""
    axis.set_yscale("log")
    values = [y for line in panel.lines for y in line[2]]
    if max(values) < 1000 * min(values):
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 3, 5)))
        axis.yaxis.set_minor_formatter("{x:g}")


# ---- Lines from records


def smooth(values, width=5):
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def over_seeds(records, metric):
    """A metric of the curves: (iterations, mean over seeds, one standard deviation or None)."""
    by_iteration = {}
    for record in records:
        lines = [line for line in record["curve"] if metric in line]
        for line, y in zip(lines, smooth([line[metric] for line in lines])):
            by_iteration.setdefault(line["iteration"], []).append(y)
    most = max(map(len, by_iteration.values()), default=0)
    full = {x: values for x, values in by_iteration.items() if len(values) == most}
    band = None
    if len(records) > 1:
        band = [statistics.stdev(values) for values in full.values()]
    return list(full), [statistics.mean(values) for values in full.values()], band


def mean_kl(records):
    """The records with one KL per line, the mean over its tasks."""
    averaged = []
    for record in records:
        curve = []
        for line in record["curve"]:
            kls = [number for name, number in line.items() if name.startswith("kl/")]
            curve.append(line | {"kl": statistics.mean(kls)})
        averaged.append(record | {"curve": curve})
    return averaged


def average_line(runs, name, label, over="minutes"):
    """[the Average of a run's stages as a line, the mean over seeds with several stages] or []."""
    records = staged(runs, name)
    if not records:
        return []
    start = scores(runs["merged"][0])["average"]
    curves = zip(*(stage_curve(record, start) for record in records))
    means = []
    for curves_of_seeds in curves:  # minutes, Average, its error
        means.append([statistics.mean(column) for column in zip(*curves_of_seeds)])
    x, y, error = means
    if over == "iterations":
        x = [0, *records[0]["stages"]]
    return [(label, x, y, error)]


def to_teacher(runs, numbers):
    """{task: (score, error)} -> (scores, errors), both over the score of the task's own teacher,
    in the order of TASKS."""
    goals = {task: value(runs, task, task)[0] for task in TASKS}
    ratios = [numbers[task][0] / goals[task] for task in TASKS]
    return ratios, [numbers[task][1] / goals[task] for task in TASKS]


# ---- The figures: each returns its panels; one without lines is not drawn


def average_panels(runs, found):
    names = {
        "opd_small": "ppo, 32 images",
        "opd_merge": "ppo, 128 images",
        "ode_lr3e-3": "ode, 32 images",
        "published_schedule": "ppo-public-code, published schedule",
        "merge_mix": "merge + GRPO-Mix, 192 images",
    }
    lines = []
    for name, label in names.items():
        lines += average_line(runs, name, label)
    top = value(runs, "oracle", "average")[0]
    levels = {"oracle": top, "97 % of the oracle": 0.97 * top}
    title = "From the merged start: objective and images per iteration"
    return [Panel(title, "CPU minutes, one thread", "Average (0 to 1)", "", lines, levels)]


def objectives_panels(runs, found):
    images, kls, rates, curves = "iteration, 32 images each", [], [], []
    for name in OBJECTIVES:
        at_default = f"{name}_lr1e-3"
        if name != "ode" and at_default in runs:  # ode's KL is another quantity, on other states
            kls.append((name, *over_seeds(mean_kl(runs[at_default]), "kl")))
        points = []
        for lr in RATES:
            if f"{name}_lr{lr}" in runs:
                points.append((float(lr), *value(runs, f"{name}_lr{lr}", "average")))
        if points:
            rates.append((name, *zip(*points)))
    if complete(runs):
        for run, name in {"opd_small": "ppo", "kl_lr1e-3": "kl", "ode_lr3e-3": "ode"}.items():
            curves += average_line(runs, run, name, "iterations")
    average = "Average (0 to 1)"
    return [
        Panel("KL to own teacher, rate 1e-3", images, "nats per dimension", "y", kls),
        Panel("Average after 80 iterations", "learning rate", average, "x", rates),
        Panel("Average during training", images, average, "", curves),
    ]


def gradients_panels(runs, found):
    by_batch, by_step = [], []
    for name in OBJECTIVES:
        if name == "ode":
            continue
        *steps, total = found["objectives"][name]
        batches = [int(batch) for batch in total["cosine"]]
        by_batch.append((name, batches, list(total["cosine"].values()), None))
        times = [entry["t"] for entry in steps]
        by_step.append((name, times, [entry["variance"] for entry in steps], None))
    batch, to_exact = "images in the batch", "cosine to the exact gradient"
    step, variance = "time t of the step (1 = noise)", "variance / exact gradient squared"
    return [
        Panel("Direction of the whole gradient", batch, to_exact, "x", by_batch),
        Panel("Noise of one image at each step", step, variance, "y", by_step),
    ]


def interference_panels(runs, found):
    main, logged, mixed = runs.get("opd_merge", []), [], []
    if main:
        logged = [(pair(name), *over_seeds(main, f"cosine/{name}")) for name in PAIRS]
    if found:
        by_iteration = {}
        for stage, measured in found["tasks"].items():
            if stage.startswith("grpo"):
                by_iteration[at_stage(stage)[1]] = measured["cosine"]
        for name in PAIRS:
            cosines = [measured[name] for measured in by_iteration.values()]
            mixed.append((pair(name), list(by_iteration), cosines, None))
    ylabel = "cosine of two tasks' gradients"
    return [
        Panel("Flow-OPD from merge (three seeds)", "iteration", ylabel, "", logged),
        Panel("merge + GRPO-Mix (one seed)", "iteration", ylabel, "", mixed),
    ]


def tasks_panels(runs, found):
    main, kls, relative = runs.get("opd_merge", []), [], []
    if main:
        kls = [(COLUMNS[task][0], *over_seeds(main, f"kl/{task}")) for task in TASKS]
    records = staged(runs, "opd_merge")
    if records and complete(runs):
        stages = [0, *records[0]["stages"]]
        rows = [scores(runs["merged"][0])]
        rows += [scores(records[0], stage) for stage in stages[1:]]
        ratios, errors = [], []  # a list over tasks per stage
        for row in rows:
            numbers = {task: (row[task]["mean"], row[task]["se"]) for task in TASKS}
            of_stage = to_teacher(runs, numbers)
            ratios.append(of_stage[0])
            errors.append(of_stage[1])
        for task, y, error in zip(TASKS, zip(*ratios), zip(*errors)):
            relative.append((COLUMNS[task][0], stages, y, error))
    return [
        Panel("KL to own teacher (three seeds)", "iteration", "nats per dimension", "y", kls),
        Panel("Score (seed 2)", "iteration", "score / score of own teacher", "", relative),
    ]


def routing_panels(runs, found):
    rows = {
        "merged": "merged start",
        "opd_small": "own teacher for every prompt",
        "routing_all": "all teachers for every prompt",
    }
    heads, lines = [COLUMNS[task][0] for task in TASKS], []
    if set(rows) <= set(runs):
        for name, label in rows.items():
            numbers = {task: value(runs, name, task) for task in TASKS}
            lines.append((label, heads, *to_teacher(runs, numbers)))
    title = "Flow-OPD with and without routing"
    return [Panel(title, "", "score / score of own teacher", "", lines)]


def hacking_panels(runs, found):
    scored, others = [], []
    for record in runs.get("teacher_pickscore", ()):
        rows = [scores(runs["base"][0])]
        rows += [scores(record, stage) for stage in record["stages"]]
        for metric in METRICS:
            label = COLUMNS[metric][0]
            if metric == "pickscore":
                label = "PickScore, the reward"
            base = rows[0][metric]["mean"]
            y = [row[metric]["mean"] / base for row in rows]
            error = [row[metric]["se"] / base for row in rows]
            panel = scored if metric in TASKS else others
            panel.append((label, [0, *record["stages"]], y, error))
    images = "GRPO iteration, 192 images each"
    return [
        Panel("Scores of the tasks", images, "score / score of the base", "", scored),
        Panel("What no teacher was trained on", images, "value / value of the base", "y", others),
    ]


def pays_panels(runs, found, prefix="", metric="average"):
    """prefix "strict_": the same runs with rewards of all or nothing."""
    given, counted = [], []
    for run in [f"{kind}_from_{start}" for kind in ("mix", "opd") for start in STARTS]:
        curve = by_images(runs, prefix + run, metric)
        if curve:
            means, errors, _ = zip(*curve.values())
            given.append((LABELS[run], list(curve), means, errors))
            images = [images_before(prefix + run) + number for number in curve]
            counted.append((LABELS[run], images, means, errors))
    images, ylabel = "images sampled", f"{COLUMNS[metric][0]} (0 to 1)"
    top = value(runs, f"{prefix}oracle", metric)
    levels = {f"{prefix.replace('_', ' ')}oracle": top[0]} if top else {}
    return [
        Panel("Teachers and SFT are given", images, ylabel, "x", given, levels),
        Panel("Their images are counted", f"{images}, linear axis", ylabel, "", counted, levels),
    ]


def strict_panels(runs, found):
    return pays_panels(runs, found, "strict_", "strict")


def by_task_panels(runs, found):
    panels, ylabel = [], "way from the base to the own teacher"
    for run in ("mix_from_base", "mix_from_merge", "opd_from_merge"):
        lines = []
        for task in TASKS:
            curve = by_images(runs, run, task)
            if curve:
                low, high = (value(runs, name, task)[0] for name in ("base", task))
                means, errors, _ = zip(*curve.values())
                y = [(mean - low) / (high - low) for mean in means]
                band = [error / (high - low) for error in errors]
                lines.append((COLUMNS[task][0], list(curve), y, band))
        levels = {"own teacher": 1.0}
        panels.append(Panel(LABELS[run], "images sampled", ylabel, "x", lines, levels))
    return panels


def complete(runs):
    """Is there what the scores of others are compared with?"""
    return {"oracle", "merged", "base"} <= set(runs)


def draw_all(runs, found, folder):
    """Every figure that there is data for, as folder/NAME.png."""
    figures = {"objectives": objectives_panels}
    if found:
        figures["gradients"] = gradients_panels
    figures |= {"interference": interference_panels, "tasks": tasks_panels}
    if complete(runs):
        figures |= {"average": average_panels, "routing": routing_panels, "hacking": hacking_panels}
        figures |= {"pays": pays_panels, "strict": strict_panels, "by_task": by_task_panels}
    for name, panels_of in figures.items():
        panels = [panel for panel in panels_of(runs, found) if panel.lines]
        if panels:
            width = {1: 8, 2: 4.6, 3: 3.5}[len(panels)]  # inches of a panel
            figure(folder / f"{name}.png", panels, width)
