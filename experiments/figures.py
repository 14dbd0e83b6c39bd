"""The figures of RESULTS.md, drawn from the records: see report.py."""

import statistics
from pathlib import Path

from experiments.records import COLUMNS, OBJECTIVES, PAIRS, RATES, TASKS, at_stage, pair, scores, stage_curve, value

# Okabe and Ito's palette, told apart by colour-blind eyes; and a marker each.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "x", "P")
STYLES = ("-", "-", "-", "--", "-", "-.", ":")  # where two lines lie on each other, the lower one shows through


def figure(path, panels, width=4.2):
    """panels: [(title, x label, y label, log axes, [(label, x, y, half width of the band or None)], {note: height})].
    Where x are words, points with error bars side by side instead of lines with bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

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
        for note, height in level.items():
            axis.axhline(height, color="gray", linewidth=0.9, linestyle="--")
            axis.annotate(note, (0.99, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
        if "x" in log:
            ticks = sorted({v for line in lines for v in line[1]})
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{v:g}" for v in ticks])
            axis.minorticks_off()
        if "y" in log:  # 0.2 and not 2 x 10^-1
            axis.set_yscale("log")
            values = [v for line in lines for v in line[2]]
            few = max(values) < 1000 * min(values)  # decades
            axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
            axis.yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 5)))
            axis.yaxis.set_minor_formatter(lambda v, _, few=few: f"{v:g}" if few else "")
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


def draw_all(runs, found, folder):
    """Every figure that there is data for, as folder/NAME.png."""

    def draw(name, *panels, width=4.6):
        panels = [p for p in panels if p[4]]
        if panels:
            figure(folder / f"{name}.png", panels, width)

    complete = {"oracle", "merged", "base"} <= set(runs)  # what the scores of others are compared with
    main = runs.get("opd_merge", [])

    if complete:
        names = {"opd_small": "Flow-OPD, 32 images an iteration", "opd_merge": "Flow-OPD, 128 images an iteration",
                 "ode_lr3e-3": "Flow-OPD, 32 images, ode at 3e-3",
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
    draw("objectives",
         ("learning rate 1e-3", "iteration (32 images each)", "KL to own teacher, nats / dimension", "y", lines, {}),
         ("after 80 iterations", "learning rate", "Average (0 to 1)", "x", points, {}),
         ("while they train", "iteration (32 images each)", "Average (0 to 1)", "", curves, {}))  # fmt: skip

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
    draw("tasks", ("three seeds", "iteration", "KL to own teacher, nats / dimension", "y", lines, {}),
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
