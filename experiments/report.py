"""RESULTS.md and its figures from results/*.json alone: python experiments/miniature.py --report

The prose is RESULTS.template.md. Double braces there hold the name of a function below and its
arguments, as on a command line: {{score opd_merge variety}}, {{table "base ocr" "ocr average"}}.
"""

import functools
import json
import math
import re
import shlex
import statistics
from pathlib import Path

from experiments import figures
from experiments.records import (
    COLUMNS,
    LABELS,
    MIX_BEST,
    OBJECTIVES,
    PAIRS,
    RATES,
    SHIPPED,
    TASKS,
    at_stage,
    by_images,
    images_before,
    load,
    mean_of_seeds,
    pair,
    reached,
    scores,
    stage_curve,
    trainings,
    value,
)

MISSING = "not run yet"

# ---- Single numbers


def shown(number, digits, sign=""):
    """(mean, standard error) -> "0.9275 ± 0.0022", without an error of 0; None -> a dash."""
    if not number:
        return "–"
    mean, error = number
    text = f"{mean:{sign},.{digits}f}"
    return f"{text} ± {error:.{digits}f}" if error else text


def score(runs, name, metric="average"):
    number = value(runs, name, metric)
    return shown(number, COLUMNS[metric][1]) if number else MISSING


def gap(runs, name, other, metric="average"):
    """The difference of two runs, "+0.0120 ± 0.0040". The errors are added as if independent."""
    a, b, digits = value(runs, name, metric), value(runs, other, metric), COLUMNS[metric][1]
    if not (a and b):
        return MISSING
    difference = round(a[0] - b[0], digits) + 0.0  # no -0.00
    return shown((difference, math.hypot(a[1], b[1])), digits, "+")


def ratio(runs, name, other, metric):
    a, b = value(runs, name, metric), value(runs, other, metric)
    return f"{a[0] / b[0]:.0%}" if a and b else MISSING


# ---- Tables


def markdown(head, lines):
    rows = [head, ["---"] * len(head), *lines]
    text = ["| " + " | ".join(row) + " |" for row in rows]
    text[1] = "|---" * len(head) + "|"
    return "\n".join(text)


def differences(runs, pairs):
    """A table of gaps in Average, "one:other two:other", and what two standard errors decide."""
    lines = []
    for name, other in (words.split(":") for words in pairs.split()):
        a, b = value(runs, name, "average"), value(runs, other, "average")
        if not (a and b):
            continue
        word = "ahead" if a[0] > b[0] else "behind"
        if abs(a[0] - b[0]) <= 2 * math.hypot(a[1], b[1]):
            word = "not to be told apart"
        lines.append([LABELS[name], LABELS[other], gap(runs, name, other), word])
    return markdown(["", "minus", "difference in Average", ""], lines)


def table(runs, names, metrics, against=None):
    """A row for every run of `names`, a column for every metric. With `against` one more column:
    the difference in Average to that run."""
    metrics, lines = metrics.split(), []
    head = ["", *(COLUMNS[metric][0] for metric in metrics)]
    if against:
        head.append("against the first row")
    for name in names.split():
        row = [LABELS.get(name, name)]
        if name not in runs:
            lines.append([*row, MISSING, *[""] * (len(head) - 2)])
            continue
        row += [shown(value(runs, name, metric), COLUMNS[metric][1]) for metric in metrics]
        if against:
            row.append("" if name == against else gap(runs, name, against))
        lines.append(row)
    return markdown(head, lines)


def learning_rates(runs, metrics):
    """The same for every objective at every learning rate of the grid that has run."""
    names = [f"{objective}_lr{lr}" for objective in OBJECTIVES for lr in RATES]
    return table(runs, " ".join(name for name in names if name in runs), metrics)


def mapped(runs, objective):
    """Part map: the Average of held-back prompts by iteration size, updates and learning rate."""
    rates, lines = ("1e-3", "2e-3", "4e-3"), []
    for size in (8, 16, 32, 64, 128):
        for updates in (1, 2):
            row = f"map_{objective}_b{size}_u{updates}_lr"
            found = [value(runs, f"{row}{rate}", "average") for rate in rates]
            if any(found):
                cells = [f"{number[0]:.4f}" if number else "–" for number in found]
                lines.append([f"{size}", f"{updates}", *cells])
    return markdown([f"`{objective}`, images an iteration", "updates", *rates], lines)


