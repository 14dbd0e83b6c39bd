"""Stage 1: train one teacher by GRPO on one reward (Flow-GRPO, arXiv 2505.05470), or the GRPO-Mix baseline on several.

    python train_teacher.py --reward ocr                                     # one teacher, minutes on a laptop CPU
    python train_teacher.py --reward deqa=0.78 pickscore=0.22 --tasks geneval ocr deqa pickscore   # MAR's anchor
    python train_teacher.py --mix geneval=3 ocr=1 pickscore=1                # GRPO-Mix: one model, all rewards
    torchrun --nproc_per_node=8 train_teacher.py --reward ocr                # the same run on eight processes

Every prompt is painted G times by the SDE sampler; a sample that scores above its group's mean is made more
likely at every trained step, one below less likely. The result is a LoRA in runs/NAME/adapter.

Deviations from Flow-GRPO and from the paper's GRPO-Mix:
 1. Every iteration holds all tasks of --mix in their proportions; the public code alternates whole epochs.
 2. Noise and prompts are functions of (seed, iteration, sample), so the number of processes changes nothing.
 3. Rewards are put on 0..1 by their range before they are weighted, so that weights mean what they say.
 4. No KL to the base by default (--beta): a teacher is meant to specialise.
"""

import time
from pathlib import Path

import support.flags as cli
from support.flags import TASKS, at_least, fail, pairs, positive, prompt_files, read_prompts, within


