"""Stage 1: train one teacher by GRPO on one reward (Flow-GRPO, arXiv 2505.05470), or GRPO-Mix.

    python train_teacher.py --reward ocr                      # one teacher, minutes on a laptop
    python train_teacher.py --reward deqa=0.78 pickscore=0.22 --tasks geneval ocr deqa pickscore
    python train_teacher.py --mix geneval=3 ocr=1 pickscore=1 # GRPO-Mix: one model, all rewards
    torchrun --nproc_per_node=8 train_teacher.py --reward ocr # the same run on eight processes

Every prompt is sampled G times with the SDE sampler. A sample that scores above the mean of its
group is made more likely at every trained step, one below it less likely. The result is a LoRA.

Deviations from Flow-GRPO and from the paper's GRPO-Mix:
 1. Every iteration holds all tasks of --mix in their shares; the public code alternates epochs.
 2. Noise and prompts are functions of (seed, iteration, sample), not of the number of processes.
 3. Each reward is scaled to 0..1 by its range before it is weighted.
 4. No KL to the base by default (--beta): a teacher is meant to specialise.
"""

import argparse
from math import inf
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from losses import group_advantage, grpo
from rewards.monitors import colour_entropy, diversity, edge_density, thumbnails
from rewards.pictures import decode, draw_curves, picture_grid, sample_images
from rewards.scoring import make_reward, next_command, reward_log
from sde import kl_weight, log_prob, rollout, step
from support import lora, metrics, model, run
from support.arguments import check_teacher
from support.checkpoint import begin_run
from support.checks import self_checks
from support.flags import Pairs, above_0, at_least, fail, make_parser, model_flags, positive
from support.flags import portion, run_flags, scale, within

