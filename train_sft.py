"""Stage 2, the other cold start: supervised fine-tuning (SFT) on samples of the teachers.

    python train_sft.py                                        # from the base -> runs/sft/adapter
    python train_opd.py --init runs/sft/adapter --out runs/opd_sft   # then Flow-OPD

Every teacher samples images for the training prompts of its own task, once, with the ODE sampler.
The student, a fresh LoRA, learns them by flow matching at random times: the paper's SFT start.

Unlike train_opd.py the student is trained at states x_t on straight lines from noise to the
teachers' images, not at states that it visits itself (off-policy).
"""

import argparse
from math import inf
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import clip_grad_norm_

from losses import flow_matching
from rewards.pictures import draw_curves, sample_latents
from rewards.scoring import load_scorers, report
from support import lora, metrics, model, run
from support.arguments import check_distillation
from support.checkpoint import begin_run
from support.flags import Pairs, above_0, at_least, lora_alpha, make_parser, model_flags
from support.flags import portion, positive, run_flags, scale, within


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    model_flags(parser)
    flag = parser.add_argument_group("what to train").add_argument
    named = {"action": Pairs}
    flag("--teacher", **named, metavar="TASK=DIR|HUB", help="default MODEL/adapters/TASK")
    flag("--teacher_guidance", **named, kind=scale, metavar="TASK=SCALE", help="of one teacher")
    flag("--teacher_alpha", **named, kind=lora_alpha, metavar="TASK=A|rank", help="if not in file")
    flag("--prompts", **named, metavar="TASK=FILE", help="default MODEL/prompts/TASK_train.txt")
    flag("--task_mix", **named, kind=portion, metavar="TASK=SHARE", help="of images; default 1")
    flag("--init", default="base", metavar="DIR|HUB", help="base (a fresh LoRA) or an adapter")
    flag("--rank", type=positive, default=32, help="LoRA rank of the student (--init has its own)")
    flag("--alpha", type=above_0, default=64, help="LoRA alpha: its scale is alpha / rank")
    flag("--sft_images", type=positive, default=2048, help="images of all teachers together")
    flag("--guidance", type=scale, default=1.0, help="guidance scale of the teachers (SD3.5: 4.5)")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--batch", type=positive, default=64, help="images per iteration, over all processes")
    flag("--iterations", type=positive, default=160, help="optimizer steps")
    flag("--lr", type=within(0), default=1e-3, help="AdamW's learning rate")
    flag("--grad_norm", type=within(0), default=1.0, help="clip the gradient to it; 0 = off")
    flag("--ema_decay", type=within(0, 1), default=0.9, help="of the average that is evaluated")
    flag("--ema_every", type=positive, default=1, help="updates between averages")
    flag("--micro_batch", type=positive, default=128, help="images in a pass with gradient")
    flag("--label_batch", type=positive, default=128, help="images in a pass of a teacher")
    flag = parser.add_argument_group("run").add_argument
    flag("--out", default="runs/sft", help="folder of the run")
    flag("--eval_prompts", type=at_least(0), default=256, help="test prompts per task; 0 = none")
    flag("--eval_steps", type=positive, default=16, help="ODE steps of all samples (paper: 40)")
    flag("--test_prompts", **named, metavar="TASK=FILE", help="default .../TASK_test.txt")
    run_flags(flag)
    return check_distillation(parser.parse_args())


