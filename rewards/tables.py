"""From scores to tables: means, standard errors, the paper's averages and its published rows.

Scores are {model: {metric: (N,) tensor}}, tests {task: (N prompts, N lines of metadata)}. The paper
has three tables. main: each metric on the test prompts of its own task, and
Average = (GenEval + OCR + DeQA / 5 + PickScore / 26) / 4, which fits all published rows to 1e-4.
quality: several metrics on one set of prompts. compbench: four parts of T2I-CompBench and their
mean. The paper's "Overall" is not that mean, nor any other of the four: it cannot be computed.
"""

import math
from collections.abc import Sequence

import torch

from support.flags import TASKS

TABLES = {  # whose tasks are the default
    "main": TASKS,
    "quality": ("drawbench",),
    "compbench": ("t2i_color", "t2i_shape", "t2i_3d", "t2i_numeracy"),
}
QUALITY = ("imagereward", "aesthetic", "hpsv2", "qwenvl")  # qwenvl: of every qwenvl@MODEL
COLUMNS = {"geneval": "GenEval", "ocr": "OCR", "deqa": "DeQA", "pickscore": "PickScore"}
COLUMNS |= {"average": "Average"}
COLUMNS |= {"imagereward": "ImageReward", "aesthetic": "Aesthetic", "hpsv2": "HPSv2.1"}
COLUMNS |= {"qwenvl": "QwenVL of the paper"}  # on an unknown model: never that of a qwenvl@MODEL
COLUMNS |= {"t2i_color": "colour", "t2i_shape": "shape", "t2i_texture": "texture"}
COLUMNS |= {"t2i_3d": "3D", "t2i_3d_fixed": "3D, depth not transposed", "t2i_numeracy": "numeracy"}
COLUMNS |= {"t2i_mean": "mean of 4"}
SCALES = {"geneval": 1, "ocr": 1, "deqa": 5, "pickscore": 26}  # Average divides by these
AVERAGES = {"average": SCALES, "t2i_mean": dict.fromkeys(TABLES["compbench"], 1)}
DIGITS = {"deqa": 2, "pickscore": 2, "average": 4, "hpsv2": 4}
# Stable Diffusion 3.5 Medium in arXiv 2605.08063; no errors are published.
PUBLISHED = {
    "main": {
        "SD3.5-M": (0.63, 0.59, 4.07, 21.64, 0.7165),
        "GRPO-GenEval": (0.94, 0.65, 4.01, 21.53, 0.8050),
        "GRPO-OCR": (0.64, 0.92, 4.06, 21.69, 0.8015),
        "GRPO-DeQA": (0.64, 0.66, 4.23, 23.02, 0.7578),
        "GRPO-PickScore": (0.51, 0.69, 4.22, 23.19, 0.7340),
        "GRPO-Mix": (0.73, 0.83, 4.33, 21.84, 0.8165),
        "SFT + GRPO-Mix": (0.85, 0.86, 4.29, 21.79, 0.8515),
        "Merge + GRPO-Mix": (0.84, 0.86, 4.18, 21.87, 0.8442),
        "Flow-OPD, SFT init": (0.91, 0.92, 4.29, 21.83, 0.8820),
        "Flow-OPD, merge init, v1 to v4": (0.92, 0.94, 4.35, 23.08, 0.9045),
        "Flow-OPD, merge init, v5": (0.93, 0.93, 4.31, 23.05, 0.9021),
    },
    "quality": {
        "SD3.5-M": (1.02, 5.87, 0.298, 3.45),
        "GRPO-Mix": (1.23, 5.93, 0.310, 3.88),
        "Flow-OPD without MAR": (1.26, 5.89, 0.300, 3.82),
        "Flow-OPD": (1.36, 6.23, 0.330, 4.05),
    },
    "compbench": {  # the last number is ours, the mean
        "GRPO-Mix": (0.692, 0.611, 0.422, 0.641, 0.5915),
        "cold start": (0.710, 0.613, 0.425, 0.646, 0.5985),
        "Flow-OPD, merge init": (0.719, 0.629, 0.457, 0.684, 0.62225),
    },
}
# The four numbers called GenEval: two of djghosh13/geneval, two of the reward server that trains.
GENEVAL = {
    "geneval_tasks": "official, mean of the task means",
    "geneval_official": "official, image mean",
    "geneval_strict": "strict",
    "geneval": "softened",
}