CURVES = {  # panel of curves.png: beginning of the names in metrics.jsonl
    "reward": "reward",
    "test reward": "test/",
    "fraction of ratios clipped": "clip_fraction",
    "signs of reward hacking": "monitor/",
}


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    model_flags(parser)
    flag = parser.add_argument_group("what to train").add_argument
    named = {"action": Pairs}  # NAME=VALUE ... -> {NAME: VALUE}
    flag("--reward", **named, kind=above_0, bare="1", metavar="NAME[=W]", help="or a weighted sum")
    flag("--mix", **named, kind=portion, metavar="TASK=SHARE", help="GRPO-Mix: a reward per task")
    flag("--mix_quality", type=within(0, 1), default=0.2, help="weight of deqa in rewards of --mix")
    flag("--on_reward_error", choices=("stop", "skip"), default="stop", help="skip: no update")
    flag("--tasks", nargs="+", help="whose prompts to use; default: named like the reward")
    flag("--prompts", **named, metavar="TASK=FILE", help="default MODEL/prompts/TASK_train.txt")
    flag("--test_prompts", **named, metavar="TASK=FILE", help="default .../TASK_test.txt")
    flag("--init", default="base", metavar="DIR|HUB", help="base (a fresh LoRA) or an adapter")
    flag("--rank", type=positive, default=16, help="LoRA rank (paper: 32; --init has its own)")
    flag("--alpha", type=above_0, default=32, help="LoRA alpha: its scale is alpha / rank")
    flag = parser.add_argument_group("sampling").add_argument
    flag("--prompts_per_iteration", type=positive, default=8, help="over all tasks and processes")
    flag("--group_size", type=at_least(2), default=16, help="samples per prompt, G (paper: 24)")
    flag("--steps", type=at_least(2), default=6, help="steps of a rollout, T (10 in the paper)")
    flag("--noise", type=within(0), default=0.7, help="SDE noise level a")
    flag("--noise_kind", choices=("flow", "dance", "cps"), default="flow", help="see sde.py")
    flag("--window", type=at_least(0), default=0, help="train only so many steps in a row; 0 = all")
    flag("--window_end", type=at_least(0), default=0, help="step after the window; 0 = the last")
    flag("--guidance", type=scale, default=1.0, help="guidance scale; 1 = off (SD3.5: 4.5)")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--iterations", type=positive, default=100, help="rollouts, each with --updates steps")
    flag("--updates", type=positive, default=2, help="optimizer steps per rollout")
    flag("--lr", type=within(0), default=1e-3, help="AdamW's (public code: 3e-4, a larger model)")
    flag("--clip_range", type=above_0, default=1e-2, help="of PPO, on a ratio of mean log-probs")
    flag("--beta", type=within(0), default=0.0, help="weight of KL(student, base); 0 = off")
    flag("--std", choices=("global", "group"), default="global", help="std that divides advantages")
    flag("--grad_norm", type=within(0), default=1.0, help="clip the gradient to it; 0 = off")
    flag("--ema_decay", type=within(0, 1), default=0.9, help="of the average that is evaluated")
    flag("--ema_every", type=positive, default=1, help="updates between averages (public code: 8)")
    flag("--micro_batch", type=positive, default=128, help="rows in a pass with gradient")
    flag("--label_batch", type=positive, default=128, help="rows in a pass without gradient")
    flag = parser.add_argument_group("run").add_argument
    flag("--out", help="folder of the run; default runs/teacher_REWARD or runs/grpo_mix")
    flag("--eval_every", type=at_least(0), default=20, help="iterations per test; 0 = never")
    flag("--eval_prompts", type=positive, default=64, help="test prompts per task")
    flag("--eval_steps", type=positive, default=16, help="ODE steps of a test (40 in the paper)")
    flag("--final", choices=("last", "best"), default="last", help="best = by test reward")
    run_flags(flag)
    args = parser.parse_args()
    if bool(args.reward) == bool(args.mix):
        fail("give --reward NAME (a teacher) or --mix TASK=SHARE ... (GRPO-Mix), one of the two")
    args.tasks = list(args.mix) or args.tasks or list(args.reward)[:1]
    name = "teacher_" + "_".join(args.reward) if args.reward else "grpo_mix"
    args.out = args.out or f"runs/{name}"
    last = args.steps - 1  # not trained, as in the public code
    args.window_end = args.window_end or last
    if not args.window <= args.window_end <= last:
        fail("--window must be at most --window_end, and --window_end below --steps")
    args.eligible_steps, args.trained_steps = list(range(last)), args.window or last
    return check_teacher(args)


def draw_window(args: argparse.Namespace, iteration: int) -> torch.Tensor:
    """The trained steps of an iteration (S,): all but the last; with --window (Flow-GRPO-Fast) so
    many in a row before --window_end, drawn anew in every iteration."""
    generator, first = run.generator(args.seed, "window", iteration), 0
    if args.window:
        first = torch.randint(args.window_end - args.window + 1, (), generator=generator)
    return torch.arange(args.trained_steps) + first


