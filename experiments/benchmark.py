r"""Seconds and memory of one Flow-OPD iteration: this code beside the way of the public code.

    python experiments/benchmark.py                   # the miniature, on the device there is
    python experiments/benchmark.py --arch sd35m --size 512 --guidance 4.5 --checkpointing \
        --prompts_per_iteration 4 --group_size 4 --steps 4 --micro_batch 6 --label_batch 12 \
        --repeats 2

The second command needs a GPU of 80 GB. Other flags go to train_opd.py, so to the first two lines
(--compile). Three lines do the same job, alternating in one process. Each is the median over
--repeats iterations, without the first one:

    ours           train_opd.py itself, read from its metrics.jsonl
    full copies    the same, but every teacher is a full copy of the transformer, not a LoRA
    as published   the public code's way: full float32 copies, the student under fp16 autocast on a
                   GPU (TF32 allowed), three forward passes per step one after the other, text
                   encoded for every batch, every image decoded and scored

`--arch sd35m` is the transformer and the VAE of Stable Diffusion 3.5 Medium by their public
configuration, with random weights, and tiny text encoders of the right widths. Its images are
decoded, not scored. On a GPU three more numbers are measured: the peak of memory, the bytes of a
fifth teacher, and the update's share of the bf16 matmul rate. Not part of the test suite.
"""

import contextlib
import copy
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import losses
import sde
import train_opd
from experiments.sd35m import save_pipeline
from rewards.pictures import decode
from support import lora, model
from support.flags import TASKS, make_parser, model_flags
from support.metrics import read_log
from toy import REWARDS

ROOT = Path(__file__).resolve().parents[1]
LINES = ("ours", "full copies", "as published")
NOISE = 0.7


def ours(flags, out, iterations):
    """The log of a few iterations of train_opd.py."""
    sys.argv = ["train_opd.py", *flags, "--iterations", str(iterations)]
    sys.argv += ["--out", str(out), "--overwrite"]
    with contextlib.redirect_stdout(sys.stderr):
        train_opd.main(train_opd.parse_args())
    return read_log(out)


def add_to_weights(transformer, layers):
    """Fuse a LoRA of read_adapter."""
    for layer, (A, B, scaling) in layers.items():
        linear = transformer.get_submodule(layer)
        weight = getattr(linear, "base_layer", linear).weight
        weight.data += (scaling * B @ A).to(weight)
    return transformer


@contextlib.contextmanager
def full_copies():
    """Inside, train_opd.py keeps every frozen LoRA as a fused copy of the whole transformer."""
    copies = {}
    add_lora, velocity_of_lora = lora.add_adapter, model.Backbone.velocity

    def add_adapter(transformer, name, layers=None, *rest, **flags):
        if name in ("student", "average"):
            return add_lora(transformer, name, layers, *rest, **flags)
        copies[name] = add_to_weights(copy.deepcopy(transformer), layers)

    def velocity(self, name, x, t, prompt):
        if name not in copies:
            return velocity_of_lora(self, name, x, t, prompt)
        return model.velocity(copies[name], x, t, self.text, prompt, self.guidance[name])

    lora.add_adapter, model.Backbone.velocity = add_adapter, velocity
    try:
        yield
    finally:
        lora.add_adapter, model.Backbone.velocity = add_lora, velocity_of_lora


