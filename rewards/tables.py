"""From scores to tables: means, standard errors, the paper's Average and its published rows.

Scores are {model: {metric: (N,) tensor}}, tests {task: (N prompts, N lines of metadata)}. Columns
are the paper's: each metric on the test prompts of its own task, and
Average = (GenEval + OCR + DeQA / 5 + PickScore / 26) / 4, which fits all published rows to 1e-4.
"""

import math
from collections.abc import Sequence

import torch

from support.flags import TASKS

COLUMNS = {"geneval": "GenEval", "ocr": "OCR", "deqa": "DeQA", "pickscore": "PickScore"}
SCALES = {"geneval": 1, "ocr": 1, "deqa": 5, "pickscore": 26}  # Average divides by these
DIGITS = {"deqa": 2, "pickscore": 2, "average": 4}
# Stable Diffusion 3.5 Medium in arXiv 2605.08063; no errors are published.
PUBLISHED = {
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


def average(scores: dict[str, torch.Tensor], tests: dict[str, Sequence]) -> tuple[float, float]:
    """The paper's Average and its error from {metric: (N,)}; nan without all four tasks."""
    if any(task not in scores for task in TASKS):
        return math.nan, math.nan
    mean = sum(scores[t].mean().item() / SCALES[t] for t in TASKS) / 4
    errors = [standard_error(scores[t], tests[t][0]) / SCALES[t] for t in TASKS]
    return mean, math.hypot(*errors) / 4


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
            task = next(t for t in tests if metric == t or metric.startswith(t + "_"))
            row[metric] = mean_of(values, tests[task][0])
        if "geneval_official" in metrics:
            row["geneval_tasks"] = task_means(metrics["geneval_official"], *tests["geneval"])
        mean, se = average(metrics, tests)
        if not math.isnan(mean):
            row["average"] = {"mean": mean, "se": se}
    return summary


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


def table(summary: dict[str, dict], notes: dict | None = None, columns: dict | None = None) -> str:
    """A Markdown table. columns {metric: title}; default the paper's, then other tasks' metrics.
    notes {model: text} stand behind its name. A value without "se" is a published one."""
    if columns is None:
        found = dict.fromkeys(metric for row in summary.values() for metric in row)
        columns = {metric: title for metric, title in COLUMNS.items() if metric in found}
        if len(columns) == 4:
            columns["average"] = "Average"
        others = [m for m in found if m != "average" and m.split("_")[0] not in COLUMNS]
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


def published() -> dict[str, dict]:
    """The paper's rows, in the form of `summarise`. Their GenEval fits the softened reward."""
    names, rows = [*COLUMNS, "average"], {}
    for model, values in PUBLISHED.items():
        rows[model] = {name: {"mean": value} for name, value in zip(names, values)}
    return rows