@run.guarded
def main(args: argparse.Namespace) -> None:
    rank, world, device = run.start_processes()
    scorers = load_scorers(args.rewards, args.test_prompts, args.reward_device or device)
    pipe = model.load_pipeline(args, device)
    for task, path in args.teacher.items():
        how = (f"teacher_{task}", path, f"--teacher {task}", args.teacher_alpha.get(task))
        lora.load_adapter(pipe.transformer, *how)
    student, average = lora.add_student(pipe.transformer, args)  # {name: parameter} of two LoRAs
    parameters = list(student.values())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=1e-4, fused=True)

    # The seed decides every image: its task, its prompt, and the iterations that train on it.
    train = run.read_tasks(args.prompts)
    tests = run.read_tasks(args.test_prompts, args.eval_prompts)
    slots = run.draw_schedule(train, args.task_mix, args.sft_images, 1, args.seed)[0]
    numbers = {"image": (range(args.sft_images), [None] * args.sft_images)}  # as if prompts
    schedule = run.draw_schedule(numbers, {"image": 1}, args.batch, args.iterations, args.seed)
    samples = run.share(args.batch, rank, world)  # of 0 .. batch - 1, this process's b samples
    images = {drawn[i][1] for drawn in schedule for i in samples}  # this process trains on these
    used = {slots[i][1] for i in [*images, *run.share(args.sft_images, rank, world)]}  # and samples
    text = model.embed_prompts(pipe, [*used, *run.test_prompts_used(tests)], args)
    rows = torch.tensor([text["rows"].get(prompt, 0) for _, prompt, _ in slots])  # (images,)
    # Flow matching trains the unguided velocity: guidance scale 1.
    backbone = model.Backbone(pipe.transformer, text, {"student": 1.0}, args.label_batch)
    start, saver = begin_run(args, pipe, student, average, optimizer)
    latents = sample_teachers(args, pipe, text, slots, Path(args.out, "teachers.safetensors"))
    bad_updates = 0  # in a row, for NaN or infinity
    bar = metrics.progress(start, args.iterations)
    for iteration in bar:
        watch, log = metrics.Stopwatch(device), {}
        # 1. Images: shuffled passes through the teachers' samples.
        index = torch.tensor([schedule[iteration][i][1] for i in samples])  # (b,)
        x0 = latents[index].to(device)  # (b, C, H, W)

        # 2. States: points on the straight line from data (t = 0) to noise (t = 1).
        generators = [run.generator(args.seed, "sft", iteration, i) for i in samples]
        noise = model.initial_noise(pipe, generators)  # (b, C, H, W)
        t = torch.stack([torch.rand(1, 1, 1, generator=g) for g in generators]).to(device)
        x = (1 - t) * x0 + t * noise  # (b, C, H, W), t (b, 1, 1, 1)

        # 3. Labels: the velocity along that line is known, noise - x0. No teacher is queried.
        # 4. Update: the gradient is summed over micro-batches and processes.
        for batch in run.chunks(torch.arange(len(samples)), args.micro_batch):
            v = backbone.velocity("student", x[batch], t[batch], rows[index[batch]])
            loss, values = flow_matching(v, x0[batch], noise[batch])
            fraction = len(batch) / args.batch  # sums to 1 over all processes
            (fraction * loss).backward()
            metrics.add_to_log(log, values | {"loss": loss.item()}, fraction)
        run.set_gradients(parameters, run.all_reduce(run.take_gradients(parameters)))
        norm = clip_grad_norm_(parameters, args.grad_norm or inf)
        if norm.isfinite():
            optimizer.step()
        else:  # NaN or infinity: every process skips this update, rank 0 counts it
            metrics.add_to_log(log, {"skipped_updates": 1}, rank == 0)
        bad_updates = 0 if norm.isfinite() else bad_updates + 1
        optimizer.zero_grad()
        run.update_average(average, student, iteration + 1, args)

        # 5. Log.
        log = metrics.sum_logs(log) | {"grad_norm": norm.item()} | watch.result()
        metrics.log_line(args.out, iteration, log)
        bar.set_postfix(loss=f"{log['loss']:.3f}")
        # 6. Samples come with the final report. 7. Checkpoint.
        saver.iteration_done(iteration + 1, bad_updates)

    saver.finish()  # publishes the adapter
    draw_curves(args.out, {"loss": "loss", "gradient norm": "grad_norm"})
    report(args, pipe, text, tests, scorers)  # of the start and the averaged student
    run.stop_processes()


def sample_teachers(args, pipe, text, slots, file: Path) -> torch.Tensor:
    """Sample each slot's prompt with its task's teacher: latents (images, C, H, W), on the CPU.
    Every process samples its share. Rank 0 saves all in `file`: --resume reads them."""
    rank, world = run.rank_and_world()
    if not run.gather(file.exists())[0]:  # rank 0 decides
        own = {}  # {image: latent} that this process samples
        for task in args.teacher:
            numbers = [i for i in run.share(len(slots), rank, world) if slots[i][0] == task]
            prompts, keys = [slots[i][1] for i in numbers], [(args.seed, "sft", i) for i in numbers]
            guidance = args.teacher_guidance.get(task, args.guidance)
            how = (args.eval_steps, guidance, args.label_batch)
            with lora.use(pipe.transformer, f"teacher_{task}"):
                latents = sample_latents(pipe, text, prompts, keys, *how)
            own |= dict(zip(numbers, latents.cpu()))
        latents = {i: x for part in run.gather(own) for i, x in part.items()}
        if rank == 0:
            stacked = torch.stack([latents[i] for i in range(len(slots))])
            save_file({"latents": stacked}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
        run.gather(None)  # wait for the file
    return load_file(file)["latents"]


if __name__ == "__main__":
    main(parse_args())
