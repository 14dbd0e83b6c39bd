"""Stage 3: Flow-OPD, on-policy distillation of teachers into one student (arXiv 2605.08063).

    python train_opd.py                          # the miniature: merged start, four teachers, MAR
    torchrun --nproc_per_node=8 train_opd.py     # the same run on eight processes
    torchrun --nproc_per_node=8 train_opd.py @recipes/sd35m_opd.args    # Stable Diffusion 3.5

One iteration, with the default sizes. It needs no reward, no VAE and no text encoder:

    PROMPTS  8 prompts, 2 of each task; 2 samples of each prompt
    ROLLOUT  from noise at t = 1, five steps of the student's SDE: 16 samples x 5 steps = 80 rows
    LABELS   at the state of every row: the velocity of its task's teacher, and of the anchor
    UPDATE   with the first sample of every prompt, then with the second: ppo + MAR
             -> a gradient per task -> their sum -> AdamW -> the running average, which is evaluated

The student's step and the teacher's are Gaussians. Their KL is the dense training signal.

Deviations from the paper (numbered as in README.md, which has the whole list):
 1. PPO's ratio and reward are per latent coordinate; the paper's form is --objective ppo-published.
 2. Routing is hard: a prompt's own teacher alone labels it. The paper's v1 text blends teachers.
 3. Iterations mix the tasks in their shares. The public code alternates whole epochs.
 5. All steps but the last are trained, as in the public code. The paper trains all.
"""

import argparse
from collections import Counter
from functools import partial
from math import inf

import torch
from torch.nn.utils import clip_grad_norm_

from losses import OBJECTIVES, kl_of, mar
from recipes.memory import dry_run
from rewards.pictures import draw_curves, picture_grid, sample_images
from rewards.scoring import load_scorers, report
from sde import kl_weight, rollout, step
from support import lora, metrics, model, run
from support.arguments import check_distillation
from support.checkpoint import begin_run
from support.checks import self_checks
from support.flags import Pairs, above_0, at_least, lora_alpha, make_parser, model_flags
from support.flags import portion, positive, run_flags, scale, within

CURVES = {  # panel of curves.png: beginning of the names in metrics.jsonl
    "KL to the task's teacher": "kl/",
    "gradient cosine of two tasks": "cosine/",
    "fraction of ratios clipped": "clip_fraction",
}


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    model_flags(parser)
    flag = parser.add_argument_group("what to train").add_argument
    named = {"action": Pairs}  # NAME=VALUE ... -> {NAME: VALUE}
    flag("--teacher", **named, metavar="TASK=DIR|HUB", help="default MODEL/adapters/TASK")
    flag("--teacher_guidance", **named, kind=scale, metavar="TASK=SCALE", help="of one teacher")
    flag("--teacher_alpha", **named, kind=lora_alpha, metavar="TASK=A|rank", help="if not in file")
    flag("--prompts", **named, metavar="TASK=FILE", help="default MODEL/prompts/TASK_train.txt")
    flag("--task_mix", **named, kind=portion, metavar="TASK=SHARE", help="of prompts; default 1")
    flag("--init", metavar="DIR|HUB", help="base or an adapter; default MODEL/adapters/merged")
    flag("--anchor", metavar="DIR|HUB", help="MAR's anchor, or base; default MODEL/adapters/deqa")
    flag("--rank", type=positive, default=32, help="LoRA rank of the student (--init has its own)")
    flag("--alpha", type=above_0, default=64, help="LoRA alpha: its scale is alpha / rank")
    flag = parser.add_argument_group("objective").add_argument
    flag("--objective", choices=OBJECTIVES, default="ppo", help="see the table in losses.py")
    flag("--clip_range", type=above_0, help="of PPO; default 0.2 for ppo, 1e-4 for others")
    flag("--step_weights", choices=("kl", "equal"), default="kl", help="of step errors: w(t) or 1")
    flag("--mar_weight", type=within(0), default=0.02, help="lambda of MAR, the paper's; 0 = off")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--prompts_per_iteration", type=positive, default=8, help="over all tasks and processes")
    flag("--group_size", type=positive, default=2, help="samples per prompt, G (24 in the paper)")
    flag("--steps", type=at_least(2), default=6, help="steps of a rollout, T (10 in the paper)")
    flag("--train_steps", default="first", help="first = all but the last; all; 0,2,5; random:K")
    flag("--noise", type=within(0), default=0.7, help="SDE noise level a (--objective ode: 0)")
    flag("--noise_kind", choices=("flow", "dance", "cps"), default="flow", help="see sde.py")
    flag("--guidance", type=scale, default=1.0, help="guidance scale; 1 = off (SD3.5: 4.5)")
    flag("--student_guidance", type=scale, help="of the student; default --guidance")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--iterations", type=positive, default=160, help="rollouts, each with --updates steps")
    flag("--updates", type=positive, default=2, help="optimizer steps per rollout")
    flag("--lr", type=within(0), default=2e-3, help="AdamW's (public code: 1e-4, a larger model)")
    flag("--grad_norm", type=within(0), default=1.0, help="clip the gradient to it; 0 = off")
    flag("--ema_decay", type=within(0, 1), default=0.9, help="of the average that is evaluated")
    flag("--ema_every", type=positive, default=1, help="updates between averages (public code: 8)")
    flag("--micro_batch", type=positive, default=128, help="rows in a pass with gradient")
    flag("--label_batch", type=positive, default=128, help="rows in a pass without gradient")
    flag = parser.add_argument_group("run").add_argument
    flag("--out", default="runs/opd", help="folder of the run")
    flag("--sample_every", type=at_least(0), default=20, help="iterations per picture; 0 = none")
    flag("--eval_prompts", type=at_least(0), default=256, help="test prompts per task; 0 = none")
    flag("--eval_steps", type=positive, default=16, help="ODE steps of samples (40 in the paper)")
    flag("--test_prompts", **named, metavar="TASK=FILE", help="default .../TASK_test.txt")
    flag("--dry_run", action="store_true", help="print memory and batch sizes; no training")
    run_flags(flag)
    return check_distillation(parser.parse_args())


