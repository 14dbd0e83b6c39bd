"""Stage 2: Flow-OPD, on-policy distillation of several teachers into one student (arXiv 2605.08063).

    python train_opd.py                                     # the miniature: merged start, four teachers, MAR; minutes
    torchrun --nproc_per_node=8 train_opd.py                # the same run on eight processes
    python train_opd.py --objective kl                      # the direct loss instead of the PPO form
    python train_opd.py --objective sft --init base --out runs/sft       # the SFT cold start

The student paints with the SDE sampler; each prompt belongs to one task, and that task's teacher says what its
velocity would have been at every state the student visited. The KL between the two Gaussian steps is the dense
training signal; MAR holds the student near a frozen teacher of image quality. No reward, no VAE and no text
encoder is used on the training path: pictures are scored at the end only.

The default objective: the formula published first (`--objective ppo-published`) rewards every step with its
analytic -KL, detached, inside a PPO-clipped policy gradient; that reward does not depend on the action taken, so
the expected gradient is zero and nothing is learnt. `--objective ppo` keeps PPO but rewards the action itself,
with the sampled log-ratio of teacher to student, one ratio and one reward per latent coordinate. Its expected
gradient is that of the KL, with little noise. All forms stand side by side in losses.py.

Deviations from the paper:
 1. PPO's reward and ratio are per latent coordinate (above); the paper's form is --objective ppo-published.
 2. Routing is hard: a prompt's own teacher alone labels it, as in all public code; v1's text blends teachers.
 3. Every task is in every iteration in equal parts; the public code alternates whole epochs.
 4. Noise and prompts are functions of (seed, iteration, sample): the number of processes changes nothing.
 5. All but the last of the T steps are trained, as in the public code; the paper trains all.
"""

import os
import time
from pathlib import Path

from cli import check_adapter, check_model, check_out, fail, make_parser, pairs, prompt_files, read_prompts, save_json

TEACHERS = ("geneval", "ocr", "deqa", "pickscore")
OBJECTIVES = ("ppo", "ppo-scalar", "ppo-published", "ppo-public-code", "kl", "trajectory", "ode", "sft")


