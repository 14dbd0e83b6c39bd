"""Memory: what a run of train_opd.py will need, counted without loading the model (--dry_run), and
one line where memory runs out.

The model is built from its configuration files alone. Then a forward and a backward pass run on
fake tensors, which have shapes but no contents, and the bytes of those alive are added up.
"""

import argparse
import functools
import json
import math
import os
import re
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from support.files import check_model, fetch
from support.lora import add_student, load_adapter, load_anchor, use
from support.model import backbone_dtype, precision, velocity
from support.run import print_batch, share, start_processes, stop_processes


class Alive(TorchDispatchMode):
    """Adds up the bytes of tensors that are made inside and still alive; `peak` is the maximum."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.now, self.peak, self.known = device, 0, 0, weakref.WeakSet()

    def storages(self, tree) -> list:
        tensors = [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]
        return [t.untyped_storage() for t in tensors if t.device == self.device]

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.known.update(self.storages((args, kwargs)))  # made before: neither it nor its views
        out = op(*args, **(kwargs or {}))
        for storage in self.storages(out):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, size: int) -> None:
        self.now -= size


def size_of(module: torch.nn.Module) -> int:
    """Bytes of its parameters and of the buffers that are saved with it."""
    saved = module.state_dict()
    buffers = [buffer for name, buffer in module.named_buffers() if name in saved]
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *buffers))


def largest_batch(args: argparse.Namespace, world: int = 1) -> dict[str, int]:
    """{phase: rows in the largest forward pass} of process 0 in an iteration of train_opd.py."""
    S, G = args.trained_steps, args.group_size
    samples = share(args.prompts_per_iteration * G, 0, world)
    cycle = [task for task in args.teacher for _ in range(int(args.task_mix[task]))]
    parts = Counter((cycle[i // G % len(cycle)], i % args.updates) for i in samples)
    return {
        "rollout": min(args.label_batch, len(samples)),
        "labels": min(args.label_batch, S * len(samples)),  # the anchor's; a teacher's are fewer
        "update": min(args.micro_batch, S * max(parts.values())),
    }


def guidance_of(args: argparse.Namespace, phase: str) -> float:
    """The guidance scale of a phase. Of the teachers' scales: one that doubles the rows, if any."""
    if phase != "labels":
        return args.student_guidance
    return max(args.guidance, *args.teacher_guidance.values(), 1, key=lambda scale: scale != 1)


def build(args: argparse.Namespace, folder: str, dtype: torch.dtype) -> tuple:
    """(the transformer with all its LoRAs, without contents; {what it holds: bytes})."""
    config = SD3Transformer2DModel.load_config(f"{folder}/transformer")
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config)
    to_dtype = torch.nn.Module.to  # diffusers' own warns
    to_dtype(transformer, dtype).requires_grad_(False).eval()
    bare = size_of(transformer)
    for task, path in args.teacher.items():
        alpha = args.teacher_alpha.get(task)
        load_adapter(transformer, f"teacher_{task}", path, f"--teacher {task}", alpha)
    load_anchor(transformer, args)
    to_dtype(transformer, dtype)  # as peft does with a LoRA that has contents
    frozen = size_of(transformer) - bare
    add_student(transformer, args)
    trained = size_of(transformer) - bare - frozen
    return transformer, {
        f"transformer, {str(dtype).removeprefix('torch.')}": bare,
        "LoRAs of teachers and anchor": frozen,
        "student and its average, float32": trained,
        "gradients, one per task": len(args.teacher) * trained // 2,
        "Adam's two moments": trained,
    }


def peak_of(transformer, rows, side, tokens, guidance, device, backward=False) -> int:
    """Peak bytes of one guided velocity (with `backward`: and of its gradient) on top of what was
    there. It also measures a real model."""
    config, dtype = transformer.config, backbone_dtype(transformer)
    x = torch.zeros(rows, config.in_channels, side, side, device=device)
    embeds = torch.zeros(1, tokens, config.joint_attention_dim, dtype=dtype)
    pooled = torch.zeros(1, config.pooled_projection_dim, dtype=dtype)
    text, prompt = {"embeds": embeds, "pooled": pooled}, torch.zeros(rows, dtype=torch.long)
    with torch.set_grad_enabled(backward), use(transformer, "student"), Alive(device) as alive:
        v = velocity(transformer, x, 0.5, text, prompt, guidance)
        if backward:
            v.square().mean().backward()
    return alive.peak


