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
    load,
    pair,
    reached,
    scores,
    stage_curve,
    trainings,
    value,
)

MISSING = "not run yet"


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
    digits = COLUMNS[metric][1]
    return shown((round(a[0] - b[0], digits) + 0.0, math.hypot(a[1], b[1])), digits, "+") if a and b else MISSING  # no -0.00


def ratio(runs, name, other, metric):
    a, b = value(runs, name, metric), value(runs, other, metric)
    return f"{a[0] / b[0]:.0%}" if a and b else MISSING


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


def cosines(runs, found):
    """Cosines of the tasks' gradients: as every iteration of the main job logged them, and as gradients.py measured them."""
    by_stage = {at_stage(name): m for name, m in (found["tasks"] if found else {}).items()}
    by_stage = dict(sorted(by_stage.items(), key=lambda item: (item[0][0] == "GRPO", item[0][1])))

    def logged(name, low, high):
        lines = [r for record in runs.get("opd_merge", ()) for r in record["curve"] if low <= r["iteration"] < high]
        return signed(statistics.mean(r[f"cosine/{name}"] for r in lines)) if lines else "–"

    lines = [
        [pair(p), logged(p, 0, 10), logged(p, 70, 80), *(signed(m["cosine"][p]) for m in by_stage.values())] for p in PAIRS
    ]
    for t in TASKS:
        lines.append([f"{COLUMNS[t][0]} with itself", "", "", *(signed(m["reliability"][t]) for m in by_stage.values())])
    return markdown(["", "logged, 0 to 9", "logged, 70 to 79", *(f"{kind}, {n}" for kind, n in by_stage)], lines)


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


def mix_minutes(runs, against=None):
    """CPU minutes of the shipped GRPO-Mix to its best iteration, at what an image took here in merge_mix; `against`: how many
    times the minutes of that run to 97 % of the oracle."""
    if not {"merge_mix", *({"oracle", "merged", against} if against else ())} <= set(runs):
        return MISSING
    one = statistics.mean(r["compute"]["cpu_minutes"] / r["compute"]["images"] for r in runs["merge_mix"])
    long = one * MIX_BEST * SHIPPED["grpo_mix"][1]
    if not against:
        return f"{long:.1f}"
    found = [m for m in reached(runs, against, 0.97 * value(runs, "oracle", "average")[0]) if m]
    return f"{long / statistics.mean(found):.1f} times" if found else MISSING


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


def write(results):
    """RESULTS.md beside the folder `results`, the figures in figures/."""
    results = Path(results)
    runs = load(results)
    file = results / "gradients.json"
    found = json.loads(file.read_text()) if file.exists() else None
    of_runs, of_both = (
        (score, gap, ratio, differences, table, learning_rates, stages, minutes, speedup, mix_minutes, hours, parts),
        (gradients, cosine, length, times, measured, images, routing, cosines),
    )
    calls = {f.__name__: functools.partial(f, runs) for f in of_runs}
    calls |= {f.__name__: functools.partial(f, runs, found) for f in of_both}
    calls["picture"] = functools.partial(picture, results.parent / "figures")
    figures.draw_all(runs, found, results.parent / "figures")
    template = Path(__file__).with_name("RESULTS.template.md").read_text()
    text = re.sub(r"\{\{(\w+)(.*?)\}\}", lambda call: calls[call[1]](*shlex.split(call[2])), template, flags=re.S)
    (results.parent / "RESULTS.md").write_text(text)
    print(f"{len(list(results.glob('*_seed*.json')))} records -> {results.parent}/RESULTS.md and figures/")
