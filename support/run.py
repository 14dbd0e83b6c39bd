"""Plumbing shared so that two copies cannot drift apart: processes, randomness, EMA, the log (checkpoints: checkpoint.py).

No method in here: the sampler is sde.py, the objectives are losses.py, the loops are the scripts.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

# ----------------------------------------------------------------------------------------------------------
# Processes. One or many, on CPU or GPU: the same names afterwards
# ----------------------------------------------------------------------------------------------------------


def start_processes() -> tuple[int, int, torch.device]:
    """-> rank, world size, device. Under torchrun joins the group (gloo on a CPU, nccl on GPUs), else (0, 1, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        if not cuda:  # processes on one machine share its cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
        store, *_ = next(dist.rendezvous("env://"))
        if int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world:
            # After torchrun's --max-restarts the store still holds the addresses of processes that are gone
            # (pytorch #135712); on several machines the restarts are counted apart, so the cure is an environment variable.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=device if cuda else None)
    return rank, world, device


def chunks(index: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """An index tensor in pieces of at most `size`; no piece at all where it is empty (torch.split gives an empty one)."""
    return index.split(size) if len(index) else ()


def batches(samples: torch.Tensor, steps: int, states: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(samples, steps), index tensors, of batches of at most `states`: all steps of some samples, or some of one sample's."""
    for part in chunks(samples, max(1, states // steps)):
        for some in torch.arange(steps).split(states):
            yield part, some


def share(number: int, rank: int, world: int) -> list[int]:
    """This process's part of the global sample indices 0 .. number - 1: a contiguous block."""
    return list(range(rank * number // world, (rank + 1) * number // world))


def print_batch(args: argparse.Namespace, trained: int, world: int) -> None:
    """The derived numbers of an iteration, and a notice where processes get parts of unequal size."""
    samples, G = args.prompts_per_iteration * args.group_size, args.group_size
    print(f"{samples} images an iteration = {args.prompts_per_iteration} prompts x {G} samples, {world} process(es)")
    each = f"{samples // args.updates} images x {trained} of {args.steps} steps"
    print(f"{args.updates} update{'s' * (args.updates > 1)} of {each}", flush=True)
    if samples % world:
        even = world // math.gcd(world, G)
        even *= -(-args.prompts_per_iteration // even)  # rounded up
        parts = f"{samples // world} or {samples // world + 1} samples each"
        print(f"notice: {world} processes, {parts}: the same result, but some wait; equal with --prompts_per_iteration {even}")


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place (all ranks participate). With take_gradients and give_gradients it is what
    DistributedDataParallel does, once per optimizer step in one flat transfer; by hand, because adapters are switched
    inside the model and micro-batches differ in number between processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def take_gradients(parameters: Iterable[torch.Tensor], scale: float = 1) -> torch.Tensor:
    """All gradients, over `scale`, as one flat vector (P,), and none left behind."""
    parameters = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return flat / scale


def give_gradients(parameters: Iterable[torch.Tensor], flat: torch.Tensor) -> None:
    """The reverse: what the optimizer will see."""
    parameters = list(parameters)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p).clone()


def stop_processes() -> None:
    if dist.is_initialized():
        dist.barrier()  # rank 0 may still be writing
        dist.destroy_process_group()


def gather(value: object) -> list:
    """Every process's value, in rank order, on every process (all ranks participate)."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_logs(log: dict[str, float]) -> dict[str, float]:
    """{metric: this process's part} -> {metric: sum over processes} (all ranks participate)."""
    parts = gather(log)
    names = dict.fromkeys(k for part in parts for k in part)
    return {k: sum(part.get(k, 0.0) for part in parts) for k in names}


# ----------------------------------------------------------------------------------------------------------
# Randomness: a function of (seed, iteration, sample), never a position in a stream. One process or eight,
# from the start or resumed, draw the same prompts and the same noise.
# ----------------------------------------------------------------------------------------------------------


def generator(*key) -> torch.Generator:
    """A CPU generator of its own for a key such as (seed, "noise", iteration, sample)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def choose(sizes: dict[str, int], cycle: list[str], wanted: int, seed: int, iteration: int) -> list[tuple[str, int]]:
    """The `wanted` prompts of an iteration: [(task, index), ...], over all processes.

    The task of a slot follows `cycle` (a list of tasks, repeated for ever), so shares are exact in the long run; a
    task's `sizes[task]` prompts come in shuffled passes: all of them once, then all again in another order."""
    chosen = []
    for slot in range(iteration * wanted, (iteration + 1) * wanted):
        turn, place = divmod(slot, len(cycle))
        task = cycle[place]
        nth = turn * cycle.count(task) + cycle[:place].count(task)  # how many slots this task has had before
        order = torch.randperm(sizes[task], generator=generator(seed, task, "pass", nth // sizes[task]))
        chosen.append((task, int(order[nth % sizes[task]])))
    return chosen


def prompts_used(
    args: argparse.Namespace,
    train: dict[str, list[str]],
    tests: dict[str, Sequence],
    sizes: dict[str, int],
    cycle: list[str],
    mine: list[int],
    rank: int,
    world: int,
) -> list[str]:
    """The prompts that this process will need: choose() tells them beforehand, so that a run embeds these and no others.

    train {task: prompts}, tests {task: (prompts, metadata)}, mine: this process's samples."""
    slots, used = {i // args.group_size for i in mine}, set()
    for iteration in range(args.iterations):
        chosen = choose(sizes, cycle, args.prompts_per_iteration, args.seed, iteration)
        used |= {train[task][n % len(train[task])] for slot, (task, n) in enumerate(chosen) if slot in slots}
    return [*sorted(used), *(prompts[i] for prompts, _ in tests.values() for i in share(len(prompts), rank, world))]


# ----------------------------------------------------------------------------------------------------------
# Average of the weights, stopwatch, the log
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def update_ema(ema: Iterable[torch.Tensor], parameters: Iterable[torch.Tensor], updates: int, decay: float) -> None:
    """ema += (1 - d) (parameters - ema) with d = min((1 + n) / (10 + n), decay): short runs are not held at their start."""
    d = min((1 + updates) / (10 + updates), decay)
    for average, parameter in zip(ema, parameters):
        average.lerp_(parameter, 1 - d)


def sha256(path: str | Path) -> str:
    """Of a file, or of what is read from a directory; names do not matter, contents do."""
    path, kinds = Path(path), (".safetensors", ".json", ".txt", ".model")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in kinds)
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:  # streamed: a text encoder has 10 GB
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


class Stopwatch:
    """Seconds of an iteration's phases. A GPU works ahead of Python: each lap waits until it is done."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps, self.began = device, {}, time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.laps[f"seconds/{phase}"] = time.perf_counter() - self.began - sum(self.laps.values())

    def result(self) -> dict[str, float]:
        """The laps, their sum, and on a GPU the peak of memory so far in GB (10^9 bytes)."""
        memory = {"memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9} if self.device.type == "cuda" else {}
        return {"seconds": time.perf_counter() - self.began} | self.laps | memory


def log_line(run: str | Path, values: dict) -> None:
    """Append one iteration to metrics.jsonl: six digits; NaN and infinity, which JSON does not know, as null."""
    short = {k: (float(f"{v:.6g}") if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in values.items()}
    with open(Path(run) / "metrics.jsonl", "a") as file:
        file.write(json.dumps(short) + "\n")


def read_log(run: str | Path) -> list[dict]:
    """The lines of metrics.jsonl as dicts; a last line that was cut by a kill is left out."""
    path, lines = Path(run) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def cut_log(run: str | Path, iteration: int) -> None:
    """After --resume: drop the lines of iterations that are run again."""
    kept = [json.dumps(line) + "\n" for line in read_log(run) if line["iteration"] < iteration]
    beside = Path(run) / "metrics.tmp"
    beside.write_text("".join(kept))
    os.replace(beside, Path(run) / "metrics.jsonl")


def draw_curves(run: str | Path, panels: dict[str, list[str]]) -> None:
    """curves.png from metrics.jsonl: {title: [metric, ...]}, a panel each; panels without data are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = read_log(run)
    panels = {title: [n for n in names if any(n in line for line in log)] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (title, names) in zip(axes[0], panels.items()):
        axis.set_prop_cycle(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"])  # safe for all eyes
        for name in names:
            points = [(line["iteration"], line[name]) for line in log if name in line]
            axis.plot(*zip(*points), marker="." if len(points) < 10 else "", label=name.split("/")[-1])
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    figure.savefig(Path(run) / "curves.png", dpi=110)
    plt.close(figure)
