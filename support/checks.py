"""What is tested before hours are spent: one line each, before a run writes anything.

Faults in this kind of training are silent: an adapter that was not loaded, a sampler that is off by a step, a ratio that
is not 1 because dropout was on. Each of them trains, and learns nothing.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from support.lora import adapter
from support.flags import fail
from support.run import generator
from support.model import backbone_dtype, initial_noise, velocity
from sde import Trajectory, kl_weight, rollout, step

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of labels, relative to the largest velocity


def say(passed: bool, line: str) -> None:
    """A check that does not pass warns and lets the run go on: the person who sees it may know why."""
    print(f"check: {line}" if passed else f"WARNING: check: {line}", file=sys.stdout if passed else sys.stderr, flush=True)


def self_checks(
    args: argparse.Namespace,
    pipe: StableDiffusion3Pipeline,
    text: dict,
    grid: list[float],
    prompts: list[str],
    trained: Sequence[int],
    guidance: dict[str | None, float],
    student: dict[str, torch.nn.Parameter],
) -> None:
    """On rank 0. prompts: two or more that are in `text`; trained: the steps that may be trained; guidance {adapter: scale} of
    "student" and of the teachers; student {name: parameter}."""
    check_disk(args, student)
    check_step(pipe, grid)
    transformer, rows = pipe.transformer, torch.tensor([text["rows"][p] for p in prompts[:2]])
    noise = initial_noise(pipe, [generator(args.seed, "check", i) for i in range(len(rows))], args.size)  # (2, C, H, W)
    steps = sorted({trained[0], trained[-1]})

    def velocities(on, x, t):
        with adapter(transformer, on):
            return velocity(transformer, x, t, text, rows.repeat(len(x) // len(rows)), guidance[on])

    def alone(on, x, t):
        with adapter(transformer, on):
            many = rows.repeat(len(x) // len(rows))
            one = [
                velocity(transformer, x[i : i + 1], t[i : i + 1], text, many[i : i + 1], guidance[on]) for i in range(len(x))
            ]
        return torch.cat(one)

    with torch.no_grad():
        path = rollout(lambda x, t: velocities("student", x, t), noise, grid, args.noise, args.noise_kind)
    x = path.x[steps].flatten(0, 1)  # (S 2, C, H, W): the states of these steps in one batch, as labels and update have them
    t = torch.tensor([grid[i] for i in steps], device=x.device).repeat_interleave(len(rows))  # (S 2,)
    # Of whose probability PPO takes a ratio; the last three objectives have none.
    ratio_of = {"ppo": "coordinate", "kl": None, "ode": None, "sft": None}.get(getattr(args, "objective", None), "image")
    if ratio_of:
        v = alone("student", x, t).detach()  # with gradients on, as in the update
        check_ratio(args, grid, steps, path, v.view_as(path.x[steps]), ratio_of)
    teachers = [name for name in guidance if str(name).startswith("teacher_")]
    if teachers:
        with torch.no_grad():
            check_teachers(args, grid, steps, {on: velocities(on, x, t) for on in ("student", *teachers)})
            check_batches(backbone_dtype(transformer), velocities(teachers[0], x, t), alone(teachers[0], x, t))


def check_disk(args: argparse.Namespace, student: dict[str, torch.nn.Parameter]) -> None:
    """A checkpoint holds student, average and Adam's two moments, and the average twice more as an adapter: 6 x 4 bytes a
    parameter. While one is written, there is one more than are kept; at the end a copy of the adapter."""
    need = (args.keep + 2) * 24 * sum(p.numel() for p in student.values())
    place = next(p for p in (Path(args.out).absolute(), *Path(args.out).absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if free < need:
        fail(f"--out {args.out}: {free / 1e9:.2f} GB free, {args.keep} checkpoints take {need / 1e9:.2f} GB; fewer with --keep")
    say(True, f"disk: {free / 1e9:.1f} GB free, checkpoints take {need / 1e9:.3f} GB")


def check_step(pipe: StableDiffusion3Pipeline, grid: list[float]) -> None:
    """Without noise, sde.step is the step of the pipeline's own scheduler."""
    pipe.scheduler.set_timesteps(len(grid) - 1)
    x, v = torch.randn(2, 1, 4, 8, 8, generator=generator("check"))
    gap = 0.0
    for i, time in enumerate(pipe.scheduler.timesteps):
        theirs = pipe.scheduler.step(v, time, x, return_dict=False)[0]
        gap = max(gap, (step(x, v, grid[i], grid[i + 1], 0.0, grid[1])[0] - theirs).abs().max().item())
    if not gap < 1e-5:
        fail(
            f"--model {pipe.name_or_path}: its scheduler's step is not the Euler step (it differs by {gap:.1e}); not supported"
        )
    say(True, f"step: with noise 0 it is {type(pipe.scheduler).__name__}'s within {gap:.0e}")


