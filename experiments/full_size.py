r"""Every stage on Stable Diffusion 3.5 Medium's own architecture, with random weights, on a CPU.

    python experiments/full_size.py           # two cores: twenty minutes; 18 GB of memory
    python experiments/full_size.py --tiny    # the same steps with small widths: a minute or two

A command for people; pytest does not collect it. The transformer, the VAE and both CLIP encoders
have their real sizes, the T5 its real width in one small layer, the tokenizers their real special
tokens and lengths. Images have 64 pixels. Each step is a process of its own and leaves STEP.json in
--out: after a stop the same command goes on behind the last finished step.

The steps check what must hold: numbers are finite, adapters move, the KL falls, a run that was
killed and resumed ends with the weights of one that was not, files have the sizes of their tensors,
and stock diffusers and peft make the same picture from what was saved. Seconds and peak memory are
printed per phase; for train_opd.py beside the estimate of --dry_run, which must be within 10 % of
what was measured (not with --tiny: there Python itself is larger). Linux alone.
"""

import gc
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import support  # noqa: F401  first: it quiets the notices of transformers
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import PeftModel
from safetensors.torch import load_file

import train_opd
from experiments import sd35m
from experiments.phases import ENVIRONMENT, Watch
from recipes import memory
from rewards.pictures import sample_images
from support import lora, metrics, model
from support.files import save_json
from support.flags import TASKS, make_parser, model_flags
from support.run import generator

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def bright(images, prompts, metadata):
    """A reward by rule: the mean of all pixels."""
    return images.mean((1, 2, 3))


bright.range = (0, 1)
REWARDS = dict.fromkeys(TASKS, bright)  # of --rewards full_size


def run(script, *flags):
    """`python SCRIPT.py FLAGS`, in this process; what a step that failed has left is replaced."""
    if "--resume" not in flags:
        flags = [*flags, "--overwrite"]
    module = importlib.import_module(script)
    sys.argv = [f"{script}.py", *map(str, flags)]
    print(shlex.join(sys.argv), flush=True)
    module.main(module.parse_args())


def check(holds, what):
    print(f"  {'holds' if holds else 'DOES NOT HOLD'}: {what}", flush=True)
    if not holds:
        raise SystemExit(1)


# ---- The steps: each gets the folder of all of them, and its Watch


def shared(folder):
    """The flags of every script that runs the model."""
    return ["--model", folder / "model", "--size", 64, "--text_length", 32, "--guidance", 4.5]


def training(folder):
    files = [f"{task}={folder}/prompts/{task}.txt" for task in TASKS]
    return [*shared(folder), "--save_every", 9, "--rewards", "full_size", "--prompts", *files]


def distillation(folder):
    """Four images an iteration, one of each task; one trained step of two; MAR."""
    words = "--prompts_per_iteration 4 --group_size 1 --updates 1 --steps 2 --iterations 3"
    words += " --lr 3e-5 --eval_prompts 0 --eval_steps 2 --micro_batch 2 --label_batch 4"
    return [*training(folder), "--init", folder / "merged", *words.split()]


def build(folder, watch, parts=sd35m.PARTS):
    """The model, and a prompt for each task: every iteration learns the same four."""
    (folder / "prompts").mkdir(exist_ok=True)
    for task in TASKS:
        (folder / f"prompts/{task}.txt").write_text(f"a picture for {task}\n")
    sd35m.save_pipeline(folder / "model", parts)
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config(folder))
    number = sum(tensor.numel() for tensor in transformer.state_dict().values())
    check_size(folder / "model/transformer", 2 * number)
    check_size(folder / "model/adapters/ocr", 2 * 4 * lora_numbers(transformer))


def config(folder):
    return SD3Transformer2DModel.load_config(folder / "model/transformer")