@run.guarded
def main(args: argparse.Namespace) -> None:
    rank, world, device = run.start_processes()
    pipe = model.load_pipeline(args, device)
    student, average = lora.add_student(pipe.transformer, args)  # {name: parameter} of two LoRAs
    parameters = list(student.values())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=1e-4, fused=True)
    grid = model.time_grid(pipe, args.steps)  # T + 1 floats from 1 to 0
    times = torch.tensor(grid, device=device).view(-1, 1, 1, 1)  # (T + 1, 1, 1, 1)
    sampler = (args.noise, grid[1], args.noise_kind)  # noise level a, t_max, kind
    B, G, S = args.prompts_per_iteration * args.group_size, args.group_size, args.trained_steps
    samples = run.share(B, rank, world)  # of 0 .. B - 1, this process's b samples
    b = len(samples)
    run.print_batch(args)
    group_of = torch.arange(B) // G  # (B,) over all processes

    # The seed decides the prompts of all iterations. They are embedded once.
    train = run.read_tasks(args.prompts)  # {task: (prompts, metadata)}
    tests = run.read_tasks(args.test_prompts, args.eval_prompts)
    reward_of = make_reward(args, device, train, tests)  # (images, slots) -> (b,) in 0..1
    shares, wanted = args.mix or dict.fromkeys(train, 1), args.prompts_per_iteration
    schedule = run.draw_schedule(train, shares, wanted, args.iterations, args.seed)
    used = run.prompts_used(schedule, samples, G, tests)  # on this process
    text = model.embed_prompts(pipe, used, args)
    guidance = {"student": args.guidance, "average": args.guidance, None: args.guidance}
    backbone = model.Backbone(pipe.transformer, text, guidance, args.label_batch)
    self_checks(args, pipe, text, grid, used, guidance, student)
    start, saver = begin_run(args, pipe, student, average, optimizer)
    bad_updates = 0  # in a row, for NaN or infinity

    bar = metrics.progress(start, args.iterations)
    for iteration in bar:
        watch, log = metrics.Stopwatch(device), {}
        # 1. Prompts: each belongs to one task and is sampled G times. A trained step of a sample is
        #    a row: row n is step step_of[n] of sample sample_of[n]; N = S b rows.
        trained = draw_window(args, iteration)  # (S,)
        step_of = trained.repeat_interleave(b)  # (N,)
        sample_of = torch.arange(b).repeat(S)  # (N,)
        t, t_next = times[step_of], times[step_of + 1]  # (N, 1, 1, 1)
        slots = [schedule[iteration][i // G] for i in samples]  # b of (task, prompt, metadata)
        prompt = torch.tensor([text["rows"][prompt] for _, prompt, _ in slots])  # (b,)
        prompt_of = prompt[sample_of]  # (N,)
        update_of = torch.tensor(samples)[sample_of] % args.updates  # (N,): a share of each group

        # 2. Rollout (no gradient): the student samples with its SDE, to the end for the scorers.
        generators = [run.generator(args.seed, "rollout", iteration, i) for i in samples]
        noise = model.initial_noise(pipe, generators)  # (b, C, H, W)
        policy = lambda x, t: backbone.predict("student", x, t, prompt)
        window = trained.tolist() if args.window else None  # the other steps get no noise
        path = rollout(policy, noise, grid, args.noise, args.noise_kind, generators, window)
        x, x_next = path.x[trained].flatten(0, 1), path.x[trained + 1].flatten(0, 1)  # (N, C, H, W)
        old_log_prob = path.log_prob[trained].flatten()  # (N,)
        watch.lap("rollout")

        # 3. Rewards (no gradient): every process scores its own images and gets all rewards.
        images = decode(pipe.vae, path.x[-1], args.label_batch)  # (b, 3, H, W)
        rewards = torch.cat(run.gather(reward_of(images, slots)))  # (B,) in 0..1
        advantage = torch.zeros(B)
        of_slot = [task for task, *_ in schedule[iteration]]  # the task of each prompt
        for task in set(of_slot):  # each task by its own std, so that no task outweighs another
            rows = torch.tensor([of_slot[group] == task for group in group_of])  # (B,)
            advantage[rows] = group_advantage(rewards[rows], group_of[rows], args.std == "global")
        advantage_of = advantage[samples].to(device)[sample_of]  # (N,)
        watch.lap("rewards")

        # 4. Update: the gradient is summed over micro-batches and processes.
        std = torch.tensor(path.std, device=device)[step_of].view(-1, 1, 1, 1)  # (N, 1, 1, 1)
        for update in range(args.updates):
            rows = (update_of == update).nonzero().flatten()
            for batch in run.chunks(rows, args.micro_batch):
                v = backbone.velocity("student", x[batch], t[batch], prompt_of[batch])
                mean, _ = step(x[batch], v, t[batch], t_next[batch], *sampler)  # (n, C, H, W)
                new_log_prob = log_prob(x_next[batch], mean, std[batch])  # (n,)
                old = old_log_prob[batch]
                loss, values = grpo(new_log_prob, old, advantage_of[batch], args.clip_range)
                if args.beta:
                    v_base = backbone.predict(None, x[batch], t[batch], prompt_of[batch])
                    w = kl_weight(t[batch], t_next[batch], *sampler)  # (n, 1, 1, 1)
                    kl_base = (w * (v - v_base).square()).mean()
                    loss = loss + args.beta * kl_base
                    values["kl_base"] = kl_base.item()
                fraction = len(batch) * args.updates / (B * S)  # sums to 1 over all processes
                (fraction * loss).backward()
                metrics.add_to_log(log, values, fraction / args.updates)
            gradient = run.all_reduce(run.take_gradients(parameters))  # (P,), sum over processes
            run.set_gradients(parameters, gradient)
            norm = clip_grad_norm_(parameters, args.grad_norm or inf)
            if norm.isfinite():
                optimizer.step()
            else:  # NaN or infinity: every process skips this update, rank 0 counts it
                metrics.add_to_log(log, {"skipped_updates": 1}, rank == 0)
            bad_updates = 0 if norm.isfinite() else bad_updates + 1
            optimizer.zero_grad()
            run.update_average(average, student, iteration * args.updates + update + 1, args)
        watch.lap("update")

        # 5. Log. If the reward rises while a monitor drifts from its early values, suspect hacking.
        log = metrics.sum_logs(log)  # over all processes
        log |= reward_log(rewards, G, of_slot) | monitor(images, schedule[iteration], G)
        log |= {"grad_norm": norm.item()} | watch.result()
        bar.set_postfix(reward=f"{log['reward']:.3f}", ratio_gap=f"{log['ratio_gap']:.1e}")

        # 6. Samples: the averaged student on the test prompts, always with the same noise.
        if metrics.is_due(iteration, args.eval_every, args.iterations):
            log |= test(args, pipe, text, tests, reward_of, iteration + 1)
            saver.keep_best(log["test"])  # for --final best
        metrics.log_line(args.out, iteration, log)

        # 7. Checkpoint: student, average, optimizer and iteration are all that a run depends on.
        saver.iteration_done(iteration + 1, bad_updates)

    saver.finish()  # publishes the adapter
    draw_curves(args.out, CURVES)
    if rank == 0:
        print(next_command(args, ["base", f"teacher={args.out}/adapter"]))
    run.stop_processes()


def monitor(images: torch.Tensor, slots: list[tuple], G: int) -> dict[str, float]:
    """What reward hacking changes: means over the iteration's images of all processes."""
    images, log = images.nan_to_num(), {}
    for measure in (edge_density, colour_entropy):
        log[f"monitor/{measure.name}"] = torch.cat(run.gather(measure(images))).mean().item()
    small = torch.cat(run.gather(thumbnails(images)))  # (B, 3, 32, 32)
    prompts = [prompt for _, prompt, _ in slots for _ in range(G)]  # B of them
    return log | {"monitor/diversity": diversity(small, prompts).mean().item()}


def test(args, pipe, text, tests, reward_of, iterations) -> dict[str, float]:
    """Score ODE samples of the averaged student on test prompts; save a picture per task.

    Returns {"test/TASK": mean over the task's prompts, "test": their mean}, on all processes."""
    rank, world = run.rank_and_world()
    log = {}
    for task, (prompts, metadata) in tests.items():
        own = run.share(len(prompts), rank, world)
        words, keys = [prompts[i] for i in own], [(args.seed, "test", task, i) for i in own]
        how = (args.eval_steps, args.guidance, args.label_batch)
        with lora.use(pipe.transformer, "average"):
            images = sample_images(pipe, text, words, keys, *how)
        rewards = reward_of(images, [(task, prompts[i], metadata[i]) for i in own])
        log[f"test/{task}"] = torch.cat(run.gather(rewards)).mean().item()
        if rank == 0:
            file = Path(args.out) / "samples" / f"{task}_{iterations:05d}.png"
            picture_grid(file, {"student": images[:8]}, words[:8], {"student": rewards[:8]})
    return log | {"test": sum(log.values()) / len(log)}


if __name__ == "__main__":
    main(parse_args())