def phases(args, folder, device, dtype, world=1) -> tuple[dict[str, int], dict[str, int]]:
    """({what is held all the time: bytes}, {phase: bytes on top at its peak})."""
    transformer, held = build(args, folder, dtype)
    read = lambda name: json.loads((Path(folder) / name).read_text())
    vae_config = AutoencoderKL.load_config(f"{folder}/vae")
    side = transformer.config.sample_size
    if args.size:
        side = args.size // 2 ** (len(vae_config["block_out_channels"]) - 1)
    clip_length = read("tokenizer/tokenizer_config.json")["model_max_length"]
    t5_length = args.text_length
    if not args.no_t5:
        t5_length = min(t5_length, read("tokenizer_3/tokenizer_config.json")["model_max_length"])
    tokens = clip_length + t5_length
    latent = 4 * transformer.config.in_channels * side**2  # bytes of a state, float32
    S, steps = args.trained_steps, args.eligible_steps[-1] + 1
    b = math.ceil(args.prompts_per_iteration * args.group_size / world)  # samples of a process
    # Noise, states and means of a rollout; of its rows x, x_next, two means and two labels.
    held["states, means and labels, float32"] = (2 * steps + 2 + 6 * S) * b * latent
    extra = {"text encoders": 0}
    with torch.device("meta"):
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3")[: 2 if args.no_t5 else 3]:
            kind = getattr(transformers, read("model_index.json")[part][1])
            encoder = kind(kind.config_class.from_pretrained(f"{folder}/{part}"))
            extra["text encoders"] += size_of(encoder.to(dtype))
        vae = AutoencoderKL.from_config(vae_config).requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer.to_empty(device=device)
        if args.checkpointing:
            transformer.enable_gradient_checkpointing()
        for phase, rows in largest_batch(args, world).items():
            scale, backward = guidance_of(args, phase), phase == "update"
            extra[phase] = peak_of(transformer, rows, side, tokens, scale, device, backward)
        extra["rollout"] += (2 * steps + 2) * b * latent  # lists, before they are stacked
        if args.sample_every or args.eval_prompts:
            held["VAE, float32, from the first pictures on"] = size_of(vae)
            vae.to_empty(device=device)
            n = min(args.label_batch, args.eval_prompts or 2 * len(args.teacher))
            sampling = peak_of(transformer, n, side, tokens, args.student_guidance, device)
            sampling += (4 * args.eval_steps + 3) * n * latent
            with torch.no_grad(), Alive(device) as alive:
                vae.decode(torch.zeros(n, vae.config.latent_channels, side, side, device=device))
            extra["pictures"] = max(sampling, alive.peak)
    return held, extra


def dry_run(args: argparse.Namespace) -> None:
    """Print what this run of train_opd.py would hold. Nothing is loaded or written."""
    rank, world, device = start_processes()
    folder = fetch(args.model, "--model", ("model_index.json", "*/*config.json"))
    check_model(folder)
    print_batch(args)
    if rank == 0:
        held, extra = phases(args, folder, device, precision(args.dtype, device), world)
        for phase, rows in largest_batch(args, world).items():
            twice = ", each twice for guidance" if guidance_of(args, phase) != 1 else ""
            print(f"{phase}: up to {rows} rows a forward pass{twice}")
        total, GB = sum(held.values()), 1e9
        print("\nheld all the time, per process")
        for name, size in {**held, "together": total}.items():
            print(f"  {size / GB:9.3f} GB  {name}")
        print("\npeak of each phase: this and")
        for phase, size in extra.items():
            print(f"  {size / GB:9.3f} GB  {phase:14} {(total + size) / GB:9.3f} GB in all")
        # Student, average and two moments in float32, and the average in two formats.
        disk = 3 * held["Adam's two moments"] / GB
        print(f"\na checkpoint takes {disk:.3f} GB of disk; at most {args.keep + 1} exist at once")
        print("An estimate: nothing was measured. It leaves out the CUDA context, workspaces of\n"
              "libraries, temporaries inside an operation, fragmentation and the text encoders'\n"
              "activations.")  # fmt: skip
    stop_processes()


# Where memory ran out: the outermost of these functions in the traceback, what it does, and what
# needs less there (the first flag that the script has).
PHASES = {
    "load_pipeline": ("the model", ["--dtype bf16"]),
    "embed_prompts": ("text embeddings", ["--no_t5, or --cache_embeddings of another machine"]),
    "score_files": ("evaluation", ["a smaller --batch", "a smaller --label_batch"]),
    "sample_images": ("pictures", ["a smaller --batch", "a smaller --label_batch"]),
    "decode": ("pictures", ["a smaller --batch", "a smaller --label_batch"]),
    "rollout": ("rollout", ["a smaller --label_batch"]),
    "predict": ("labels", ["a smaller --label_batch"]),
}
ELSE = ("update", ["a smaller --micro_batch, or --checkpointing", "a smaller --batch"])
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "CUDA out of memory",
                 "CUBLAS_STATUS_ALLOC_FAILED")  # fmt: skip
PEER_GONE = ("closed by peer", "remote process exit")  # the words of gloo and nccl


def guarded(main: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """main(args); out of memory is one line and exit code 2, on every process."""

    @functools.wraps(main)
    def run(args):
        try:
            return main(args)
        except (MemoryError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            if isinstance(error, MemoryError) or any(sign in reason for sign in OUT_OF_MEMORY):
                frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
                phase, cures = next((PHASES[name] for name in frames if name in PHASES), ELSE)
                cure = next(c for c in cures if hasattr(args, re.search(r"--(\w+)", c)[1]))
                line = f"out of memory ({phase}): try {cure} ({reason})"
            elif any(sign in reason for sign in PEER_GONE):
                line = "another process has stopped; its own message says why"
            else:
                raise
            tqdm.write(f"error: {line}", file=sys.stderr)  # below the progress bar
            if dist.is_initialized():
                os._exit(2)  # at once: a tidy end would wait for the other processes
            raise SystemExit(2) from None

    return run