def stages(runs, name, seed, metrics):
    """A run's scores at every iteration where it was scored."""
    records = [record for record in runs.get(name, ()) if record["seed"] == int(seed)]
    if not records:
        return MISSING
    metrics, lines = metrics.split(), []
    for stage in records[0]["stages"]:
        rows = scores(records[0], stage)
        cells = [f"{rows[metric]['mean']:.{COLUMNS[metric][1]}f}" for metric in metrics]
        lines.append([str(stage), *cells])
    return markdown(["iteration", *(COLUMNS[metric][0] for metric in metrics)], lines)


def picture(folder, name, text):
    """A figure, if there was data for it."""
    return f"![{text}](figures/{name}.png)" if (folder / f"{name}.png").exists() else MISSING


# ---- What gradients.py measured


def gradients(runs, found):
    """The gradient of every objective over all five steps beside the exact one."""
    if not found:
        return MISSING
    lines = []
    for name in OBJECTIVES:
        entry = of_objective(found, name)
        cells = [f"{cosine:.3f}" for cosine in entry["cosine"].values()]
        if name == "ode":  # in other units
            cells += ["–", "–"]
        else:
            cells += [f"{entry['length']:.2f}", f"{entry['variance']:,.0f}"]
        lines.append([name, *cells])
    batches = [f"cosine, {batch} images" for batch in of_objective(found, "kl")["cosine"]]
    return markdown(["", *batches, "length", "variance"], lines)


def of_objective(found, name):
    """Over all steps."""
    return found["objectives"][name][-1]


def cosine(runs, found, name, batch):
    """Of an objective's gradient over so many images to the exact one."""
    return f"{of_objective(found, name)['cosine'][batch]:.2f}" if found else MISSING


def length(runs, found, name):
    return f"{of_objective(found, name)['length']:.3f}" if found else MISSING


def times(runs, found, name, other):
    """How many times another objective's variance."""
    if not found:
        return MISSING
    factor = of_objective(found, name)["variance"] / of_objective(found, other)["variance"]
    return f"{float(f'{factor:.2g}'):,.0f}" if factor > 100 else f"{factor:,.1f}"


def signed(cosine):
    return f"{round(cosine, 2) + 0.0:+.2f}"  # no -0.00


def measured(runs, found, stage, tasks):
    return signed(found["tasks"][stage]["cosine"][tasks]) if found else MISSING


def images(runs, found):
    return str(found["units"] * found["unit"]) if found else MISSING


def routing(runs, found):
    return f"{found['routing']:.0e}" if found else MISSING


def cosines(runs, found):
    """Cosines of the tasks' gradients: as the main job logged and as gradients.py measured them."""
    by_stage = {}
    for name, measurement in (found["tasks"] if found else {}).items():
        by_stage[at_stage(name)] = measurement
    order = sorted(by_stage, key=lambda stage: (stage[0] == "GRPO", stage[1]))
    curves = [line for record in runs.get("opd_merge", ()) for line in record["curve"]]

    def logged(name, low, high):
        values = [line[f"cosine/{name}"] for line in curves if low <= line["iteration"] < high]
        return signed(statistics.mean(values)) if values else "–"

    lines = []
    for name in PAIRS:
        cells = [signed(by_stage[stage]["cosine"][name]) for stage in order]
        lines.append([pair(name), logged(name, 0, 10), logged(name, 70, 80), *cells])
    for task in TASKS:
        cells = [signed(by_stage[stage]["reliability"][task]) for stage in order]
        lines.append([f"{COLUMNS[task][0]} with itself", "", "", *cells])
    heads = [f"{kind}, {iteration}" for kind, iteration in order]
    return markdown(["", "logged, 0 to 9", "logged, 70 to 79", *heads], lines)


# ---- Speed and cost


def goal(runs):
    """97 % of the oracle's Average."""
    return 0.97 * value(runs, "oracle", "average")[0]


def minutes(runs, name):
    """CPU minutes to 97 % of the oracle, one number per seed."""
    if not {"oracle", "merged", name} <= set(runs):
        return MISSING
    total = value(runs, name, "cpu_minutes")[0]
    words = []
    for number in reached(runs, name, goal(runs)):
        words.append(f"{number:.1f}" if number else f"not in {total:.1f}")
    return ", ".join(words) or MISSING


