"""What a run of train_opd.py will hold in memory, counted without loading the model.

    python train_opd.py @recipes/sd35m_opd.args --dry_run

The model is built from its configuration files alone. Then a forward and a backward pass run on
fake tensors, which have shapes but no contents, and the bytes of the live ones are added up.
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
from support.run import print_batch, rank_and_world, share, start_processes, stop_processes

# In order: what is held from a phase on stays held in the later ones.
PHASES = ("loading", "text", "rollout", "labels", "update", "saving", "pictures")
NAMES = {"loading": "the model is loaded", "text": "prompts are embedded", "pictures": "samples"}


class Alive(TorchDispatchMode):
    """Add up the bytes of tensors that are made inside and still alive; `peak` is the maximum."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.now, self.peak, self.known = device, 0, 0, weakref.WeakSet()

    def storages(self, tree) -> list:
        tensors = [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]
        return [t.untyped_storage() for t in tensors if t.device == self.device]

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.known.update(self.storages((args, kwargs)))  # made before: not counted, nor its views
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
    """Peak bytes of one guided velocity of a transformer; with `backward`, also of its gradient."""
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


def for_gpu(args: argparse.Namespace, device: torch.device) -> bool:
    """Count for a GPU? Without one here, --dtype bf16 (as in the recipes) says the run has one."""
    return device.type == "cuda" or args.dtype == "bf16"