def load_loras(args: argparse.Namespace, transformer: torch.nn.Module) -> tuple:
    """Load teachers, anchor, student and the student's average: LoRAs on one frozen backbone.
    Returns the parameters {name: tensor} of student and average, the name of the anchor's LoRA
    (None: the base) and {LoRA: guidance scale}."""
    guidance = {"student": args.student_guidance, "anchor": args.guidance, None: args.guidance}
    for task, path in args.teacher.items():
        name, alpha = f"teacher_{task}", args.teacher_alpha.get(task)
        lora.load_adapter(transformer, name, path, f"--teacher {task}", alpha)
        guidance[name] = args.teacher_guidance.get(task, args.guidance)
    anchor = load_anchor(transformer, args)  # "teacher_deqa" by default
    student, average = lora.add_student(transformer, args)
    return student, average, anchor, guidance


def load_anchor(transformer: torch.nn.Module, args: argparse.Namespace) -> str | None:
    """The LoRA of MAR's anchor: None (the base), "teacher_TASK" (that teacher's) or "anchor"."""
    if args.anchor == "base" or not args.mar_weight:
        return None
    for task, path in args.teacher.items():
        if path == args.anchor and task not in args.teacher_guidance:  # the same velocities
            return f"teacher_{task}"
    lora.load_adapter(transformer, "anchor", args.anchor, "--anchor")
    return "anchor"


def load_prompts(args: argparse.Namespace, pipe, samples: list[int]) -> tuple:
    """Draw the prompts of all iterations by the seed, and embed those of `samples`, once.
    Returns the schedule (per iteration a list of (task, prompt, metadata)), the test prompts {task:
    (prompts, metadata)}, the prompts of the sample pictures and the table of text embeddings."""
    run.print_batch(args)
    train = run.read_tasks(args.prompts)
    tests = run.read_tasks(args.test_prompts, args.eval_prompts)
    how = (args.prompts_per_iteration, args.iterations, args.seed)
    schedule = run.draw_schedule(train, args.task_mix, *how)
    shown = [prompt for prompts, _ in train.values() for prompt in sorted(prompts)[:2]]
    used = run.prompts_used(schedule, samples, args.group_size, tests)
    return schedule, tests, shown, model.embed_prompts(pipe, used + shown, args)


