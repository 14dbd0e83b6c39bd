"""Memory: what a run of train_opd.py will hold, counted without loading the model (--dry_run), and
one line where memory runs out.

The model is built from its configuration files alone. Then a forward and a backward pass run on
fake tensors, which have shapes but no contents, and the bytes of those alive are added up.
"""

import argparse
import functools
import json
import math
import os
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from support.files import check_model, fetch
from support.lora import add_student, load_adapter, load_anchor, use
from support.model import ENCODERS, backbone_dtype, precision, velocity
from support.run import print_batch, start_processes, stop_processes


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


def peak_of(transformer, rows, side, tokens, guidance, device, backward=False) -> int:
    """Peak bytes of one guided velocity, with `backward` and its gradient, of any transformer."""
    config, dtype = transformer.config, backbone_dtype(transformer)
    x = torch.zeros(rows, config.in_channels, side, side, device=device)
    embeds = torch.zeros(1, tokens, config.joint_attention_dim, dtype=dtype)
    text = {"embeds": embeds, "pooled": torch.zeros(1, config.pooled_projection_dim, dtype=dtype)}
    prompt = torch.zeros(rows, dtype=torch.long)
    with torch.set_grad_enabled(backward), use(transformer, "student"), Alive(device) as alive:
        v = velocity(transformer, x, 0.5, text, prompt, guidance)
        if backward:
            v.square().mean().backward()
    return alive.peak


def largest_batch(args: argparse.Namespace, world: int = 1) -> dict[str, int]:
    """{phase: rows in the largest forward pass of an iteration of train_opd.py}."""
    samples = math.ceil(args.prompts_per_iteration * args.group_size / world)  # of a process
    rows = args.trained_steps * samples
    of_task = rows * max(args.task_mix.values()) / sum(args.task_mix.values()) / args.updates
    sizes = {"rollout": samples, "labels": rows, "update": math.ceil(of_task)}
    limits = {"rollout": args.label_batch, "labels": args.label_batch, "update": args.micro_batch}
    return {phase: min(size, limits[phase]) for phase, size in sizes.items()}


