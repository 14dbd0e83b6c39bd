r"""Seconds and memory of one Flow-OPD iteration: this code beside the way of the public code, the same job for both.

    python tests/benchmark.py                         # the miniature, on the device there is
    python tests/benchmark.py --arch sd35m --size 512 --guidance 4.5 --checkpointing --prompts_per_iteration 4 --group_size 4 \
        --steps 4 --micro_batch 6 --label_batch 12 --repeats 2                        # a GPU of 80 GB; 16 images an iteration
    python tests/benchmark.py --arch sd35m --size 512 --guidance 4.5 --checkpointing --prompts_per_iteration 4 --group_size 8 \
        --steps 10 --micro_batch 9 --label_batch 9 --repeats 2 --lines ours --sample_every 1   # the recipe for 24 GB
    WORLD_SIZE=8 python tests/benchmark.py --dry_run sd35m_opd      # no GPU, no weights: that recipe's memory, estimated

Flags that are not its own go to train_opd.py, so to the first two lines: --compile, --sample_every 1 (with pictures).

Three lines, alternating in one process; each is the median over --repeats iterations, the first iteration left out:

    ours           train_opd.py itself: its main(), read from its metrics.jsonl
    full copies    the same, but every teacher and the anchor is a full copy of the transformer instead of an adapter
    as published   the public code's way: full fp32 copies, the student under fp16 autocast on a GPU (TF32 allowed), three
                   forwards per step one after the other, text encoded for every batch, every image decoded and scored

`--arch sd35m` is Stable Diffusion 3.5 Medium's transformer (its public configuration) with random weights, the real VAE's
architecture and tiny text encoders of the right widths; its images are decoded, and not scored. Not part of the test suite.
A GPU adds the peak of memory, what a fifth teacher takes, and the update's share of the measured bf16 matmul rate.
"""

import argparse
import contextlib
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel  # noqa: E402

import support.lora as adapters  # noqa: E402
import support.files as files  # noqa: E402
import losses  # noqa: E402
import support.memory as memory  # noqa: E402
import support.model as model  # noqa: E402
import sde  # noqa: E402
import toy  # noqa: E402
import train_opd  # noqa: E402

TASKS = ("geneval", "ocr", "deqa", "pickscore")
LINES = ("ours", "full copies", "as published")

# Stable Diffusion 3.5 Medium, as its public configuration files say.
TRANSFORMER = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "caption_projection_dim": 1536, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "sample_size": 1024,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305, "shift_factor": 0.0609,
}  # fmt: skip
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "projection_dim": 768}  # fmt: skip
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280}  # fmt: skip
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
          "feed_forward_proj": "gated-gelu"}  # fmt: skip


def dry_run(recipe):
    """train_opd.py --dry_run with a recipe, where no hub is reached: the configuration files alone stand in for it."""
    with tempfile.TemporaryDirectory() as work:
        folder, index = Path(work), {"_class_name": "StableDiffusion3Pipeline"}
        with torch.device("meta"):
            SD3Transformer2DModel(**TRANSFORMER).save_config(folder / "transformer")
            AutoencoderKL(**VAE).save_config(folder / "vae")
        texts = {"text_encoder": CLIPTextConfig(**CLIP_L), "text_encoder_2": CLIPTextConfig(**CLIP_G)}
        for name, config in (texts | {"text_encoder_3": T5Config(**T5_XXL)}).items():
            config.save_pretrained(folder / name)
            index[name] = ["transformers", "T5EncoderModel" if name[-1] == "3" else "CLIPTextModelWithProjection"]
        for name, length in (("tokenizer", 77), ("tokenizer_3", 512)):
            files.save_json(folder / name / "tokenizer_config.json", {"model_max_length": length})
        files.save_json(folder / "model_index.json", index)
        files.save_json(folder / "adapter_config.json", {"r": 32})  # the published teachers'
        memory.fetch = lambda path, *_: str(folder)
        prompts = [f"{task}={ROOT}/toy/prompts/{task}_train.txt" for task in TASKS]
        sys.argv = ["train_opd.py", f"@{ROOT}/recipes/{recipe}.args", "--dry_run", "--dtype", "bf16", "--init", "base"]
        sys.argv += ["--prompts", *prompts]
        train_opd.main(train_opd.parse_args())


