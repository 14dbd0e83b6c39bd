"""Memory: what a run of train_opd.py will hold, counted without loading a weight (`--dry_run`), and one line where it runs out.

The model is built from its configuration files alone, with all adapters. A forward and a backward pass then run on
tensors that have shapes and no content, and the bytes of those alive are added up as they come and go.
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

import support.lora as adapters
from support.flags import check_model, fetch, hub_id
from support.run import print_batch, share
from support.model import precision, velocity


class Live(TorchDispatchMode):
    """Adds up the bytes of the tensors made inside that are still alive; `peak` is the most there were at once."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.now, self.peak, self.known = device, 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        of = lambda tree: [t.untyped_storage() for t in tree_leaves(tree) if torch.is_tensor(t) and t.device == self.device]
        self.known.update(of((args, kwargs)))  # what was there before is not counted, nor a view of it
        out = op(*args, **(kwargs or {}))
        for storage in of(out):
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
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *buffers.values()))


def passes(args: argparse.Namespace, world: int = 1) -> dict[str, tuple[int, int]]:
    """{phase: (calls of the transformer, the states in the largest)} of process 0 in one iteration of train_opd.py."""
    sft, G = args.objective == "sft", args.group_size
    S, R = (1, 1) if sft else (args.trained_steps, args.eligible_steps[-1] + 1)  # steps trained, steps of a rollout
    cycle = [task for task in args.teacher for _ in range(int(args.task_mix[task]))]
    mine = share(args.prompts_per_iteration * G, 0, world)
    of = {task: [i for i in mine if cycle[i // G % len(cycle)] == task] for task in args.teacher}
    updates = [[i for i in part if i % args.updates == n] for part in of.values() for n in range(args.updates)]
    painters, asked = ([*of.values()], [*of.values(), mine]) if args.rollout == "teacher" else ([mine], [*of.values()])
    if args.mar_weight:  # the anchor; where it is a teacher, not on this one's prompts
        alike = [task for task, path in args.teacher.items() if path == args.anchor and task not in args.teacher_guidance]
        asked.append([i for i in mine if not alike or i not in of[alike[-1]]])
    firsts = [i for i in mine if i % G == 0]  # for the log's kl_after

    def count(parts, batch, steps):
        size, split = max(1, batch // steps), math.ceil(steps / batch)  # samples in a call, or calls for a sample
        calls = split * sum(math.ceil(len(part) / size) for part in parts)
        return calls, min(size, max(map(len, parts))) * min(steps, batch)

    update, (rollouts, wide) = count(updates, args.micro_batch, S), count(painters, args.rollout_batch, 1)
    if sft:
        return {"update": update}
    return {"rollout": (R * rollouts, wide), "labels": count([*asked, firsts], args.label_batch, S), "update": update}


def scale_of(args: argparse.Namespace, phase: str) -> float:
    """The guidance scale there: the labels are the teachers', and so is an off-policy rollout; sft's update has none."""
    if args.objective == "sft":
        return 1.0
    return args.guidance if phase == "labels" or (phase, args.rollout) == ("rollout", "teacher") else args.student_guidance


def lora(path: str, flag: str, args: argparse.Namespace, alpha: float | None = None) -> dict:
    """What add_adapter wants of it. Of an adapter on the hub the configuration alone is fetched."""
    if path == "base":
        return {"rank": args.rank, "alpha": args.alpha}
    if not hub_id(path):
        return {"layers": adapters.read_adapter(path, flag, alpha)}
    file = Path(fetch(path, flag, ("adapter_config.json",))) / "adapter_config.json"
    return {"rank": json.loads(file.read_text())["r"] if file.is_file() else args.rank, "alpha": 1}


def build(args: argparse.Namespace, folder: str | Path, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, int]]:
    """The transformer with all its adapters, on no device at all. Returns it, and {what: bytes} of what it holds."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(f"{folder}/transformer"))
    torch.nn.Module.to(transformer, dtype).requires_grad_(False).eval()
    bare = size_of(transformer)
    for task, path in args.teacher.items():
        adapters.add_adapter(transformer, task, **lora(path, f"--teacher {task}", args, args.teacher_alpha.get(task)))
    alike = [path for task, path in args.teacher.items() if task not in args.teacher_guidance]
    if args.mar_weight and args.anchor not in ("base", *alike):
        adapters.add_adapter(transformer, "anchor", **lora(args.anchor, "--anchor", args))
    torch.nn.Module.to(transformer, dtype)  # peft casts a frozen LoRA to the backbone's precision, but not where nothing is
    frozen = size_of(transformer) - bare
    start = lora(args.init, "--init", args)
    flags = argparse.Namespace(**vars(args) | {"rank": start.get("rank"), "alpha": start.get("alpha")})
    student, _ = adapters.add_student(transformer, flags, start.get("layers"))
    P = sum(4 * p.numel() for p in student.values())
    return transformer, {
        f"transformer, {str(dtype).removeprefix('torch.')}": bare,
        "LoRAs of teachers and anchor": frozen,
        "student and its average, float32": size_of(transformer) - bare - frozen,
        "gradients, one of every task": len(args.teacher) * P,
        "Adam's two moments": 2 * P,
    }


def peak_of(
    transformer: torch.nn.Module,
    states: int,
    side: int,
    tokens: int,
    guidance: float,
    device: torch.device,
    backward: bool = False,
) -> int:
    """Peak bytes of one guided velocity (with `backward`: and its gradient) beyond what was there. Also of a real model."""
    config, dtype = transformer.config, transformer.pos_embed.proj.weight.dtype
    x, t = torch.zeros(states, config.in_channels, side, side, device=device), torch.full((states,), 0.5, device=device)
    text = {"embeds": torch.zeros(1, tokens, config.joint_attention_dim, dtype=dtype),
            "pooled": torch.zeros(1, config.pooled_projection_dim, dtype=dtype)}  # fmt: skip
    with torch.set_grad_enabled(backward), adapters.adapter(transformer, "student"), Live(device) as live:
        v = velocity(transformer, x, t, text, torch.zeros(states, dtype=torch.long), guidance)
        if backward:
            v.square().mean().backward()
    return live.peak


def phases(
    args: argparse.Namespace, folder: str | Path, device: torch.device, dtype: torch.dtype, world: int = 1
) -> tuple[dict, dict]:
    """({what is held all the time: bytes}, {phase: bytes on top at its peak})."""
    transformer, held = build(args, folder, dtype)
    read = lambda name: json.loads((Path(folder) / name).read_text())
    vae_config, index = AutoencoderKL.load_config(f"{folder}/vae"), read("model_index.json")
    side = args.size // 2 ** (len(vae_config["block_out_channels"]) - 1) if args.size else transformer.config.sample_size
    limit = [read(f"{name}/tokenizer_config.json")["model_max_length"] for name in ("tokenizer", "tokenizer_3")]
    tokens = limit[0] + (args.text_length if args.no_t5 else min(args.text_length, limit[1]))
    latent = 4 * transformer.config.in_channels * side**2  # bytes of one state, float32
    S, R = (0, 0) if args.objective == "sft" else (args.trained_steps, args.eligible_steps[-1] + 1)
    b = math.ceil(args.prompts_per_iteration * args.group_size / world)  # samples of a process
    # Noise, R + 1 states, R means; of the S trained steps the state, v_teacher, v_anchor and the teacher's mean.
    held["states, means and labels, float32"] = (2 * R + 2 + 4 * S) * b * latent

    encoders = 0
    for name in ("text_encoder", "text_encoder_2", *([] if args.no_t5 else ["text_encoder_3"])):
        with torch.device("meta"):
            kind = getattr(transformers, index[name][1])
            encoders += size_of(kind(kind.config_class.from_pretrained(f"{folder}/{name}")).to(dtype))
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(vae_config).requires_grad_(False)
    if args.sample_every:
        held["VAE, float32, from the first pictures on"] = size_of(vae)

    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer.to_empty(device=device)
        vae.to_empty(device=device)
        if args.checkpointing:
            transformer.enable_gradient_checkpointing()
        out = {"text encoders": encoders}
        peak = lambda states, scale, **more: peak_of(transformer, states, side, tokens, scale, device, **more)
        for phase, (_, states) in passes(args, world).items():
            out[phase] = peak(states, scale_of(args, phase), backward=phase == "update")
        if "rollout" in out:  # sde.rollout keeps lists of states and means, and stacks them
            out["rollout"] += (4 * R + 3) * min(b, args.rollout_batch) * latent
        if args.sample_every or args.eval_prompts:
            number = min(args.micro_batch, args.eval_prompts or 2 * len(args.teacher))  # images in a batch
            with torch.no_grad(), Live(device) as live:
                vae.decode(torch.zeros(number, vae.config.latent_channels, side, side, device=device))
            painted = (
                peak(number, args.guidance if args.eval_prompts else args.student_guidance)
                + (4 * args.eval_steps + 3) * number * latent
            )
            out["pictures"] = max(painted, live.peak) + (0 if args.sample_every else size_of(vae))
    return held, out


def dry_run(args: argparse.Namespace) -> None:
    """Print what this run would hold and do. Nothing is loaded, nothing is written."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = fetch(args.model, "--model", ("model_index.json", "*/*config.json"))
    check_model(folder)
    dtype, gb = precision(args.dtype, device), lambda size: f"{size / 1e9:9.3f} GB"
    held, extra = phases(args, folder, device, dtype, world)
    always = sum(held.values())
    print_batch(args, args.trained_steps, world)
    for phase, (calls, states) in passes(args, world).items():
        twice = ", each twice (guidance)" if scale_of(args, phase) != 1 else ""
        print(f"{phase}: {calls} calls of the transformer on process 0, up to {states} states{twice}")
    print("\nheld all the time, per process")
    for name, size in held.items():
        print(f"  {gb(size)}  {name}")
    print(f"  {gb(always)}  together\n\npeak of each phase: this and")
    for phase, size in extra.items():
        print(f"  {gb(size)}  {phase:14} {gb(always + size)} in all")
    disk = gb(3 * held["Adam's two moments"]).strip()  # student, average and moments in float32, and the average in two formats
    print(f"\na checkpoint takes {disk} of disk; {args.keep} are kept, one more while it is written")
    print("An estimate: nothing was measured. "
          "Left out: the CUDA context, workspaces of libraries and temporaries inside an operation, fragmentation, the text "
          "encoders' activations.")  # fmt: skip


# Where memory ran out: the function, what it was about, and what needs less there (the first that the script has).
PHASES = {
    "load_pipeline": ("the model", ["--dtype bf16"]),
    "embed_prompts": ("text embeddings", ["--no_t5, or --cache_embeddings DIR filled on a larger machine"]),
    "paint_files": ("evaluation", ["a smaller --batch", "a smaller --micro_batch"]),
    "paint": ("pictures", ["a smaller --batch", "a smaller --micro_batch"]),
    "decode": ("pictures", ["a smaller --micro_batch"]),
    "label": ("labels", ["a smaller --label_batch"]),
    "rollout": ("rollout", ["a smaller --rollout_batch", "a smaller --micro_batch"]),
}
ELSE = ("update", ["a smaller --micro_batch, or --checkpointing", "a smaller --batch"])
SIGNS = ("not enough memory", "can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
GONE = ("closed by peer", "remote process exit")  # gloo's and nccl's words


def guarded(main: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """main(args) whose lack of memory is one line and exit code 2, on every process."""

    @functools.wraps(main)
    def run(args):
        try:
            return main(args)
        except (MemoryError, RuntimeError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            if isinstance(error, MemoryError) or any(sign in why for sign in SIGNS):
                names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
                phase, cures = next((PHASES[name] for name in names if name in PHASES), ELSE)
                cure = next(cure for cure in cures if hasattr(args, re.search(r"--(\w+)", cure)[1]))
                line = f"out of memory ({phase}): try {cure} ({why})"
            elif any(sign in why for sign in GONE):
                line = "another process has stopped, and says why"
            else:
                raise
            tqdm.write(f"error: {line}", file=sys.stderr)  # below the progress bar
            if dist.is_initialized():
                os._exit(2)  # at once: taking the group down would wait for the others, and torchrun ends them
            raise SystemExit(2) from None

    return run
