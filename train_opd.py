"""Stage 2: Flow-OPD, on-policy distillation of several teachers into one student (arXiv 2605.08063).

    python train_opd.py                                     # the miniature: merged start, four teachers, MAR; minutes
    torchrun --nproc_per_node=8 train_opd.py                # the same run on eight processes
    python train_opd.py --objective kl                      # the direct loss instead of the PPO form
    python train_opd.py --objective sft --init base --out runs/sft       # the SFT cold start

The student paints with the SDE sampler; each prompt belongs to one task, and that task's teacher says what its
velocity would have been at every state the student visited. The KL between the two Gaussian steps is the dense
training signal; MAR holds the student near a frozen teacher of image quality. No reward, no VAE and no text
encoder is used on the training path: pictures are scored at the end only. The objectives, and why the default is
not the formula published first, stand in losses.py.

Deviations from the paper:
 1. PPO's reward and ratio are per latent coordinate (losses.py); the paper's form is --objective ppo-published.
 2. Routing is hard: a prompt's own teacher alone labels it, as in all public code; v1's text blends teachers.
 3. Every task is in every iteration, in its share; the public code alternates whole epochs.
 4. Noise and prompts are functions of (seed, iteration, sample): the number of processes changes nothing.
 5. All but the last of the T steps are trained, as in the public code; the paper trains all.
"""

import os
import time
from pathlib import Path

import support.flags as cli
from support.flags import TASKS, at_least, fail, pairs, positive, prompt_files, read_prompts, within

OBJECTIVES = ("ppo", "ppo-scalar", "ppo-published", "ppo-public-code", "kl", "trajectory", "ode", "sft")