def parse_args():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what to train")
    group.add_argument("--model", default="toy", help="base pipeline: a directory that diffusers loads")
    group.add_argument("--teacher", action="append", metavar="TASK=DIR", help="the teacher (adapter directory) of a task; repeat "
                       "for each; default MODEL/adapters/TASK for geneval, ocr, deqa, pickscore")  # fmt: skip
    group.add_argument("--teacher_guidance", nargs="+", metavar="TASK=SCALE", help="a guidance scale of its own for a teacher")
    group.add_argument("--teacher_alpha", nargs="+", metavar="TASK=ALPHA", help="LoRA alpha where a teacher's file does not say it")
    group.add_argument("--prompts", nargs="+", metavar="TASK=FILE", help="training prompts; default toy/prompts/TASK_train.txt")
    group.add_argument("--task_mix", nargs="+", metavar="TASK=SHARE", help="prompts of each task in an iteration, as shares; default equal")
    group.add_argument("--init", help="student's start: base or an adapter directory; default MODEL/adapters/merged")
    group.add_argument("--anchor", help="MAR's anchor: base or an adapter directory; default MODEL/adapters/deqa")
    group.add_argument("--rank", type=int, default=32, help="LoRA rank of a fresh student (--init base)")
    group.add_argument("--alpha", type=float, default=64, help="its alpha: the update is scaled by alpha / rank")
    group = parser.add_argument_group("objective")
    group.add_argument("--objective", choices=OBJECTIVES, default="ppo", help="rows of the table in losses.py")
    group.add_argument("--mar_weight", type=float, help="weight of MAR, 0 = off; default 0.02 as in the paper, 0 for sft")
    group.add_argument("--clip_range", type=float, default=0.2, help="PPO clip: of a coordinate's ratio for ppo, of an image's else")
    group.add_argument("--rollout", choices=("student", "teacher"), default="student", help="whose states are labelled; teacher = "
                       "off-policy distillation, a control (kl and ode only)")  # fmt: skip
    group = parser.add_argument_group("sampling")
    group.add_argument("--prompts_per_iteration", type=int, default=8, help="distinct prompts, over all tasks and processes")
    group.add_argument("--group_size", type=int, default=16, help="samples per prompt, G (24 in the paper)")
    group.add_argument("--steps", type=int, default=8, help="denoising steps of a rollout, T (10 in the paper)")
    group.add_argument("--train_steps", default="first", metavar="WHICH", help="first = all but the last; all; a list 0,2,5; or "
                       "random:K = K of all but the last, drawn anew each iteration (unbiased)")  # fmt: skip
    group.add_argument("--noise", type=float, default=0.7, help="SDE noise level a; the ode objective takes 0 by itself")
    group.add_argument("--noise_kind", choices=("flow", "dance", "cps"), default="flow", help="see sde.py")
    group.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance of student, teachers and anchor; "
                       "1 = off (4.5 for SD3.5)")  # fmt: skip
    group.add_argument("--text_length", type=int, default=128, help="T5 tokens, at most what the tokenizer allows")
    group.add_argument("--size", type=int, help="image side in pixels; default the model's own")
    group.add_argument("--sft_images", type=int, default=2048, help="images that the teachers paint for --objective sft, once")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--iterations", type=int, default=40, help="rollouts; each gives --updates optimizer steps")
    group.add_argument("--updates", type=int, default=2, help="optimizer steps per iteration, each on its share of every group")
    group.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate (1e-4 in the paper, whose model is 1000 times larger)")
    group.add_argument("--grad_norm", type=float, default=1.0, help="clip the global gradient norm here")
    group.add_argument("--ema_decay", type=float, default=0.9, help="of the average that is evaluated and saved")
    group.add_argument("--ema_every", type=int, default=1, help="optimizer steps between averages (8 in the paper, for longer runs)")
    group.add_argument("--micro_batch", type=int, default=128, help="samples per forward pass; less if memory runs out, same result")
    group = parser.add_argument_group("run")
    group.add_argument("--out", default="runs/opd", help="run folder")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--sample_every", type=int, default=10, help="iterations between sample pictures; 0 = never")
    group.add_argument("--save_every", type=int, default=20, help="iterations between checkpoints")
    group.add_argument("--eval_prompts", type=int, default=256, help="test prompts per task in the final evaluation; 0 = none")
    group.add_argument("--eval_steps", type=int, default=16, help="ODE steps of evaluation and pictures (40 in the paper)")
    group.add_argument("--test_prompts", nargs="+", metavar="TASK=FILE", help="default toy/prompts/TASK_test.txt")
    group.add_argument("--rewards", default="toy", help="Python module with the scorers of the final evaluation")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    args = parser.parse_args()

    check_model(args.model)
    args.teacher = pairs(args.teacher, "--teacher") or {task: f"{args.model}/adapters/{task}" for task in TEACHERS}
    tasks = list(args.teacher)
    args.prompts = prompt_files(pairs(args.prompts, "--prompts"), tasks, "train")
    args.test_prompts = prompt_files(pairs(args.test_prompts, "--test_prompts"), tasks, "test") if args.eval_prompts else {}
    args.task_mix = pairs(args.task_mix, "--task_mix", number=True) or {task: 1 for task in tasks}
    for flag in ("teacher_guidance", "teacher_alpha"):
        setattr(args, flag, pairs(getattr(args, flag), f"--{flag}", number=True))
    for flag in ("task_mix", "teacher_guidance", "teacher_alpha"):
        for task in getattr(args, flag):
            if task not in tasks:
                fail(f"--{flag}: task {task!r} has no teacher; add --teacher {task}=DIR")
    for task in tasks:
        if task not in args.task_mix:
            fail(f"--teacher {task}: its task is not in --task_mix; give it a share there or leave the teacher out")
        check_adapter(args.teacher[task], f"--teacher {task}")
    if any(share < 1 or share != int(share) for share in args.task_mix.values()):
        fail("--task_mix: shares are whole numbers of at least 1")
    args.init = args.init or f"{args.model}/adapters/merged"
    args.anchor = args.anchor or f"{args.model}/adapters/deqa"
    if args.mar_weight is None:
        args.mar_weight = 0.0 if args.objective == "sft" else 0.02
    for flag in ("init", "anchor"):
        if getattr(args, flag) != "base" and not (flag == "anchor" and args.mar_weight == 0):
            check_adapter(getattr(args, flag), f"--{flag}")
    if args.objective == "sft" and args.mar_weight:
        fail("--mar_weight: sft is a cold start and has no anchor; leave it out or 0")
    if args.objective == "ode":
        args.noise = 0.0
    elif args.noise <= 0:
        fail("--noise must be above 0 for this objective: without noise a step has no density; or take --objective ode")
    if args.rollout == "teacher" and args.objective not in ("kl", "ode"):
        fail(f"--rollout teacher goes with --objective kl or ode: {args.objective} needs actions that the student drew")
    if args.steps < 2:
        fail("--steps must be at least 2")
    if args.group_size % args.updates:
        fail(f"--updates {args.updates} must divide --group_size {args.group_size}: every update takes its share of each group")
    check_train_steps(args)
    check_out(args.out, args.resume, args.overwrite)
    return args


