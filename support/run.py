"""What every training run needs and no paper describes: processes, gradients, randomness."""

import argparse
import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from support.files import read_prompts
from support.flags import fail, reason

# ---- Processes: one or many, on CPU or GPU


def start_processes() -> tuple[int, int, torch.device]:
    """(rank, number of processes, device). Under torchrun joins the group: nccl or gloo."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
        torch.cuda.set_device(device)
    elif world > 1:  # processes on one machine share its cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    if world > 1 and "MASTER_ADDR" not in os.environ:
        fail(f"WORLD_SIZE is {world}, but torchrun did not start this: `torchrun train_opd.py ...`")
    if world > 1:
        store, *_ = next(dist.rendezvous("env://"))
        if local_world == world:
            # After torchrun's --max-restarts the store still holds addresses of dead processes
            # (pytorch #135712). With several machines set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        store.set(f"started/{rank}", "")  # a process that failed earlier never sets it
        store.wait([f"started/{other}" for other in range(world)], timedelta(minutes=5))
        # Hours: others may score or download for long. torchrun notices a process that dies.
        how = {"rank": rank, "world_size": world, "timeout": timedelta(hours=12)}
        if device.type == "cuda":
            how["device_id"] = device
        dist.init_process_group(backend, store=store, **how)
    return rank, world, device


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes): (0, 1) without a group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def stop_processes() -> None:
    if dist.is_initialized():
        dist.barrier()  # rank 0 may still be writing
        dist.destroy_process_group()


def share(number: int, rank: int, world: int) -> list[int]:
    """This process's contiguous part of 0 .. number - 1."""
    return list(range(rank * number // world, (rank + 1) * number // world))


def gather(value: object) -> list:
    """Every process's value, in rank order, on every process. All processes must call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over processes, in place; all must call it. DistributedDataParallel does not fit: LoRAs
    are switched, and the number of micro-batches differs between processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def print_batch(args: argparse.Namespace) -> None:
    """Print the sizes of an iteration (rank 0)."""
    rank, world = rank_and_world()
    prompts, G = args.prompts_per_iteration, args.group_size
    if rank == 0:
        tasks = ", ".join(args.prompts)
        print(f"an iteration: {prompts} prompts ({tasks}) x {G} samples, {world} process(es)")
        steps, images = f"{args.trained_steps} of {args.steps} steps", prompts * G // args.updates
        print(f"{args.updates} update(s) of {images} images x {steps}", flush=True)


# ---- Gradients and the average of the weights


def chunks(index: Tensor, size: int) -> tuple[Tensor, ...]:
    """An index tensor in pieces of at most `size`; no piece if it is empty."""
    return index.split(size) if len(index) else ()


def take_gradients(parameters: Sequence[Tensor]) -> Tensor:
    """All gradients as one flat vector (P,); the parameters keep none."""
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return torch.cat([gradient.flatten() for gradient in flat])


def set_gradients(parameters: Sequence[Tensor], flat: Tensor) -> None:
    """The reverse: flat (P,) becomes what the optimizer sees."""
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p).clone()


@torch.no_grad()
def update_average(average: dict, student: dict, updates: int, args: argparse.Namespace) -> None:
    """After n updates: average += (1 - d) (student - average), d = min((1 + n) / (10 + n),
    --ema_decay). The warm-up (Flow-GRPO's code) is for short runs."""
    if updates % args.ema_every:
        return
    d = min((1 + updates) / (10 + updates), args.ema_decay)
    for name, parameter in student.items():
        average[name].lerp_(parameter, 1 - d)


def task_cosines(gradients: Tensor, tasks: list[str]) -> dict[str, float]:
    """{"grad_norm/A": length, "cosine/A-B": agreement, -1 to 1} of gradients (tasks, P). Tasks
    without samples have none."""
    lengths = gradients.norm(dim=1)  # (tasks,)
    cosine = gradients @ gradients.T / (lengths[:, None] * lengths).clamp(min=1e-30)
    present = [k for k, length in enumerate(lengths.tolist()) if length]
    log = {f"grad_norm/{tasks[k]}": lengths[k].item() for k in present}
    for j in present:
        log |= {f"cosine/{tasks[j]}-{tasks[k]}": cosine[j, k].item() for k in present if k > j}
    return log


# ---- Randomness: a function of (seed, iteration, sample), never a position in a stream. One
# process or eight, from the start or resumed, draw the same prompts and noise.


def generator(*key) -> torch.Generator:
    """A CPU generator for a key such as (seed, "rollout", iteration, sample)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def draw_schedule(train: dict, shares: dict, wanted: int, iterations: int, seed: int) -> list[list]:
    """Per iteration `wanted` of (task, prompt, metadata), from train {task: (prompts, metadata)}.

    Tasks follow a cycle, so `shares` {task: whole number} are exact in the long run. A task's
    prompts come in shuffled passes: each once, then each again in another order."""
    cycle = [task for task in train for _ in range(int(shares[task]))]
    drawn, order = dict.fromkeys(train, 0), {}  # {task: prompts so far}, {task: its current pass}
    schedule = [[] for _ in range(iterations)]
    for slot in range(iterations * wanted):
        task = cycle[slot % len(cycle)]
        prompts, metadata = train[task]
        number = len(prompts)
        if drawn[task] % number == 0:  # a new pass
            key = (seed, task, "pass", drawn[task] // number)
            order[task] = torch.randperm(number, generator=generator(*key)).tolist()
        n = order[task][drawn[task] % number]
        schedule[slot // wanted].append((task, prompts[n], metadata[n]))
        drawn[task] += 1
    return schedule


def read_tasks(files: dict[str, str], number: int | None = None) -> dict[str, tuple[list, list]]:
    """{task: file} -> {task: (prompts, metadata)}: `number` lines of each, evenly spaced, since a
    file may be sorted by kind, as GenEval's is. None: all lines; 0: {}."""
    if number == 0:
        return {}
    tasks = {}
    for task, file in files.items():
        prompts, metadata = read_prompts(file)
        n = min(number or len(prompts), len(prompts))
        lines = [i * len(prompts) // n for i in range(n)]
        tasks[task] = ([prompts[i] for i in lines], [metadata[i] for i in lines])
    return tasks


def prompts_used(schedule: list[list[tuple]], samples: list[int], G: int, tests: dict) -> list[str]:
    """The prompts that this process will need: a run embeds these and no others."""
    places = sorted({i // G for i in samples})
    used = {slots[place][1] for slots in schedule for place in places}
    return sorted(used | set(test_prompts_used(tests)))


def test_prompts_used(tests: dict[str, tuple]) -> list[str]:
    """This process's share of every task's test prompts."""
    rank, world = rank_and_world()
    return [prompts[i] for prompts, _ in tests.values() for i in share(len(prompts), rank, world)]


def check_disk(folder: str, flag: str, needed: float, cure: str) -> float:
    """The free GB where `folder` is or will be; an error if `needed` are more."""
    path = Path(folder).absolute()
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free / 1e9
    if free < needed:
        fail(f"{flag} {folder}: {free:.2f} GB free, {needed:.2f} needed; {cure}")
    return free


OUT_OF_MEMORY = ("enough memory", "allocate memory", "CUDA out of memory", "STATUS_ALLOC_FAILED")
CURES = "the batch flags, or give --checkpointing, --no_t5 or --dtype bf16"
# In the words of gloo, nccl and the store.
PEER_GONE = ("by peer", "Broken pipe", "remote process exit", "wait timeout", "got 0 bytes")


def guarded(main: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """main(args) that Ctrl-C or a lack of memory (exit code 2) ends with one line."""

    @functools.wraps(main)
    def run(args):
        try:
            return main(args)
        except KeyboardInterrupt:  # amid the last scores; a run that trains catches the signal
            tqdm.write("stopped; what was saved is kept", file=sys.stderr)
            raise SystemExit(130) from None
        except (MemoryError, RuntimeError) as error:
            message = reason(error)
            if isinstance(error, MemoryError) or any(sign in message for sign in OUT_OF_MEMORY):
                line = f"out of memory: lower {CURES} ({message})"
            elif any(sign in message for sign in PEER_GONE):
                line = "another process has stopped; its own message says why"
            else:
                raise
            tqdm.write(f"error: {line}", file=sys.stderr)  # below the progress bar
            saver = getattr(sys.excepthook, "__self__", None)  # of a run that has begun
            if hasattr(saver, "stop"):
                saver.stop()
            if dist.is_initialized():
                os._exit(2)  # at once: a tidy end would wait for the other processes
            raise SystemExit(2) from None

    return run