def phases(args, folder, device, dtype, world=1) -> tuple[dict[str, int], dict[str, int]]:
    """({what is held all the time: bytes}, {phase: bytes on top at its peak})."""
    about = lambda part: json.loads(Path(folder, part, "tokenizer_config.json").read_text())
    to_dtype = torch.nn.Module.to  # diffusers' own warns
    with torch.device("meta"):
        config = SD3Transformer2DModel.load_config(f"{folder}/transformer")
        transformer = SD3Transformer2DModel.from_config(config)
        vae_config = AutoencoderKL.load_config(f"{folder}/vae")
        vae = AutoencoderKL.from_config(vae_config).requires_grad_(False)
    to_dtype(transformer, dtype).requires_grad_(False).eval()
    bare = size_of(transformer)
    for task, path in args.teacher.items():
        alpha = args.teacher_alpha.get(task)
        load_adapter(transformer, f"teacher_{task}", path, f"--teacher {task}", alpha)
    load_anchor(transformer, args)
    frozen = size_of(to_dtype(transformer, dtype)) - bare  # peft's LoRAs have the model's dtype
    add_student(transformer, args)
    trained = size_of(transformer) - bare - frozen

    side, tokens = transformer.config.sample_size, args.text_length
    if args.size:
        side = args.size // 2 ** (len(vae_config["block_out_channels"]) - 1)
    encoders = dict(ENCODERS)
    if args.no_t5:
        del encoders["text_encoder_3"]
    else:
        tokens = min(tokens, about("tokenizer_3")["model_max_length"])
    tokens += about("tokenizer")["model_max_length"]
    S, steps = args.trained_steps, args.eligible_steps[-1] + 1
    b = math.ceil(args.prompts_per_iteration * args.group_size / world)  # samples of a process
    latent = 4 * transformer.config.in_channels * side**2  # bytes of a state, float32
    held = {
        f"transformer, {str(dtype).removeprefix('torch.')}": bare,
        "LoRAs of teachers and anchor": frozen,
        "student and its average, float32": trained,
        "gradients, one per task": len(args.teacher) * trained // 2,
        "Adam's two moments": trained,
        # Noise, states and means of a rollout; of its rows x, x_next, two means and two labels.
        "states, means and labels, float32": (2 * steps + 2 + 6 * S) * b * latent,
    }
    extra = {"text encoders": 0}
    for part, kind in encoders.items():
        with torch.device("meta"):
            encoder = kind(kind.config_class.from_pretrained(f"{folder}/{part}"))
        extra["text encoders"] += size_of(encoder.to(dtype))

    # Of the scales one that doubles the rows, if any.
    scales = {args.guidance, *args.teacher_guidance.values()} - {1}
    guidance = dict.fromkeys(("rollout", "update"), args.student_guidance)
    guidance["labels"] = max(scales, default=1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer.to_empty(device=device)
        if args.checkpointing:
            transformer.enable_gradient_checkpointing()
        for phase, rows in largest_batch(args, world).items():
            how = (side, tokens, guidance[phase], device, phase == "update")
            extra[phase] = peak_of(transformer, rows, *how)
        extra["rollout"] += (2 * steps + 2) * b * latent  # lists, before they are stacked
        if args.sample_every or args.eval_prompts:
            held["VAE, float32, from the first pictures on"] = size_of(vae)
            vae.to_empty(device=device)
            n = min(args.label_batch, args.eval_prompts or 2 * len(args.teacher))
            with torch.no_grad(), Alive(device) as alive:
                vae.decode(torch.zeros(n, vae.config.latent_channels, side, side, device=device))
            extra["pictures"] = alive.peak
    return held, extra


def dry_run(args: argparse.Namespace) -> None:
    """Print what this run of train_opd.py would hold. Nothing is loaded or written."""
    rank, world, device = start_processes()
    folder = fetch(args.model, "--model", ("model_index.json", "*/*config.json"))
    check_model(folder)
    print_batch(args)
    if rank == 0:
        held, extra = phases(args, folder, device, precision(args.dtype, device), world)
        total, rows = sum(held.values()), largest_batch(args, world)
        print("\nGB held all the time, per process")
        for name, size in {**held, "together": total}.items():
            print(f"  {size / 1e9:9.3f}  {name}")
        print("\nGB at the peak of each phase: this on top, and in all")
        for phase, size in extra.items():
            largest = f", {rows[phase]} rows a forward pass" if phase in rows else ""
            print(f"  {size / 1e9:9.3f} {(total + size) / 1e9:9.3f}  {phase}{largest}")
        # Student, average and two moments in float32, and the average in two formats.
        disk = 3 * held["Adam's two moments"] / 1e9
        print(f"\na checkpoint takes {disk:.3f} GB of disk; at most {args.keep + 1} exist at once")
        print("An estimate, not measured. It leaves out the CUDA context, libraries' workspaces,")
        print("temporaries inside an operation, fragmentation and the text encoders' activations.")
    stop_processes()


# What helps where memory ran out: in the outermost of these functions, or else in the update.
LABEL_BATCH = "a smaller --label_batch (evaluate.py: --batch)"
CURES = {"load_pipeline": "--dtype bf16", "embed_prompts": "--no_t5, or --cache_embeddings"}
CURES |= dict.fromkeys(("rollout", "predict", "decode", "score_files"), LABEL_BATCH)
CURES["update"] = "a smaller --micro_batch, or --checkpointing"
OUT_OF_MEMORY = ("enough memory", "allocate memory", "CUDA out of memory", "STATUS_ALLOC_FAILED")
PEER_GONE = ("by peer", "Broken pipe", "remote process exit")  # the words of gloo and nccl


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
                place = next((name for name in frames if name in CURES), "update")
                line = f"out of memory ({place}): try {CURES[place]} ({reason})"
            elif any(sign in reason for sign in PEER_GONE):
                line = "another process has stopped; its own message says why"
            else:
                raise
            tqdm.write(f"error: {line}", file=sys.stderr)  # below the progress bar
            saver = getattr(sys.excepthook, "__self__", None)  # of a run that has begun
            if hasattr(saver, "stop"):
                saver.stop()
            if dist.is_initialized():
                os._exit(2)  # at once: a tidy end would wait for the other processes
            raise SystemExit(2) from None

    return run
