"""Check the flags of a training script, and fill in those that follow from others."""

import argparse
import os

from support.files import check_adapter, check_model, prompt_files
from support.flags import TASKS, check_out, fail


def check_distillation(args: argparse.Namespace) -> argparse.Namespace:
    """For train_opd.py and train_sft.py. Afterwards every file that a flag names exists."""
    check_model(args.model)
    args.teacher = args.teacher or {task: f"{args.model}/adapters/{task}" for task in TASKS}
    check_prompt_files(args, list(args.teacher))
    for name in ("task_mix", "teacher_guidance", "teacher_alpha"):
        for task in getattr(args, name):
            if task not in args.teacher:
                fail(f"--{name}: task {task!r} has no teacher; add --teacher {task}=DIR")
    args.task_mix = args.task_mix or dict.fromkeys(args.teacher, 1)
    for task, path in args.teacher.items():
        if task not in args.task_mix:
            fail(f"--teacher {task}: --task_mix has no share for it; add one or drop the teacher")
        check_adapter(path, f"--teacher {task}")
    args.init = args.init or f"{args.model}/adapters/merged"
    check_start(args.init, "--init")
    if "objective" in args:
        check_objective(args)
    else:
        check_processes(args.batch, "--batch")
        if args.sft_images < len(args.teacher):
            fail(f"--sft_images must be at least {len(args.teacher)}: one for every task")
    if not getattr(args, "dry_run", False):
        check_out(args)
    return args


def check_objective(args: argparse.Namespace) -> None:
    """For train_opd.py alone: the anchor, the objective and the sampler."""
    args.anchor = args.anchor or f"{args.model}/adapters/deqa"
    if args.mar_weight:
        check_start(args.anchor, "--anchor")
    if args.student_guidance is None:
        args.student_guidance = args.guidance
    if args.clip_range is None:  # 0.2 for a coordinate's ratio, 1e-4 for an image's
        args.clip_range = 0.2 if args.objective == "ppo" else 1e-4
    if args.objective == "ode":
        args.noise = 0.0
    if args.objective == "trajectory" and args.train_steps == "random:1":
        fail("--train_steps random:1: --objective trajectory looks ahead; train 2 steps or more")
    check_samples(args)
    kind, _, number = args.train_steps.partition(":")
    where, steps = f"--train_steps {args.train_steps}", list(range(args.steps))
    named = {"all": steps, "first": steps[:-1], "random": steps[:-1]}
    try:
        eligible = named.get(kind) or sorted({int(step) for step in kind.split(",")})
        count = int(number) if kind == "random" else len(eligible)
    except ValueError:
        fail(f"{where}: expected first, all, random:K or a list such as 0,2,5")
    if not 1 <= count <= len(eligible) or eligible[0] < 0 or eligible[-1] >= args.steps:
        fail(f"{where}: there are {args.steps} steps, numbered from 0 (--steps)")
    if args.noise_kind == "cps" and args.noise > 0 and steps[-1] in eligible:
        fail(f"{where}: the last cps step has no noise and so no KL; leave it out")
    args.eligible_steps, args.trained_steps = eligible, count  # an iteration trains `count` of them


def check_teacher(args: argparse.Namespace) -> argparse.Namespace:
    """For train_teacher.py. Afterwards every file that a flag names exists."""
    check_model(args.model)
    for task in args.tasks:
        if task not in (*TASKS, *args.prompts):
            known = f"{', '.join(TASKS)}, or any task with --prompts {task}=FILE"
            fail(f"unknown task {task!r} (--tasks, --mix or --reward): expected {known}")
    if not args.eval_every:
        args.eval_prompts = 0
    check_prompt_files(args, args.tasks)
    if args.final == "best" and not args.eval_every:
        fail("--final best needs test rewards: give --eval_every")
    check_samples(args)
    check_start(args.init, "--init")
    check_out(args)
    return args


def check_prompt_files(args: argparse.Namespace, tasks: list[str]) -> None:
    """args.prompts and args.test_prompts -> {task: file}. With --eval_prompts 0 the second holds
    given files only, for the command printed at the end."""
    args.prompts = prompt_files(args.prompts, tasks, "train", args.model)
    tests = tasks if args.eval_prompts else args.test_prompts
    args.test_prompts = prompt_files(args.test_prompts, tests, "test", args.model, "--test_prompts")


def check_start(path: str, flag: str) -> None:
    if path != "base":
        check_adapter(path, flag)


def check_samples(args: argparse.Namespace) -> None:
    """Every step has a density, every update an equal part of a group, every process a sample."""
    G = args.group_size
    if args.noise <= 0 and getattr(args, "objective", "") != "ode":
        fail("--noise must be above 0: a step without noise has no density")
    if args.noise_kind == "cps" and args.noise > 1:
        fail("--noise_kind cps: --noise is at most 1, where all noise of a step is new")
    if G % args.updates:
        fail(f"--updates {args.updates} must divide --group_size {G}: each takes a part of a group")
    check_processes(args.prompts_per_iteration * G, "--prompts_per_iteration")


def check_processes(samples: int, flag: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))
    if samples < world:
        fail(f"{world} processes for {samples} samples: raise {flag}")
