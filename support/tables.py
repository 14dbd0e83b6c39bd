"""From scores to tables: means, standard errors, the paper's Average and its published rows. Torch for sums, nothing else.

Columns are the paper's: each metric on the test prompts of its own task, and
Average = (GenEval + OCR + DeQA / 5 + PickScore / 26) / 4, which fits all published rows to 1e-4.
Scores are {model: {metric: (N,) tensor}}, tests {task: (N prompts, N lines of metadata)}.
"""

import math
from collections.abc import Sequence

import torch

from support.flags import TASKS

COLUMNS = {"geneval": "GenEval", "ocr": "OCR", "deqa": "DeQA", "pickscore": "PickScore"}
SCALES = {"geneval": 1, "ocr": 1, "deqa": 5, "pickscore": 26}  # what Average divides each metric by
# Stable Diffusion 3.5 Medium in arXiv 2605.08063: the four columns and Average; no errors are given there.
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
# The four numbers that papers call GenEval: djghosh13/geneval's own two, and two of the reward server that trains.
GENEVAL = {
    "geneval_tasks": "official, mean of the task means",
    "geneval_official": "official, image mean",
    "geneval_strict": "strict",
    "geneval": "softened",
}


def standard_error(scores: torch.Tensor, prompts: Sequence[str]) -> float:
    """Of the mean of scores (N,). Images of one prompt are alike, so a prompt counts as one draw however many it has:
    with s_p the summed deviations of prompt p of P, sqrt(P / (P - 1) sum s_p^2) / N; std / sqrt(N) if all differ."""
    number = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    sums = torch.zeros(len(number), dtype=torch.float64)
    sums.index_add_(0, torch.tensor([number[prompt] for prompt in prompts]), scores.double() - scores.double().mean())
    return (sums.square().sum().item() * len(sums) / (len(sums) - 1)) ** 0.5 / len(scores) if len(sums) > 1 else math.nan


def mean_of(scores: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
    return {"mean": scores.mean().item(), "se": standard_error(scores, prompts), "n": len(scores)}


def average(scores: dict[str, torch.Tensor], tests: dict[str, Sequence]) -> tuple[float, float]:
    """The paper's Average and its standard error from {metric: (N,) scores}; nan unless all four tasks are there."""
    if any(task not in scores for task in TASKS):
        return math.nan, math.nan
    mean = sum(scores[t].mean().item() / SCALES[t] for t in TASKS) / 4
    variance = sum((standard_error(scores[t], tests[t][0]) / SCALES[t]) ** 2 for t in TASKS) / 16
    return mean, variance**0.5


def compare(scores: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tests: dict[str, Sequence]) -> tuple[float, float]:
    """The difference of two models' Averages and its paired standard error: the same prompts and noise for both."""
    return average({task: scores[task] - other[task] for task in TASKS}, tests)


def summarise(scores: dict[str, dict[str, torch.Tensor]], tests: dict[str, Sequence]) -> dict[str, dict[str, dict]]:
    """{name: {metric: {"mean", "se", "n"}, "average": {...}}}, with the oracle's row if all teachers are there."""
    if all(task in scores and task in scores[task] for task in TASKS):
        scores = scores | {"oracle": {task: scores[task][task] for task in TASKS}}
    summary = {}
    for name, metrics in scores.items():
        summary[name] = row = {}
        if "geneval_official" in metrics and "geneval" in metrics:
            # No term of the softened reward is above 1, and all are 1 where the strict rules find no fault.
            metrics = metrics | {"geneval_strict": (metrics["geneval"] == 1).double()}
        for metric, values in metrics.items():
            prompts = next(tests[task][0] for task in tests if metric == task or metric.startswith(task + "_"))
            row[metric] = mean_of(values, prompts)
        if "geneval_official" in metrics:
            tags = [line["tag"] for line in tests["geneval"][1]]
            of = {tag: [j for j, other in enumerate(tags) if other == tag] for tag in dict.fromkeys(tags)}
            official, prompts = metrics["geneval_official"], tests["geneval"][0]
            tasks = {tag: mean_of(official[own], [prompts[j] for j in own]) for tag, own in of.items()}
            mean = sum(of_task["mean"] for of_task in tasks.values()) / len(tasks)
            se = math.hypot(*(of_task["se"] for of_task in tasks.values())) / len(tasks)
            row["geneval_tasks"] = {"mean": mean, "se": se, "n": len(tags), "tasks": tasks}
        mean, se = average(metrics, tests)
        if not math.isnan(mean):
            row["average"] = {"mean": mean, "se": se}
    return summary


def table(
    summary: dict[str, dict[str, dict]], notes: dict[str, str] | None = None, columns: dict[str, str] | None = None
) -> str:
    """A Markdown table of `columns` {metric: title}, or of the paper's and behind them other metrics that were tasks;
    `notes` {name: text} go behind the name. A value without "se" is a published one."""
    digits = {"deqa": 2, "pickscore": 2, "average": 4}
    if columns is None:
        found = dict.fromkeys(metric for row in summary.values() for metric in row)
        columns = {metric: title for metric, title in COLUMNS.items() if metric in found}
        columns |= {"average": "Average"} if len(columns) == 4 else {}
        columns |= {metric: metric for metric in found if metric != "average" and metric.split("_")[0] not in COLUMNS}
    lines = ["| " + " | ".join(["model", *columns.values()]) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, row in summary.items():
        cells = [name + (f" ({notes[name]})" if notes and name in notes else "")]
        for metric in columns:
            value, n = row.get(metric), digits.get(metric, 3)
            known = value and (f"{value['mean']:.{n}f} ± {value['se']:.{n}f}" if "se" in value else f"{value['mean']:g}")
            cells.append(known or "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def published() -> dict[str, dict[str, dict]]:
    """The paper's rows, as `summarise` gives ours. Their GenEval fits the softened reward (README)."""
    return {name: {m: {"mean": v} for m, v in zip([*COLUMNS, "average"], values)} for name, values in PUBLISHED.items()}