def check_train_steps(args):
    """--train_steps -> the list of steps that may be trained, and how many of them in an iteration."""
    kind, _, number = args.train_steps.partition(":")
    try:
        if kind in ("first", "random"):
            eligible = list(range(args.steps - 1))
        else:
            eligible = list(range(args.steps)) if kind == "all" else sorted({int(i) for i in kind.split(",")})
        count = int(number) if kind == "random" else len(eligible)
    except ValueError:
        fail(f"--train_steps {args.train_steps}: expected first, all, random:K or a list such as 0,2,5")
    if not 1 <= count <= len(eligible) or not 0 <= eligible[0] <= eligible[-1] < args.steps:
        fail(f"--train_steps {args.train_steps}: there are {args.steps} steps, numbered from 0")
    if args.noise_kind == "cps" and args.noise > 0 and args.steps - 1 in eligible:
        fail("--train_steps: the last cps step has no noise, so no KL; leave it out")
    args.eligible_steps, args.trained_steps = eligible, count


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import shutil  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

import adapters  # noqa: E402
import common  # noqa: E402
import losses  # noqa: E402
from evaluate import picture_grid, report  # noqa: E402
from sde import kl_weight, rollout, step  # noqa: E402


def objective(args, i, grid, v, x, mean_old, v_teacher, kl_to_go, std):
    """The chosen loss at step i of a micro-batch. v is the student's velocity with gradient; v, v_teacher, mean_old
    (c, C, H, W), x (T + 1, c, C, H, W), kl_to_go (c,). Returns (loss, metrics, v_student's mean)."""
    if args.objective == "ode":
        return losses.opd_ode(v, v_teacher, grid[i] - grid[i + 1])
    mean, _ = step(x[i], v, grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)
    mean_teacher, _ = step(x[i], v_teacher, grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)
    if args.objective == "kl":
        return losses.opd_kl(mean, mean_teacher, std)
    if args.objective == "trajectory":
        return losses.opd_trajectory(mean, mean_old, mean_teacher, x[i + 1], std, kl_to_go, args.clip_range)
    if args.objective == "ppo-scalar":
        return losses.opd_ppo_scalar(mean, mean_old, mean_teacher, x[i + 1], std, args.clip_range)
    if args.objective.startswith("ppo-pub"):
        detach = args.objective == "ppo-published"  # the public code forgot to
        return losses.opd_ppo_published(mean, mean_old, mean_teacher, x[i + 1], std, args.clip_range, detach)
    return losses.opd_ppo(mean, mean_old, mean_teacher, x[i + 1], std, args.clip_range)