def check_ratio(
    args: argparse.Namespace, grid: list[float], steps: list[int], path: Trajectory, v: torch.Tensor, ratio_of: str
) -> None:
    """Before the first update the policy is the one that drew the actions: every ratio is 1, up to the rounding of another
    batch size. Where that rounding reaches the clip range, PPO clips noise. v (S, 2, C, H, W): the policy's once more."""
    gap = 0.0
    for s, i in enumerate(steps):
        mean = step(path.x[i], v[s], grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)[0]
        log_ratio = ((path.x[i + 1] - path.mean[i]) ** 2 - (path.x[i + 1] - mean) ** 2) / (2 * path.std[i] ** 2)
        log_ratio = log_ratio.flatten(1).mean(1) if ratio_of == "image" else log_ratio
        gap = max(gap, log_ratio.expm1().abs().max().item())
    line = f"ratio: before an update every {ratio_of}'s is 1 within {gap:.0e} (clip range {args.clip_range:g})"
    say(gap < args.clip_range / 2, line)


def check_teachers(args: argparse.Namespace, grid: list[float], steps: list[int], v: dict[str, torch.Tensor]) -> None:
    """A teacher that does not differ from the student teaches nothing; two that are the same are probably one by mistake.
    v {adapter: velocities (S 2, C, H, W)}."""
    weight = [(grid[i] - grid[i + 1]) ** 2 / 2 for i in steps]
    if args.noise:
        weight = [kl_weight(grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind) for i in steps]
    weight = torch.tensor(weight, device=v["student"].device)
    kl = lambda a, b: ((v[a] - v[b]).square().flatten(1).mean(1).view(len(steps), -1).mean(1) * weight).mean().item()
    to_student = {name.removeprefix("teacher_"): kl(name, "student") for name in v if name != "student"}
    line = "teachers: KL to the student " + ", ".join(f"{name} {value:.1e}" for name, value in to_student.items())
    say(min(to_student.values()) > 0, line + ("" if min(to_student.values()) > 0 else "; 0 teaches nothing"))
    pairs = {pair: kl(*pair) for pair in combinations([name for name in v if name != "student"], 2)}
    if pairs:
        a, b = (name.removeprefix("teacher_") for name in min(pairs, key=pairs.get))
        smallest = min(pairs.values())
        say(smallest > 0, f"teachers: the closest two are {a} and {b}, KL {smallest:.1e}" + ("" if smallest else ": the same"))


def check_batches(dtype: torch.dtype, v: torch.Tensor, v_alone: torch.Tensor) -> None:
    """A label must not depend on what else is in its batch: v (S 2, C, H, W) of one batch, v_alone of batches of one."""
    gap, name = ((v_alone - v).abs().max() / v.abs().max()).item(), str(dtype).removeprefix("torch.")
    line = f"labels: alone or in a batch the same within {gap:.0e} of the largest velocity"
    say(gap < TOLERANCE[dtype], f"{line} ({name}: {TOLERANCE[dtype]:.0e} allowed)")