def parse_args():
    parser = cli.make_parser(__doc__)
    cli.model_flags(parser)
    flag = parser.add_argument_group("what to train").add_argument
    cli.reward_flags(flag)
    flag("--reward", nargs="+", metavar="NAME[=WEIGHT]", help="the reward, or a weighted sum of several")
    flag("--on_reward_error", choices=("stop", "skip"), default="stop", help="where a scorer fails: stop, or say so and "
         "skip the update, as after a NaN gradient (--max_bad_steps)")  # fmt: skip
    flag("--tasks", nargs="+", help="whose prompts to train on; default: the one named like the reward")
    flag(
        "--mix",
        nargs="+",
        metavar="TASK=SHARE",
        help="GRPO-Mix instead: each task in this share of the prompts, scored by the reward of its own name",
    )
    flag("--mix_quality", type=within(0, 1), default=0.2, help="weight of deqa in every reward of --mix; the rest is its own")
    flag("--prompts", nargs="+", action="extend", metavar="TASK=FILE", help="default MODEL/prompts/TASK_train.txt")
    flag("--test_prompts", nargs="+", action="extend", metavar="TASK=FILE", help="default MODEL/prompts/TASK_test.txt")
    flag("--init", default="base", metavar="DIR|HUB", help="base (a fresh LoRA), or an adapter to go on from")
    flag("--rank", type=positive, default=16, help="LoRA rank of a fresh adapter (32 in the paper)")
    flag("--alpha", type=within(0), default=32, help="LoRA alpha: the update is scaled by alpha / rank (64 in the paper)")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--prompts_per_iteration", type=positive, default=8, help="distinct prompts, over all processes")
    flag("--group_size", type=positive, default=16, help="samples per prompt, G (24 in the paper)")
    flag("--steps", type=at_least(2), default=6, help="denoising steps of a rollout, T (10 in the paper)")
    flag("--noise", type=within(0), default=0.7, help="SDE noise level a")
    flag("--noise_kind", choices=("flow", "dance", "cps"), default="flow", help="see sde.py")
    flag(
        "--window",
        type=at_least(0),
        default=0,
        help="make only this many steps in a row stochastic and train on those alone; 0 = all but the last",
    )
    flag(
        "--window_end",
        type=at_least(0),
        default=0,
        help="the window lies before this step, drawn anew each iteration; 0 = anywhere",
    )
    flag("--guidance", type=within(0), default=1.0, help="classifier-free guidance scale; 1 = off (4.5 for SD3.5)")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--iterations", type=positive, default=100, help="rollouts; each gives --updates optimizer steps")
    flag("--updates", type=positive, default=2, help="optimizer steps per iteration, each on its share of every group")
    flag("--lr", type=within(0), default=1e-3, help="AdamW's learning rate (public code: 3e-4, its model is 1000 times larger)")
    flag("--clip_range", type=within(0), default=1e-2, help="PPO clip of the ratio of mean log-probs")
    flag("--beta", type=within(0), default=0.0, help="weight of KL(student, base); 0 = off (0.04 in Flow-GRPO)")
    flag("--std", choices=("global", "group"), default="global", help="what an advantage is divided by")
    flag("--grad_norm", type=within(0), default=1.0, help="clip the global gradient norm here")
    flag("--ema_decay", type=within(0, 1), default=0.9, help="of the average that is evaluated and saved")
    flag("--ema_every", type=positive, default=1, help="optimizer steps between averages (public code: 8, for longer runs)")
    flag("--micro_batch", type=positive, default=128, help="samples per forward pass; less if memory runs out, same result")
    flag("--checkpointing", action="store_true", help="keep no activations: less memory, a slower update")
    flag = parser.add_argument_group("run").add_argument
    flag("--out", help="run folder; default runs/teacher_REWARD or runs/grpo_mix")
    flag("--eval_every", type=at_least(0), default=20, help="iterations between evaluations and sample pictures; 0 = never")
    flag("--eval_prompts", type=positive, default=64, help="test prompts per task in such an evaluation")
    flag("--eval_steps", type=positive, default=16, help="ODE steps of evaluation and pictures (40 in the paper)")
    flag("--final", choices=("last", "best"), default="last", help="the average that becomes adapter/; best = by test reward")
    cli.run_flags(flag)
    args = parser.parse_args()

    cli.check_model(args.model)
    if bool(args.reward) == bool(args.mix):
        fail("give one of --reward NAME (a teacher) and --mix TASK=SHARE … (the GRPO-Mix baseline)")
    if args.mix:
        args.mix = pairs(args.mix, "--mix", number=True)
        args.tasks = list(args.mix)
        if any(not 1 <= share <= 1000 or share % 1 for share in args.mix.values()):
            fail("--mix: shares are whole numbers from 1 to 1000")
    else:
        args.reward = pairs([r if "=" in r else f"{r}=1" for r in args.reward], "--reward", number=True)
        if any(weight <= 0 for weight in args.reward.values()):
            fail("--reward: weights are above 0; for less of something write a scorer that gives its negative")
        args.tasks = args.tasks or [name for name in args.reward][:1]
        args.mix = None
    for task in args.tasks:
        if task not in TASKS and task not in pairs(args.prompts, "--prompts", overrule=True):
            fail(f"unknown task {task!r} (--tasks, or as --reward): {', '.join(TASKS)}, or any with --prompts {task}=FILE")
    args.prompts = prompt_files(args.prompts, args.tasks, "train", args.model)
    tests = prompt_files(args.test_prompts, args.tasks, "test", args.model, "--test_prompts") if args.eval_every else {}
    args.test_prompts = tests
    if args.final == "best" and not args.eval_every:
        fail("--final best needs test rewards: give --eval_every")
    if args.group_size < 2:
        fail("--group_size must be at least 2: a group of one has no mean to be better than")
    if args.noise <= 0:
        fail("--noise must be above 0: without noise there is no policy to take the gradient of")
    if args.group_size % args.updates:
        fail(f"--updates {args.updates} must divide --group_size {args.group_size}: every update takes its share of each group")
    args.window_end = args.window_end or args.steps - 1
    if not 0 <= args.window <= args.window_end < args.steps:
        fail("--window must be at most --window_end, and that below --steps; --window 0 trains on all steps but the last")
    if args.init != "base":
        cli.check_adapter(args.init, "--init")
    args.out = args.out or ("runs/grpo_mix" if args.mix else "runs/teacher_" + "_".join(args.reward))
    cli.check_out(args)
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import math
import sys

import torch
from tqdm import tqdm

import support.lora as adapters
import support.run as common
import support.memory as memory
from support.checkpoint import begin_run, checkpoints, publish, publish_adapter
from support.checks import self_checks
from evaluate import ask, check_prompts, load_rewards, picture_grid
from losses import group_advantage, grpo
from support.model import TEXT, decode, embed_prompts, initial_noise, load_pipeline, paint, time_grid, velocity
from rewards.monitors import colour_entropy, diversity, edge_density
from sde import kl_weight, log_prob, rollout, step