def draw_steps(args: argparse.Namespace, iteration: int) -> torch.Tensor:
    """The trained steps of an iteration (S,), ascending. --train_steps random:K draws them anew."""
    generator = run.generator(args.seed, "steps", iteration)
    order = torch.randperm(len(args.eligible_steps), generator=generator)[: args.trained_steps]
    return torch.tensor(args.eligible_steps)[order].sort().values


@run.guarded
def main(args: argparse.Namespace) -> None:
    if args.dry_run:
        return dry_run(args, load_loras)
    rank, world, device = run.start_processes()
    tasks, objective = list(args.teacher), OBJECTIVES[args.objective]
    scorers = load_scorers(args.rewards, args.test_prompts, args.reward_device or device)
    pipe = model.load_pipeline(args, device)
    student, average, anchor, guidance = load_loras(args, pipe.transformer)
    is_anchor = torch.tensor([f"teacher_{task}" == anchor for task in tasks])  # (tasks,)
    parameters = list(student.values())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=1e-4, fused=True)
    grid = model.time_grid(pipe, args.steps)  # T + 1 floats from 1 to 0
    times = torch.tensor(grid, device=device).view(-1, 1, 1, 1)  # (T + 1, 1, 1, 1)
    sampler = (args.noise, grid[1], args.noise_kind)  # noise level a, t_max, kind

    B, G, S = args.prompts_per_iteration * args.group_size, args.group_size, args.trained_steps
    samples = run.share(B, rank, world)  # of 0 .. B - 1, this process's b samples
    b = len(samples)
    schedule, tests, shown, text = load_prompts(args, pipe, samples)
    backbone = model.Backbone(pipe.transformer, text, guidance, args.label_batch)
    self_checks(args, pipe, text, grid, shown, guidance, student)
    start, saver = begin_run(args, pipe, student, average, optimizer)

    bad_updates = 0  # in a row, for NaN or infinity
    bar = metrics.progress(start, args.iterations)
    for iteration in bar:
        watch, log = metrics.Stopwatch(device), {}
        # 1. Prompts: each belongs to one task and is sampled G times. A trained step of a sample is
        #    a row: row n is step step_of[n] of sample sample_of[n]; N = S b rows.
        trained = draw_steps(args, iteration)  # (S,)
        step_of = trained.repeat_interleave(b)  # (N,)
        sample_of = torch.arange(b).repeat(S)  # (N,)
        t, t_next = times[step_of], times[step_of + 1]  # (N, 1, 1, 1)
        slots = [schedule[iteration][i // G] for i in samples]  # b of (task, prompt, metadata)
        task_of = torch.tensor([tasks.index(task) for task, *_ in slots])[sample_of]  # (N,)
        prompt = torch.tensor([text["rows"][prompt] for _, prompt, _ in slots])  # (b,)
        prompt_of = prompt[sample_of]  # (N,)
        update_of = torch.tensor(samples)[sample_of] % args.updates  # (N,): a share of each group

        # 2. Rollout (no gradient): the student samples with its SDE, up to the last trained step.
        generators = [run.generator(args.seed, "rollout", iteration, i) for i in samples]
        noise = model.initial_noise(pipe, generators)  # (b, C, H, W)
        policy = lambda x, t: backbone.predict("student", x, t, prompt)
        visited = grid[: trained[-1] + 2]  # times from 1 to the last trained step's t_next
        path = rollout(policy, noise, visited, args.noise, args.noise_kind, generators)
        x, x_next = path.x[trained].flatten(0, 1), path.x[trained + 1].flatten(0, 1)  # (N, C, H, W)
        mean_old = path.mean[trained].flatten(0, 1)  # (N, C, H, W); x_next was drawn around it
        watch.lap("rollout")

        # 3. Labels (no gradient): each task's teacher at the states of its own prompts; the anchor.
        v_teacher = torch.empty_like(x)  # (N, C, H, W)
        for k, task in enumerate(tasks):
            rows = (task_of == k).nonzero().flatten()
            v_teacher[rows] = backbone.predict(f"teacher_{task}", x[rows], t[rows], prompt_of[rows])
        mean_teacher, std = step(x, v_teacher, t, t_next, *sampler)  # (N, C, H, W), (N, 1, 1, 1)
        width = torch.where(std > 0, std, 1)  # without noise, kl is half the squared distance
        kl = kl_of(mean_old, mean_teacher, width).view(S, b)  # before the update
        kl_to_go = (kl.flip(0).cumsum(0).flip(0) - kl).flatten()  # (N,): KL of later trained steps
        v_anchor = v_teacher.clone()
        if args.mar_weight:
            rows = (~is_anchor[task_of]).nonzero().flatten()  # on the others v_anchor is v_teacher
            v_anchor[rows] = backbone.predict(anchor, x[rows], t[rows], prompt_of[rows])
        w = kl_weight(t, t_next, *sampler) if args.noise else (t - t_next) ** 2 / 2  # (N, 1, 1, 1)
        step_weight = 1 / w if args.step_weights == "equal" else torch.ones_like(w)  # cancels w
        watch.lap("labels")

        # 4. Update: a gradient per task (5 compares them), summed over micro-batches, processes.
        for update in range(args.updates):
            gradients = []
            for k in range(len(tasks)):
                rows = ((task_of == k) & (update_of == update)).nonzero().flatten()
                for batch in run.chunks(rows, args.micro_batch):
                    v = backbone.velocity("student", x[batch], t[batch], prompt_of[batch])
                    v.register_hook(partial(torch.mul, step_weight[batch]))  # scales both gradients
                    mean, _ = step(x[batch], v, t[batch], t_next[batch], *sampler)  # (n, C, H, W)
                    constants = (mean_old[batch], mean_teacher[batch], x_next[batch], std[batch])
                    loss, values = objective(mean, *constants, args.clip_range, kl_to_go[batch])
                    penalty, mar_values = mar(v, v_anchor[batch], args.mar_weight * w[batch])
                    loss = loss + penalty
                    fraction = len(batch) * args.updates / (B * S)  # sums to 1 over all processes
                    (fraction * loss).backward()
                    values |= mar_values | {"loss": loss.item()}
                    metrics.add_to_log(log, values, fraction / args.updates)
                gradients.append(run.take_gradients(parameters))  # (P,); also clears them
            gradients = run.all_reduce(torch.stack(gradients))  # (tasks, P), sum over processes
            run.set_gradients(parameters, gradients.sum(0))
            norm = clip_grad_norm_(parameters, args.grad_norm or inf)
            if norm.isfinite():
                optimizer.step()
            else:  # NaN or infinity: every process skips this update, rank 0 counts it
                metrics.add_to_log(log, {"skipped_updates": 1}, rank == 0)
            bad_updates = 0 if norm.isfinite() else bad_updates + 1
            optimizer.zero_grad()
            run.update_average(average, student, iteration * args.updates + update + 1, args)
        watch.lap("update")

        # 5. Log: each task's KL before the updates; in the last one, did tasks agree (cosine 1)?
        prompts_per_task = Counter(task for task, *_ in schedule[iteration])  # over all processes
        for task, number in prompts_per_task.items():
            total = kl.flatten()[task_of == tasks.index(task)].sum().item()  # of this process
            metrics.add_to_log(log, {f"kl/{task}": total}, 1 / (number * G * S))
        log = metrics.sum_logs(log)  # over all processes
        log |= run.task_cosines(gradients, tasks) | {"grad_norm": norm.item()} | watch.result()
        metrics.log_line(args.out, iteration, log)
        bar.set_postfix({task: f"{log[f'kl/{task}']:.3f}" for task in prompts_per_task})

        # 6. Samples: the averaged student, always on the same prompts and noise.
        if rank == 0 and metrics.is_due(iteration, args.sample_every, args.iterations):
            keys = [(args.seed, "sample", words) for words in shown]
            how = (args.eval_steps, args.student_guidance, args.label_batch)
            with lora.use(pipe.transformer, "average"):
                images = sample_images(pipe, text, shown, keys, *how)
            picture_grid(f"{args.out}/samples/{iteration + 1:05d}.png", {"student": images}, shown)
        # 7. Checkpoint: student, average, optimizer and iteration are all that a run depends on.
        saver.iteration_done(iteration + 1, bad_updates)

    saver.finish()  # publishes the adapter
    draw_curves(args.out, CURVES)
    report(args, pipe, text, tests, scorers)  # of the start and the averaged student
    run.stop_processes()


if __name__ == "__main__":
    main(parse_args())
