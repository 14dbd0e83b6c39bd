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

from cli import check_adapter, check_model, check_out, fail, make_parser, pairs, positive, prompt_files, read_prompts, save_json

TEACHERS = ("geneval", "ocr", "deqa", "pickscore")
OBJECTIVES = ("ppo", "ppo-scalar", "ppo-published", "ppo-public-code", "kl", "trajectory", "ode", "sft")


def parse_args():
    parser = make_parser(__doc__)
    flag = parser.add_argument_group("what to train").add_argument
    flag("--model", default="toy", help="base pipeline: a directory that diffusers loads")
    flag(
        "--teacher",
        action="append",
        metavar="TASK=DIR",
        help="the teacher (adapter directory) of a task; repeat "
        "for each; default MODEL/adapters/TASK for geneval, ocr, deqa, pickscore",
    )
    flag("--teacher_guidance", nargs="+", metavar="TASK=SCALE", help="a guidance scale of its own for a teacher")
    flag("--teacher_alpha", nargs="+", metavar="TASK=ALPHA", help="LoRA alpha where a teacher's file does not say it")
    flag("--prompts", nargs="+", metavar="TASK=FILE", help="training prompts; default toy/prompts/TASK_train.txt")
    flag("--task_mix", nargs="+", metavar="TASK=SHARE", help="prompts of each task in an iteration, as shares; default equal")
    flag("--init", help="student's start: base or an adapter directory; default MODEL/adapters/merged")
    flag("--anchor", help="MAR's anchor: base or an adapter directory; default MODEL/adapters/deqa")
    flag("--rank", type=int, default=32, help="LoRA rank of a fresh student (--init base)")
    flag("--alpha", type=float, default=64, help="its alpha: the update is scaled by alpha / rank")
    flag = parser.add_argument_group("objective").add_argument
    flag("--objective", choices=OBJECTIVES, default="ppo", help="rows of the table in losses.py")
    flag("--mar_weight", type=float, help="weight of MAR, 0 = off; default 0.02 as in the paper, 0 for sft")
    flag("--clip_range", type=float, help="PPO clip; default 0.2 for ppo (a coordinate's ratio), 1e-4 else (an image's mean)")
    flag(
        "--rollout",
        choices=("student", "teacher"),
        default="student",
        help="whose states are labelled; teacher = off-policy distillation, a control (kl and ode only)",
    )
    flag = parser.add_argument_group("sampling").add_argument
    flag("--prompts_per_iteration", type=positive, default=8, help="distinct prompts, over all tasks and processes")
    flag("--group_size", type=positive, default=16, help="samples per prompt, G (24 in the paper)")
    flag("--steps", type=positive, default=6, help="denoising steps of a rollout, T (10 in the paper)")
    flag(
        "--train_steps",
        default="first",
        metavar="WHICH",
        help="first = all but the last; all; a list 0,2,5; or "
        "random:K = K of all but the last, drawn anew each iteration (unbiased)",
    )
    flag("--noise", type=float, default=0.7, help="SDE noise level a; the ode objective takes 0 by itself")
    flag("--noise_kind", choices=("flow", "dance", "cps"), default="flow", help="see sde.py")
    flag(
        "--guidance",
        type=float,
        default=1.0,
        help="classifier-free guidance of student, teachers and anchor; 1 = off (4.5 for SD3.5)",
    )
    flag("--text_length", type=int, default=128, help="T5 tokens, at most what the tokenizer allows")
    flag("--size", type=int, help="image side in pixels; default the model's own")
    flag("--sft_images", type=positive, default=2048, help="images that the teachers paint for --objective sft, once")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--iterations", type=positive, default=60, help="rollouts; each gives --updates optimizer steps")
    flag("--updates", type=positive, default=2, help="optimizer steps per iteration, each on its share of every group")
    flag("--lr", type=float, default=1e-3, help="Adam's learning rate (1e-4 in the paper, whose model is 1000 times larger)")
    flag("--grad_norm", type=float, default=1.0, help="clip the global gradient norm here")
    flag("--ema_decay", type=float, default=0.9, help="of the average that is evaluated and saved")
    flag("--ema_every", type=positive, default=1, help="optimizer steps between averages (8 in the paper, for longer runs)")
    flag("--micro_batch", type=positive, default=128, help="samples per forward pass; less if memory runs out, same result")
    flag = parser.add_argument_group("run").add_argument
    flag("--out", default="runs/opd", help="run folder")
    flag("--seed", type=int, default=0)
    flag("--sample_every", type=int, default=10, help="iterations between sample pictures; 0 = never")
    flag("--save_every", type=positive, default=20, help="iterations between checkpoints")
    flag("--eval_prompts", type=int, default=256, help="test prompts per task in the final evaluation; 0 = none")
    flag("--eval_steps", type=positive, default=16, help="ODE steps of evaluation and pictures (40 in the paper)")
    flag("--test_prompts", nargs="+", metavar="TASK=FILE", help="default toy/prompts/TASK_test.txt")
    flag("--rewards", default="toy", help="Python module with the scorers of the final evaluation")
    flag("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    flag("--overwrite", action="store_true", help="replace the run in --out")
    args = parser.parse_args()

    check_model(args.model)
    args.teacher = pairs(args.teacher, "--teacher") or {task: f"{args.model}/adapters/{task}" for task in TEACHERS}
    tasks = list(args.teacher)
    args.prompts = prompt_files(pairs(args.prompts, "--prompts"), tasks, "train")
    tests = pairs(args.test_prompts, "--test_prompts")
    args.test_prompts = prompt_files(tests, tasks, "test", "--test_prompts") if args.eval_prompts else {}
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
    if any(share < 1 or share % 1 for share in args.task_mix.values()):
        fail("--task_mix: shares are whole numbers of at least 1")
    args.init = args.init or f"{args.model}/adapters/merged"
    args.anchor = args.anchor or f"{args.model}/adapters/deqa"
    if args.clip_range is None:
        args.clip_range = 0.2 if args.objective == "ppo" else 1e-4
    if args.mar_weight is None:
        args.mar_weight = 0.0 if args.objective == "sft" else 0.02
    for flag in ("init", "anchor"):
        if getattr(args, flag) != "base" and not (flag == "anchor" and args.mar_weight == 0):
            check_adapter(getattr(args, flag), f"--{flag}")
    if args.objective == "sft" and args.mar_weight:
        fail("--mar_weight: sft is a cold start and has no anchor; leave it out or 0")
    if args.sft_images < len(tasks):
        fail(f"--sft_images must be at least {len(tasks)}: one for every task")
    if args.objective == "ode":
        args.noise = 0.0
    elif not 0 < args.noise < float("inf"):
        fail("--noise must be above 0 for this objective: without noise a step has no density; or take --objective ode")
    if args.objective == "trajectory" and args.train_steps == "random:1":
        fail("--train_steps random:1: the trajectory objective needs later steps to look ahead to; take at least 2")
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

import shutil

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import adapters
import common
import losses
from evaluate import load_scorers, picture_grid, report
from sde import kl_weight, rollout, step


def objective(args, v, v_teacher, x, x_next, mean_old, kl_to_go, t, t_next, t_max, std):
    """The chosen loss at one step of a micro-batch: (loss, metrics). Tensors (c, C, H, W), kl_to_go (c,); `v` alone
    carries gradient."""
    if args.objective == "ode":
        return losses.opd_ode(v, v_teacher, t - t_next)
    mean, _ = step(x, v, t, t_next, args.noise, t_max, args.noise_kind)
    mean_teacher, _ = step(x, v_teacher, t, t_next, args.noise, t_max, args.noise_kind)
    if args.objective == "kl":
        return losses.opd_kl(mean, mean_teacher, std)
    ppo = (mean, mean_old, mean_teacher, x_next, std)
    if args.objective == "trajectory":
        return losses.opd_trajectory(*ppo, kl_to_go, args.clip_range)
    if args.objective == "ppo-scalar":
        return losses.opd_ppo_scalar(*ppo, args.clip_range)
    if args.objective == "ppo-published":
        return losses.opd_ppo_published(*ppo, args.clip_range)
    if args.objective == "ppo-public-code":  # the detach was forgotten
        return losses.opd_ppo_published(*ppo, args.clip_range, detach=False)
    return losses.opd_ppo(*ppo, args.clip_range)


def kl_to_teacher(args, grid, i, x, mean, v_teacher, std):
    """KL(student, teacher) at step i, (b,), mean over dimensions; without noise half the squared distance of the means."""
    mean_teacher, _ = step(x, v_teacher, grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)
    return (mean - mean_teacher).square().flatten(1).mean(1) / (2 * std**2 if std else 2.0)


def paint_sft_images(pipe, text, args, train, run, rank, world):
    """Once, for --objective sft: latents that every task's own teacher paints for its training prompts.

    Image i belongs to task i % len(tasks). All ranks paint, rank 0 keeps. Returns (sft_images, C, H, W)."""
    file, grid, tasks = run / "sft_images.safetensors", common.time_grid(pipe, args.eval_steps), list(args.teacher)
    if not file.exists():
        own, latents = common.share(args.sft_images, rank, world), {}
        for n, task in enumerate(tasks):
            g = args.teacher_guidance.get(task, args.guidance)
            parts = common.chunks(torch.tensor([i for i in own if i % len(tasks) == n], dtype=torch.long), args.micro_batch)
            for part in tqdm(parts, desc=f"{task} teacher paints", disable=rank > 0):
                prompts = [train[task][i // len(tasks) % len(train[task])] for i in part.tolist()]
                rows = torch.tensor([text["rows"][p] for p in prompts], device=pipe.device)
                noise = common.initial_noise(pipe, [common.generator(args.seed, "sft", i) for i in part.tolist()], args.size)
                with adapters.adapter(pipe.transformer, f"teacher_{task}"):
                    x = rollout(lambda x, t: common.velocity(pipe.transformer, x, t, text, rows, g), noise, grid, a=0.0).x[-1]
                latents |= dict(zip(part.tolist(), x.cpu()))
        latents = {i: x for part in common.gather(latents) for i, x in part.items()}  # all ranks participate
        if rank == 0:
            save_file({"latents": torch.stack([latents[i] for i in range(args.sft_images)])}, f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
        common.gather(None)  # the others wait for the file
    return load_file(file)["latents"]


def main(args):
    rank, world, device = common.start_processes()
    run, tasks, sft = Path(args.out), list(args.teacher), args.objective == "sft"
    scorers = load_scorers(args.rewards, tasks) if args.eval_prompts else {}  # now, not after the training
    pipe = common.load_pipeline(args.model, device)
    transformer = pipe.transformer

    # Prompts: embedded once, then the text encoders are not needed any more.
    train = {task: read_prompts(file)[0] for task, file in args.prompts.items()}
    tests = {task: [part[: args.eval_prompts] for part in read_prompts(file)] for task, file in args.test_prompts.items()}
    text = common.embed_prompts(
        pipe,
        [*(p for ps in train.values() for p in ps), *(p for ps, _ in tests.values() for p in ps)],
        args.text_length,
    )

    # One frozen backbone; teachers, anchor, student and the student's average ("ema") are LoRAs on it.
    for task, path in args.teacher.items():
        layers = adapters.read_adapter(path, f"--teacher {task}", args.teacher_alpha.get(task))
        adapters.add_adapter(transformer, f"teacher_{task}", layers, path=path, flag=f"--teacher {task}")
    anchor = None if args.anchor == "base" else "anchor"
    if anchor and args.mar_weight:
        adapters.add_adapter(
            transformer, anchor, adapters.read_adapter(args.anchor, "--anchor"), path=args.anchor, flag="--anchor"
        )
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
    if samples < world:
        fail(f"{world} processes for {samples} samples an iteration: raise --prompts_per_iteration or start fewer")
    mine = common.share(samples, rank, world)
    cycle = [task for task in tasks for _ in range(int(args.task_mix[task]))]
    sizes = {task: args.sft_images // len(tasks) if sft else len(train[task]) for task in tasks}
    teacher_guidance = {task: args.teacher_guidance.get(task, args.guidance) for task in tasks}
    mar_scale = {}  # MAR's weight beside each objective: that of the KL (sde.kl_weight), or of the ODE's squared distance
    for i in args.eligible_steps:
        t, t_next = grid[i], grid[i + 1]
        ode = args.objective == "ode"
        mar_scale[i] = (t - t_next) ** 2 / 2 if ode else kl_weight(t, t_next, args.noise, grid[1], args.noise_kind)
    if rank == 0:
        print(f"{samples} images an iteration = {args.prompts_per_iteration} prompts x {G} samples, {world} process(es)")
        print(f"{args.updates} updates of {samples // args.updates} images x {args.trained_steps} of {args.steps} steps")

    # Flags and files that change the mathematics; --resume refuses others.
    harmless = "out resume overwrite iterations sample_every save_every micro_batch eval_prompts eval_steps".split()
    harmless += ["test_prompts", "rewards"]
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
    bar = tqdm(range(start, args.iterations), "training", args.iterations, initial=start, unit="it", disable=rank > 0)

    def velocity(on, x, t, members, guidance):
        """Of one adapter at x (c, C, H, W) for the samples `members`; a teacher may have a guidance scale of its own."""
        with adapters.adapter(transformer, on):
            return common.velocity(transformer, x, t, text, rows[members], guidance)

    for iteration in bar:
        tick, log = time.time(), {}
        # 1. Prompts: every task in its share; which steps of the trajectory are trained.
        chosen = common.choose(sizes, cycle, args.prompts_per_iteration, args.seed, iteration)
        slots = [task for task, _ in chosen]
        portion = {task: slots.count(task) / len(slots) for task in tasks if task in slots}  # of the tasks in this iteration
        task_of = [chosen[i // G][0] for i in mine]  # b samples on this process
        index = [chosen[i // G][1] for i in mine]
        if sft:  # not G samples of a prompt, but the next G images that its teacher painted
            index = [(n + i % G) % sizes[task] for i, n, task in zip(mine, index, task_of)]
        rows = torch.tensor([text["rows"][train[task][n % len(train[task])]] for task, n in zip(task_of, index)], device=device)
        members = {
            task: torch.tensor([n for n, other in enumerate(task_of) if other == task], dtype=torch.long) for task in tasks
        }
        generators = [common.generator(args.seed, "rollout", iteration, i) for i in mine]
        noise = common.initial_noise(pipe, generators, args.size)  # (b, C, H, W)
        order = torch.randperm(len(args.eligible_steps), generator=common.generator(args.seed, "steps", iteration))
        trained = sorted(args.eligible_steps[j] for j in order[: args.trained_steps].tolist()) if not sft else [None]

        # 2. Rollout (no gradient): T steps of the SDE by the student; a micro-batch holds one task.
        if not sft:
            x = noise.new_empty(args.steps + 1, *noise.shape)  # (T + 1, b, C, H, W)
            mean_old = torch.empty_like(x[1:])  # (T, b, C, H, W)
            for task in tasks:
                on, g = ("student", args.guidance) if args.rollout == "student" else (f"teacher_{task}", teacher_guidance[task])
                for part in common.chunks(members[task], args.micro_batch):
                    trajectory = rollout(lambda x, t: velocity(on, x, t, part, g), noise[part], grid, args.noise,
                                         args.noise_kind, [generators[n] for n in part])  # fmt: skip
                    x[:, part], mean_old[:, part], std = trajectory.x, trajectory.mean, trajectory.std

        # 3. Labels (no gradient): each task's teacher, and the anchor, at every visited state that is trained on.
        if sft:
            x0 = kept[[n * len(tasks) + tasks.index(task) for task, n in zip(task_of, index)]].to(device)  # (b, C, H, W)
            t_sft = torch.stack([torch.rand((), generator=g) for g in generators]).to(device)  # (b,)
            x_sft = torch.lerp(x0, noise, t_sft.view(-1, 1, 1, 1))  # x_t = (1 - t) x_0 + t noise
        else:
            v_teacher, v_anchor, kl = {}, {}, {}  # step: (b, C, H, W), (b, C, H, W), (b,)
            with torch.no_grad():
                for i in trained:
                    v_teacher[i], v_anchor[i] = torch.empty_like(noise), torch.empty_like(noise)
                for task in tasks:
                    for part in common.chunks(members[task], args.micro_batch):
                        for i in trained:
                            v_teacher[i][part] = velocity(f"teacher_{task}", x[i, part], grid[i], part, teacher_guidance[task])
                            if args.mar_weight:
                                v_anchor[i][part] = velocity(anchor, x[i, part], grid[i], part, args.guidance)
                            if args.rollout == "teacher":  # the states are the teacher's, the KL is still the student's
                                v = velocity("student", x[i, part], grid[i], part, args.guidance)
                                times = (grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)
                                mean_old[i, part], _ = step(x[i, part], v, *times)
                kl = {i: kl_to_teacher(args, grid, i, x[i], mean_old[i], v_teacher[i], std[i]) for i in trained}
            # trajectory objective: the KL still to come; when only some steps are trained they stand for all
            scale = (len(args.eligible_steps) - 1) / max(args.trained_steps - 1, 1)
            kl_to_go = {
                i: scale * sum((kl[k] for k in trained if k > i), torch.zeros(len(mine), device=device)) for i in trained
            }

        # 4. Update: each optimizer step takes its share of every group; gradients add up over micro-batches and processes.
        for update in range(args.updates):
            task_gradients = []
            for task in tasks:
                ours = torch.tensor([n for n in members[task].tolist() if mine[n] % args.updates == update], dtype=torch.long)
                for part in common.chunks(ours, args.micro_batch):
                    for i in trained:
                        if sft:
                            v = common.velocity(transformer, x_sft[part], t_sft[part], text, rows[part], guidance=1.0)
                            loss, metrics = losses.flow_matching(v, x0[part], noise[part])
                        else:
                            v = common.velocity(transformer, x[i, part], grid[i], text, rows[part], args.guidance)
                            labels = (v_teacher[i][part], x[i, part], x[i + 1, part], mean_old[i, part], kl_to_go[i][part])
                            loss, metrics = objective(args, v, *labels, grid[i], grid[i + 1], grid[1], std[i])
                        if args.mar_weight:
                            extra, more = losses.mar(v, v_anchor[i][part], args.mar_weight * mar_scale[i])
                            loss, metrics = loss + extra, metrics | more
                        # The loss is a mean over the update's samples (of all processes) and the trained steps.
                        share = len(part) / (samples / args.updates) / len(trained)
                        (loss * share).backward()
                        for k, value in {"loss": loss.item(), **metrics}.items():
                            log[k] = log.get(k, 0.0) + value * share / args.updates
                            log[f"{k}/{task}"] = log.get(f"{k}/{task}", 0.0) + value * share / args.updates / portion[task]
                task_gradients.append(common.take_gradients(student.values()))  # (P,) what this task alone asks for
            gradients = common.all_reduce(torch.stack(task_gradients))  # (tasks, P); all ranks participate
            common.give_gradients(student.values(), gradients.sum(0))
            norm = torch.nn.utils.clip_grad_norm_(student.values(), args.grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            updates_done += 1
            if updates_done % args.ema_every == 0:
                common.update_ema(ema.values(), student.values(), updates_done // args.ema_every, args.ema_decay)

        # 5. Log, per task. KL: of all samples; before and after the update on the first sample of every prompt.
        if not sft:
            firsts = torch.tensor([n for n, i in enumerate(mine) if i % G == 0], dtype=torch.long)
            for task in portion:
                first, count = members[task][torch.isin(members[task], firsts)], portion[task] * samples * len(trained)
                for i in trained:
                    after = torch.zeros(0)
                    if len(first):
                        with torch.no_grad():
                            v = velocity("student", x[i, first], grid[i], first, args.guidance)
                            mean, _ = step(x[i, first], v, grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)
                            after = kl_to_teacher(args, grid, i, x[i, first], mean, v_teacher[i][first], std[i])
                    terms = {"kl": kl[i][members[task]] / G, "kl_before": kl[i][first], "kl_after": after}
                    for name, term in terms.items():
                        log[f"{name}/{task}"] = log.get(f"{name}/{task}", 0.0) + term.sum().item() * G / count
        parts = common.gather(log)  # all ranks participate
        log = {k: sum(part.get(k, 0.0) for part in parts) for k in {k: None for part in parts for k in part}}
        # Do the tasks (each with its part of MAR) pull in one direction (1), or against each other (-1)? Last update.
        lengths = gradients.norm(dim=1)  # (tasks,)
        cosine = gradients @ gradients.T / (lengths[:, None] * lengths).clamp(min=1e-30)  # (tasks, tasks)
        for m, a in enumerate(tasks):
            if a in portion:
                log[f"grad_norm/{a}"] = lengths[m].item()
                log |= {f"cosine/{a}-{b}": cosine[m, m + 1 + n].item() for n, b in enumerate(tasks[m + 1 :]) if b in portion}
        log = {"iteration": iteration} | log | {"grad_norm": norm.item(), "seconds": time.time() - tick}
        if rank == 0:
            common.log_line(run, log)
        bar.set_postfix({k.split("/")[1]: f"{v:.1e}" for k, v in log.items() if k.startswith("kl/")} or {"loss": log["loss"]})

        # 6. Samples, with the average of the weights and the same prompts and noise every time (rank 0 only).
        last = iteration + 1 == args.iterations
        if rank == 0 and args.sample_every and ((iteration + 1) % args.sample_every == 0 or last):
            prompts = [p for task in tasks for p in sorted(train[task])[:2]]
            keys = [(args.seed, "sample", p) for p in prompts]
            with adapters.adapter(transformer, "ema"):
                images = common.paint(pipe, text, prompts, keys, args.eval_steps, args.guidance, args.micro_batch, args.size)
            picture_grid(run / "samples" / f"{iteration + 1:05d}.png", {"student": images}, prompts)

        # 7. Checkpoint.
        stop = signals.stop()
        if rank == 0 and ((iteration + 1) % args.save_every == 0 or last or stop):
            common.save_checkpoint(run, iteration + 1, student, ema, optimizer, config, state)
        if stop:
            break

    signals.restore()
    done = iteration + 1 if start < args.iterations else start
    if done < args.iterations:
        if rank == 0:
            print(f"stopped after {done} iterations; go on with the same command and --resume")
        common.stop_processes()
        return
    if rank == 0:
        shutil.rmtree(run / "adapter", ignore_errors=True)
        shutil.copytree(common.checkpoints(run)[-1] / "adapter", run / "adapter")
        cosines = [f"cosine/{a}-{b}" for m, a in enumerate(tasks) for b in tasks[m + 1 :]]
        panels = {"KL to the routed teacher": [f"kl/{t}" for t in tasks], "gradient cosine of two tasks": cosines}
        common.draw_curves(run, panels | {"fraction clipped": ["clip_fraction"], "loss": ["loss"] if sft else []})
        print(
            f"{done} iterations in {(time.time() - began) / 60:.1f} minutes -> {run}/adapter, curves.png, samples/",
            flush=True,
        )
    if tests:
        name = "merged start" if Path(args.init).name == "merged" else "start"
        if layers:
            adapters.add_adapter(transformer, "init", layers, path=args.init, flag="--init")
        report(args, pipe, text, tests, scorers, {name: "init" if layers else None, "student": "ema"}, run, rank, world)
        if rank == 0:
            print(
                f'next: python evaluate.py --models base {run}/adapter --prompt "two red circles and one blue square"\n'
                f"      python train_opd.py --objective kl --out runs/opd_kl"
            )
    common.stop_processes()


if __name__ == "__main__":
    main(ARGS)