def parse_args():
    parser = cli.make_parser(__doc__)
    cli.model_flags(parser)
    flag = parser.add_argument_group("what to train").add_argument
    flag("--teacher", nargs="+", action="extend", metavar="TASK=DIR|HUB", help="the teachers; default MODEL/adapters/TASK")
    flag("--teacher_guidance", nargs="+", metavar="TASK=SCALE", help="a guidance scale of its own for a teacher")
    flag("--teacher_alpha", nargs="+", metavar="TASK=ALPHA", help="LoRA alpha where a teacher's file does not say it")
    flag("--prompts", nargs="+", action="extend", metavar="TASK=FILE", help="default MODEL/prompts/TASK_train.txt")
    flag("--task_mix", nargs="+", metavar="TASK=SHARE", help="prompts of each task in an iteration, as shares; default equal")
    flag("--init", metavar="DIR|HUB", help="student's start: base or an adapter; default MODEL/adapters/merged")
    flag("--anchor", metavar="DIR|HUB", help="MAR's anchor: base or an adapter; default MODEL/adapters/deqa")
    flag("--rank", type=positive, default=32, help="LoRA rank of a fresh student (--init base)")
    flag("--alpha", type=within(0), default=64, help="its alpha: the update is scaled by alpha / rank")
    flag = parser.add_argument_group("objective").add_argument
    flag("--objective", choices=OBJECTIVES, default="ppo", help="the table in losses.py; sft: the cold start by flow matching")
    flag("--mar_weight", type=within(0), help="weight of MAR, 0 = off; default 0.02 as in the paper, 0 for sft")
    flag("--clip_range", type=within(0), help="PPO clip; default 0.2 for ppo (a coordinate's ratio), else 1e-4 (an image's)")
    flag("--rollout", choices=("student", "teacher"), default="student", help="who paints; teacher: off-policy, kl or ode")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--prompts_per_iteration", type=positive, default=8, help="distinct prompts, over all tasks and processes")
    flag("--group_size", type=positive, default=16, help="samples per prompt, G (24 in the paper)")
    flag("--steps", type=at_least(2), default=6, help="denoising steps of a rollout, T (10 in the paper)")
    flag("--train_steps", default="first", metavar="WHICH", help="first = all but the last; all; 0,2,5; random:K of `first`")
    flag("--noise", type=within(0), default=0.7, help="SDE noise level a; the ode objective takes 0 by itself")
    flag("--noise_kind", choices=("flow", "dance", "cps"), default="flow", help="see sde.py")
    flag("--guidance", type=within(0), default=1.0, help="guidance scale of all adapters; 1 = off (4.5 for SD3.5)")
    flag("--student_guidance", type=within(0), help="the student's own scale; 1 makes one that needs no guidance")
    flag("--sft_images", type=positive, default=2048, help="images that the teachers paint for --objective sft, once")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--iterations", type=positive, default=80, help="rollouts; each gives --updates optimizer steps")
    flag("--updates", type=positive, default=2, help="optimizer steps per iteration, each on its share of every group")
    flag("--lr", type=within(0), default=1e-3, help="AdamW's learning rate (public code: 1e-4, its model is 1000 times larger)")
    flag("--grad_norm", type=within(0), default=1.0, help="clip the global gradient norm here")
    flag("--ema_decay", type=within(0, 1), default=0.9, help="of the average that is evaluated and saved")
    flag("--ema_every", type=positive, default=1, help="optimizer steps between averages (public code: 8, for longer runs)")
    flag("--micro_batch", type=positive, default=128, help="states per forward pass of the update; less if memory runs out")
    flag("--checkpointing", action="store_true", help="keep no activations: less memory, a slower update")
    flag("--label_batch", type=positive, default=128, help="states per forward pass of the labels; same result")
    flag("--rollout_batch", type=positive, help="images per forward pass of the rollout; default --label_batch; same result")
    flag = parser.add_argument_group("run").add_argument
    flag("--out", default="runs/opd", help="run folder")
    flag("--sample_every", type=at_least(0), default=10, help="iterations between sample pictures; 0 = never")
    flag("--eval_prompts", type=at_least(0), default=256, help="test prompts per task in the final evaluation; 0 = none")
    flag("--eval_steps", type=positive, default=16, help="ODE steps of evaluation and pictures (40 in the paper)")
    flag("--test_prompts", nargs="+", action="extend", metavar="TASK=FILE", help="default MODEL/prompts/TASK_test.txt")
    cli.reward_flags(flag)
    cli.run_flags(flag)
    flag("--dry_run", action="store_true", help="print each phase's memory and all derived numbers; load and write nothing")
    args = parser.parse_args()

    cli.check_model(args.model)
    args.teacher = pairs(args.teacher, "--teacher", overrule=True) or {task: f"{args.model}/adapters/{task}" for task in TASKS}
    tasks = list(args.teacher)
    args.prompts = prompt_files(args.prompts, tasks, "train", args.model)
    args.test_prompts = (
        prompt_files(args.test_prompts, tasks, "test", args.model, "--test_prompts") if args.eval_prompts else {}
    )
    args.task_mix = pairs(args.task_mix, "--task_mix", number=True) or {task: 1 for task in tasks}
    args.teacher_guidance = pairs(args.teacher_guidance, "--teacher_guidance", number=True)
    args.teacher_alpha = pairs(args.teacher_alpha, "--teacher_alpha", number=True)
    for flag in ("task_mix", "teacher_guidance", "teacher_alpha"):
        for task in sorted(set(getattr(args, flag)) - set(tasks)):
            fail(f"--{flag}: task {task!r} has no teacher; add --teacher {task}=DIR")
    for task in tasks:
        if task not in args.task_mix:
            fail(f"--teacher {task}: its task is not in --task_mix; give it a share there or leave the teacher out")
        cli.check_adapter(args.teacher[task], f"--teacher {task}")
    if any(not 1 <= share <= 1000 or share % 1 for share in args.task_mix.values()):
        fail("--task_mix: shares are whole numbers from 1 to 1000")
    args.student_guidance = args.guidance if args.student_guidance is None else args.student_guidance
    args.rollout_batch = args.rollout_batch or args.label_batch
    args.init = args.init or f"{args.model}/adapters/merged"
    args.anchor = args.anchor or f"{args.model}/adapters/deqa"
    if args.clip_range is None:
        args.clip_range = 0.2 if args.objective == "ppo" else 1e-4
    if args.mar_weight is None:
        args.mar_weight = 0.0 if args.objective == "sft" else 0.02
    for flag in ("init", "anchor"):
        if getattr(args, flag) != "base" and not (flag == "anchor" and args.mar_weight == 0):
            cli.check_adapter(getattr(args, flag), f"--{flag}")
    if args.objective == "sft" and args.mar_weight:
        fail("--mar_weight: sft is a cold start and has no anchor; leave it out or 0")
    if args.sft_images < len(tasks):
        fail(f"--sft_images must be at least {len(tasks)}: one for every task")
    if args.objective == "ode":
        args.noise = 0.0
    elif args.noise <= 0:
        fail("--noise must be above 0 for this objective: without noise a step has no density; or take --objective ode")
    if args.objective == "trajectory" and args.train_steps == "random:1":
        fail("--train_steps random:1: the trajectory objective needs later steps to look ahead to; take at least 2")
    if args.rollout == "teacher" and args.objective not in ("kl", "ode"):
        fail(f"--rollout teacher goes with --objective kl or ode: {args.objective} needs actions that the student drew")
    if args.group_size % args.updates:
        fail(f"--updates {args.updates} must divide --group_size {args.group_size}: every update takes its share of each group")
    cli.check_train_steps(args)
    if not args.dry_run:
        cli.check_out(args)
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import support.lora as adapters
import support.run as common
import losses
import support.memory as memory
from support.checkpoint import begin_run, checkpoints, publish_adapter
from support.checks import self_checks
from evaluate import load_scorers, picture_grid, report
from support.model import TEXT, embed_prompts, initial_noise, load_pipeline, paint, time_grid, velocity
from sde import kl_weight, rollout, step


