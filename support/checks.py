"""Self-checks before a run writes anything: one printed line each.

Faults in this kind of training are silent: an adapter that was not loaded, a sampler that is off by
one step, a ratio that is not 1 because dropout was on. The run goes on and learns nothing.
"""

import sys
from itertools import combinations

import torch

from losses import log_ratio_of
from sde import kl_weight, rollout, step
from support.model import Backbone, initial_noise
from support.run import check_disk, chunks, generator, rank_and_world


def self_checks(args, pipe, text, grid, prompts, guidance, student) -> None:
    """text: table of embeddings; grid: T + 1 floats; prompts: one or more of the table; guidance:
    {LoRA: scale} of student and teachers; student: {name: parameter}. Only rank 0 checks."""
    if rank_and_world()[0] > 0:
        return
    # Disk: 24 bytes a parameter (student, average, two moments, the average in two formats). There
    # are --keep checkpoints, one that is being written, and at the end an adapter.
    needed = (args.keep + 2) * 24 * sum(p.numel() for p in student.values()) / 1e9
    free = check_disk(args.out, "--out", needed, "lower --keep")
    report(True, f"disk: {free:.1f} GB free, checkpoints take {needed:.3f} GB")
    report(True, f"times, {args.time_grid} shift: {' '.join(f'{t:.3g}' for t in grid)}")

    # Ratio: 1 before the first update, up to rounding. In bf16 this may clip some; our limit is one
    # in a hundred. The rows: two samples, at the first and at the last step to be trained.
    prompt = torch.tensor([text["rows"][prompts[0]], text["rows"][prompts[-1]]])
    noise = initial_noise(pipe, [generator(args.seed, "check", i) for i in range(2)])
    backbone = Backbone(pipe.transformer, text, guidance, batch=4)
    policy = lambda x, t: backbone.predict("student", x, t, prompt)
    path = rollout(policy, noise, grid, args.noise, args.noise_kind)
    steps = torch.tensor([args.eligible_steps[0], args.eligible_steps[-1]])
    step_of, prompt_of = steps.repeat_interleave(2), prompt.repeat(2)  # (4,)
    x, x_next = path.x[steps].flatten(0, 1), path.x[steps + 1].flatten(0, 1)  # (4, C, H, W)
    times = torch.tensor(grid, device=x.device).view(-1, 1, 1, 1)
    t, t_next = times[step_of], times[step_of + 1]  # (4, 1, 1, 1)
    sampler = (args.noise, grid[1], args.noise_kind)
    batches = chunks(torch.arange(4), args.micro_batch)  # as in an update, with gradient
    parts = [backbone.velocity("student", x[n], t[n], prompt_of[n]).detach() for n in batches]
    v = {"student": torch.cat(parts)}  # (4, C, H, W)
    objective = getattr(args, "objective", "grpo")
    if objective not in ("kl", "ode"):
        mean, std = step(x, v["student"], t, t_next, *sampler)
        log_ratio = log_ratio_of(x_next, mean, path.mean[steps].flatten(0, 1), std)
        ratio_of = "coordinate" if objective == "ppo" else "image"
        if ratio_of == "image":
            log_ratio = log_ratio.flatten(1).mean(1)
        outside = (log_ratio.expm1().abs() > args.clip_range).float().mean().item()
        line = f"ratio: before an update {outside:.1%} of the {ratio_of}s are outside"
        report(outside < 0.01, f"{line} the clip range, {args.clip_range:g}")

    # Teachers: one that equals the student teaches nothing; two equal ones are a mistake.
    teachers = [lora for lora in guidance if str(lora).startswith("teacher_")]
    if not teachers:
        return
    v |= {lora: backbone.predict(lora, x, t, prompt_of) for lora in teachers}
    weight = kl_weight(t, t_next, *sampler) if args.noise else (t - t_next) ** 2 / 2
    pairs = [*combinations(v, 2)]
    kl = [(weight * (v[one] - v[other]) ** 2).mean().item() for one, other in pairs]
    smallest, one, other = min((value, *pair) for value, pair in zip(kl, pairs))
    report(smallest > 0, f"teachers: the closest two are {one} and {other}, KL {smallest:.1e}")


def report(passed: bool, line: str) -> None:
    """A failed check is a warning and the run goes on: the user may know the reason."""
    prefix, stream = ("", sys.stdout) if passed else ("WARNING: ", sys.stderr)
    print(f"{prefix}check: {line}", file=stream, flush=True)