def speedup(runs, slow, fast):
    """How many times longer `slow` takes to the best Average that it reaches, means over seeds."""
    if not {"merged", slow, fast} <= set(runs):
        return MISSING
    start = scores(runs["merged"][0])["average"]
    best = statistics.mean(max(stage_curve(record, start)[1]) for record in runs[slow])
    means = []
    for name in (slow, fast):
        numbers = [number for number in reached(runs, name, best) if number]
        if not numbers:
            return MISSING
        means.append(statistics.mean(numbers))
    return f"{means[0]:.1f} against {means[1]:.1f} minutes, {means[0] / means[1]:.1f} times"


def mix_minutes(runs, against=None):
    """CPU minutes of the shipped GRPO-Mix to its best iteration, at the cost of an image in
    merge_mix. With `against`: how many times the minutes of that run to 97 % of the oracle."""
    needed = {"merge_mix"}
    if against:
        needed |= {"oracle", "merged", against}
    if not needed <= set(runs):
        return MISSING
    costs = [record["compute"] for record in runs["merge_mix"]]
    per_image = statistics.mean(cost["cpu_minutes"] / cost["images"] for cost in costs)
    long = per_image * MIX_BEST * SHIPPED["grpo_mix"][1]
    if not against:
        return f"{long:.1f}"
    numbers = [number for number in reached(runs, against, goal(runs)) if number]
    return f"{long / statistics.mean(numbers):.1f} times" if numbers else MISSING


def at_scale(runs, name, scale):
    """The Average of a run that is sampled at another guidance scale: (mean, error) or None."""
    rows = []
    for record in runs.get(name, ()):
        stage = record["final"] if scale == "1" else f"{record['final']}@{scale}"
        if stage in record["scores"]:
            rows.append(scores(record, stage)["average"])
    return mean_of_seeds(rows) if rows else None


def scaled(runs, name, scale):
    number = at_scale(runs, name, scale)
    return shown(number, 4) if number else MISSING


def guided(runs, names):
    """The Average of every run at four guidance scales."""
    scales, lines = ("1", "1.5", "2", "3"), []
    for name in names.split():
        cells = [shown(at_scale(runs, name, scale), 4) for scale in scales]
        lines.append([LABELS[name], *cells, str(len(runs.get(name, ())))])
    return markdown(["sampled at guidance", *scales, "seeds"], lines)


def curves(runs, names, metric="average"):
    """A row for every number of images, a column for every run: its mean, error and seeds."""
    names = [name for name in names.split() if name in runs]
    curve_of = {name: by_images(runs, name, metric) for name in names}
    head = ["images", *(LABELS[name] for name in names)]
    lines = [["sampled before", *(f"{images_before(name):,}" for name in names)]]
    for images in sorted({number for curve in curve_of.values() for number in curve}):
        cells = [f"{images:,}"]
        for curve in curve_of.values():
            mean, error, seeds = curve.get(images, (None, None, None))
            cells.append(f"{mean:.3f} ± {error:.3f} ({seeds})" if mean else "")
        lines.append(cells)
    return markdown(head, lines)


def against_teachers(runs, names, scale=""):
    """Of every run: each task's score minus that of its own teacher, bold from two errors on.
    scale "@2": the teachers sampled with guidance 2."""
    lines = []
    for name in names.split():
        cells = []
        for task in TASKS:
            own, teacher = value(runs, name, task), value(runs, task + scale, task)
            text = gap(runs, name, task + scale, task)
            if own and teacher and abs(own[0] - teacher[0]) > 2 * math.hypot(own[1], teacher[1]):
                text = f"**{text}**"
            cells.append(text)
        lines.append([LABELS[name], *cells])
    return markdown(["", *(COLUMNS[task][0] for task in TASKS)], lines)


def after(runs, name, images, metric="average"):
    """A run's score after so many images."""
    found = by_images(runs, name, metric).get(int(images))
    return shown(found[:2], 3) if found else MISSING


# ---- Which curve to watch

WATCHED = {
    "own": "KL at the student's own states",
    "teacher": "KL at its teachers' states",
    "mar": "MAR's term at its own states",
    "kl": "KL as logged in training, last quarter",
}


