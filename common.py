"""The plumbing that two copies of would drift apart: processes, randomness, EMA, checkpoints, the log.

No method in here: the sampler is sde.py, the objectives are losses.py, the loops are the scripts.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from adapters import save_adapter
from cli import fail, save_json

# ----------------------------------------------------------------------------------------------------------
# Processes. One or many, on CPU or GPU: the same names afterwards
# ----------------------------------------------------------------------------------------------------------


def start_processes():
    """-> rank, world size, device. Under torchrun joins the group (gloo on a CPU, nccl on GPUs), else (0, 1, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        if not cuda:  # processes on one machine share its cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return rank, world, device


def chunks(index, size):
    """An index tensor in pieces of at most `size`; no piece at all where it is empty (torch.split gives an empty one)."""
    return index.split(size) if len(index) else ()


def batches(samples, steps, states):
    """(samples, steps), index tensors, of batches of at most `states`: all steps of some samples, or some of one sample's."""
    for part in chunks(samples, max(1, states // steps)):
        for some in torch.arange(steps).split(states):
            yield part, some


def share(number, rank, world):
    """This process's part of the global sample indices 0 .. number - 1: a contiguous block."""
    return list(range(rank * number // world, (rank + 1) * number // world))


def print_batch(args, trained, world):
    """The derived numbers of an iteration, and a notice where processes get parts of unequal size."""
    samples, G = args.prompts_per_iteration * args.group_size, args.group_size
    print(f"{samples} images an iteration = {args.prompts_per_iteration} prompts x {G} samples, {world} process(es)")
    print(f"{args.updates} updates of {samples // args.updates} images x {trained} of {args.steps} steps", flush=True)
    if samples % world:
        even = world // math.gcd(world, G)
        even *= -(-args.prompts_per_iteration // even)  # rounded up
        parts = f"{samples // world} or {samples // world + 1} samples each"
        print(f"notice: {world} processes, {parts}: the same result, but some wait; --prompts_per_iteration {even} is even")


def all_reduce(tensor):
    """Sum over all processes, in place (all ranks participate). With take_gradients and give_gradients it is what
    DistributedDataParallel does, once per optimizer step in one flat transfer; by hand, because adapters are switched
    inside the model and micro-batches differ in number between processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def take_gradients(parameters, scale=1):
    """All gradients, over `scale`, as one flat vector (P,), and none left behind."""
    parameters = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return flat / scale


def give_gradients(parameters, flat):
    """The reverse: what the optimizer will see."""
    parameters = list(parameters)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p).clone()


def stop_processes():
    if dist.is_initialized():
        dist.barrier()  # rank 0 may still be writing
        dist.destroy_process_group()


def gather(value):
    """Every process's value, in rank order, on every process (all ranks participate)."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_logs(log):
    """{metric: this process's part} -> {metric: sum over processes} (all ranks participate)."""
    parts = gather(log)
    return {k: sum(part.get(k, 0.0) for part in parts) for k in {k: None for part in parts for k in part}}


# ----------------------------------------------------------------------------------------------------------
# Randomness: a function of (seed, iteration, sample), never a position in a stream. One process or eight,
# from the start or resumed, draw the same prompts and the same noise.
# ----------------------------------------------------------------------------------------------------------


def generator(*key):
    """A CPU generator of its own for a key such as (seed, "noise", iteration, sample)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def choose(sizes, cycle, wanted, seed, iteration):
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


def prompts_used(args, train, tests, sizes, cycle, mine, rank, world):
    """The prompts that this process will need: choose() tells them beforehand, so that a run embeds these and no others.

    train {task: prompts}, tests {task: (prompts, metadata)}, mine: this process's samples."""
    slots, used = {i // args.group_size for i in mine}, set()
    for iteration in range(args.iterations):
        chosen = choose(sizes, cycle, args.prompts_per_iteration, args.seed, iteration)
        used |= {train[task][n % len(train[task])] for slot, (task, n) in enumerate(chosen) if slot in slots}
    return [*used, *(prompts[i] for prompts, _ in tests.values() for i in share(len(prompts), rank, world))]


# ----------------------------------------------------------------------------------------------------------
# Average of the weights, checkpoints, signals, the log
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def update_ema(ema, parameters, updates, decay):
    """ema += (1 - d) (parameters - ema) with d = min((1 + n) / (10 + n), decay): short runs are not held at their start."""
    d = min((1 + updates) / (10 + updates), decay)
    for average, parameter in zip(ema, parameters):
        average.lerp_(parameter, 1 - d)


def sha256(path):
    """Of a file, or of the safetensors and JSON files in a directory: what --resume compares."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".safetensors", ".json"))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:  # streamed: a text encoder has 10 GB
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def save_checkpoint(run, iteration, student, ema, optimizer, config, state, keep=2):
    """checkpoints/step_N: adapter/ (the average, for use) and the full training state. Complete, or not there at all."""
    final = Path(run) / "checkpoints" / f"step_{iteration}"
    beside = final.with_name(f"tmp_{iteration}")
    shutil.rmtree(beside, ignore_errors=True)
    save_adapter(beside / "adapter", ema, config)
    tensors = {}
    for k, p in student.items():
        tensors |= {f"student.{k}": p.detach(), f"ema.{k}": ema[k].detach()}
        tensors |= {f"optimizer.{n}.{k}": v for n, v in optimizer.state.get(p, {}).items()}
    save_file({k: t.contiguous().cpu() for k, t in tensors.items()}, beside / "state.safetensors")
    save_json(beside / "state.json", {"iteration": iteration, **state})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(beside, final)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def checkpoints(run):
    """The run's checkpoints, oldest first."""
    return sorted((Path(run) / "checkpoints").glob("step_*"), key=lambda p: int(p.name.split("_")[1]))


def begin_run(run, args, harmless, files, student, ema, optimizer, rank):
    """Make the run folder, or put its newest checkpoint back. Returns the iterations done and what --resume will compare:
    the flags, except `harmless` ones that do not change the mathematics, and the hashes of `files`."""
    state = {
        "flags": {k: v for k, v in vars(args).items() if k not in harmless},
        "files": {str(f): sha256(f) for f in files if Path(f).exists()},
    }
    start = load_checkpoint(run, student, ema, optimizer, state) if args.resume else 0
    if rank == 0:
        if args.overwrite:
            shutil.rmtree(run, ignore_errors=True)
        (run / "samples").mkdir(parents=True, exist_ok=True)
        save_json(run / "args.json", vars(args))
        cut_log(run, start)
    gather(None)  # the folder is there before anyone writes into it (all ranks participate)
    return start, state


def load_checkpoint(run, student, ema, optimizer, state):
    """Put the newest checkpoint back; refuse one made with other flags or files. Returns its iteration."""
    found = checkpoints(run)
    if not found:
        fail(f"--resume: {run} holds no checkpoint yet; start again with --overwrite")
    saved = json.loads((found[-1] / "state.json").read_text())
    for key, value in state.items():
        if saved[key] != value:
            names = [k for k in value if saved[key].get(k) != value[k]] or list(saved[key])
            fail(f"--resume: {', '.join(names)} changed since {found[-1].name} of {run} was saved; resume with the same")
    tensors = load_file(found[-1] / "state.safetensors")
    with torch.no_grad():
        for k, p in student.items():
            p.copy_(tensors[f"student.{k}"])
            ema[k].copy_(tensors[f"ema.{k}"])
            names = [n for n in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{n}.{k}" in tensors]
            if names:
                optimizer.state[p] = {n: tensors[f"optimizer.{n}.{k}"].to(p.device) for n in names}
    return saved["iteration"]


class Stopwatch:
    """Seconds of an iteration's phases. A GPU works ahead of Python: each lap waits until it is done."""

    def __init__(self, device):
        self.device, self.laps, self.began = device, {}, time.perf_counter()

    def lap(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.laps[f"seconds/{phase}"] = time.perf_counter() - self.began - sum(self.laps.values())

    def result(self):
        """The laps, their sum, and on a GPU the peak of memory so far in GB (10^9 bytes)."""
        memory = {"memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9} if self.device.type == "cuda" else {}
        return {"seconds": time.perf_counter() - self.began} | self.laps | memory


class StopSignal:
    """Ctrl-C and SIGTERM finish the iteration, save and exit; a second one exits at once. `stop()` is agreed by all ranks."""

    def __init__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number, frame):
        self.received += 1
        if self.received > 1:
            os._exit(128 + number)
        print("\nstopping after this iteration; again to stop at once", file=sys.stderr, flush=True)

    def restore(self):
        """After the loop: Ctrl-C is Ctrl-C again."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self):
        return any(gather(self.received))


def log_line(run, values):
    """Append one iteration to metrics.jsonl."""
    with open(Path(run) / "metrics.jsonl", "a") as file:
        file.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}) + "\n")


def read_log(run):
    """The lines of metrics.jsonl as dicts; a last line that was cut by a kill is left out."""
    path, lines = Path(run) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def cut_log(run, iteration):
    """After --resume: drop the lines of iterations that are run again."""
    kept = [json.dumps(line) + "\n" for line in read_log(run) if line["iteration"] < iteration]
    beside = Path(run) / "metrics.tmp"
    beside.write_text("".join(kept))
    os.replace(beside, Path(run) / "metrics.jsonl")


def draw_curves(run, panels):
    """curves.png from metrics.jsonl: {title: [metric, ...]}, a panel each; panels without data are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = read_log(run)
    panels = {title: [n for n in names if any(n in line for line in log)] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained", squeeze=False)
    for axis, (title, names) in zip(axes[0], panels.items()):
        for name in names:
            axis.plot(*zip(*[(line["iteration"], line[name]) for line in log if name in line]), label=name.split("/")[-1])
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(Path(run) / "curves.png", dpi=110)
    plt.close(figure)
