r"""Where an iteration's time goes: operations of one label batch and of one micro-batch.

    python experiments/profiler.py                     # the miniature, on the device there is
    python experiments/profiler.py --arch sd35m --size 512 --guidance 4.5 --micro_batch 9 \
        --label_batch 36 --repeats 5

Three passes of train_opd.py's network calls are timed: a teacher's labels, the same by the bare
backbone (the difference is what LoRA costs), and the student's forward and backward pass. FLOP are
counted by torch, and set against a large matrix product in the same dtype on the same device. Then
torch's profiler shares the time out by kind of operation (not with --compile, which fuses them).
What is missing to the measured time is Python, and on a GPU what it waits for. `--arch sd35m` has
random weights and needs a GPU.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.sd35m import save_pipeline
from support import lora, model
from support.flags import make_parser, model_flags, positive

ROOT = Path(__file__).resolve().parents[1]
KINDS = {  # kind: words in the names of torch's operations; the first kind that fits
    "attention": ("attention", "flash"),
    "matrix products": ("mm", "linear", "convolution", "matmul"),
    "casts and copies": ("copy", "cat", "clone", "index", "contiguous"),
    "norms": ("norm",),
    "element by element": "mul add div sub gelu silu pow mean sum fill".split(),
}


def kind_of(name):
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return "the rest"


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work, repeats, device):
    """The median, after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ b, 10, device)


def shares(work, device):
    """{kind: seconds} and [(seconds, name), ...] of torch's operations in a call, from the most."""
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        work()
        synchronize(device)
    kinds, names = {}, []
    for event in profiler.key_averages():
        if not event.key.startswith("aten::"):
            continue
        on_gpu = device.type == "cuda"
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0) + own / 1e6
        names.append((own / 1e6, event.key))
    return kinds, sorted(names, reverse=True)


def load(args, folder, device):
    """The backbone with a frozen teacher and the student in training."""
    pipe = model.load_pipeline(args, device)
    lora.load_adapter(pipe.transformer, "teacher", f"{folder}/adapters/ocr", "--teacher")
    args.init, args.alpha, args.rank, args.seed = f"{folder}/adapters/merged", 64, 32, 0
    lora.add_student(pipe.transformer, args)
    text = model.embed_prompts(pipe, ["a red circle"], args)
    guidance = dict.fromkeys(("teacher", "student", None), args.guidance)
    return pipe, model.Backbone(pipe.transformer, text, guidance, args.label_batch)


def passes(args, pipe, backbone):
    """{name: a function without arguments}."""
    state = lambda n: (model.initial_noise(pipe, [torch.Generator() for _ in range(n)]), 0.5)
    labels, update = state(args.label_batch), state(args.micro_batch)
    prompts = lambda n: torch.ones(n, dtype=torch.long)
    of_labels, of_update = prompts(args.label_batch), prompts(args.micro_batch)

    def learn():
        backbone.velocity("student", *update, of_update).mean().backward()

    return {
        "labels": lambda: backbone.predict("teacher", *labels, of_labels),
        "labels without LoRA": lambda: backbone.predict(None, *labels, of_labels),
        "update": learn,
    }


def show(name, work, args, device, rate):
    memory = ""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = seconds(work, args.repeats, device)
    if device.type == "cuda":
        memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at its peak"
    with FlopCounterMode(display=False) as counter:
        work()
    flop = counter.get_total_flops()
    print(f"\n{name}: {took * 1e3:.1f} ms, {flop / 1e12:.3f} TFLOP, {flop / took / rate:.0%} of it")
    print(f"    {flop / took / 1e12:.3g} TFLOP/s{memory}")
    if args.compile:
        return
    kinds, names = shares(work, device)
    for kind, spent in sorted(kinds.items(), key=lambda pair: -pair[1]):
        print(f"    {spent / took:4.0%}  {kind}")
    print(f"    {1 - sum(kinds.values()) / took:4.0%}  Python, and waiting for it")
    print("    most: " + ", ".join(f"{name} {s * 1e3:.1f}" for s, name in names[:8]) + " ms")


def parse_args():
    parser = make_parser(__doc__)
    model_flags(parser)
    flag = parser.add_argument
    flag("--arch", choices=("toy", "sd35m"), default="toy", help="the model")
    flag("--guidance", type=float, default=1.0, help="guidance scale; 1 = off")
    flag("--micro_batch", type=positive, default=128, help="states of the update")
    flag("--label_batch", type=positive, default=128, help="states of the labels")
    flag("--repeats", type=positive, default=10, help="calls, whose median counts")
    return parser.parse_args()


def main():
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matmul_rate(device, model.precision(args.dtype, device))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    threads = torch.get_num_threads()
    print(f"{where}, {threads} threads: a large matrix product reaches {rate / 1e12:.3g} TFLOP/s")
    with tempfile.TemporaryDirectory() as work:
        if args.arch == "sd35m":
            args.model = str(save_pipeline(f"{work}/sd35m"))
        pipe, backbone = load(args, args.model, device)
    for name, work in passes(args, pipe, backbone).items():
        show(name, work, args, device, rate)


if __name__ == "__main__":
    main()
