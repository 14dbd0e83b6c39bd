"""The plumbing that two copies of would drift apart: processes, adapters, velocities, EMA, checkpoints, the log.

No method in here: the sampler is sde.py, the objectives are losses.py, the loops are the scripts.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its start-up notices on missing torchvision concern nobody here
import numpy as np
import torch
import torch.distributed as dist
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from cli import fail, save_json
from sde import rollout

diffusers_logging.disable_progress_bar()

# The layers that the public teachers adapt: the joint attention of every block (Flow-GRPO, Flow-OPD).
LORA_TARGETS = [f"attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_q", "to_k", "to_v", "to_out.0")]

# ----------------------------------------------------------------------------------------------------------
# Processes. One or many, on CPU or GPU: the same names afterwards
# ----------------------------------------------------------------------------------------------------------


def start_processes():
    """-> rank, world size, device. Under torchrun joins the group (gloo on a CPU, nccl on GPUs), else (0, 1, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        if not cuda:  # processes on one machine share its cores
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return rank, world, device


def share(number, rank, world):
    """This process's part of the global sample indices 0 .. number - 1: a contiguous block."""
    return list(range(rank * number // world, (rank + 1) * number // world))


def all_reduce(tensor):
    """Sum over all processes, in place (all ranks participate)."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def take_gradients(parameters):
    """All gradients as one flat vector (P,), and none left behind."""
    parameters = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return flat


def give_gradients(parameters, flat):
    """The reverse: what the optimizer will see."""
    parameters = list(parameters)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p).clone()


def sum_gradients(parameters):
    """Sum the gradients over all processes in one flat transfer, once per optimizer step (all ranks participate).

    What DistributedDataParallel does; by hand, because adapters are switched inside the model and micro-batches
    differ in number between processes."""
    parameters = list(parameters)
    give_gradients(parameters, all_reduce(take_gradients(parameters)))


def stop_processes():
    if dist.is_initialized():
        dist.barrier()  # rank 0 may still be writing
        dist.destroy_process_group()


def gather(value):
    """Every process's value, in rank order, on every process (all ranks participate)."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ----------------------------------------------------------------------------------------------------------
# Randomness: a function of (seed, iteration, sample), never a position in a stream. One process or eight,
# from the start or resumed, draw the same prompts and the same noise.
# ----------------------------------------------------------------------------------------------------------


def generator(*key):
    """A CPU generator of its own for a key such as (seed, "noise", iteration, sample)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def draw(number, wanted, *key, iteration):
    """`wanted` of `number` prompts for one iteration: a shuffled pass through all of them, then another."""
    out = []
    for position in range(iteration * wanted, (iteration + 1) * wanted):
        order = torch.randperm(number, generator=generator(*key, "epoch", position // number))
        out.append(int(order[position % number]))
    return out


# ----------------------------------------------------------------------------------------------------------
# The model: one frozen backbone, prompts embedded once, velocities
# ----------------------------------------------------------------------------------------------------------


def load_pipeline(model, device):
    """The stock pipeline, frozen and in eval mode: dropout would make the rollout's log-probs differ from the update's."""
    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=torch.float32).to(device)
    except (OSError, ValueError, SafetensorError) as error:
        fail(f"--model {model}: cannot be loaded as a Stable Diffusion 3 pipeline ({str(error).splitlines()[0]})")
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        if part is not None:
            part.requires_grad_(False).eval()
    return pipe


@torch.no_grad()
def embed_prompts(pipe, prompts, length):
    """A table of text embeddings, one row per distinct prompt, row 0 the empty prompt of guidance.

    length: T5 tokens (128 in the papers, never more than the tokenizer's own limit).
    Returns {"rows": {prompt: row}, "embeds": (P, L, E), "pooled": (P, E')}."""
    distinct = ["", *sorted(set(prompts) - {""})]
    length = min(length, pipe.tokenizer_3.model_max_length) if pipe.tokenizer_3 is not None else length
    parts = [
        pipe.encode_prompt(distinct[i : i + 64], None, None, do_classifier_free_guidance=False, max_sequence_length=length)
        for i in range(0, len(distinct), 64)
    ]
    return {
        "rows": {prompt: row for row, prompt in enumerate(distinct)},
        "embeds": torch.cat([p[0] for p in parts]),
        "pooled": torch.cat([p[2] for p in parts]),
    }


def velocity(transformer, x, t, text, rows, guidance):
    """The guided velocity at x (B, C, H, W), t in [0, 1] (one, or one per sample), for the prompts in `rows` (B,) of
    the table `text`: float32.

    Classifier-free guidance: v = v_empty + guidance (v_prompt - v_empty). At guidance 1 one forward pass, not two."""
    t = torch.as_tensor(t, device=x.device, dtype=torch.float32).expand(len(x))  # (B,)
    if guidance != 1:
        x, t, rows = torch.cat([x, x]), torch.cat([t, t]), torch.cat([torch.zeros_like(rows), rows])  # (2B, ...): empty first
    v = transformer(
        x.to(transformer.dtype),
        timestep=1000 * t,
        encoder_hidden_states=text["embeds"][rows],
        pooled_projections=text["pooled"][rows],
        return_dict=False,
    )[0].float()
    if guidance != 1:
        empty, v = v.chunk(2)
        v = empty + guidance * (v - empty)
    return v


def time_grid(pipe, steps):
    """The scheduler's own grid as floats: 1 = t_0 > t_1 > ... > t_steps = 0."""
    pipe.scheduler.set_timesteps(steps)
    return [float(s) for s in pipe.scheduler.sigmas]


def initial_noise(pipe, generators, size=None):
    """One (C, H, W) per generator: (B, C, H, W). size: image pixels; default the transformer's own."""
    config = pipe.transformer.config
    side = size // pipe.vae_scale_factor if size else config.sample_size
    return torch.stack([torch.randn(config.in_channels, side, side, generator=g) for g in generators]).to(pipe.device)


@torch.no_grad()
def decode(vae, latents):
    """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1]."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def paint(pipe, text, prompts, keys, steps, guidance, batch=128, size=None):
    """ODE samples of the active adapter: images (N, 3, H, W) in [0, 1]. keys[i] seeds the noise of image i, so that
    two models given the same keys start from the same noise."""
    grid, images = time_grid(pipe, steps), []
    for i in range(0, len(prompts), batch):
        rows = torch.tensor([text["rows"][p] for p in prompts[i : i + batch]], device=pipe.device)
        noise = initial_noise(pipe, [generator(*key) for key in keys[i : i + batch]], size)
        latents = rollout(lambda x, t, r=rows: velocity(pipe.transformer, x, t, text, r, guidance), noise, grid, a=0.0).x[-1]
        images.append(decode(pipe.vae, latents).cpu())
    return torch.cat(images)


# ----------------------------------------------------------------------------------------------------------
# Adapters: the student, its average, every teacher and the anchor are LoRAs on the same backbone
# ----------------------------------------------------------------------------------------------------------


def read_adapter(path, flag, alpha=None):
    """A LoRA directory in PEFT or diffusers format -> {layer: (A (r, in), B (out, r), scaling)}. Reads files alone."""
    folder = Path(path)
    file = next((f for n in ("adapter_model", "pytorch_lora_weights") if (f := folder / f"{n}.safetensors").is_file()), None)
    if file is None:
        fail(f"{flag} {path}: not an adapter (a directory with adapter_model.safetensors or pytorch_lora_weights.safetensors)")
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        if (folder / "adapter_config.json").is_file():
            config = json.loads((folder / "adapter_config.json").read_text())
        else:  # diffusers keeps the LoRA's numbers in the file's header, each under "transformer."
            config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            config = {key.removeprefix("transformer."): value for key, value in config.items()}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        fail(f"{flag} {path}: damaged adapter ({error})")
    halves = {}
    for key, tensor in tensors.items():
        short = key.removeprefix("base_model.model.").removeprefix("transformer.").replace(".default.", ".")
        layer, _, end = short.rpartition(".lora_")
        if end not in ("A.weight", "B.weight") or tensor.ndim != 2:
            fail(f"{flag} {path}: unexpected tensor {key!r}; expected LAYER.lora_A.weight and LAYER.lora_B.weight")
        halves.setdefault(layer, {})[end[0]] = tensor.float()
    layers = {}
    for layer, half in halves.items():
        if len(half) < 2 or half["A"].shape[0] != half["B"].shape[1]:
            fail(f"{flag} {path}: layer {layer} has no matching pair of lora_A and lora_B")
        rank = len(half["A"])
        pattern = config.get("alpha_pattern") or {}  # peft: a whole layer name, or a regular expression for its end
        match = next((a for p, a in pattern.items() if re.fullmatch(rf"(.*\.)?({p})", layer)), config.get("lora_alpha"))
        layer_alpha = alpha or match
        if layer_alpha is None:
            fail(f"{flag} {path}: the file does not say its alpha; give --teacher_alpha NAME=ALPHA")
        layers[layer] = (half["A"], half["B"], layer_alpha / (rank**0.5 if config.get("use_rslora") else rank))
    if not any(B.any() and A.any() for A, B, _ in layers.values()):
        fail(f"{flag} {path}: an all-zero adapter: it changes nothing, so it was not trained or not saved")
    for layer, (A, B, _) in layers.items():
        if not B.any() and not layer.endswith("add_q_proj"):  # SD3's last add_q_proj is always zero: nothing reads it
            print(f"warning: {path}: lora_B of {layer} is all zero", file=sys.stderr)
    return layers


def add_adapter(transformer, name, layers=None, rank=None, alpha=None, path=None, flag=None):
    """Put a LoRA on the backbone: `layers` as read_adapter gives them, or a fresh one of that rank (A gaussian, B zero)."""
    if layers is None:
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
    else:
        for layer, (A, B, _) in layers.items():
            try:
                linear = transformer.get_submodule(layer)
                out_in = getattr(linear, "base_layer", linear).weight.shape
            except AttributeError:
                fail(f"{flag} {path}: its layer {layer} is not in the model")
            if tuple(out_in) != (B.shape[0], A.shape[1]):
                fail(f"{flag} {path}: layer {layer} is {B.shape[0]}x{A.shape[1]}, the model's is {out_in[0]}x{out_in[1]}")
        ranks = {layer: len(A) for layer, (A, _, _) in layers.items()}
        alphas = {layer: scaling * len(A) for layer, (A, _, scaling) in layers.items()}
        first = next(iter(layers))
        config = LoraConfig(r=ranks[first], lora_alpha=alphas[first], target_modules=list(layers), rank_pattern=ranks,
                            alpha_pattern=alphas)  # fmt: skip
    transformer.add_adapter(config, name)
    for layer, (A, B, _) in (layers or {}).items():
        module = transformer.get_submodule(layer)
        module.lora_A[name].weight.data.copy_(A)
        module.lora_B[name].weight.data.copy_(B)
    for parameter in adapter_parameters(transformer, name).values():
        parameter.requires_grad_(False)


def adapter_parameters(transformer, name):
    """{"LAYER.lora_A.weight": parameter, …} of one adapter, in a fixed order."""
    return {k.replace(f".{name}.", "."): p for k, p in transformer.named_parameters() if f".lora_A.{name}." in k or f".lora_B.{name}." in k}


@contextlib.contextmanager
def adapter(transformer, name):
    """Inside, the backbone carries this adapter (None: none at all); outside, what it carried before.

    peft's own switch turns gradients on for the adapter it activates and off for the others; here requires_grad stays as it was."""
    layers = [m for m in transformer.modules() if isinstance(m, LoraLayer)]
    before = [(layer.active_adapters, layer.disable_adapters) for layer in layers]
    trained = [p for p in transformer.parameters() if p.requires_grad]

    def switch(states):
        for layer, (names, disabled) in zip(layers, states):
            layer.set_adapter(names, inference_mode=True)
            layer.enable_adapters(not disabled)
        for p in transformer.parameters():
            p.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)

    switch([(before[i][0] if name is None else [name], name is None) for i in range(len(layers))])
    try:
        yield
    finally:
        switch(before)


def save_adapter(folder, tensors, config):
    """tensors {"LAYER.lora_A.weight": tensor, …} -> a folder that peft and `pipe.load_lora_weights` both load.

    Two files on purpose: diffusers silently loads nothing from a PEFT folder, and assumes alpha = rank without metadata."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: t.detach().float().cpu().contiguous().clone() for k, t in tensors.items()}
    save_file({f"base_model.model.{k}": t for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
    metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    StableDiffusion3Pipeline.save_lora_weights(folder, tensors, transformer_lora_adapter_metadata=metadata)


# ----------------------------------------------------------------------------------------------------------
# Average of the weights, checkpoints, signals, the log
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def update_ema(ema, parameters, updates, decay):
    """ema += (1 - d) (parameters - ema) with d = min((1 + n) / (10 + n), decay): short runs are not held at their start."""
    d = min((1 + updates) / (10 + updates), decay)
    for average, parameter in zip(ema, parameters):
        average.lerp_(parameter, 1 - d)


def sha256(path):
    """Of a file, or of the safetensors and JSON files in a directory: what --resume compares."""
    files = [Path(path)] if Path(path).is_file() else sorted(p for p in Path(path).rglob("*") if p.suffix in (".safetensors", ".json"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def save_checkpoint(run, iteration, student, ema, optimizer, config, state, keep=2):
    """checkpoints/step_N: adapter/ (the average, for use) and the full training state. Complete, or not there at all."""
    final = Path(run) / "checkpoints" / f"step_{iteration}"
    beside = final.with_name(f"tmp_{iteration}")
    shutil.rmtree(beside, ignore_errors=True)
    save_adapter(beside / "adapter", ema, config)
    tensors = {}
    for k, p in student.items():
        tensors |= {f"student.{k}": p.detach(), f"ema.{k}": ema[k].detach()}
        tensors |= {f"optimizer.{n}.{k}": v for n, v in optimizer.state.get(p, {}).items()}
    save_file({k: t.contiguous().cpu() for k, t in tensors.items()}, beside / "state.safetensors")
    save_json(beside / "state.json", {"iteration": iteration, **state})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(beside, final)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def checkpoints(run):
    """The run's checkpoints, oldest first."""
    return sorted((Path(run) / "checkpoints").glob("step_*"), key=lambda p: int(p.name.split("_")[1]))


def load_checkpoint(run, student, ema, optimizer, state):
    """Put the newest checkpoint back; refuse one made with other flags or files. Returns its iteration."""
    found = checkpoints(run)
    if not found:
        fail(f"--resume: {run} holds no checkpoint yet; start again with --overwrite")
    saved = json.loads((found[-1] / "state.json").read_text())
    for key, value in state.items():
        if saved[key] != value:
            names = [k for k in value if saved[key].get(k) != value[k]] or list(saved[key])
            fail(f"--resume: {', '.join(names)} changed since {found[-1].name} of {run} was saved; resume with the same")
    tensors = load_file(found[-1] / "state.safetensors")
    with torch.no_grad():
        for k, p in student.items():
            p.copy_(tensors[f"student.{k}"])
            ema[k].copy_(tensors[f"ema.{k}"])
            names = [n for n in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{n}.{k}" in tensors]
            if names:
                optimizer.state[p] = {n: tensors[f"optimizer.{n}.{k}"].to(p.device if n != "step" else "cpu") for n in names}
    return saved["iteration"]


class StopSignal:
    """Ctrl-C and SIGTERM finish the iteration, save and exit; a second one exits at once. `stop()` is agreed by all ranks."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.received += 1
        if self.received > 1:
            os._exit(128 + number)
        print("\nstopping after this iteration; again to stop at once", file=sys.stderr, flush=True)

    def stop(self):
        return any(gather(self.received))


def log_line(run, values):
    """Append one iteration to metrics.jsonl."""
    with open(Path(run) / "metrics.jsonl", "a") as file:
        file.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}) + "\n")


def cut_log(run, iteration):
    """After --resume: drop the lines of iterations that are run again."""
    path = Path(run) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(line + "\n" for line in lines if json.loads(line)["iteration"] < iteration))


def draw_curves(run, panels):
    """curves.png from metrics.jsonl: one panel per {title: (axis label, [metric, …])}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained", squeeze=False)
    for axis, (title, (label, names)) in zip(axes[0], panels.items()):
        for name in names:
            points = [(line["iteration"], line[name]) for line in log if name in line]
            if points:
                axis.plot(*np.array(points).T, label=name.split("/")[-1], linewidth=1.5)
        axis.set(title=title, xlabel="iteration", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(Path(run) / "curves.png", dpi=110)
    plt.close(figure)
