"""LoRA adapters on one frozen backbone: read strictly, switch safely, save so that everyone can load.

The student, its average, every teacher and the anchor are adapters of the same transformer: a fifth teacher costs
megabytes, not another copy of the model. Loading is strict because LoRAs fail silently elsewhere: a key that finds
no layer, a file without its alpha or an adapter of zeros would otherwise be a teacher that teaches nothing.
"""

import argparse
import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.flags import ADAPTER, check_adapter, fail, fetch, one_line, read_json, reason, written_beside

# The layers that the public teachers adapt: the joint attention of every block (Flow-GRPO, Flow-OPD).
LORA_TARGETS = [
    f"attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_q", "to_k", "to_v", "to_out.0")
]


def read_adapter(
    path: str | Path, flag: str, alpha: float | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """A LoRA directory in PEFT or diffusers format -> {layer: (A (r, in), B (out, r), scaling)}, float32, all of it finite.

    Reads safetensors and JSON, no pickle; of the JSON alpha, alpha_pattern and use_rslora alone, so nothing in it leads to
    another file. alpha: instead of what the directory says."""
    folder = Path(fetch(str(path), flag, ADAPTER))
    check_adapter(str(folder), flag)
    file = next(file for name in ADAPTER[1:] if (file := folder / name).is_file())
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        if (folder / "adapter_config.json").is_file():
            config = {**read_json((folder / "adapter_config.json").read_text(encoding="utf-8"))}
        else:  # diffusers keeps the LoRA's numbers in the file's header, each under "transformer."
            config = {**read_json(metadata.get("lora_adapter_metadata", "{}"))}
            config = {key.removeprefix("transformer."): value for key, value in config.items()}
    except Exception as error:  # each of the libraries has its own for a file that is not what it should be
        fail(f"{flag} {path}: damaged adapter ({reason(error)})")
    halves = {}
    for key, tensor in tensors.items():
        short = key.removeprefix("base_model.model.").removeprefix("transformer.").replace(".default.", ".")
        layer, _, end = short.rpartition(".lora_")
        half = halves.setdefault(layer, {})
        if end not in ("A.weight", "B.weight") or end[0] in half or tensor.ndim != 2 or not tensor.is_floating_point():
            fail(f"{flag} {path}: unexpected tensor {key!r}; expected LAYER.lora_A.weight and LAYER.lora_B.weight, once each")
        half[end[0]] = tensor.float()
    layers = {}
    for layer, half in halves.items():
        if len(half) < 2 or half["A"].shape[0] != half["B"].shape[1] or 0 in (*half["A"].shape, *half["B"].shape):
            fail(f"{flag} {path}: layer {layer} has no matching pair of lora_A and lora_B")
        if not half["A"].double().norm() * half["B"].double().norm() < 1e8:  # so written, nan fails too
            fail(f"{flag} {path}: layer {layer} holds nan, infinity or numbers out of all proportion: its training failed")
        rank, layer_alpha = len(half["A"]), alpha_of(layer, config, f"{flag} {path}") if alpha is None else alpha
        if layer_alpha is None:
            cure = "give --teacher_alpha TASK=ALPHA" if flag.startswith("--teacher") else "add its adapter_config.json"
            fail(f"{flag} {path}: the file does not say its alpha; {cure}")
        if type(layer_alpha) not in (int, float) or not 0 < layer_alpha < 1e6:
            fail(f"{flag} {path}: alpha {layer_alpha!r} of layer {layer} is not a number above 0 (and below a million)")
        layers[layer] = (half["A"], half["B"], layer_alpha / (rank**0.5 if config.get("use_rslora") else rank))
    if not any(B.any() and A.any() for A, B, _ in layers.values()):
        fail(f"{flag} {path}: an all-zero adapter: it changes nothing, so it was not trained or not saved")
    for layer, (_, B, _) in layers.items():
        if not B.any() and not layer.endswith("add_q_proj"):  # SD3's last add_q_proj is always zero: nothing reads it
            print(one_line(f"warning: {path}: lora_B of {layer} is all zero"), file=sys.stderr)
    return layers


def alpha_of(layer: str, config: dict, where: str) -> object:
    """What adapter_config.json says; None: nothing. peft takes the keys of alpha_pattern for regular expressions, the first
    that matches a layer's name or the end of it counts; here they must be plain: a stranger's can take for ever to match."""
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or config.get("use_rslora") not in (None, True, False):
        fail(f"{where}: in adapter_config.json alpha_pattern must be an object and use_rslora true or false")
    for key, alpha in pattern.items():
        name = key.removeprefix("^").removesuffix("$").replace(r"\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            fail(f"{where}: alpha_pattern {key!r} is an expression; expected the name of a layer or the end of one")
        if layer == name or (layer.endswith("." + name) and not key.startswith("^")):
            return alpha
    return config.get("lora_alpha")


def add_adapter(
    transformer: torch.nn.Module,
    name: str,
    layers: dict[str, tuple] | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    path: str | Path | None = None,
    flag: str | None = None,
) -> None:
    """Put a LoRA on the backbone: `layers` as read_adapter gives them, or a fresh one of that rank (A gaussian, B zero)."""
    if layers is None:
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
    else:
        linear = {n: m for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear) and ".lora_" not in n}
        shapes = {n.removesuffix(".base_layer"): tuple(module.weight.shape) for n, module in linear.items()}  # (out, in)
        for layer, (A, B, _) in layers.items():
            if layer not in shapes:
                fail(f"{flag} {path}: its layer {layer} is not a linear layer of the model")
            out_in = shapes[layer]
            if out_in != (B.shape[0], A.shape[1]):
                fail(f"{flag} {path}: layer {layer} is {B.shape[0]}x{A.shape[1]}, the model's is {out_in[0]}x{out_in[1]}")
        ranks = {layer: len(A) for layer, (A, _, _) in layers.items()}
        alphas = {layer: scaling * len(A) for layer, (A, _, scaling) in layers.items()}
        first = next(iter(layers))
        config = LoraConfig(
            r=ranks[first],
            lora_alpha=alphas[first],
            target_modules=list(layers),
            rank_pattern=ranks,
            alpha_pattern=alphas,
        )
    with warnings.catch_warnings():  # peft warns at every adapter after the first; several are the point here
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        transformer.add_adapter(config, name)
    for layer, (A, B, _) in (layers or {}).items():
        module = transformer.get_submodule(layer)
        module.lora_A[name].weight.data.copy_(A)
        module.lora_B[name].weight.data.copy_(B)
    for parameter in adapter_parameters(transformer, name).values():
        parameter.requires_grad_(False)


def add_student(transformer: torch.nn.Module, args: argparse.Namespace, layers: dict[str, tuple] | None) -> tuple[dict, dict]:
    """The student, a LoRA as `layers` say or a fresh one, and "ema", a second one that holds its running average; both
    in float32 whatever the backbone is: an update of 1e-4 would be lost in bfloat16's three digits.

    Returns {"LAYER.lora_A.weight": parameter, …} of each; the student's alone carry gradient."""
    torch.manual_seed(args.seed)
    for name in ("ema", "student"):
        add_adapter(transformer, name, layers, args.rank, args.alpha, args.init, "--init")
    student, ema = (adapter_parameters(transformer, name) for name in ("student", "ema"))
    for parameter in (*student.values(), *ema.values()):
        parameter.data = parameter.data.float()
    for name, parameter in student.items():
        parameter.requires_grad_(True)
        ema[name].data.copy_(parameter.data)
    return student, ema


def adapter_parameters(transformer: torch.nn.Module, name: str) -> dict[str, torch.nn.Parameter]:
    """{"LAYER.lora_A.weight": parameter, …} of one adapter, in a fixed order."""
    return {
        k.replace(f".{name}.", "."): p
        for k, p in transformer.named_parameters()
        if f".lora_A.{name}." in k or f".lora_B.{name}." in k
    }


@contextlib.contextmanager
def adapter(transformer: torch.nn.Module, name: str | None) -> Iterator[None]:
    """Inside, the backbone carries this adapter (None: none at all); outside, what it carried before.

    peft's own switch turns gradients on for the adapter it activates and off for the others; here requires_grad
    stays as it was."""
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


def save_adapter(folder: str | Path, tensors: dict[str, torch.Tensor], config: LoraConfig) -> None:
    """tensors {"LAYER.lora_A.weight": tensor, …} -> a folder that peft and `pipe.load_lora_weights` both load.

    Two files on purpose: diffusers silently loads nothing from a PEFT folder, and assumes alpha = rank without metadata."""
    tensors = {k: t.detach().float().cpu().contiguous().clone() for k, t in tensors.items()}
    metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    with written_beside(folder) as beside:
        save_file({f"base_model.model.{k}": t for k, t in tensors.items()}, beside / "adapter_model.safetensors")
        config.save_pretrained(beside)
        StableDiffusion3Pipeline.save_lora_weights(beside, tensors, transformer_lora_adapter_metadata=metadata)
