"""Self-checks before a run writes anything: one printed line each.

Faults in this kind of training are silent: an adapter that was not loaded, a sampler that is off by
one step, a ratio that is not 1 because dropout was on. The run goes on and learns nothing.
"""

import argparse
import shutil
import sys
from itertools import combinations
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from sde import Trajectory, kl_weight, rollout, step
from support.flags import fail
from support.lora import use
from support.model import backbone_dtype, initial_noise, velocity
from support.run import generator

# Of labels, relative to the largest velocity.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# What PPO's ratio is taken over; without an entry: the whole image.
RATIO_OF = {"ppo": "coordinate", "kl": None, "ode": None}


def report(passed: bool, line: str) -> None:
    """A failed check warns and the run goes on: its user may know the reason."""
    if passed:
        print(f"check: {line}", flush=True)
    else:
        print(f"WARNING: check: {line}", file=sys.stderr, flush=True)


def self_checks(
    args: argparse.Namespace,
    pipe: StableDiffusion3Pipeline,
    text: dict,
    grid: list[float],
    prompts: list[str],
    guidance: dict[str | None, float],
    student: dict[str, torch.nn.Parameter],
) -> None:
    """On rank 0. prompts: at least two that are in `text`; guidance {LoRA: scale} of "student" and
    of the teachers; student {name: parameter}."""
    check_disk(args, student)
    check_step(pipe, grid)
    rows = torch.tensor([text["rows"][prompt] for prompt in prompts[:2]])
    noise = initial_noise(pipe, [generator(args.seed, "check", i) for i in range(2)], args.size)

    def predict(lora, x, t):  # rows of x: both prompts at one step, then both at the next
        prompt = rows.repeat(len(x) // 2)
        with use(pipe.transformer, lora):
            return velocity(pipe.transformer, x, t, text, prompt, guidance[lora])

    def predict_alone(lora, x, t):  # the same in batches of one
        v = []
        with use(pipe.transformer, lora):
            for n in range(len(x)):
                one = slice(n, n + 1)
                prompt = rows[n % 2].view(1)
                v.append(velocity(pipe.transformer, x[one], t[one], text, prompt, guidance[lora]))
        return torch.cat(v)

    with torch.no_grad():
        student_v = lambda x, t: predict("student", x, t)
        path = rollout(student_v, noise, grid, args.noise, args.noise_kind)
    steps = sorted({args.eligible_steps[0], args.eligible_steps[-1]})
    x = path.x[steps].flatten(0, 1)  # (2 S, C, H, W): states as labels and update see them
    t = torch.tensor([grid[i] for i in steps], device=x.device).repeat_interleave(2)  # (2 S,)
    ratio_of = RATIO_OF.get(getattr(args, "objective", None), "image")
    if ratio_of:
        v = predict_alone("student", x, t).detach()  # with gradients on, as in the update
        check_ratio(args, grid, steps, path, v.unflatten(0, (len(steps), 2)), ratio_of)
    teachers = [name for name in guidance if str(name).startswith("teacher_")]
    if teachers:
        with torch.no_grad():
            v = {name: predict(name, x, t) for name in ("student", *teachers)}
            check_teachers(args, grid, steps, v)
            v_alone = predict_alone(teachers[0], x, t)
        check_batches(backbone_dtype(pipe.transformer), v[teachers[0]], v_alone)


def check_disk(args: argparse.Namespace, student: dict[str, torch.nn.Parameter]) -> None:
    """A checkpoint takes 24 bytes a parameter: student, average and Adam's two moments, and the
    average twice more as an adapter. There is one more than --keep while one is written, and at the
    end a copy of the adapter."""
    needed = (args.keep + 2) * 24 * sum(p.numel() for p in student.values())
    out = Path(args.out).absolute()
    folder = next(path for path in (out, *out.parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        fail(f"--out {args.out}: {free / 1e9:.2f} GB free, but {args.keep} checkpoints take "
             f"{needed / 1e9:.2f} GB; keep fewer with --keep")  # fmt: skip
    report(True, f"disk: {free / 1e9:.1f} GB free, checkpoints take {needed / 1e9:.3f} GB")


def check_step(pipe: StableDiffusion3Pipeline, grid: list[float]) -> None:
    """Without noise, sde.step equals the step of the pipeline's own scheduler."""
    pipe.scheduler.set_timesteps(len(grid) - 1)
    x, v = torch.randn(2, 1, 4, 8, 8, generator=generator("check"))
    gap = 0.0
    for i, timestep in enumerate(pipe.scheduler.timesteps):
        expected = pipe.scheduler.step(v, timestep, x, return_dict=False)[0]
        mean, _ = step(x, v, grid[i], grid[i + 1], 0.0, grid[1])
        gap = max(gap, (mean - expected).abs().max().item())
    if not gap < 1e-5:
        fail(f"--model {pipe.name_or_path}: not supported: the step of its scheduler is not the "
             f"Euler step (it differs by {gap:.1e})")  # fmt: skip
    report(True, f"step: with noise 0 it equals {type(pipe.scheduler).__name__}'s within {gap:.0e}")


def check_ratio(
    args: argparse.Namespace,
    grid: list[float],
    steps: list[int],
    path: Trajectory,
    v: torch.Tensor,
    ratio_of: str,
) -> None:
    """Before the first update every ratio is 1, up to the rounding of another batch size. Where
    that rounding reaches the clip range, PPO clips noise. v (S, 2, C, H, W): predicted again."""
    gap = 0.0
    for n, i in enumerate(steps):
        mean, _ = step(path.x[i], v[n], grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)
        squares = (path.x[i + 1] - path.mean[i]) ** 2 - (path.x[i + 1] - mean) ** 2
        log_ratio = squares / (2 * path.std[i] ** 2)
        if ratio_of == "image":
            log_ratio = log_ratio.flatten(1).mean(1)
        gap = max(gap, log_ratio.expm1().abs().max().item())
    line = f"ratio: before an update every {ratio_of}'s is 1 within {gap:.0e}"
    report(gap < args.clip_range / 2, f"{line} (clip range {args.clip_range:g})")


def check_teachers(
    args: argparse.Namespace, grid: list[float], steps: list[int], v: dict[str, torch.Tensor]
) -> None:
    """A teacher that equals the student teaches nothing; of two equal teachers one is probably a
    mistake. v {LoRA: velocities (2 S, C, H, W)}."""
    weight = []
    for t, t_next in ((grid[i], grid[i + 1]) for i in steps):
        if args.noise:
            weight.append(kl_weight(t, t_next, args.noise, grid[1], args.noise_kind))
        else:
            weight.append((t - t_next) ** 2 / 2)
    weight = torch.tensor(weight).repeat_interleave(2)  # (2 S,)

    def kl(a, b):
        return (weight * (v[a] - v[b]).square().flatten(1).mean(1).cpu()).mean().item()

    teachers = [name for name in v if name != "student"]
    to_student = {name.removeprefix("teacher_"): kl(name, "student") for name in teachers}
    line = ", ".join(f"{task} {value:.1e}" for task, value in to_student.items())
    report(min(to_student.values()) > 0, f"teachers: KL to the student (0 teaches nothing) {line}")
    between = {pair: kl(*pair) for pair in combinations(teachers, 2)}
    if between:
        a, b = (name.removeprefix("teacher_") for name in min(between, key=between.get))
        smallest = min(between.values())
        report(smallest > 0, f"teachers: the closest two are {a} and {b}, KL {smallest:.1e}")


def check_batches(dtype: torch.dtype, v: torch.Tensor, v_alone: torch.Tensor) -> None:
    """A label must not depend on the rest of its batch: v (2 S, C, H, W) predicted in one batch,
    v_alone in batches of one."""
    gap, allowed = ((v_alone - v).abs().max() / v.abs().max()).item(), TOLERANCE[dtype]
    line = f"labels: alone and in a batch they agree within {gap:.0e} of the largest velocity"
    report(gap < allowed, f"{line} ({allowed:.0e} is allowed in {str(dtype).split('.')[-1]})")