def lora_numbers(transformer):
    """Numbers of a LoRA of rank 32 on the transformer."""
    lora.add_adapter(transformer, "any", rank=32, alpha=64)
    return sum(p.numel() for p in lora.adapter_parameters(transformer, "any").values())


def check_size(folder, expected):
    """The safetensors in a folder have so many bytes, and no more than their headers besides."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    check(0 <= size - expected < 4e5, f"{folder.name}: {size / 1e6:.1f} MB of weights")


def estimate(folder, watch):
    """What --dry_run prints of the step opd."""
    sys.argv = ["train_opd.py", *map(str, distillation(folder)), "--dry_run", "--sample_every", "3"]
    args = train_opd.parse_args()
    held, extra = memory.phases(args, train_opd.load_loras, args.model, CPU)
    estimated = memory.in_all(held, extra, "device", "host")
    save_json(folder / "estimated.json", estimated)


def teacher(folder, watch):
    watch.laps()
    words = "--reward ocr --beta 0.01 --prompts_per_iteration 1 --group_size 2 --updates 1"
    words += " --steps 2 --iterations 1 --eval_every 0 --micro_batch 2 --rank 32 --alpha 64"
    flags = training(folder)
    del flags[flags.index("--prompts") :]
    words += f" --prompts ocr={folder}/prompts/ocr.txt"
    run("train_teacher", *flags, *words.split(), "--out", folder / "teacher")
    check_run(folder / "teacher")


def check_run(out):
    """A log of finite numbers, and an adapter that has moved and has the size of its tensors."""
    values = [v for line in metrics.read_log(out) for v in line.values() if not isinstance(v, list)]
    check(None not in values, f"{out.name}: all {len(values)} numbers of its log are finite")
    tensors = load_file(out / "adapter/adapter_model.safetensors")
    layers = 8 * config(out.parent)["num_layers"] - 1  # the last block has no to_add_out
    check(len(tensors) == 2 * layers, f"its adapter has {layers} layers")
    moved = sum(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)
    check(moved >= layers - 1, f"{moved} of them have moved")  # the last add_q is never read
    check_size(out / "adapter", 2 * 4 * sum(tensor.numel() for tensor in tensors.values()))


def sft(folder, watch):
    watch.laps()
    words = "--sft_images 4 --batch 4 --iterations 2 --eval_steps 2 --eval_prompts 0"
    run("train_sft", *training(folder), *words.split(), "--micro_batch", 2, "--out", folder / "sft")
    check_run(folder / "sft")


def merge(folder, watch):
    adapters = [folder / "model/adapters" / task for task in TASKS]
    run("merge", "--adapters", *adapters, "--rank", 32, "--out", folder / "merged")
    merged = lora.read_adapter(folder / "merged", "--init")
    check({len(A) for A, _, _ in merged.values()} == {32}, f"rank 32 in {len(merged)} layers")


def fuse(folder, watch):
    """The base plus an adapter is what stock diffusers reloads, up to the file's bfloat16."""
    adapter, out = folder / "merged", folder / "fused"
    run("merge", "--adapters", adapter, "--fuse", folder / "model", "--out", out)
    watch.mark("fusing")
    fused = SD3Transformer2DModel.from_pretrained(out, dtype=torch.bfloat16)
    base = SD3Transformer2DModel.from_pretrained(folder / "model/transformer", dtype=torch.bfloat16)
    gaps = []
    for layer, (A, B, scaling) in lora.read_adapter(adapter, "--init").items():
        before, after = (m.get_submodule(layer).weight.float() for m in (base, fused))
        gap = (after - before - scaling * B @ A).abs() / after.abs().clamp(min=1e-4)
        gaps.append(gap.max())
    half = 2**-8  # bfloat16 keeps 8 bits, so it rounds by at most that part of a number
    check(max(gaps) < 1.001 * half, f"fused - base = update within {max(gaps):.1e} of a weight")


