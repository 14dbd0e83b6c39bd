"""The progress bar and the log of a run: metrics.jsonl, a line per iteration."""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from support.run import gather, rank_and_world


def progress(start: int, iterations: int) -> tqdm:
    """The bar over the iterations start .. iterations - 1, with the time left (rank 0)."""
    how = {"initial": start, "unit": "it", "disable": rank_and_world()[0] > 0}
    return tqdm(range(start, iterations), "training", iterations, **how)


def is_due(iteration: int, every: int, iterations: int) -> bool:
    """True after every `every`-th iteration and after the last; never if `every` is 0."""
    return every > 0 and ((iteration + 1) % every == 0 or iteration + 1 == iterations)


class Stopwatch:
    """Seconds of an iteration's phases. A GPU works asynchronously: each lap waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps, self.began = device, {}, time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before = sum(self.laps.values())
        self.laps[f"seconds/{phase}"] = time.perf_counter() - self.began - before

    def result(self) -> dict[str, float]:
        """The laps, their sum, and on a GPU the peak of memory in GB (10^9 bytes)."""
        result = {"seconds": time.perf_counter() - self.began} | self.laps
        if self.device.type == "cuda":
            result["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        return result


def add_to_log(log: dict[str, float], values: dict[str, float], weight: float) -> None:
    """log[name] += weight * value."""
    for name, value in values.items():
        log[name] = log.get(name, 0.0) + weight * value


def sum_logs(log: dict[str, float]) -> dict[str, float]:
    """{name: this process's part} -> {name: sum over processes}. All processes must call it."""
    total = {}
    for part in gather(log):
        add_to_log(total, part, 1)
    return total


def log_line(folder: str | Path, iteration: int, log: dict) -> None:
    """Append one iteration to metrics.jsonl (rank 0): six digits; NaN and infinity become null."""
    if rank_and_world()[0] > 0:
        return
    line = {"iteration": iteration}
    for name, value in log.items():
        if isinstance(value, float):
            value = float(f"{value:.6g}") if math.isfinite(value) else None
        line[name] = value
    with open(Path(folder) / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def read_log(folder: str | Path) -> list[dict]:
    """The lines of metrics.jsonl; a line cut by a kill is left out."""
    path, lines = Path(folder) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def cut_log(folder: str | Path, iteration: int) -> None:
    """After --resume: drop the lines of iterations that run again."""
    lines = [line for line in read_log(folder) if line["iteration"] < iteration]
    beside = Path(folder) / "metrics.tmp"
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(beside, Path(folder) / "metrics.jsonl")