def make_reward(args, scorers):
    """-> reward(images, task, prompts, metadata): (B,), the weighted mean of the scores, each brought to 0..1 by its range.
    An error is never a score: it stops the run, or with --on_reward_error skip gives nan, which skips the update."""
    for name in args.reward or [*args.tasks, "deqa"]:
        if name not in scorers:
            fail(f"unknown reward {name!r}: {args.rewards} has {', '.join(scorers)}")
        limits = getattr(scorers[name], "range", None)
        if not (isinstance(limits, tuple | list) and len(limits) == 2 and limits[0] < limits[1]):
            fail(f"reward {name!r} of {args.rewards}: give it .range = (low, high), the scores that count as 0 and as 1")

    def reward(images, task, prompts, metadata):
        own = 1 - args.mix_quality
        weights = args.reward or ({task: own, "deqa": args.mix_quality} if task != "deqa" else {"deqa": 1.0})
        total = torch.zeros(len(images))
        for name, weight in weights.items():
            low, high = scorers[name].range
            try:
                scores = ask(scorers[name], images, prompts, metadata)
            except ValueError as error:
                why = f"reward {name} cannot score: {str(error).removeprefix(f'{name}: ')}"
                if args.on_reward_error == "stop":
                    print(file=sys.stderr)  # ends the progress bar's line
                    fail(why)
                tqdm.write(f"batch dropped: {why}", file=sys.stderr)
                return torch.full((len(images),), math.nan)
            total += weight * (scores.float() - low) / (high - low)
        return total / sum(weights.values())

    return reward


