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

from sde import kl_weight, rollout, step
from support.flags import fail
from support.model import Backbone, backbone_dtype, initial_noise
from support.run import generator, rank_and_world

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative to the largest velocity
RATIO_OF = {"ppo": "coordinate", "kl": None, "ode": None}  # of PPO's ratio; all others: "image"


def self_checks(args: argparse.Namespace, pipe, text, grid, prompts, guidance, student) -> None:
    """text: table of embeddings; grid: T + 1 floats; prompts: one or more of the table; guidance:
    {LoRA: scale} of student and teachers; student: {name: parameter}. Only rank 0 checks."""
    if rank_and_world()[0] > 0:
        return
    check_disk(args, student)
    check_step(pipe, grid)
    prompt = torch.tensor([text["rows"][prompts[0]], text["rows"][prompts[-1]]])
    noise = initial_noise(pipe, [generator(args.seed, "check", i) for i in range(2)], args.size)
    backbone = Backbone(pipe.transformer, text, guidance, batch=4)
    policy = lambda x, t: backbone.predict("student", x, t, prompt)
    path = rollout(policy, noise, grid, args.noise, args.noise_kind)

    # The rows: both samples at the first and at the last step that may be trained.
    steps = torch.tensor(sorted({args.eligible_steps[0], args.eligible_steps[-1]}))
    step_of, prompt_of = steps.repeat_interleave(2), prompt.repeat(len(steps))  # (N,)
    x, x_next = path.x[steps].flatten(0, 1), path.x[steps + 1].flatten(0, 1)  # (N, C, H, W)
    times = torch.tensor(grid, device=x.device).view(-1, 1, 1, 1)
    t, t_next = times[step_of], times[step_of + 1]  # (N, 1, 1, 1)
    sde = (args.noise, grid[1], args.noise_kind)

    ratio_of = RATIO_OF.get(getattr(args, "objective", None), "image")
    if ratio_of:
        v = torch.empty_like(x)
        for n in torch.arange(len(x)).split(1):  # alone and with gradients on, as in an update
            v[n] = backbone.velocity("student", x[n], t[n], prompt_of[n]).detach()
        mean, std = step(x, v, t, t_next, *sde)
        mean_old = path.mean[steps].flatten(0, 1)
        log_ratio = ((x_next - mean_old) ** 2 - (x_next - mean) ** 2) / (2 * std**2)
        check_ratio(log_ratio, ratio_of, args.clip_range)
    teachers = [lora for lora in guidance if str(lora).startswith("teacher_")]
    if teachers:
        loras = ("student", *teachers)
        v = {lora: backbone.predict(lora, x, t, prompt_of) for lora in loras}
        weight = kl_weight(t, t_next, *sde) if args.noise else (t - t_next) ** 2 / 2
        check_teachers(v, weight)
        alone = Backbone(pipe.transformer, text, guidance, batch=1)
        v_alone = alone.predict(teachers[0], x, t, prompt_of)
        check_batches(v[teachers[0]], v_alone, backbone_dtype(pipe.transformer))


def report(passed: bool, line: str) -> None:
    """A failed check is a warning and the run goes on: the user may know the reason."""
    prefix, stream = ("", sys.stdout) if passed else ("WARNING: ", sys.stderr)
    print(f"{prefix}check: {line}", file=stream, flush=True)


def check_disk(args, student) -> None:
    """A checkpoint takes 24 bytes a parameter: student, average, Adam's two moments, and the
    average in two formats. While saving there is one more than --keep, at the end an adapter."""
    needed = (args.keep + 2) * 24 * sum(p.numel() for p in student.values()) / 1e9
    out = Path(args.out).absolute()
    free = shutil.disk_usage(next(p for p in (out, *out.parents) if p.is_dir())).free / 1e9
    if free < needed:
        fail(f"--out {args.out}: {free:.2f} GB free, checkpoints take {needed:.2f}; lower --keep")
    report(True, f"disk: {free:.1f} GB free, checkpoints take {needed:.3f} GB")


def check_step(pipe, grid) -> None:
    """Without noise, sde.step equals the step of the pipeline's own scheduler."""
    pipe.scheduler.set_timesteps(len(grid) - 1)
    x, v = torch.randn(2, 1, 4, 8, 8, generator=generator("check"))
    gap, name = 0.0, type(pipe.scheduler).__name__
    for i, timestep in enumerate(pipe.scheduler.timesteps):
        expected = pipe.scheduler.step(v, timestep, x, return_dict=False)[0]
        mean, _ = step(x, v, grid[i], grid[i + 1], 0.0, grid[1])
        gap = max(gap, (mean - expected).abs().max().item())
    if not gap < 1e-5:
        fail(f"--model {pipe.name_or_path}: {name}'s step is not the Euler step (off by {gap:.1e})")
    report(True, f"step: with noise 0 it equals {name}'s within {gap:.0e}")


def check_ratio(log_ratio, ratio_of, clip_range) -> None:
    """Before the first update every ratio is 1, up to the rounding of another batch size. Where
    that rounding reaches the clip range, PPO clips noise. log_ratio (N, C, H, W)."""
    if ratio_of == "image":
        log_ratio = log_ratio.flatten(1).mean(1)
    gap = log_ratio.expm1().abs().max().item()
    line = f"ratio: before an update every {ratio_of}'s is 1 within {gap:.0e}"
    report(gap < clip_range / 2, f"{line} (clip range {clip_range:g})")


def check_teachers(v, weight) -> None:
    """A teacher that equals the student teaches nothing; of two equal teachers one is probably a
    mistake. v: {LoRA: velocities (N, C, H, W)}; weight (N, 1, 1, 1): KL = weight * distance."""
    kl = lambda a, b: (weight * (v[a] - v[b]).square()).mean().item()
    names = {lora: lora.removeprefix("teacher_") for lora in v if lora != "student"}
    to_student = {names[lora]: kl(lora, "student") for lora in names}
    line = ", ".join(f"{name} {value:.1e}" for name, value in to_student.items())
    report(min(to_student.values()) > 0, f"teachers: KL to the student (0: no signal) {line}")
    if len(names) > 1:
        smallest, a, b = min((kl(a, b), names[a], names[b]) for a, b in combinations(names, 2))
        report(smallest > 0, f"teachers: the closest two are {a} and {b}, KL {smallest:.1e}")


def check_batches(v, v_alone, dtype) -> None:
    """A label must not depend on its batch: v of one batch, v_alone of batches of one."""
    gap, allowed = ((v_alone - v).abs().max() / v.abs().max()).item(), TOLERANCE[dtype]
    line = f"labels: alone and in a batch they agree within {gap:.0e} of the largest velocity"
    report(gap < allowed, f"{line} ({str(dtype).removeprefix('torch.')} allows {allowed:.0e})")
