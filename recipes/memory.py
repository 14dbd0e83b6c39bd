"""What a run of train_opd.py will hold in memory, counted without loading the model.

    python train_opd.py @recipes/sd35m_opd.args --dry_run

The model is built from its configuration files alone. Then a forward and a backward pass run on
fake tensors, which have shapes but no contents, and the bytes of those alive are added up.
"""

import argparse
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import support  # noqa: F401  first: it quiets the notices of transformers
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.files import check_model, fetch
from support.lora import use
from support.model import ENCODERS, backbone_dtype, precision, set_size, velocity
from support.run import print_batch, rank_and_world, start_processes, stop_processes


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


def phases(args, load_loras, folder, device, world=1) -> tuple[dict[str, int], dict[str, int]]:
    """({what is held all the time: bytes}, {phase: bytes on top at its peak}) of one process."""
    dtype, encoders = precision(args.dtype, device), dict(ENCODERS)
    if args.no_t5:
        del encoders["text_encoder_3"]
    with torch.device("meta"):
        build = lambda kind, part: kind.from_config(kind.load_config(f"{folder}/{part}"))
        transformer = build(SD3Transformer2DModel, "transformer")
        vae = build(AutoencoderKL, "vae").requires_grad_(False)
        text_encoders = torch.nn.ModuleList()
        for part, kind in encoders.items():
            text_encoders.append(kind(kind.config_class.from_pretrained(f"{folder}/{part}")))
    set_size(transformer, vae, args.size)
    torch.nn.Module.to(transformer, dtype).requires_grad_(False).eval()  # diffusers' own .to warns
    bare = size_of(transformer)
    student, *_ = load_loras(args, transformer)
    number = sum(p.numel() for p in student.values())
    trained = 4 * number  # bytes of one float32 copy
    loras = [p.numel() for name, p in transformer.named_parameters() if ".lora_" in name]

    about = lambda part: json.loads(Path(folder, part, "tokenizer_config.json").read_text())
    tokens, t5_tokens = about("tokenizer")["model_max_length"], args.text_length
    if not args.no_t5:
        t5_tokens = min(t5_tokens, about("tokenizer_3")["model_max_length"])
    side = transformer.config.sample_size
    S, steps = args.trained_steps, args.eligible_steps[-1] + 1
    b = math.ceil(args.prompts_per_iteration * args.group_size / world)  # samples of a process
    latent = 4 * transformer.config.in_channels * side**2  # bytes of a state, float32
    held = {
        f"transformer, {str(dtype).removeprefix('torch.')}": bare,
        "LoRAs of teachers and anchor": (sum(loras) - 2 * number) * dtype.itemsize,
        "student and its average, float32": 2 * trained,
        "gradients, one per task": len(args.teacher) * trained,
        "Adam's two moments": 2 * trained,
        # Noise, states and means of a rollout; of its rows x, x_next, two means and two labels.
        "states, means and labels, float32": (2 * steps + 2 + 6 * S) * b * latent,
    }
    # Of the scales one that doubles the rows, if any.
    scales = {args.guidance, *args.teacher_guidance.values()} - {1}
    guidance = dict.fromkeys(("rollout", "update"), args.student_guidance)
    guidance["labels"] = max(scales, default=1)
    extra = {"text encoders": size_of(text_encoders.to(dtype))}
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer.to_empty(device=device)
        if args.checkpointing:
            transformer.enable_gradient_checkpointing()
        for phase, rows in largest_batch(args, world).items():
            how = (side, tokens + t5_tokens, guidance[phase], device, phase == "update")
            extra[phase] = peak_of(transformer, rows, *how)
        extra["rollout"] += (2 * steps + 2) * b * latent  # lists, before they are stacked
        if args.sample_every or args.eval_prompts:
            held["VAE, float32, from the first pictures on"] = size_of(vae)
            n = min(args.label_batch, args.eval_prompts or 2 * len(args.teacher))
            with torch.no_grad(), Alive(device) as alive:
                latents = torch.zeros(n, vae.config.latent_channels, side, side, device=device)
                vae.to_empty(device=device).decode(latents)
            extra["pictures"] = alive.peak - size_of(vae)
    return held, extra


def dry_run(args: argparse.Namespace, load_loras: Callable) -> None:
    """Print what this run of train_opd.py would hold. Nothing is loaded or written."""
    folder = fetch(args.model, "--model", ("model_index.json", "*/*config.json"))
    check_model(folder)
    _, world, device = start_processes()
    print_batch(args)
    if rank_and_world()[0] == 0:
        held, extra = phases(args, load_loras, folder, device, world)
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