def paint_sft_images(pipe, text, args, train, run, rank, world):
    """Once: latents that every task's own teacher paints for its training prompts (all ranks paint, rank 0 keeps them)."""
    file, grid = run / "sft_images.safetensors", common.time_grid(pipe, args.eval_steps)
    if not file.exists():
        tasks = list(args.teacher)
        own = common.share(args.sft_images, rank, world)
        latents = {}
        for n, task in enumerate(tasks):
            mine = [i for i in own if i % len(tasks) == n]
            with adapters.adapter(pipe.transformer, f"teacher_{task}"):
                for j in tqdm(range(0, len(mine), args.micro_batch), desc=f"{task} paints", disable=rank > 0):
                    part = mine[j : j + args.micro_batch]
                    rows = torch.tensor([text["rows"][train[task][i // len(tasks) % len(train[task])]] for i in part], device=pipe.device)
                    noise = common.initial_noise(pipe, [common.generator(args.seed, "sft", i) for i in part], args.size)
                    g = args.teacher_guidance.get(task, args.guidance)
                    x = rollout(lambda x, t: common.velocity(pipe.transformer, x, t, text, rows, g), noise, grid, a=0.0).x[-1]
                    latents |= dict(zip(part, x.cpu()))
        everything = {i: x for part in common.gather(latents) for i, x in part.items()}  # all ranks participate
        if rank == 0:
            save_file({"latents": torch.stack([everything[i] for i in range(args.sft_images)])}, f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
        common.gather(None)  # the others wait for the file
    return load_file(file)["latents"]  # (sft_images, C, H, W); image i is of task i % 4


def main(args):
    rank, world, device = common.start_processes()
    run, tasks, sft = Path(args.out), list(args.teacher), args.objective == "sft"
    pipe = common.load_pipeline(args.model, device)
    transformer = pipe.transformer

    # Prompts: embedded once, then the text encoders are not needed any more.
    train = {task: read_prompts(file)[0] for task, file in args.prompts.items()}
    tests = {task: [part[: args.eval_prompts] for part in read_prompts(file)] for task, file in args.test_prompts.items()}
    text = common.embed_prompts(pipe, [*(p for ps in train.values() for p in ps), *(p for ps, _ in tests.values() for p in ps)],
                                args.text_length)  # fmt: skip

    # One frozen backbone; teachers, anchor, student and the student's average ("ema") are LoRAs on it.
    for task, path in args.teacher.items():
        layers = adapters.read_adapter(path, f"--teacher {task}", args.teacher_alpha.get(task))
        adapters.add_adapter(transformer, f"teacher_{task}", layers, path=path, flag=f"--teacher {task}")
    anchor = None if args.anchor == "base" else "anchor"
    if anchor and args.mar_weight:
        adapters.add_adapter(transformer, anchor, adapters.read_adapter(args.anchor, "--anchor"), path=args.anchor, flag="--anchor")
    layers = None if args.init == "base" else adapters.read_adapter(args.init, "--init")
    torch.manual_seed(args.seed)
    for name in ("ema", "student"):
        adapters.add_adapter(transformer, name, layers, args.rank, args.alpha, args.init, "--init")
    student, ema = (adapters.adapter_parameters(transformer, name) for name in ("student", "ema"))
    for name, parameter in student.items():
        parameter.requires_grad_(True)
        ema[name].data.copy_(parameter.data)
    config = transformer.peft_config["student"]
    optimizer = torch.optim.AdamW(student.values(), lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4)

    # Every derived number, once.
    grid = common.time_grid(pipe, args.steps)
    samples, G = args.prompts_per_iteration * args.group_size, args.group_size
    mine = common.share(samples, rank, world)
    cycle = [task for task in tasks for _ in range(int(args.task_mix[task]))]
    if rank == 0:
        print(f"{samples} images an iteration = {args.prompts_per_iteration} prompts x {G} samples, on {world} process(es); "
              f"{args.trained_steps} of {args.steps} steps trained; {args.updates} updates of {samples // args.updates} images x "
              f"{args.trained_steps} steps; {sum(p.numel() for p in student.values()):,} parameters; {len(tasks)} teachers", flush=True)  # fmt: skip

    # Flags and files that change the mathematics; --resume refuses others.
    harmless = ("out", "resume", "overwrite", "iterations", "sample_every", "save_every", "micro_batch", "eval_prompts",
                "eval_steps", "test_prompts", "rewards")  # fmt: skip
    files = [args.model + "/transformer", *args.teacher.values(), *args.prompts.values(), args.init, args.anchor]
    state = {
        "flags": {k: v for k, v in vars(args).items() if k not in harmless},
        "files": {str(f): common.sha256(f) for f in files if Path(f).exists()},
    }
    start = common.load_checkpoint(run, student, ema, optimizer, state) if args.resume else 0
    if rank == 0:
        if args.overwrite:
            shutil.rmtree(run, ignore_errors=True)
        (run / "samples").mkdir(parents=True, exist_ok=True)
        save_json(run / "args.json", vars(args))
        common.cut_log(run, start)
    common.gather(None)  # the run folder is there before anyone writes into it
    kept = paint_sft_images(pipe, text, args, train, run, rank, world) if sft else None
    signals = common.StopSignal()
    updates_done = start * args.updates
    began = time.time()
    bar = tqdm(range(start, args.iterations), initial=start, total=args.iterations, unit="it", disable=rank > 0, dynamic_ncols=True)

    for iteration in bar:
        tick = time.time()
        # 1. Prompts: a slot's task follows the cycle of shares; a task's prompts come in shuffled passes.
        slots = range(iteration * args.prompts_per_iteration, (iteration + 1) * args.prompts_per_iteration)
        slot_task = [cycle[slot % len(cycle)] for slot in slots]
        chosen = []
        for slot, task in zip(slots, slot_task):
            nth = slot // len(cycle) * cycle.count(task) + cycle[: slot % len(cycle)].count(task)
            number = args.sft_images // len(tasks) if sft else len(train[task])
            chosen += common.draw(number, 1, args.seed, task, iteration=nth)
        sample_task = [slot_task[i // G] for i in mine]
        which = [chosen[i // G] for i in mine] if not sft else [  # sft: another kept image of the task for each sample
            (chosen[i // G] + i % G) % (args.sft_images // len(tasks)) for i in mine]  # fmt: skip
        rows = torch.tensor([text["rows"][train[task][n % len(train[task])]] for task, n in zip(sample_task, which)], device=device)  # (b,)
        generators = [common.generator(args.seed, "rollout", iteration, i) for i in mine]
        members = {task: torch.tensor([n for n, t in enumerate(sample_task) if t == task], dtype=torch.long) for task in tasks}
        order = torch.randperm(len(args.eligible_steps), generator=common.generator(args.seed, "steps", iteration))
        trained = sorted(args.eligible_steps[j] for j in order[: args.trained_steps].tolist())

        # 2. Rollout (no gradient): b samples, T steps, by the SDE; each chunk belongs to one task.
        if sft:
            noise = common.initial_noise(pipe, generators, args.size)  # (b, C, H, W)
            t_sft = torch.stack([torch.rand((), generator=g) for g in generators]).to(device)  # (b,)
        else:
            x, mean_old, std = None, None, None
            for task in tasks:
                on = "student" if args.rollout == "student" else f"teacher_{task}"
                g = args.guidance if args.rollout == "student" else args.teacher_guidance.get(task, args.guidance)
                for chunk in members[task].split(args.micro_batch):
                    with adapters.adapter(transformer, on):
                        noise = common.initial_noise(pipe, [generators[n] for n in chunk], args.size)
                        part = rollout(lambda x, t: common.velocity(transformer, x, t, text, rows[chunk], g), noise, grid,
                                       args.noise, args.noise_kind, [generators[n] for n in chunk])  # fmt: skip
                    if x is None:
                        x = part.x.new_empty(args.steps + 1, len(mine), *part.x.shape[2:])  # (T + 1, b, C, H, W)
                        mean_old, std = torch.empty_like(x[1:]), part.std  # (T, b, C, H, W)
                    x[:, chunk], mean_old[:, chunk] = part.x, part.mean

        # 3. Labels (no gradient): each task's teacher, and the anchor, at every visited state that is trained on.
        log, kl_to_go = {}, {}
        with torch.no_grad():
            if sft:
                x0 = kept[[n * len(tasks) + tasks.index(task) for task, n in zip(sample_task, which)]].to(device)  # (b, C, H, W)
            else:
                v_teacher = {i: torch.empty_like(x[0]) for i in trained}  # (b, C, H, W) each
                v_anchor = {i: torch.empty_like(x[0]) for i in trained} if args.mar_weight else None
                for on, labels in (("teacher", v_teacher), *([("anchor", v_anchor)] if args.mar_weight else [])):
                    for task in tasks:
                        g = args.teacher_guidance.get(task, args.guidance) if on == "teacher" else args.guidance
                        with adapters.adapter(transformer, f"teacher_{task}" if on == "teacher" else anchor):
                            for chunk in members[task].split(args.micro_batch):
                                for i in trained:
                                    labels[i][chunk] = common.velocity(transformer, x[i, chunk], grid[i], text, rows[chunk], g)
                kl = {}  # KL(student, teacher) of every sample and trained step, before the update: mean over dimensions
                for i in trained:
                    mean_teacher, _ = step(x[i], v_teacher[i], grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)
                    scale = 2 * std[i] ** 2 if std[i] else 2.0  # without noise half the squared distance, no KL
                    kl[i] = (mean_old[i] - mean_teacher).square().flatten(1).mean(1) / scale  # (b,)
                share = (len(args.eligible_steps) - 1) / max(args.trained_steps - 1, 1)  # a part of the steps stands for all
                kl_to_go = {i: share * sum((kl[k] for k in trained if k > i), torch.zeros(len(mine), device=device)) for i in trained}

        # 4. Update: each optimizer step takes its share of every group; gradients are summed over micro-batches and processes.
        for update in range(args.updates):
            task_gradients = {}
            for task in tasks:
                part = torch.tensor([n for n in members[task].tolist() if mine[n] % args.updates == update], dtype=torch.long)
                for chunk in part.split(args.micro_batch) if len(part) else ():
                    for i in [None] if sft else trained:
                        with adapters.adapter(transformer, "student"):
                            if sft:
                                t = t_sft[chunk].view(-1, 1, 1, 1)
                                x_t = (1 - t) * x0[chunk] + t * noise[chunk]  # (c, C, H, W)
                                v = common.velocity(transformer, x_t, t_sft[chunk], text, rows[chunk], 1.0)
                                loss, metrics = losses.flow_matching(v, x0[chunk], noise[chunk])
                            else:
                                v = common.velocity(transformer, x[i, chunk], grid[i], text, rows[chunk], args.guidance)
                                loss, metrics = objective(args, i, grid, v, x[:, chunk], mean_old[i, chunk], v_teacher[i][chunk],
                                                          kl_to_go[i][chunk], std[i])  # fmt: skip
                            if args.mar_weight:
                                w = (grid[i] - grid[i + 1]) ** 2 / 2 if args.objective == "ode" else kl_weight(
                                    grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)  # fmt: skip
                                extra, more = losses.mar(v, v_anchor[i][chunk], args.mar_weight * w)
                                loss, metrics = loss + extra, metrics | more
                            # The loss is a mean over the update's samples, of all processes, and the trained steps.
                            share = len(chunk) / (samples / args.updates) / (1 if sft else len(trained))
                            (loss * share).backward()
                        for k, value in {"loss": loss.item(), **metrics}.items():
                            log[k] = log.get(k, 0.0) + value * share / args.updates
                task_gradients[task] = common.take_gradients(student.values())
            gradients = common.all_reduce(torch.stack(list(task_gradients.values())))  # (tasks, P); all ranks participate
            common.give_gradients(student.values(), gradients.sum(0))
            norm = torch.nn.utils.clip_grad_norm_(student.values(), args.grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            updates_done += 1
            if updates_done % args.ema_every == 0:
                common.update_ema(ema.values(), student.values(), updates_done // args.ema_every, args.ema_decay)

        # 5. Log. Cosines: do the tasks pull the student in one direction (1), or against each other (-1)?
        cosine = torch.nn.functional.cosine_similarity(gradients[:, None], gradients[None], dim=-1)  # (tasks, tasks)
        if not sft:
            with torch.no_grad(), adapters.adapter(transformer, "student"):  # the KL again, on the first sample of every prompt
                firsts = torch.tensor([n for n, i in enumerate(mine) if i % G == 0], dtype=torch.long)
                for i in trained if len(firsts) else ():
                    v = common.velocity(transformer, x[i, firsts], grid[i], text, rows[firsts], args.guidance)
                    mean, _ = step(x[i, firsts], v, grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)
                    mean_teacher, _ = step(x[i, firsts], v_teacher[i][firsts], grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)
                    after = (mean - mean_teacher).square().flatten(1).mean(1) / (2 * std[i] ** 2 if std[i] else 2.0)
                    for n, value in zip(firsts.tolist(), after.tolist()):
                        task, count = sample_task[n], slot_task.count(sample_task[n]) * len(trained)
                        log[f"kl_after/{task}"] = log.get(f"kl_after/{task}", 0.0) + value / count
                        log[f"kl_before/{task}"] = log.get(f"kl_before/{task}", 0.0) + kl[i][n].item() / count
            for task in set(slot_task):
                count = slot_task.count(task) * G * len(trained)
                log[f"kl/{task}"] = sum(kl[i][members[task]].sum().item() for i in trained) / count
        parts = common.gather(log)  # all ranks participate
        log = {k: sum(part.get(k, 0.0) for part in parts) for part in parts for k in part}
        log |= {f"cosine/{a}-{b}": cosine[m, n].item() for m, a in enumerate(tasks) for n, b in enumerate(tasks) if m < n}
        log = {"iteration": iteration} | log | {"grad_norm": norm.item(), "seconds": time.time() - tick}
        if rank == 0:
            common.log_line(run, log)
        bar.set_postfix({k.split("/")[-1]: f"{v:.1e}" for k, v in log.items() if k.startswith("kl/")} or {"loss": f"{log['loss']:.3f}"})

        # 6. Samples, with the average of the weights and the same prompts and noise every time (rank 0 only).
        last = iteration + 1 == args.iterations
        if rank == 0 and args.sample_every and ((iteration + 1) % args.sample_every == 0 or last):
            prompts = [p for task in tasks for p in sorted(train[task])[:2]]
            with adapters.adapter(transformer, "ema"):
                images = common.paint(pipe, text, prompts, [(args.seed, "sample", p) for p in prompts], args.eval_steps,
                                      args.guidance, args.micro_batch, args.size)  # fmt: skip
            picture_grid(run / "samples" / f"{iteration + 1:05d}.png", {"student": images}, prompts)

        # 7. Checkpoint.
        stop = signals.stop()
        if rank == 0 and ((iteration + 1) % args.save_every == 0 or last or stop):
            common.save_checkpoint(run, iteration + 1, student, ema, optimizer, config, state)
        if stop:
            break

    done = iteration + 1 if start < args.iterations else start
    if done < args.iterations:
        if rank == 0:
            print(f"stopped after {done} iterations; go on with the same command and --resume")
        common.stop_processes()
        return
    if rank == 0:
        shutil.rmtree(run / "adapter", ignore_errors=True)
        shutil.copytree(common.checkpoints(run)[-1] / "adapter", run / "adapter")
        pairs_of = [f"cosine/{a}-{b}" for m, a in enumerate(tasks) for b in tasks[m + 1 :]]
        common.draw_curves(run, {"KL to the routed teacher": ("mean over dimensions", [f"kl/{t}" for t in tasks]),
                                 "gradient cosine between tasks": ("cosine", pairs_of), "update": ("fraction", ["clip_fraction"])})  # fmt: skip
        print(f"{done} iterations in {(time.time() - began) / 60:.1f} minutes -> {run}/adapter, curves.png, samples/", flush=True)
    if tests:
        start = "merged start" if Path(args.init).name == "merged" else "start"
        if layers:
            adapters.add_adapter(transformer, "init", layers, path=args.init, flag="--init")
        report(args, pipe, text, tests, {start: "init" if layers else None, "student": "ema"}, run, rank, world)
        if rank == 0:
            print(f'next: python evaluate.py --models base {run}/adapter --prompt "two red circles and one blue square"\n'
                  f"      python train_opd.py --objective kl --out runs/opd_kl")  # fmt: skip
    common.stop_processes()


if __name__ == "__main__":
    main(ARGS)