def opd(folder, watch):
    watch.laps()
    watch.around(train_opd, "self_checks", "self-checks")
    watch.around(train_opd, "sample_images", "pictures")
    out = folder / "opd"
    run("train_opd", *distillation(folder), "--sample_every", 3, "--out", out)
    check_run(out)
    kl = [sum(line[f"kl/{task}"] for task in TASKS) for line in metrics.read_log(out)]
    check(kl[-1] < kl[0], f"the KL falls: {' '.join(f'{value:.3g}' for value in kl)}")
    state = load_file(out / "checkpoints/step_3/state.safetensors")
    check_size(out / "checkpoints/step_3", sum(tensor.nbytes for tensor in state.values()))
    start = lora.read_adapter(folder / "merged", "--init")
    name, (_, B, _) = next(iter(start.items()))
    check(not torch.equal(state[f"student.{name}.lora_B.weight"], B / 2), "the student has left it")


def stopped(folder, watch):
    """The same with --checkpointing, killed amid its second iteration: 143 is SIGTERM's code."""
    watch.laps()
    lap, rollouts = metrics.Stopwatch.lap, []

    def kill(stopwatch, phase):
        lap(stopwatch, phase)
        rollouts.extend([phase] * (phase == "rollout"))
        if len(rollouts) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)  # what handles the signal ends the process

    metrics.Stopwatch.lap = kill
    words = ["--checkpointing", "--sample_every", 0, "--out", folder / "resumed"]
    run("train_opd", *distillation(folder), *words)


def resumed(folder, watch):
    watch.laps()
    words = ["--checkpointing", "--sample_every", 0, "--resume", "--out", folder / "resumed"]
    run("train_opd", *distillation(folder), *words)
    one, two = (load_file(folder / run / "adapter/adapter_model.safetensors")
                for run in ("opd", "resumed"))  # fmt: skip
    gap = max((one[name] - two[name]).norm() / one[name].norm().clamp(min=1e-9) for name in one)
    check(gap < 1e-4, f"killed, resumed, with --checkpointing: the same adapter within {gap:.1e}")


def evaluate(folder, watch):
    watch.laps()
    models = ["base", f"merged={folder}/merged", f"student={folder}/opd/adapter"]
    how = [*shared(folder), "--steps", 2, "--models", *models, "--prompt", "a red circle"]
    run("evaluate", *how, "--out", folder / "evaluate")
    check((folder / "evaluate/prompts.png").stat().st_size > 1000, "prompts.png is there")


def score(folder, watch):
    """Images in a folder, without the model."""
    images, picture = folder / "images", (folder / "evaluate/prompts.png").read_bytes()
    images.mkdir(exist_ok=True)
    for number in range(2):
        (images / f"{number:05d}.png").write_bytes(picture)
    (folder / "two.txt").write_text("red circle\nblue square\n")
    words = ["--tasks", "ocr", "--prompts", f"ocr={folder}/two.txt", "--rewards", "full_size"]
    run("evaluate", "--scores_only", images, *words, "--out", folder / "scores")
    (row,) = json.loads((folder / "scores/results.json").read_text())["results"].values()
    check(0 < row["ocr"]["mean"] < 1, f"two images have the score {row['ocr']['mean']:.3f}")