def sd35m(folder):
    """A pipeline directory with SD3.5-Medium's transformer and VAE (random weights, bf16) and four random teachers."""
    torch.manual_seed(0)
    small = StableDiffusion3Pipeline.from_pretrained(ROOT / "toy")
    text = {"vocab_size": len(small.tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    small.tokenizer.model_max_length = 77
    small.tokenizer_3.model_max_length = 256
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        transformer = SD3Transformer2DModel(**TRANSFORMER)
    vae = AutoencoderKL(**VAE)
    t5 = T5Config(vocab_size=len(small.tokenizer_3), d_model=4096, d_kv=64, d_ff=128, num_layers=1, num_heads=2)
    StableDiffusion3Pipeline(
        transformer=transformer.to("cpu", torch.bfloat16), vae=vae, scheduler=small.scheduler,
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**text, projection_dim=768)), tokenizer=small.tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text, projection_dim=1280)), tokenizer_2=small.tokenizer,
        text_encoder_3=T5EncoderModel(t5), tokenizer_3=small.tokenizer_3,
    ).save_pretrained(folder)  # fmt: skip
    for task in (*TASKS, "merged"):
        adapters.add_adapter(transformer, task, rank=32, alpha=64)
        parameters = adapters.adapter_parameters(transformer, task)
        for parameter in parameters.values():
            parameter.data = torch.randn_like(parameter) * 0.01
        adapters.save_adapter(Path(folder) / "adapters" / task, parameters, transformer.peft_config[task])
    return folder


def ours(flags, out, iterations):
    """train_opd.main() for a few iterations: its log lines."""
    sys.argv = ["train_opd.py", *flags, "--iterations", str(iterations), "--out", str(out), "--overwrite"]
    with contextlib.redirect_stdout(sys.stderr):
        train_opd.main(train_opd.parse_args())
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def full_copies():
    """Inside, train_opd.py keeps every frozen teacher as a fused copy of the whole transformer, in the backbone's dtype."""
    copies, active = {}, []
    add, switch, velocity = adapters.add_adapter, adapters.adapter, train_opd.velocity

    def add_copy(transformer, name, layers=None, *args, **flags):
        if name in ("student", "ema", "init"):
            return add(transformer, name, layers, *args, **flags)
        copies[name] = copy.deepcopy(transformer)
        for layer, (A, B, scaling) in layers.items():
            linear = copies[name].get_submodule(layer)
            weight = getattr(linear, "base_layer", linear).weight
            weight.data += (scaling * B @ A).to(weight)

    @contextlib.contextmanager
    def switch_copy(transformer, name):
        active.append(copies.get(name))
        try:
            with contextlib.nullcontext() if active[-1] else switch(transformer, name):
                yield
        finally:
            active.pop()

    def velocity_copy(transformer, *args):
        return velocity(active[-1] if active and active[-1] else transformer, *args)

    adapters.add_adapter, adapters.adapter, train_opd.velocity = add_copy, switch_copy, velocity_copy
    try:
        yield
    finally:
        adapters.add_adapter, adapters.adapter, train_opd.velocity = add, switch, velocity