@memory.guarded
def main(args):
    rank, world, device = common.start_processes()
    run = Path(args.out)
    scorers = load_rewards(args.rewards, args.reward_device or device)
    reward_of = make_reward(args, scorers)
    pipe = load_pipeline(args.model, device, args.dtype, args.no_t5, args.checkpointing, args.size, args.compile)
    transformer = pipe.transformer

    # The student is a LoRA on the frozen backbone; "ema" is a second one that holds its running average.
    layers = None if args.init == "base" else adapters.read_adapter(args.init, "--init")
    student, ema = adapters.add_student(transformer, args, layers)
    config = transformer.peft_config["student"]
    optimizer = torch.optim.AdamW(student.values(), lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4, fused=True)

    # Every derived number, once.
    grid = time_grid(pipe, args.steps)
    samples = args.prompts_per_iteration * args.group_size
    if samples < world:
        fail(f"{world} processes for {samples} samples an iteration: raise --prompts_per_iteration or start fewer")
    mine = common.share(samples, rank, world)
    cycle = [task for task in args.tasks for _ in range(int(args.mix[task]) if args.mix else 1)]
    train = {task: read_prompts(file) for task, file in args.prompts.items()}
    tests = {task: [part[: args.eval_prompts] for part in read_prompts(file)] for task, file in args.test_prompts.items()}
    for flag, files, sets in (("--prompts", args.prompts, train), ("--test_prompts", args.test_prompts, tests)):
        for task, (prompts, metadata) in sets.items():
            for name in args.reward or [task]:
                check_prompts(scorers[name], prompts, metadata, f"{flag} {files[task]}")
    sizes = {task: len(prompts) for task, (prompts, _) in train.items()}
    if rank == 0:
        common.print_batch(args, args.window or args.steps - 1, world)

    # Prompts are embedded once, those that this process will use, and the text encoders are gone again.
    prompts = {task: part[0] for task, part in train.items()}
    used = common.prompts_used(args, prompts, tests, sizes, cycle, mine, rank, world)
    text = embed_prompts(pipe, used, args.text_length, args.no_t5, args.cache_embeddings)

    if rank == 0:
        self_checks(args, pipe, text, grid, used, range(args.steps - 1), {"student": args.guidance}, student)

    # --resume refuses other flags than these, and other contents of these files.
    harmless = "model init prompts test_prompts eval_every eval_prompts eval_steps micro_batch checkpointing cache_embeddings"
    harmless += " on_reward_error reward_device compile"
    files = [(part, f"{pipe.name_or_path}/{part}") for part in ("transformer", *TEXT)]
    files += [("init", cli.fetch(args.init, "", cli.ADAPTER))] if args.init != "base" else []
    files += [(f"prompts {task}", file) for task, file in args.prompts.items()]
    start, saver = begin_run(args, harmless, files, rank, student, ema, optimizer, config)
    updates_done, bad_steps, began = start * args.updates, 0, time.time()
    bar = tqdm(range(start, args.iterations), "training", args.iterations, initial=start, unit="it", disable=rank > 0)

    for iteration in bar:
        watch = common.Stopwatch(device)
        # 1. Prompts: a slot's task follows the cycle of shares; a task's prompts come in shuffled passes.
        chosen = common.choose(sizes, cycle, args.prompts_per_iteration, args.seed, iteration)
        tasks = [task for task, _ in chosen]
        chosen = [(train[task][0][n], train[task][1][n]) for task, n in chosen]  # (prompt, metadata) of every slot
        own_prompts = [chosen[i // args.group_size][0] for i in mine]  # b samples on this process
        rows = torch.tensor([text["rows"][prompt] for prompt in own_prompts])  # (b,)
        generators = [common.generator(args.seed, "rollout", iteration, i) for i in mine]

        # 2. Rollout (no gradient): b samples, T steps, by the SDE.
        trained = range(args.steps - 1)
        if args.window:
            places, own = args.window_end - args.window + 1, common.generator(args.seed, "window", iteration)
            first = int(torch.randint(places, (), generator=own))
            trained = range(first, first + args.window)
        noisy = trained if args.window else None
        noise = initial_noise(pipe, generators, args.size)  # (b, C, H, W)
        loss_scale = noise.shape[1:].numel() if args.dtype == "fp16" else 1  # fp16 cannot hold a mean's gradient, 1 / (C H W)
        x = noise.new_empty(args.steps + 1, *noise.shape)  # (T + 1, b, C, H, W)
        old_log_prob = noise.new_empty(args.steps, len(mine))  # (T, b)
        for part in common.chunks(torch.arange(len(mine)), args.micro_batch):
            own = [generators[n] for n in part]
            move = lambda x, t, r=rows[part]: velocity(transformer, x, t, text, r, args.guidance)
            trajectory = rollout(move, noise[part], grid, args.noise, args.noise_kind, own, noisy)
            x[:, part], old_log_prob[:, part], std = trajectory.x, trajectory.log_prob, trajectory.std
        watch.lap("rollout")

        # 3. Rewards and advantages: every process scores its own images, all share the numbers. After the whole rollout, not
        # beside it: both want the same device, and off it an image takes 6 to 105 ms (tests/benchmark_rewards.py).
        images = torch.cat([decode(pipe.vae, latents).cpu() for latents in x[-1].split(args.micro_batch)])  # (b, 3, H, W)
        scores = {}
        for task in sorted(set(tasks)):
            members = [n for n, i in enumerate(mine) if tasks[i // args.group_size] == task]
            if members:
                asked = [chosen[mine[n] // args.group_size] for n in members]
                values = reward_of(images[members], task, [c[0] for c in asked], [c[1] for c in asked])
                scores |= {mine[n]: value for n, value in zip(members, values.tolist())}
        scores = {i: s for part in common.gather(scores) for i, s in part.items()}  # all ranks participate
        rewards = torch.tensor([scores[i] for i in range(samples)], dtype=torch.float64)  # (N,)
        groups, advantage = torch.arange(samples) // args.group_size, torch.zeros(samples)
        for task in set(tasks):  # each task by its own std: a reward that varies little weighs as much as one that varies a lot
            of_task = torch.tensor([t == task for t in tasks])[groups]  # (N,) bool
            advantage[of_task] = group_advantage(rewards[of_task], groups[of_task], args.std == "global")
        advantage = advantage[mine].to(device)  # (b,)
        watch.lap("rewards")

        # 4. Update: each optimizer step takes its share of every group; gradients are summed over micro-batches and processes.
        log = {}
        for update in range(args.updates):
            ours = torch.tensor([n for n, i in enumerate(mine) if i % args.updates == update], dtype=torch.long)
            for part in common.chunks(ours, args.micro_batch):
                for i in trained:
                    v = velocity(transformer, x[i, part], grid[i], text, rows[part], args.guidance)  # (c, C, H, W)
                    mean, _ = step(x[i, part], v, grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)
                    new_log_prob = log_prob(x[i + 1, part], mean, std[i])  # (c,)
                    loss, metrics = grpo(new_log_prob, old_log_prob[i, part], advantage[part], args.clip_range)
                    if args.beta:
                        with torch.no_grad(), adapters.adapter(transformer, None):
                            v_base = velocity(transformer, x[i, part], grid[i], text, rows[part], args.guidance)
                        w = kl_weight(grid[i], grid[i + 1], args.noise, grid[1], args.noise_kind)
                        kl = w * (v - v_base).square().mean()
                        loss = loss + args.beta * kl
                        metrics["kl_base"] = kl.item()
                    fraction = len(part) / (samples / args.updates) / len(trained)  # the loss is a mean over all processes
                    (loss * fraction * loss_scale).backward()
                    for k, value in metrics.items():
                        log[k] = log.get(k, 0.0) + value * fraction / args.updates
            gradient = common.all_reduce(common.take_gradients(student.values(), loss_scale))  # (P,); all ranks participate
            common.give_gradients(student.values(), gradient)
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

        # 5. Log. A reward that climbs while a monitor leaves its range of the first iterations is being cheated. Diversity is
        # that among the images of a prompt on one process.
        for monitor in (edge_density, colour_entropy, diversity):
            log[f"monitor/{monitor.name}"] = monitor(images.nan_to_num(), own_prompts).nanmean().item() * len(mine) / samples
        log = common.sum_logs(log)  # all ranks participate
        log = {"iteration": iteration, "reward": rewards.mean().item()} | log | {"grad_norm": norm.item()}
        log |= watch.result()
        if "skipped_updates" in log:
            log["skipped_prompts"] = [prompt for prompt, _ in chosen]
        for task in sorted(set(tasks)):
            log[f"reward/{task}"] = rewards.view(-1, args.group_size)[[t == task for t in tasks]].mean().item()
        log["flat_groups"] = (rewards.view(-1, args.group_size).std(1) < 1e-6).double().mean().item()  # they carry no signal
        bar.set_postfix(reward=f"{log['reward']:.3f}", ratio_gap=f"{log['ratio_gap']:.1e}")

        # 6. Samples and evaluation, with the average of the weights and the same noise every time.
        last = iteration + 1 == args.iterations
        if args.eval_every and ((iteration + 1) % args.eval_every == 0 or last):
            with adapters.adapter(transformer, "ema"):
                for task, (prompts, metadata) in tests.items():
                    own = common.share(len(prompts), rank, world)
                    asked, keys = [prompts[i] for i in own], [(args.seed, "test", task, i) for i in own]
                    images = paint(pipe, text, asked, keys, args.eval_steps, args.guidance, args.micro_batch, args.size)
                    values = reward_of(images, task, asked, [metadata[i] for i in own])
                    log[f"test/{task}"] = sum(common.gather(values.sum().item())) / len(prompts)  # all ranks participate
                    if rank == 0:
                        file = run / "samples" / f"{task}_{iteration + 1:05d}.png"
                        picture_grid(file, {"student": images[:8]}, asked[:8], {"student": values[:8]})
            mean = sum(log[f"test/{task}"] for task in tests) / len(tests)
            before = [line["test"] for line in common.read_log(run) if line.get("test") is not None]
            if rank == 0 and mean > max(before, default=-math.inf):
                adapters.save_adapter(run / "tmp_best", ema, config)
                publish(run / "tmp_best", run / "best")
            log["test"] = mean
        if rank == 0:
            common.log_line(run, log)

        # 7. Checkpoint: a copy in memory after every iteration, for signals and errors; on disk now and then (rank 0).
        saver.keep(iteration + 1)
        if (iteration + 1) % args.save_every == 0 or last:
            saver.save()
        if bad_steps >= args.max_bad_steps:
            saver.give_up(f"{bad_steps} updates in a row had a NaN or infinite gradient; metrics.jsonl names their prompts")

    saver.close()
    if rank == 0:
        best = args.final == "best" and (run / "best").is_dir()  # not there where no test could be scored
        publish_adapter(run / "best" if best else checkpoints(run)[-1] / "adapter", run / "adapter")
        panels = {"reward": ["reward"], "test reward": [f"test/{task}" for task in tests]}
        panels["fraction of ratios clipped"] = ["clip_fraction"]
        common.draw_curves(run, panels | {"signs of reward hacking": ["monitor/edge_density", "monitor/diversity"]})
        minutes = f"{(time.time() - began) / 60:.1f} minutes"
        print(f"{max(args.iterations - start, 0)} iterations in {minutes} -> {run}/adapter, curves.png, samples/")
        print(f"next: python evaluate.py --models base teacher={run}/adapter --out {run}/evaluate")
    common.stop_processes()


if __name__ == "__main__":
    main(ARGS)