def objective(args, v, v_teacher, mean_teacher, mean_old, x, x_next, kl_to_go, t, t_next, t_max, std):
    """The chosen loss at one step of a micro-batch: (loss, metrics). Tensors (c, C, H, W), kl_to_go (c,); `v` alone
    carries gradient."""
    if args.objective == "ode":
        return losses.opd_ode(v, v_teacher, t - t_next)
    mean, _ = step(x, v, t, t_next, args.noise, t_max, args.noise_kind)
    if args.objective == "kl":
        return losses.opd_kl(mean, mean_teacher, std)
    ppo = (mean, mean_old, mean_teacher, x_next, std)
    if args.objective == "trajectory":
        return losses.opd_trajectory(*ppo, kl_to_go, args.clip_range)
    if args.objective == "ppo-scalar":
        return losses.opd_ppo_scalar(*ppo, args.clip_range)
    if args.objective in ("ppo-published", "ppo-public-code"):  # the public code forgot the detach
        return losses.opd_ppo_published(*ppo, args.clip_range, detach=args.objective == "ppo-published")
    return losses.opd_ppo(*ppo, args.clip_range)


def means(args, grid, steps, x, v):
    """Where velocities v would take the states x (S, n, C, H, W) of `steps`: the means of the SDE steps, the same shape."""
    moves = [step(x[s], v[s], grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)[0] for s, i in enumerate(steps)]
    return torch.stack(moves)


def kl_between(mean, mean_teacher, std):
    """KL(student, teacher) per step and sample, (S, n), mean over dimensions; std (S,). Without noise: half the squared
    distance of the means."""
    width = torch.where(std > 0, std, 1.0).to(mean.device)[:, None]
    return (mean - mean_teacher).square().flatten(2).mean(2) / (2 * width**2)