class AsPublished:
    """Flow-OPD's public training loop for the same job, written anew from what it does (not from its code)."""

    def __init__(self, args, folder, device):
        self.args, self.device = args, device
        self.pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32).to(device)
        self.student = self.pipe.transformer.requires_grad_(False).eval()
        if args.checkpointing:
            self.student.enable_gradient_checkpointing()
        self.teachers = {task: copy.deepcopy(self.student) for task in (*TASKS, "anchor")}
        for task, teacher in self.teachers.items():  # full fp32 copies
            layers = adapters.read_adapter(f"{folder}/adapters/{'deqa' if task == 'anchor' else task}", "")
            for layer, (A, B, scaling) in layers.items():
                teacher.get_submodule(layer).weight.data += (scaling * B @ A).to(device)
        adapters.add_adapter(self.student, "student", adapters.read_adapter(f"{folder}/adapters/merged", ""))
        parameters = adapters.adapter_parameters(self.student, "student").values()
        self.parameters = [parameter.requires_grad_(True) for parameter in parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.grid = model.time_grid(self.pipe, args.steps)
        self.half = torch.autocast(device.type, torch.float16, enabled=device.type == "cuda")

    def guided(self, transformer, x, t, text):
        x, times = (torch.cat([x, x]), 2) if self.args.guidance != 1 else (x, 1)
        embeds, pooled = (part if times == 2 else part[len(part) // 2 :] for part in text)
        t = torch.full((len(x),), 1000 * t, device=x.device)
        v = transformer(x, timestep=t, encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False)[0].float()
        if times == 2:
            empty, v = v.chunk(2)
            v = empty + self.args.guidance * (v - empty)
        return v

    def iteration(self, prompts):
        """One iteration over all batches, a batch holding samples of one task: seconds."""
        args, grid, began = self.args, self.grid, time.perf_counter()
        for task in TASKS:
            own = [p for p in prompts[task] for _ in range(args.group_size)]
            for start in range(0, len(own), args.micro_batch):
                part = own[start : start + args.micro_batch]
                with torch.no_grad(), self.half:
                    length = min(128, self.pipe.tokenizer_3.model_max_length)
                    e, e0, p, p0 = self.pipe.encode_prompt(part, None, None, negative_prompt="", max_sequence_length=length)
                    text = torch.cat([e0, e]), torch.cat([p0, p])
                    keys = [torch.Generator().manual_seed(n) for n in range(len(part))]
                    noise = model.initial_noise(self.pipe, keys, args.size)
                    move = lambda x, t, text=text: self.guided(self.student, x, t, text)
                    path = sde.rollout(move, noise, grid, 0.7, "flow", keys)
                    images = model.decode(self.pipe.vae, path.x[-1]).cpu()
                    if args.arch == "toy":
                        toy.REWARDS[task](images, part)
                for i in range(args.steps - 1):
                    x, times = path.x[i], (grid[i], grid[i + 1], 0.7, grid[1])
                    with self.half:
                        v = self.guided(self.student, x, grid[i], text)
                    with torch.no_grad():
                        v_teacher = self.guided(self.teachers[task], x, grid[i], text)
                        v_anchor = self.guided(self.teachers["anchor"], x, grid[i], text)
                    mean, mean_teacher = (sde.step(x, u, *times)[0] for u in (v, v_teacher))
                    ppo = (mean, path.mean[i], mean_teacher, path.x[i + 1], path.std[i])
                    loss, _ = losses.opd_ppo_published(*ppo, 1e-4, detach=False)
                    extra, _ = losses.mar(v, v_anchor, 0.02 * sde.kl_weight(*times))
                    (loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def matmul_rate(device, n=8192):
    """Measured bf16 matmul FLOP/s of this GPU."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
    return 20 * 2 * n**3 / (time.perf_counter() - began)


def on_a_gpu(args, folder, device):
    """-> the update's model FLOPs for one state, forward and backward, nothing counted twice for recomputation; and the
    bytes that one more teacher takes."""
    pipe = model.load_pipeline(str(folder), device, args.dtype)
    before = torch.cuda.memory_allocated()
    adapters.add_adapter(pipe.transformer, "fifth", adapters.read_adapter(f"{folder}/adapters/ocr", ""))
    fifth = torch.cuda.memory_allocated() - before
    text = model.embed_prompts(pipe, ["red circle"])
    flags = argparse.Namespace(seed=0, rank=32, alpha=64, init="")
    adapters.add_student(pipe.transformer, flags, adapters.read_adapter(f"{folder}/adapters/merged", ""))
    noise = model.initial_noise(pipe, [torch.Generator()], args.size)
    with FlopCounterMode(display=False) as counter, adapters.adapter(pipe.transformer, "student"):
        model.velocity(pipe.transformer, noise, 0.5, text, torch.tensor([1]), args.guidance).mean().backward()
    return counter.get_total_flops(), fifth


def parse_args():
    """-> its own flags, and those for train_opd.py."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how, allow_abbrev=False)
    flag = parser.add_argument
    flag("--arch", choices=("toy", "sd35m"), default="toy")
    flag("--repeats", type=int, default=4, help="iterations of each line that count, an even number (default: 4)")
    flag("--lines", nargs="+", choices=LINES, default=LINES, help="which of the three")
    flag("--prompts_per_iteration", type=int, default=8)
    flag("--group_size", type=int, default=16)
    flag("--steps", type=int, default=6)
    flag("--size", type=int, help="image side in pixels; default the model's own")
    flag("--guidance", type=float, default=1.0)
    flag("--dtype", choices=("fp32", "bf16", "fp16"))
    flag("--micro_batch", type=int, default=128)
    flag("--label_batch", type=int, default=256)
    flag("--checkpointing", action="store_true")
    flag("--dry_run", metavar="RECIPE", help="only estimate the memory of this recipe for train_opd.py")
    args, more = parser.parse_known_args()
    flags = "--eval_prompts 0 --sample_every 0".split() + ["--checkpointing"] * args.checkpointing
    for name in ("prompts_per_iteration", "group_size", "steps", "size", "guidance", "dtype", "micro_batch", "label_batch"):
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    return args, flags + more


def measure(line, args, flags, folder, device, prompts, out):
    """The log lines of `--repeats` / 2 iterations, after a first one that does not count."""
    number = 1 + args.repeats // 2
    if device.type == "cuda":
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
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    return [entry | {"memory_gb": peak} for entry in log[1:]]


def main():
    args, flags = parse_args()
    if args.dry_run:
        return dry_run(args.dry_run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    train = {task: (ROOT / f"toy/prompts/{task}_train.txt").read_text().splitlines() for task in TASKS}
    prompts = {task: train[task][: args.prompts_per_iteration // len(TASKS)] for task in TASKS}
    images = sum(map(len, prompts.values())) * args.group_size
    rows = {line: [] for line in args.lines}
    with tempfile.TemporaryDirectory() as work:
        folder = "toy" if args.arch == "toy" else sd35m(f"{work}/sd35m")
        for _ in range(2):  # alternating: what the machine does meanwhile hits every line
            for line in args.lines:
                rows[line] += measure(line, args, flags, folder, device, prompts, Path(work) / "run")
        flops, fifth = on_a_gpu(args, folder, device) if gpu else (None, None)

    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{args.arch}, {images} images an iteration, {args.steps} steps, guidance {args.guidance:g}; {name}\n")
    print("| | s / iteration | rollout | labels | update | images / s | peak GB |\n|---|---|---|---|---|---|---|")
    middle = {}
    for line, log in rows.items():
        keys = [key for key in log[0] if key.startswith("seconds") or key == "memory_gb"]
        middle[line] = {key: statistics.median(entry[key] for entry in log) for key in keys}
    for line, row in middle.items():
        laps = [f"{row[k]:.2f}" if (k := f"seconds/{phase}") in row else "" for phase in ("rollout", "labels", "update")]
        memory_gb = f"{row['memory_gb']:.1f}" if gpu else "not measured"
        print(f"| {line} | {row['seconds']:.2f} | {' | '.join(laps)} | {images / row['seconds']:.2f} | {memory_gb} |")
    first = middle[args.lines[0]]
    print()
    for line in args.lines[1:]:
        memory_ratio = f", {middle[line]['memory_gb'] / first['memory_gb']:.2f} in memory" if gpu else ""
        print(f"{line} / {args.lines[0]}: {middle[line]['seconds'] / first['seconds']:.2f} in seconds{memory_ratio}")
    if gpu:
        print(f"a fifth teacher: {fifth / 1e6:.0f} MB")
    if gpu and "ours" in rows:
        rate = flops * images * (args.steps - 1) / middle["ours"]["seconds/update"]
        print(f"update: {rate / matmul_rate(device):.0%} of the bf16 matmul rate measured here")


if __name__ == "__main__":
    main()