def prompts_embedded(args: argparse.Namespace, world: int) -> int:
    """How many prompts a process embeds at most: empty, of training, of pictures, of tests."""
    G, tasks = args.group_size, len(args.teacher)
    places = {i // G for i in share(args.prompts_per_iteration * G, 0, world)}
    return 1 + args.iterations * len(places) + 2 * tasks + tasks * args.eval_prompts // world


def copied(folder: str, part: str, module: torch.nn.Module) -> int:
    """Bytes of a part's files, which are mapped into memory until all numbers are converted. 0 if
    they have the module's precision: then they are the weights. Files that are not here count two
    bytes a number, like SD3.5's."""
    files = Path(folder, part).glob("*.safetensors")
    size = sum(file.stat().st_size for file in files if "." not in file.stem)  # no .fp16
    size = size or 2 * sum(tensor.numel() for tensor in module.state_dict().values())
    return size if abs(size / size_of(module) - 1) > 0.1 else 0


def phases(args, load_loras, folder, device, world=1) -> tuple[dict, dict]:
    """What one process holds {name: (place, from which phase on, bytes)}, and what a phase takes on
    top {(place, phase): bytes at its peak}. place: "device" or "host", the same memory on a CPU."""
    dtype, encoders, gpu = precision(args.dtype, device), dict(ENCODERS), for_gpu(args, device)
    if args.no_t5:
        del encoders["text_encoder_3"]
    with torch.device("meta"):
        build = lambda kind, part: kind.from_config(kind.load_config(f"{folder}/{part}"))
        transformer = build(SD3Transformer2DModel, "transformer")
        vae = build(AutoencoderKL, "vae").requires_grad_(False)
        text = torch.nn.ModuleDict()
        for part, kind in encoders.items():
            text[part] = kind(kind.config_class.from_pretrained(f"{folder}/{part}"))
    set_size(transformer, vae, args.size)
    torch.nn.Module.to(transformer, dtype).requires_grad_(False).eval()  # diffusers' own .to warns
    text.to(dtype)
    bare = size_of(transformer)
    # While it is loaded: its files, and its table of positions (buffers), built before it is read.
    read = copied(folder, "transformer", transformer)
    read += 4 * sum(buffer.numel() for buffer in transformer.buffers())
    student, *_ = load_loras(args, transformer)
    number = sum(p.numel() for p in student.values())
    trained = 4 * number  # bytes of one float32 copy
    loras = sum(p.numel() for name, p in transformer.named_parameters() if ".lora_" in name)

    about = lambda part: json.loads(Path(folder, part, "tokenizer_config.json").read_text())
    tokens, t5_tokens = about("tokenizer")["model_max_length"], args.text_length
    if not args.no_t5:
        t5_tokens = min(t5_tokens, about("tokenizer_3")["model_max_length"])
    tokens, config, side = tokens + t5_tokens, transformer.config, transformer.config.sample_size
    row = dtype.itemsize * (tokens * config.joint_attention_dim + config.pooled_projection_dim)
    S, steps = args.trained_steps, args.eligible_steps[-1] + 1
    b = math.ceil(args.prompts_per_iteration * args.group_size / world)  # samples of a process
    latent = 4 * config.in_channels * side**2  # bytes of a state, float32
    # Noise, states and means of a rollout; of each row x, x_next, two means and two labels.
    states, tasks = (2 * steps + 2 + 6 * S) * b * latent, len(args.teacher)
    pictures = bool(args.sample_every or args.eval_prompts)
    vae_is = ("host", "loading")
    if gpu and pictures:  # it is moved when it first decodes
        vae_is = ("device", "rollout")
    held = {
        f"transformer, {str(dtype).removeprefix('torch.')}": ("device", "loading", bare),
        "VAE, float32": (*vae_is, size_of(vae)),
        "LoRAs of teachers and anchor": ("device", "text", (loras - 2 * number) * dtype.itemsize),
        "student and its average, float32": ("device", "text", 2 * trained),
        "text embeddings": ("host", "rollout", row * prompts_embedded(args, world)),
        "Adam's two moments": ("device", "rollout", 2 * trained),
        "the last iteration's state, for signals": ("host", "rollout", 4 * trained),
        "states, means and labels, float32": ("device", "rollout", states),
        "gradients, one per task": ("device", "update", tasks * trained),
    }
    extra = {("host", "loading"): gpu * bare + read, ("device", "text"): size_of(text)}
    files = [copied(folder, part, encoder) for part, encoder in text.items()]
    extra["host", "text"] = gpu * size_of(text) + max(files)
    extra["host", "saving"] = 4 * trained  # the next state, and what is written of it
    # Any scale but 1 doubles the rows; which one does not matter.
    scales = {args.guidance, *args.teacher_guidance.values()} - {1}
    guidance = dict.fromkeys(("rollout", "update"), args.student_guidance)
    guidance["labels"] = max(scales, default=1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer.to_empty(device=device)
        if args.checkpointing:
            transformer.enable_gradient_checkpointing()
        for phase, rows in largest_batch(args, world).items():
            how = (side, tokens, guidance[phase], device, phase == "update")
            extra["device", phase] = peak_of(transformer, rows, *how)
        extra["device", "rollout"] += (2 * steps + 2) * b * latent  # lists, before they are stacked
        if pictures:
            n = min(args.label_batch, args.eval_prompts or 2 * tasks)
            with torch.no_grad(), Alive(device) as alive:
                latents = torch.zeros(n, vae.config.latent_channels, side, side, device=device)
                vae.to_empty(device=device).decode(latents)
            extra["device", "pictures"] = alive.peak - size_of(vae)
    return held, extra


def in_all(held: dict, extra: dict, *places: str) -> dict[str, int]:
    """{phase: bytes in all at its peak} in these places, for phases that take something on top."""
    total = {}
    for number, phase in enumerate(PHASES):
        on_top = [extra[place, phase] for place in places if (place, phase) in extra]
        begun = PHASES[: number + 1]
        sizes = [size for place, since, size in held.values() if place in places and since in begun]
        if on_top:
            total[phase] = sum(on_top) + sum(sizes)
    return total


def dry_run(args: argparse.Namespace, load_loras: Callable) -> None:
    """Print what this run of train_opd.py would hold. Nothing is loaded or written."""
    folder = fetch(args.model, "--model", ("model_index.json", "*/*config.json"))
    check_model(folder)
    _, world, device = start_processes()
    print_batch(args)
    if rank_and_world()[0] == 0:
        held, extra = phases(args, load_loras, folder, device, world)
        if not for_gpu(args, device):
            print("no GPU here: counted for a CPU, in float32; --dtype bf16 counts for a GPU")
            print_memory("memory", held, extra, "device", "host")
        else:
            if device.type == "cpu":
                print("no GPU here: counted for one, as --dtype bf16 asks")
            print_memory("the GPU's memory", held, extra, "device")
            print_memory("the host's memory", held, extra, "host")
        # Student, average and two moments in float32, and the average in two formats.
        disk = 3 * held["Adam's two moments"][-1] / 1e9
        print(f"\na checkpoint takes {disk:.3f} GB of disk; at most {args.keep + 1} exist at once")
        if args.cache_embeddings:
            cache = world * held["text embeddings"][-1] / 1e9
            print(f"--cache_embeddings takes at most {cache:.3f} GB of disk")
        print("An estimate, not measured. It leaves out Python and the libraries (0.5 GB, and a")
        print("CUDA context), workspaces, temporaries inside an operation, fragmentation.")
    stop_processes()


def print_memory(name: str, held: dict, extra: dict, *places: str) -> None:
    rows = {what: size for what, (place, _, size) in held.items() if place in places}
    print(f"\nGB of {name} that a process holds in training")
    for what, size in {**rows, "together": sum(rows.values())}.items():
        print(f"  {size / 1e9:9.3f}  {what}")
    print("and at the peak of each phase: on top, and in all")
    for phase, size in in_all(held, extra, *places).items():
        on_top = sum(extra.get((place, phase), 0) for place in places)
        print(f"  {on_top / 1e9:9.3f} {size / 1e9:9.3f}  {NAMES.get(phase, phase)}")