def paint_sft_images(pipe, text, args, train, run, rank, world):
    """Once, for --objective sft: latents that every task's own teacher paints for its training prompts.

    Image i belongs to task i % len(tasks). All ranks paint, rank 0 keeps. Returns (sft_images, C, H, W)."""
    file, grid, tasks = run / "sft_images.safetensors", time_grid(pipe, args.eval_steps), list(args.teacher)
    if not file.exists():
        own, latents = common.share(args.sft_images, rank, world), {}
        for n, task in enumerate(tasks):
            g = args.teacher_guidance.get(task, args.guidance)
            parts = common.chunks(torch.tensor([i for i in own if i % len(tasks) == n], dtype=torch.long), args.micro_batch)
            for part in tqdm(parts, desc=f"{task} teacher paints", disable=rank > 0):
                prompts = [train[task][i // len(tasks) % len(train[task])] for i in part.tolist()]
                noise = initial_noise(pipe, [common.generator(args.seed, "sft", i) for i in part.tolist()], args.size)
                with adapters.adapter(pipe.transformer, f"teacher_{task}"):
                    rows = torch.tensor([text["rows"][p] for p in prompts])
                    x = rollout(lambda x, t: velocity(pipe.transformer, x, t, text, rows, g), noise, grid, a=0.0).x[-1]
                latents |= dict(zip(part.tolist(), x.cpu()))
        latents = {i: x for part in common.gather(latents) for i, x in part.items()}  # all ranks participate
        if rank == 0:
            save_file({"latents": torch.stack([latents[i] for i in range(args.sft_images)])}, f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
        common.gather(None)  # the others wait for the file
    return load_file(file)["latents"]


@memory.guarded
def main(args):
    if args.dry_run:
        return memory.dry_run(args)
    rank, world, device = common.start_processes()
    run, tasks, sft = Path(args.out), list(args.teacher), args.objective == "sft"
    scorers = load_scorers(args.rewards, tasks, args.reward_device or device) if args.eval_prompts else {}  # fails now
    pipe = load_pipeline(args.model, device, args.dtype, args.no_t5, args.checkpointing, args.size, args.compile)
    transformer = pipe.transformer

    # One frozen backbone; teachers, anchor, student and the student's average ("ema") are LoRAs on it.
    for task, path in args.teacher.items():
        layers = adapters.read_adapter(path, f"--teacher {task}", args.teacher_alpha.get(task))
        adapters.add_adapter(transformer, f"teacher_{task}", layers, path=path, flag=f"--teacher {task}")
    named = {path: f"teacher_{task}" for task, path in args.teacher.items() if task not in args.teacher_guidance}
    anchor = None if args.anchor == "base" else named.get(args.anchor, "anchor")  # by default it is the deqa teacher itself
    if anchor == "anchor" and args.mar_weight:
        layers = adapters.read_adapter(args.anchor, "--anchor")
        adapters.add_adapter(transformer, anchor, layers, path=args.anchor, flag="--anchor")
    layers = None if args.init == "base" else adapters.read_adapter(args.init, "--init")
    student, ema = adapters.add_student(transformer, args, layers)
    optimizer = torch.optim.AdamW(student.values(), lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4, fused=True)

    # Every derived number, once.
    grid = time_grid(pipe, args.steps)
    samples, G = args.prompts_per_iteration * args.group_size, args.group_size
    if samples < world:
        fail(f"{world} processes for {samples} samples an iteration: raise --prompts_per_iteration or start fewer")
    mine = common.share(samples, rank, world)
    cycle = [task for task in tasks for _ in range(int(args.task_mix[task]))]
    train = {task: read_prompts(file)[0] for task, file in args.prompts.items()}
    tests = {task: [part[: args.eval_prompts] for part in read_prompts(file)] for task, file in args.test_prompts.items()}
    sizes = {task: args.sft_images // len(tasks) if sft else len(train[task]) for task in tasks}
    guidance = {"student": args.student_guidance, "anchor": args.guidance, None: args.guidance}  # of each adapter
    guidance |= {f"teacher_{task}": args.teacher_guidance.get(task, args.guidance) for task in tasks}
    w = {}  # of every step, for MAR: that of the KL (sde.kl_weight), or of the ODE's squared distance
    for i in args.eligible_steps:
        t, t_next = grid[i], grid[i + 1]
        w[i] = (t - t_next) ** 2 / 2 if not args.noise else kl_weight(t, t_next, args.noise, grid[1], args.noise_kind)
    if rank == 0:
        common.print_batch(args, args.trained_steps, world)

    # Prompts are embedded once, those that this process will use, and the text encoders are gone again.
    shown = [p for task in tasks for p in sorted(train[task])[:2]]  # in the sample pictures
    used = common.prompts_used(args, train, tests, sizes, cycle, mine, rank, world)
    also = [p for prompts in train.values() for p in prompts] if sft else shown
    text = embed_prompts(pipe, used + also, args.text_length, args.no_t5, args.cache_embeddings)

    if rank == 0:
        self_checks(args, pipe, text, grid, shown, args.eligible_steps, guidance, student)

    # --resume refuses other flags than these, and other contents of these files.
    harmless = "model teacher init anchor prompts test_prompts sample_every micro_batch label_batch rollout_batch eval_prompts"
    harmless += " eval_steps rewards reward_device cache_embeddings checkpointing compile dry_run"
    loras = {f"teacher {task}": path for task, path in args.teacher.items()} | {"init": args.init, "anchor": args.anchor}
    files = [(part, f"{pipe.name_or_path}/{part}") for part in ("transformer", *TEXT)]
    files += [(role, cli.fetch(path, "", cli.ADAPTER)) for role, path in loras.items() if path != "base"]
    files += [(f"prompts {task}", file) for task, file in args.prompts.items()]
    start, saver = begin_run(args, harmless, files, rank, student, ema, optimizer, transformer.peft_config["student"])
    kept = paint_sft_images(pipe, text, args, train, run, rank, world) if sft else None
    updates_done, bad_steps, began = start * args.updates, 0, time.time()
    bar = tqdm(range(start, args.iterations), "training", args.iterations, initial=start, unit="it", disable=rank > 0)

    def velocities(x, steps, rows, guidance_scale):
        """Of the active adapter, for all states x (S, n, C, H, W) of `steps` in one pass, prompts rows (n,): shaped like x."""
        times = torch.tensor([grid[i] for i in steps], device=device).repeat_interleave(len(rows))  # (S n,)
        return velocity(transformer, x.flatten(0, 1), times, text, rows.repeat(len(steps)), guidance_scale).view_as(x)

    @torch.no_grad()
    def label(on, x, steps, rows):
        """The same of adapter `on`: one switch of adapters, batches as large as memory allows."""
        v = torch.empty_like(x)
        with adapters.adapter(transformer, on):
            for part, some in common.batches(torch.arange(len(rows)), len(steps), args.label_batch):
                at = some[:, None], part
                v[at] = velocities(x[at], [steps[s] for s in some], rows[part], guidance[on])
        return v

    # One iteration (b samples on this process, S of the T steps trained; * = the only tensors with gradient):
    #   prompts -> noise (b, C, H, W) -> rollout by the student: x (R + 1, b, C, H, W), mean_old (R, b, C, H, W)
    #   states = x[trained] (S, b, C, H, W) -> each task's teacher: v_teacher -> mean_teacher = step(states, v_teacher)
    #                                       -> the anchor:          v_anchor
    #   micro-batch: v* = student(states) -> mean* = step(states, v*)
    #   loss = objective(mean*, mean_old, mean_teacher, x[i + 1]) + mar_weight w(t) |v* - v_anchor|^2
    #   a gradient per task (tasks, P) -> summed over tasks and processes -> clip -> AdamW -> average of the weights
    for iteration in bar:
        watch, log = common.Stopwatch(device), {}
        # 1. Prompts: every task in its share; which steps of the trajectory are trained.
        chosen = common.choose(sizes, cycle, args.prompts_per_iteration, args.seed, iteration)
        portion = {task: sum(other == task for other, _ in chosen) / len(chosen) for task in tasks if task in dict(chosen)}
        task_of = [chosen[i // G][0] for i in mine]  # b samples on this process
        index = [chosen[i // G][1] for i in mine]
        if sft:  # not G samples of a prompt, but the next G images that its teacher painted
            index = [(n + i % G) % sizes[task] for i, n, task in zip(mine, index, task_of)]
        rows = torch.tensor([text["rows"][train[task][n % len(train[task])]] for task, n in zip(task_of, index)])  # (b,)
        members = {task: torch.tensor([n for n, own in enumerate(task_of) if own == task], dtype=torch.long) for task in tasks}
        generators = [common.generator(args.seed, "rollout", iteration, i) for i in mine]
        noise = initial_noise(pipe, generators, args.size)  # (b, C, H, W)
        loss_scale = noise.shape[1:].numel() if args.dtype == "fp16" else 1  # fp16 cannot hold a mean's gradient, 1 / (C H W)
        order = torch.randperm(len(args.eligible_steps), generator=common.generator(args.seed, "steps", iteration))
        trained = sorted(args.eligible_steps[j] for j in order[: args.trained_steps].tolist()) if not sft else [None]

        # 2. Rollout (no gradient): the SDE by the student; off-policy each teacher paints its own prompts. It ends with the
        #    last step that is trained on, the R-th of T: nobody looks at the images.
        if not sft:
            x = noise.new_empty(trained[-1] + 2, *noise.shape)  # (R + 1, b, C, H, W)
            mean_old = torch.empty_like(x[1:])  # (R, b, C, H, W)
            off_policy = {f"teacher_{task}": members[task] for task in tasks}
            for on, who in (off_policy if args.rollout == "teacher" else {"student": torch.arange(len(mine))}).items():
                with adapters.adapter(transformer, on):
                    for part in common.chunks(who, args.rollout_batch):
                        move = lambda x, t: velocity(transformer, x, t, text, rows[part], guidance[on])
                        own = [generators[n] for n in part]
                        trajectory = rollout(move, noise[part], grid[: len(x)], args.noise, args.noise_kind, own)
                        x[:, part], mean_old[:, part], std = trajectory.x, trajectory.mean, trajectory.std
        watch.lap("rollout")

        # 3. Labels (no gradient): each task's teacher, and the anchor, at the S visited states that are trained on.
        if sft:
            x0 = kept[[n * len(tasks) + tasks.index(task) for task, n in zip(task_of, index)]].to(device)  # (b, C, H, W)
            t_sft = torch.stack([torch.rand((), generator=g) for g in generators]).to(device)  # (b,)
            x_sft = torch.lerp(x0, noise, t_sft.view(-1, 1, 1, 1))  # x_t = (1 - t) x_0 + t noise
        else:
            states, v_teacher = x[trained], torch.empty_like(x[trained])  # (S, b, C, H, W)
            for task in tasks:
                v_teacher[:, members[task]] = label(f"teacher_{task}", states[:, members[task]], trained, rows[members[task]])
            if args.mar_weight:  # where the anchor is the task's own teacher its label is v_teacher; the rest is asked
                v_anchor, rest = v_teacher.clone(), [n for n, task in enumerate(task_of) if f"teacher_{task}" != anchor]
                rest = torch.tensor(rest, dtype=torch.long)
                v_anchor[:, rest] = label(anchor, states[:, rest], trained, rows[rest])
            if args.rollout == "teacher":  # the states are the teacher's, the KL is still the student's
                mean_old[trained] = means(args, grid, trained, states, label("student", states, trained, rows))
            mean_teacher, std_trained = means(args, grid, trained, states, v_teacher), torch.tensor([std[i] for i in trained])
            kl = kl_between(mean_old[trained], mean_teacher, std_trained)  # (S, b)
            # The trajectory objective's KL still to come; when only some steps are trained they stand for all.
            stand_for = (len(args.eligible_steps) - 1) / max(args.trained_steps - 1, 1)
            kl_to_go = stand_for * (kl.flip(0).cumsum(0).flip(0) - kl)  # (S, b)
        watch.lap("labels")

        # 4. Update: each optimizer step takes its share of every group; gradients add up over micro-batches and processes.
        for update in range(args.updates):
            gradients = []
            for task in tasks:
                ours = torch.tensor([n for n in members[task].tolist() if mine[n] % args.updates == update], dtype=torch.long)
                for part, some in common.batches(ours, len(trained), args.micro_batch):
                    steps = [trained[s] for s in some]
                    if sft:
                        v = velocity(transformer, x_sft[part], t_sft[part], text, rows[part], guidance=1.0)[None]
                    else:  # (steps, c, C, H, W)
                        v = velocities(states[some[:, None], part], steps, rows[part], args.student_guidance)
                    total = 0.0  # the loss: a mean over the update's samples (of all processes) and the trained steps
                    for s, i, v_s in zip(some.tolist(), steps, v):  # s: place among the trained steps; i: place in the grid
                        if sft:
                            loss, metrics = losses.flow_matching(v_s, x0[part], noise[part])
                        else:
                            tensors = (v_teacher[s, part], mean_teacher[s, part], mean_old[i, part], x[i, part], x[i + 1, part])
                            interval = (grid[i], grid[i + 1], grid[1], std[i])
                            loss, metrics = objective(args, v_s, *tensors, kl_to_go[s, part], *interval)
                        if args.mar_weight:
                            mar, mar_metrics = losses.mar(v_s, v_anchor[s, part], args.mar_weight * w[i])
                            loss, metrics = loss + mar, metrics | mar_metrics
                        fraction = len(part) / (samples / args.updates) / len(trained)
                        total = total + loss * fraction
                        for k, value in {"loss": loss.item(), **metrics}.items():
                            log[k] = log.get(k, 0.0) + value * fraction / args.updates
                            log[f"{k}/{task}"] = log.get(f"{k}/{task}", 0.0) + value * fraction / args.updates / portion[task]
                    (total * loss_scale).backward()
                gradients.append(common.take_gradients(student.values(), loss_scale))  # (P,) what this task alone asks for
            gradients = common.all_reduce(torch.stack(gradients))  # (tasks, P); all ranks participate
            common.give_gradients(student.values(), gradients.sum(0))
            norm = torch.nn.utils.clip_grad_norm_(student.values(), args.grad_norm)
            if norm.isfinite():
                optimizer.step()
            else:  # NaN or infinity in what led to this gradient; all processes see the same sum, rank 0 counts it
                log["skipped_updates"] = log.get("skipped_updates", 0) + (rank == 0)
            bad_steps = 0 if norm.isfinite() else bad_steps + 1  # in a row
            optimizer.zero_grad(set_to_none=True)
            updates_done += 1
            if updates_done % args.ema_every == 0:
                common.update_ema(ema.values(), student.values(), updates_done // args.ema_every, args.ema_decay)
        watch.lap("update")

        # 5. Log, per task. KL: of all samples; before and after the update on the first sample of every prompt.
        if not sft:
            firsts = torch.tensor([n for n, i in enumerate(mine) if i % G == 0], dtype=torch.long)
            v = label("student", states[:, firsts], trained, rows[firsts])
            kl_after = kl_between(means(args, grid, trained, states[:, firsts], v), mean_teacher[:, firsts], std_trained)
            for task in portion:
                ours = torch.tensor([other == task for other in task_of], dtype=torch.bool)  # (b,)
                first, count = ours[firsts], portion[task] * samples * len(trained)
                log[f"kl/{task}"] = kl[:, ours].sum().item() / count
                log[f"kl_before/{task}"] = kl[:, firsts][:, first].sum().item() * G / count
                log[f"kl_after/{task}"] = kl_after[:, first].sum().item() * G / count
        log = common.sum_logs(log)  # all ranks participate
        # Do the tasks (each with its part of MAR) pull in one direction (1), or against each other (-1)? Last update.
        lengths = gradients.norm(dim=1)  # (tasks,)
        cosine = gradients @ gradients.T / (lengths[:, None] * lengths).clamp(min=1e-30)  # (tasks, tasks)
        for m, a in enumerate(tasks):
            if a in portion:
                log[f"grad_norm/{a}"] = lengths[m].item()
                log |= {f"cosine/{a}-{b}": cosine[m, m + 1 + n].item() for n, b in enumerate(tasks[m + 1 :]) if b in portion}
        log = {"iteration": iteration} | log | {"grad_norm": norm.item()} | watch.result()
        if "skipped_updates" in log:
            log["skipped_prompts"] = [train[task][n % len(train[task])] for task, n in chosen]
        if rank == 0:
            common.log_line(run, log)
        kls = " ".join(f"{task} {log[f'kl/{task}']:.3f}" for task in portion if not sft)
        bar.set_postfix_str(f"KL {kls}" if kls else f"loss {log['loss']:.3f}")

        # 6. Samples, with the average of the weights and the same prompts and noise every time (rank 0 only).
        last = iteration + 1 == args.iterations
        if rank == 0 and args.sample_every and ((iteration + 1) % args.sample_every == 0 or last):
            keys = [(args.seed, "sample", p) for p in shown]
            with adapters.adapter(transformer, "ema"):
                images = paint(pipe, text, shown, keys, args.eval_steps, args.student_guidance, args.micro_batch, args.size)
            picture_grid(run / "samples" / f"{iteration + 1:05d}.png", {"student": images}, shown)

        # 7. Checkpoint: a copy in memory after every iteration, for signals and errors; on disk now and then (rank 0).
        saver.keep(iteration + 1)
        if (iteration + 1) % args.save_every == 0 or last:
            saver.save()
        if bad_steps >= args.max_bad_steps:
            saver.give_up(f"{bad_steps} updates in a row had a NaN or infinite gradient; metrics.jsonl names their prompts")

    saver.close()
    if rank == 0:
        publish_adapter(checkpoints(run)[-1] / "adapter", run / "adapter")
        cosines = [f"cosine/{a}-{b}" for m, a in enumerate(tasks) for b in tasks[m + 1 :]]
        panels = {"KL to the task's own teacher": [f"kl/{t}" for t in tasks], "gradient cosine of two tasks": cosines}
        common.draw_curves(run, panels | {"fraction of ratios clipped": ["clip_fraction"], "loss": ["loss"] if sft else []})
        done = f"{max(args.iterations - start, 0)} iterations in {(time.time() - began) / 60:.1f} minutes"
        print(f"{done} -> {run}/adapter, curves.png, samples/", flush=True)
    if tests:
        name = "merged start" if Path(args.init).name == "merged" else "start"
        if layers:
            adapters.add_adapter(transformer, "init", layers, path=args.init, flag="--init")
        report(args, pipe, text, tests, scorers, {name: "init" if layers else None, "student": "ema"}, run, rank, world)
        if rank == 0:
            show = f'student={run}/adapter --prompt "two red circles and one blue square" --out {run}/prompt'
            print(f"next: python evaluate.py --models base {show}")
    common.stop_processes()


if __name__ == "__main__":
    main(ARGS)