def exports(folder, watch):
    """The picture of the trained adapter: here, in stock diffusers, and in peft."""
    parser = make_parser(None)
    model_flags(parser)
    args = parser.parse_args(list(map(str, shared(folder)[:-2])))
    adapter, prompt, keys = folder / "opd/adapter", "a red circle", [(0, "export")]
    pipe = model.load_pipeline(args, CPU)
    lora.load_adapter(pipe.transformer, "student", str(adapter), "--models")
    text = model.embed_prompts(pipe, [prompt], args)
    noise = model.initial_noise(pipe, [generator(*keys[0])])
    with lora.use(pipe.transformer, "student"):
        ours = sample_images(pipe, text, [prompt], keys, 2, 4.5)
    with lora.use(pipe.transformer, None):
        base = sample_images(pipe, text, [prompt], keys, 2, 4.5)
    watch.mark("here")
    del pipe
    gc.collect()
    stock = StableDiffusion3Pipeline.from_pretrained(folder / "model", dtype=torch.float32)
    how = {"num_inference_steps": 2, "guidance_scale": 4.5, "max_sequence_length": 32}
    how |= {"height": 64, "width": 64, "latents": noise, "output_type": "pt"}
    stock.load_lora_weights(adapter)
    pictures = {"diffusers": stock(prompt, **how).images}
    watch.mark("diffusers")
    stock.unload_lora_weights()
    stock.transformer = PeftModel.from_pretrained(stock.transformer, adapter)
    pictures["peft"] = stock(prompt, **how).images
    watch.mark("peft")
    for name, images in pictures.items():
        gap, moved = (images - ours).abs().max(), (images - base).abs().max()
        check(gap < 0.1 * moved, f"{name}: the same picture within {gap:.1e} (base: {moved:.1e})")


STEPS = (build, teacher, sft, merge, fuse, estimate, opd, stopped, resumed)
STEPS += (evaluate, score, exports)


# ---- The command


def main():
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("--tiny", action="store_true", help="small widths")
    flag("--out", type=Path, help="its folder; default runs/full_size or runs/full_size_tiny")
    names = [step.__name__ for step in STEPS]
    flag("--step", choices=names, help="this step alone, in this process")
    args = parser.parse_args()
    name = "full_size_tiny" if args.tiny else "full_size"
    folder = (args.out or ROOT / "runs" / name).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    if args.step:
        watch = Watch(folder / f"{args.step}.part.json")
        more = [sd35m.TINY] * (args.tiny and args.step == "build")
        globals()[args.step](folder, watch, *more)
        return watch.mark("the rest")
    for name in names:
        if (folder / f"{name}.json").exists():
            continue
        print(f"{name} ...", flush=True)
        began, log = time.perf_counter(), folder / f"{name}.log"
        again = [sys.executable, __file__, "--step", name, "--out", folder]
        with open(log, "w") as file:
            how = {"stdout": file, "stderr": subprocess.STDOUT, "env": os.environ | ENVIRONMENT}
            if args.tiny:
                how["env"]["OMP_NUM_THREADS"] = "1"
            done = subprocess.run([*again, *["--tiny"] * args.tiny], **how).returncode
        if done != (143 if name == "stopped" else 0):
            raise SystemExit(f"{name} failed with code {done}: see {log}")
        lines = [line for line in log.read_text().splitlines() if line.startswith("  holds")]
        print("\n".join([f"{name}: {time.perf_counter() - began:.0f} s", *lines]), flush=True)
        (folder / f"{name}.part.json").replace(folder / f"{name}.json")
    print_table(folder, names)
    if not args.tiny:
        check_estimates(folder)


def print_table(folder, names):
    estimated = json.loads((folder / "estimated.json").read_text())
    print("\n| step | phase | s | peak GB | --dry_run, GB |\n|---|---|---|---|---|")
    for name in names:
        for phase, entry in json.loads((folder / f"{name}.json").read_text()).items():
            promised = ""
            if name == "opd" and phase in estimated:
                promised = f"{estimated[phase] / 1e9:.2f}"
            numbers = f"{entry['seconds']:.0f} | {entry['peak'] / 1e9:.2f}"
            print(f"| {name} | {phase} | {numbers} | {promised} |")


def check_estimates(folder):
    measured = json.loads((folder / "opd.json").read_text())
    estimated = json.loads((folder / "estimated.json").read_text())
    for phase in memory.PHASES:
        ratio = estimated[phase] / measured[phase]["peak"]
        check(abs(ratio - 1) < 0.1, f"{phase}: the estimate is {ratio:.2f} of what was measured")


if __name__ == "__main__":
    main()