def ranked(values):
    """1 for the smallest; equal values share the mean of their ranks."""
    order = sorted(values)
    return [(order.index(x) + 1 + len(order) - order[::-1].index(x)) / 2 for x in values]


def spearman(rows, name):
    """The correlation of a column's ranks with those of the Average, over the rows that have it."""
    rows = [row for row in rows if name in row]
    columns = [ranked([row[key]["mean"] for row in rows]) for key in (name, "average")]
    return f"{statistics.correlation(*columns):+.2f} ({len(rows)})"


def correlations(runs, watched):
    """Of what which_curve.py measured, and of the logged KL, with the Average."""
    students = []
    for record in trainings(runs):
        measured = watched.get(f"{record['name']}_seed{record['seed']}")
        if measured:
            own = {name: {"mean": number} for name, number in measured.items()}
            students.append(scores(record) | own | {"part": record["part"]})
    students.sort(key=lambda row: row["average"]["mean"])
    groups = {"all students": students}
    groups["of part map alone"] = [row for row in students if row["part"] == "map"]
    groups["the better half of all"] = students[len(students) // 2 :]
    if min(map(len, groups.values())) < 3:
        return MISSING
    lines = []
    for name, words in WATCHED.items():
        lines.append([words, *(spearman(rows, name) for rows in groups.values())])
    return markdown(["", *groups], lines)


def own_kl(runs, watched, name):
    """The KL at the own states of a row's students, over its seeds."""
    measured = [watched.get(f"{name}_seed{record['seed']}") for record in runs.get(name, ())]
    if not measured or not all(measured):
        return MISSING
    return shown(mean_of_seeds([{"mean": row["own"], "se": 0.0} for row in measured]), 4)


# ---- What ran


def hours(runs):
    costs = [record["compute"]["cpu_minutes"] for record in trainings(runs)]
    return f"{len(costs)} trainings, {sum(costs) / 60:.1f} hours of CPU time"


def parts(runs):
    """What has been trained for every part, and what that took."""
    by_part, lines = {}, []
    for record in trainings(runs):
        by_part.setdefault(record["part"], []).append(record)
    for part, records in by_part.items():
        names = [record["name"] for record in records]
        seeds = [names.count(name) for name in dict.fromkeys(names)]
        words = []
        for number in sorted(set(seeds), reverse=True):
            unit = "seed" if number == 1 else "seeds"
            words.append(f"{seeds.count(number)} with {number} {unit}")
        cpu = sum(record["compute"]["cpu_minutes"] for record in records) / 60
        lines.append([part, ", ".join(words), str(len(records)), f"{cpu:.2f}"])
    return markdown(["part", "rows", "trainings", "hours on one core"], lines)


OF_RUNS = (score, gap, ratio, differences, table, learning_rates, mapped, stages)
OF_RUNS += (minutes, speedup, mix_minutes, curves, guided, scaled, after, against_teachers)
OF_RUNS += (hours, parts)
OF_GRADIENTS = (gradients, cosine, length, times, measured, images, routing, cosines)


def write(results):
    """RESULTS.md beside the folder `results`, the figures in figures/."""
    results = Path(results)
    folder = results.parent / "figures"
    runs, found = load(results), None
    if (results / "gradients.json").exists():
        found = json.loads((results / "gradients.json").read_text())
    calls = {"picture": functools.partial(picture, folder)}
    calls |= {function.__name__: functools.partial(function, runs) for function in OF_RUNS}
    for function in OF_GRADIENTS:
        calls[function.__name__] = functools.partial(function, runs, found)
    watched = {}
    if (results / "curves.json").exists():
        watched = json.loads((results / "curves.json").read_text())
    for function in (correlations, own_kl):
        calls[function.__name__] = functools.partial(function, runs, watched)
    figures.draw_all(runs, found, folder)
    template = Path(__file__).with_name("RESULTS.template.md").read_text()
    answer = lambda call: calls[call[1]](*shlex.split(call[2]))
    text = re.sub(r"\{\{(\w+)(.*?)\}\}", answer, template, flags=re.S)
    (results.parent / "RESULTS.md").write_text(text)
    number = len(list(results.glob("*_seed*.json")))
    print(f"{number} records -> {results.parent}/RESULTS.md and figures/")