class AsPublished:
    """Flow-OPD's public training loop for the same job, written anew from what it does."""

    def __init__(self, args, folder, device):
        self.args, self.device = args, device
        self.pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32).to(device)
        self.pipe.time_grid = "double"
        self.student = self.pipe.transformer.requires_grad_(False).eval()
        if args.checkpointing:
            self.student.enable_gradient_checkpointing()
        self.teachers = {}
        for name, task in {**dict(zip(TASKS, TASKS)), "anchor": "deqa"}.items():
            layers = lora.read_adapter(f"{folder}/adapters/{task}", "--teacher")
            self.teachers[name] = add_to_weights(copy.deepcopy(self.student), layers)
        lora.load_adapter(self.student, "student", f"{folder}/adapters/merged", "--init")
        parameters = lora.adapter_parameters(self.student, "student").values()
        self.parameters = [parameter.requires_grad_(True) for parameter in parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.grid = model.time_grid(self.pipe, args.steps)
        self.half = torch.autocast(device.type, torch.float16, enabled=device.type == "cuda")

    def encode(self, prompts):
        """(embeds, pooled): with guidance those of the empty prompt first."""
        length = min(128, self.pipe.tokenizer_3.model_max_length)
        how = {"negative_prompt": "", "max_sequence_length": length}
        embeds, empty, pooled, empty_pooled = self.pipe.encode_prompt(prompts, None, None, **how)
        if self.args.guidance == 1:
            return embeds, pooled
        return torch.cat([empty, embeds]), torch.cat([empty_pooled, pooled])

    def velocity(self, transformer, x, t, text):
        guided = self.args.guidance != 1
        if guided:
            x = torch.cat([x, x])
        times = torch.full((len(x),), 1000 * t, device=x.device)
        v = transformer(x, *text, timestep=times, return_dict=False)[0].float()
        if guided:
            v_empty, v_prompt = v.chunk(2)
            v = v_empty + self.args.guidance * (v_prompt - v_empty)
        return v

    def rollout(self, task, prompts):
        """(text, path) of one batch, and its images scored: nothing uses the scores."""
        text = self.encode(prompts)
        generators = [torch.Generator().manual_seed(n) for n in range(len(prompts))]
        noise = model.initial_noise(self.pipe, generators)
        policy = lambda x, t: self.velocity(self.student, x, t, text)
        path = sde.rollout(policy, noise, self.grid, NOISE, "flow", generators)
        images = decode(self.pipe.vae, path.x[-1])
        if self.args.arch == "toy":
            REWARDS[task](images, prompts)
        return text, path

    def iteration(self, prompts):
        """One iteration over all batches; a batch holds samples of one task: its seconds."""
        args, began = self.args, time.perf_counter()
        for task in TASKS:
            own = [prompt for prompt in prompts[task] for _ in range(args.group_size)]
            for start in range(0, len(own), args.micro_batch):
                with torch.no_grad(), self.half:
                    text, path = self.rollout(task, own[start : start + args.micro_batch])
                for i in range(args.steps - 1):
                    self.backward(task, text, path, i)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def backward(self, task, text, path, i):
        x, t = path.x[i], self.grid[i]
        times = (t, self.grid[i + 1], NOISE, self.grid[1])
        with self.half:
            v = self.velocity(self.student, x, t, text)
        text_32 = [part.float() for part in text]  # the frozen copies run without autocast
        with torch.no_grad():
            v_teacher = self.velocity(self.teachers[task], x, t, text_32)
            v_anchor = self.velocity(self.teachers["anchor"], x, t, text_32)
        mean, mean_teacher = sde.step(x, v, *times)[0], sde.step(x, v_teacher, *times)[0]
        rollout_of = (path.mean[i], mean_teacher, path.x[i + 1], path.std[i])
        loss, _ = losses.opd_ppo_public(mean, *rollout_of)
        penalty, _ = losses.mar(v, v_anchor, 0.02 * sde.kl_weight(*times))
        (loss + penalty).backward()


def matmul_rate(device, n=8192):
    """Measured bf16 matmul FLOP/s of this GPU."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / Timer("a @ a", globals={"a": a}).timeit(20).median


def on_a_gpu(flags, guidance, folder, device):
    """(model FLOPs of one row's update, recomputation not counted; bytes of one more teacher)."""
    parser = make_parser(None)
    model_flags(parser)
    args, _ = parser.parse_known_args(["--model", str(folder), *flags])
    pipe, before = model.load_pipeline(args, device), torch.cuda.memory_allocated()
    lora.load_adapter(pipe.transformer, "fifth", f"{folder}/adapters/ocr", "--teacher")
    fifth = torch.cuda.memory_allocated() - before
    for parameter in lora.adapter_parameters(pipe.transformer, "fifth").values():
        parameter.requires_grad_(True)
    text = model.embed_prompts(pipe, ["red circle"], args)
    backbone = model.Backbone(pipe.transformer, text, {"fifth": guidance}, 1)
    x = model.initial_noise(pipe, [torch.Generator()])
    with FlopCounterMode(display=False) as counter:
        backbone.velocity("fifth", x, 0.5, torch.tensor([1])).mean().backward()
    return counter.get_total_flops(), fifth


def measure(line, args, flags, folder, device, prompts, out):
    """The log lines of --repeats / 2 iterations, after a first one that does not count."""
    number, on_gpu = 1 + args.repeats // 2, device.type == "cuda"
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.backends.cuda.matmul.allow_tf32 = line == "as published"
    if line == "as published":
        public = AsPublished(args, folder, device)
        log = [{"seconds": public.iteration(prompts)} for _ in range(number)]
    else:
        with full_copies() if line == "full copies" else contextlib.nullcontext():
            log = ours(["--model", str(folder), *flags], out, number)
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else float("nan")
    return [entry | {"memory_gb": peak} for entry in log[1:]]


def parse_args():
    """(its own flags, those for train_opd.py)."""
    parser = make_parser(__doc__)
    flag = parser.add_argument
    flag("--arch", choices=("toy", "sd35m"), default="toy", help="the model")
    flag("--repeats", type=int, default=4, help="iterations of each line that count, even")
    flag("--lines", nargs="+", choices=LINES, default=LINES, help="which of the three")
    flag("--checkpointing", action="store_true", help="this and all others: as in train_opd.py")
    flag("--guidance", type=float, default=1.0, help="guidance scale; 1 = off")
    flag("--dtype", choices=("fp32", "bf16"), help="of the backbone, as in train_opd.py")
    sizes = {"prompts_per_iteration": 8, "group_size": 16, "steps": 6, "size": None}
    sizes |= {"micro_batch": 128, "label_batch": 256}
    for name, default in sizes.items():
        flag(f"--{name}", type=int, default=default, help="as in train_opd.py")
    args, more = parser.parse_known_args()
    flags = "--eval_prompts 0 --sample_every 0".split() + ["--checkpointing"] * args.checkpointing
    for name in (*sizes, "guidance", "dtype"):
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    return args, flags + more


def print_table(args, rows, images, device):
    """Print the medians of each line's log, and return them: {line: {name: median}}."""
    on_gpu, medians = device.type == "cuda", {}
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    settings = f"{images} images an iteration, {args.steps} steps, guidance {args.guidance:g}"
    print(f"\n{args.arch}, {settings}; {name}\n")
    phases = ("rollout", "labels", "update")
    print(f"| | s / iteration | {' | '.join(phases)} | images / s | peak GB |\n|{'---|' * 7}")
    for line, log in rows.items():
        keys = ["seconds", "memory_gb", *(f"seconds/{phase}" for phase in phases)]
        known = [key for key in keys if key in log[0]]
        row = {key: statistics.median(entry[key] for entry in log) for key in known}
        cells = [f"{row[key]:.2f}" if key in row else "" for key in keys[2:]]
        cells.append(f"{images / row['seconds']:.2f}")
        cells.append(f"{row['memory_gb']:.1f}" if on_gpu else "not measured")
        print(f"| {line} | {row['seconds']:.2f} | {' | '.join(cells)} |")
        medians[line] = row
    first = args.lines[0]
    for line in args.lines[1:]:
        seconds, memory = (medians[line][key] / medians[first][key] for key in keys[:2])
        in_memory = f", {memory:.2f} in memory" if on_gpu else ""
        print(f"\n{line} / {first}: {seconds:.2f} in seconds{in_memory}")
    return medians


def main():
    args, flags = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts, per_task = {}, args.prompts_per_iteration // len(TASKS)
    flags.append("--prompts")
    for task in TASKS:
        file = ROOT / "toy" / "prompts" / f"{task}_train.txt"
        prompts[task] = file.read_text().splitlines()[:per_task]
        flags.append(f"{task}={file}")
    images = per_task * len(TASKS) * args.group_size
    rows = {line: [] for line in args.lines}
    with tempfile.TemporaryDirectory() as work:
        folder, run = ROOT / "toy", Path(work) / "run"
        if args.arch == "sd35m":
            folder = save_pipeline(f"{work}/sd35m")
        for _ in range(2):  # alternating: other load on the machine slows every line
            for line in args.lines:
                rows[line] += measure(line, args, flags, folder, device, prompts, run)
        if device.type == "cuda":
            flops, fifth = on_a_gpu(flags, args.guidance, folder, device)
    medians = print_table(args, rows, images, device)
    if device.type == "cuda":
        print(f"a fifth teacher: {fifth / 1e6:.0f} MB")
        if "ours" in rows:
            rate = flops * images * (args.steps - 1) / medians["ours"]["seconds/update"]
            print(f"update: {rate / matmul_rate(device):.0%} of the bf16 matmul rate measured here")


if __name__ == "__main__":
    main()