def standard_error(scores: torch.Tensor, prompts: Sequence[str]) -> float:
    """Of the mean of scores (N,). A prompt is one draw however many images it has: with s_p the
    summed deviations of prompt p of P it is sqrt(P / (P - 1) sum s_p^2) / N."""
    number = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    prompt_of = torch.tensor([number[prompt] for prompt in prompts])
    deviations = scores.double() - scores.double().mean()
    sums = torch.zeros(len(number), dtype=torch.float64).index_add_(0, prompt_of, deviations)
    P = len(sums)
    if P < 2:
        return math.nan
    return (sums.square().sum().item() * P / (P - 1)) ** 0.5 / len(scores)


def mean_of(scores: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
    return {"mean": scores.mean().item(), "se": standard_error(scores, prompts), "n": len(scores)}


def average(
    scores: dict[str, torch.Tensor], tests: dict[str, Sequence], scales: dict[str, float] = SCALES
) -> tuple[float, float]:
    """The paper's Average and its error from {metric: (N,)}; nan without all tasks of `scales`."""
    if any(task not in scores for task in scales):
        return math.nan, math.nan
    mean = sum(scores[t].mean().item() / scales[t] for t in scales) / len(scales)
    errors = [standard_error(scores[t], tests[t][0]) / scales[t] for t in scales]
    return mean, math.hypot(*errors) / len(scales)


def compare(scores: dict, other: dict, tests: dict[str, Sequence]) -> tuple[float, float]:
    """Difference of two models' Averages and its paired error: both saw equal prompts and noise."""
    return average({task: scores[task] - other[task] for task in TASKS}, tests)


def summarise(scores: dict[str, dict], tests: dict[str, Sequence]) -> dict[str, dict]:
    """{model: {metric: {"mean", "se", "n"}, "average": {}}}; with all teachers also the oracle."""
    if all(task in scores and task in scores[task] for task in TASKS):
        scores = scores | {"oracle": {task: scores[task][task] for task in TASKS}}
    summary = {}
    for name, metrics in scores.items():
        summary[name] = row = {}
        if "geneval_official" in metrics and "geneval" in metrics:
            # The softened reward is 1 exactly where the strict rules find no fault.
            metrics = metrics | {"geneval_strict": (metrics["geneval"] == 1).double()}
        for metric, values in metrics.items():
            row[metric] = mean_of(values, tests[task_of(metric, tests)][0])
            if "qwenvl@" in metric:
                row[metric] |= misses(values)
        if "geneval_official" in metrics:
            row["geneval_tasks"] = task_means(metrics["geneval_official"], *tests["geneval"])
        for name_of_mean, scales in AVERAGES.items():
            mean, se = average(metrics, tests, scales)
            if not math.isnan(mean):
                row[name_of_mean] = {"mean": mean, "se": se}
    return summary


def task_of(metric: str, tests: dict[str, Sequence]) -> str:
    """On whose prompts a metric is scored: geneval for geneval_official."""
    return max((t for t in tests if metric == t or metric.startswith(f"{t}_")), key=len)


def task_means(scores: torch.Tensor, prompts: list[str], metadata: list[dict]) -> dict:
    """Official GenEval: the mean over its six tasks ("tag") of each task's mean."""
    tasks, tags = {}, [line["tag"] for line in metadata]
    for tag in dict.fromkeys(tags):
        own = [j for j, other in enumerate(tags) if other == tag]
        tasks[tag] = mean_of(scores[own], [prompts[j] for j in own])
    mean = sum(task["mean"] for task in tasks.values()) / len(tasks)
    se = math.hypot(*(task["se"] for task in tasks.values())) / len(tasks)
    return {"mean": mean, "se": se, "n": len(tags), "tasks": tasks}


def most_different(scores: dict, tests: dict, number: int = 3) -> dict[str, list[int]]:
    """{task: the prompts on which the models' scores differ most, at most `number` of them}."""
    rows = {}
    for task in tests:
        values = [row[task] for row in scores.values() if task in row]
        if len(values) > 1:
            # The range of the models' scores on each prompt; ties stay in the file's order.
            spread = torch.stack(values).amax(0) - torch.stack(values).amin(0)  # (N,)
            order = spread.argsort(descending=True, stable=True)[:number]
            rows[task] = [int(j) for j in order if spread[j] > 0]
    return rows


def misses(scores: torch.Tensor) -> dict:
    """Of a judge's scores (N,): a reply that holds none counts 0, as in the public code."""
    found = scores[scores > 0]
    return {"missed": len(scores) - len(found), "mean_of_found": found.mean().item()}


def paper_table(which: str, summary: dict, tests: dict, with_published: bool = False) -> str:
    """One of the paper's TABLES and what must be said below it; quality: one per set of prompts."""
    above, parts = {}, []
    if with_published:
        above = {f"{name} (published)": row for name, row in published(which).items()}
    if which != "quality":
        parts.append(table(above | summary))
    else:
        for task, (prompts, _) in tests.items():
            title = f"{len(prompts)} images of {len(set(prompts))} prompts of {task}"
            if with_published:
                title += " (the paper does not say which prompts it used)"
            parts += [f"{title}:", table(above | rows_on(task, summary, tests))]
    # With the real scorers GenEval has four names, which papers do not tell apart.
    if any("geneval_tasks" in row for row in summary.values()):
        parts += ["GenEval by its four names:", table(summary, columns=GENEVAL)]
    for name, row in summary.items():
        for metric, value in row.items():
            if "missed" in value:
                count = f"{value['missed']} of {value['n']} replies hold no score and count 0"
                mean = "there are no others"
                if value["missed"] < value["n"]:
                    mean = f"the mean of the others is {value['mean_of_found']:.3f}"
                parts.append(f"{name}, {metric}: {count}; {mean}")
    return "\n\n".join(parts)


def rows_on(task: str, summary: dict, tests: dict) -> dict[str, dict]:
    """What was scored on the prompts of a task, without its name: drawbench_hpsv2 is hpsv2."""
    rows = {name: {} for name in summary}
    for name, row in summary.items():
        for metric in row:
            if task_of(metric, tests) == task:
                rows[name][metric.removeprefix(f"{task}_")] = row[metric]
    return rows


def table(summary: dict[str, dict], notes: dict | None = None, columns: dict | None = None) -> str:
    """A Markdown table. columns {metric: title}; default COLUMNS, then other tasks' metrics.
    notes {model: text} stand behind its name. A value without "se" is a published one."""
    if columns is None:
        found = dict.fromkeys(metric for row in summary.values() for metric in row)
        columns = {metric: title for metric, title in COLUMNS.items() if metric in found}
        others = [m for m in found if m not in COLUMNS and m.split("_")[0] not in TASKS]
        columns |= {metric: metric for metric in others}
    lines = [" | ".join(["| model", *columns.values()]) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, row in summary.items():
        note = f" ({notes[name]})" if notes and name in notes else ""
        cells = [cell(row.get(metric), DIGITS.get(metric, 3)) for metric in columns]
        lines.append(" | ".join([f"| {name}{note}", *cells]) + " |")
    return "\n".join(lines)


def cell(value: dict | None, digits: int) -> str:
    if value is None:
        return "–"
    if "se" not in value:
        return f"{value['mean']:g}"
    return f"{value['mean']:.{digits}f} ± {value['se']:.{digits}f}"


def published(which: str = "main") -> dict[str, dict]:
    """The paper's rows, in the form of `summarise`. Their GenEval fits the softened reward."""
    names = {"main": [*TASKS, "average"], "quality": QUALITY}
    names["compbench"] = [*TABLES["compbench"], "t2i_mean"]
    rows = {}
    for model, values in PUBLISHED[which].items():
        rows[model] = {name: {"mean": value} for name, value in zip(names[which], values)}
    return rows
