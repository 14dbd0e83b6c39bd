"""LoRA adapters on one frozen backbone: a fifth teacher costs megabytes, not another model.

Reading is strict: a key without a layer, a missing alpha or a LoRA of zeros would teach nothing.
"""

import argparse
import contextlib
import functools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.files import ADAPTER, check_adapter, fetch, read_json
from support.flags import fail, one_line, reason

# What the published teachers adapt: the joint attention of every block (Flow-GRPO, Flow-OPD).
PROJECTIONS = "add_q_proj add_k_proj add_v_proj to_add_out to_q to_k to_v to_out.0".split()
LORA_TARGETS = [f"attn.{projection}" for projection in PROJECTIONS]

# adapter_config.json: initialisations of A and B that leave the base as it is (peft 0.21.2), and
# keys that do not change what A, B and alpha mean. PiSSA, OLoRA and others change the base too.
PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
PLAIN_KEYS = """
    alpha_pattern auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode
    init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout peft_version
    qalora_group_size r rank_pattern revision target_modules task_type use_rslora
""".split()


def read_adapter(path: str | Path, flag: str, alpha=None, model: str = "") -> dict[str, tuple]:
    """A folder or hub id in PEFT or diffusers format -> {layer: (A (r, in), B (out, r), scaling)}.

    float32, finite. Reads safetensors and JSON, never a pickle. alpha, a number or "rank", replaces
    the folder's. model: a path; a notice is printed if the adapter was made for another model."""
    folder, where = Path(fetch(str(path), flag, ADAPTER)), f"{flag} {path}"
    check_adapter(str(folder), flag)
    file = next(folder / name for name in ADAPTER[1:] if (folder / name).is_file())
    try:
        tensors, config = load_file(file), read_config(folder, file)
    except Exception as error:  # each library raises its own kind for a damaged file
        fail(f"{where}: damaged adapter ({reason(error)})")
    check_config(config, where)
    base = config.get("base_model_name_or_path")
    if base and model and Path(str(base)).name.lower() not in model.lower():
        print(one_line(f"notice: {path} was made for {base}; here it is used with {model}"))
    layers = {}
    for layer, pair in pair_up(tensors, where).items():
        A, B = pair.get("A"), pair.get("B")
        if A is None or B is None or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
            fail(f"{where}: layer {layer} has no matching pair of lora_A and lora_B")
        if not A.double().norm() * B.double().norm() < 1e8:  # so written, nan fails too
            fail(f"{where}: layer {layer} holds nan, infinity or numbers far too large")
        layer_alpha = alpha_of(layer, config, where) if alpha is None else alpha
        if layer_alpha == "rank":
            layer_alpha = len(A)
        if layer_alpha is None:
            cure = f"give --teacher_alpha TASK=ALPHA (mostly =rank), or {ADAPTER[0]}"
            fail(f"{where}: the file does not say its alpha; {cure}")
        if type(layer_alpha) not in (int, float) or not 0 < layer_alpha < 1e6:
            fail(f"{where}: alpha {layer_alpha!r} of layer {layer} is not a number from 0 to 1e6")
        power = 0.5 if config.get("use_rslora") else 1  # rsLoRA: alpha / sqrt(rank)
        layers[layer] = (A, B, layer_alpha / len(A) ** power)
    if not any(A.any() and B.any() for A, B, _ in layers.values()):
        fail(f"{where}: an all-zero adapter changes nothing: it was not trained or not saved")
    return layers


def read_config(folder: Path, file: Path) -> dict:
    """adapter_config.json; without one the file's header: diffusers' config, or an alpha alone."""
    if (folder / "adapter_config.json").is_file():
        return {**read_json((folder / "adapter_config.json").read_text(encoding="utf-8"))}
    with safe_open(file, "pt") as opened:
        header = opened.metadata() or {}
    config = read_json(header.get("lora_adapter_metadata", "{}"))
    alpha = header.get("lora_alpha") or header.get("ss_network_alpha")  # the second is kohya's
    alone = {"lora_alpha": float(alpha)} if alpha else {}
    return alone | {key.removeprefix("transformer."): value for key, value in config.items()}


def check_config(config: dict, where: str) -> None:
    """Refuse all but plain LoRA: A and B of other kinds would load silently and mean something
    else. A key that this code does not know must be off, or at peft's default."""
    init, default = config.get("init_lora_weights"), LoraConfig().to_dict()
    if init not in PLAIN_INIT:
        cure = "save it with peft's path_initial_model_for_weight_conversion"
        fail(f"{where}: init_lora_weights {init!r} has changed the base model too; {cure}")
    for key, value in config.items():
        if value and key not in PLAIN_KEYS and value != default.get(key):
            fail(f"{where}: {key} {value!r} in its config: only plain LoRA can be read")


@functools.cache
def sd3_layers() -> set[str]:
    """The linear layers of an SD3 transformer, with N for the number of a block."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(num_layers=2, dual_attention_layers=(0,))
    linear = [name for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    return {re.sub(r"(?<=transformer_blocks\.)\d+", "N", name) for name in linear}


def pair_up(tensors: dict[str, torch.Tensor], where: str) -> dict[str, dict[str, torch.Tensor]]:
    """{"PREFIX.LAYER.lora_A.weight": tensor, ...} -> {layer: {"A": tensor, "B": tensor}}. The
    prefixes of peft, diffusers, DDP and torch.compile are cut; a layer must be one of SD3's."""
    pairs = {}
    for key, tensor in tensors.items():
        if re.search(r"lora_(up|down|unet)", key):
            fail(f"{where}: {key!r} is in kohya's format; only peft's and diffusers' can be read")
        name = key.replace("_orig_mod.", "").replace(".default.", ".")
        name = re.sub(r"^((base_model\.)?model\.|transformer\.|module\.)+", "", name)
        layer, _, end = name.rpartition(".lora_")
        pair = pairs.setdefault(layer, {})
        known = end in ("A.weight", "B.weight") and end[0] not in pair
        if not known or tensor.ndim != 2 or not tensor.is_floating_point():
            wanted = "LAYER.lora_A.weight and LAYER.lora_B.weight, once each"
            fail(f"{where}: unexpected tensor {key!r}; expected {wanted}")
        if re.sub(r"(?<=transformer_blocks\.)\d+", "N", layer) not in sd3_layers():
            fail(f"{where}: {key!r}: {layer} is not a linear layer of an SD3 transformer")
        pair[end[0]] = tensor.float()
    return pairs


def alpha_of(layer: str, config: dict, where: str) -> object:
    """alpha of a layer in adapter_config.json, as peft reads it; None where it has none."""
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or config.get("use_rslora") not in (None, True, False):
        fail(f"{where}: alpha_pattern must be a JSON object and use_rslora true or false")
    for key in pattern:  # a stranger's expression may never finish
        if not re.fullmatch(r"(\w|\\?\.|[$^])+", key):
            fail(f"{where}: alpha_pattern {key!r} is an expression; expected the name of a layer")
    return pattern.get(get_pattern_key(pattern, layer), config.get("lora_alpha"))


def add_adapter(
    transformer: torch.nn.Module, name: str, layers: dict[str, tuple] | None = None,
    rank: int | None = None, alpha: float | None = None, where: str = "",
) -> None:  # fmt: skip
    """Put a LoRA on the backbone: `layers` of read_adapter, or a fresh one (A gaussian, B zero)."""
    if layers is None:
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian")
        config.target_modules = set(LORA_TARGETS)
    else:
        check_layers(transformer, layers, where)
        config = config_of(layers)
    with warnings.catch_warnings():  # peft warns of a second adapter; here there are many
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        transformer.add_adapter(config, name)
    for layer, (A, B, _) in (layers or {}).items():
        module = transformer.get_submodule(layer)
        module.lora_A[name].weight.data.copy_(A)
        module.lora_B[name].weight.data.copy_(B)
    for parameter in adapter_parameters(transformer, name).values():
        parameter.requires_grad_(False)


def config_of(layers: dict[str, tuple]) -> LoraConfig:
    """peft's configuration of {layer: (A, B, scaling)}."""
    ranks = {layer: len(A) for layer, (A, _, _) in layers.items()}
    alphas = {layer: scaling * len(A) for layer, (A, _, scaling) in layers.items()}
    rank, alpha = max(ranks.values()), max(alphas.values())
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(layers))
    config.rank_pattern = {layer: r for layer, r in ranks.items() if r != rank}
    config.alpha_pattern = {layer: value for layer, value in alphas.items() if value != alpha}
    return config


def check_layers(transformer: torch.nn.Module, layers: dict[str, tuple], where: str) -> None:
    """Every layer of the adapter is a linear layer of the transformer, with the same sizes."""
    shapes = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name:
            shapes[name.removesuffix(".base_layer")] = tuple(module.weight.shape)  # (out, in)
    for layer, (A, B, _) in layers.items():
        shape = (len(B), A.shape[1])
        if layer not in shapes:
            fail(f"{where}: its layer {layer} is not a linear layer of the model")
        if shapes[layer] != shape:
            fail(f"{where}: layer {layer} is {shape}, the model's is {shapes[layer]}")


def load_adapter(transformer, name: str, path: str, flag: str, alpha=None) -> None:
    """Read an adapter and put it on the backbone under `name`."""
    layers = read_adapter(path, flag, alpha, transformer.config.get("_name_or_path", ""))
    add_adapter(transformer, name, layers, where=f"{flag} {path}")


class Float32Linear(torch.nn.Linear):
    """A or B of a LoRA in training: float32 for the optimizer, multiplied in its input's dtype.
    autocast would also run norms in float32: 1.2 times the time of an update (H100)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


def add_student(transformer: torch.nn.Module, args: argparse.Namespace) -> tuple[dict, dict]:
    """Add the LoRAs "student" and "average" (its running average), from --init or fresh.

    Both are float32 whatever the backbone is: bfloat16 would lose an update of 1e-4. Their scale is
    --alpha / --rank, and B of --init is rescaled to it, so that a learning rate always means the
    same. Returns {"LAYER.lora_A.weight": parameter} of each; the student is active."""
    layers, where, scale = None, f"--init {args.init}", args.alpha / args.rank
    if args.init != "base":
        layers = read_adapter(args.init, "--init", model=args.model)
        layers = {layer: (A, B * (old / scale), scale) for layer, (A, B, old) in layers.items()}
    torch.manual_seed(args.seed)
    for name in ("average", "student"):  # the last is active
        add_adapter(transformer, name, layers, args.rank, args.alpha, where)
    student = adapter_parameters(transformer, "student")
    average = adapter_parameters(transformer, "average")
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # peft would make the input float32 too
        if isinstance(module, torch.nn.Linear) and name.endswith((".student", ".average")):
            module.__class__ = Float32Linear
    for name, parameter in student.items():
        parameter.data = parameter.data.float()
        average[name].data = parameter.data.clone()
        parameter.requires_grad_(True)
    return student, average


def adapter_parameters(transformer: torch.nn.Module, name: str) -> dict[str, torch.nn.Parameter]:
    """{"LAYER.lora_A.weight": parameter} of one adapter, in a fixed order."""
    found = {}
    for key, parameter in transformer.named_parameters():
        if f".lora_A.{name}." in key or f".lora_B.{name}." in key:
            found[key.replace(f".{name}.", ".")] = parameter
    return found


def lora_layers(transformer: torch.nn.Module) -> list[LoraLayer]:
    return [module for module in transformer.modules() if isinstance(module, LoraLayer)]


@contextlib.contextmanager
def use(transformer: torch.nn.Module, name: str | None, layers=None) -> Iterator[None]:
    """Inside, the backbone uses this adapter (None: no adapter); afterwards the one before.

    layers: the backbone's lora_layers. peft's own switch also sets requires_grad everywhere."""
    layers = layers or lora_layers(transformer)
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [name], name is None
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before):
            layer._active_adapter, layer._disable_adapters = active, disabled


def save_adapter(folder: str | Path, tensors: dict[str, torch.Tensor], scale: float = 1) -> None:
    """{"LAYER.lora_A.weight": tensor} of this scale -> a folder that peft and diffusers load.

    The scale is multiplied into B and alpha = rank: a loader that reads no alpha is right too. Two
    files, because `pipe.load_lora_weights` finds nothing in peft's."""
    saved, layers = {}, {}
    for key, tensor in tensors.items():
        layer, _, half = key.rpartition(".lora_")
        saved[key] = (tensor.detach().float() * (scale if half == "B.weight" else 1)).cpu()
        layers[layer] = (saved[f"{layer}.lora_A.weight"], None, 1)  # config_of reads no B
    config = config_of(layers)
    metadata = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    peft_names = {f"base_model.model.{key}": tensor for key, tensor in saved.items()}
    config.save_pretrained(folder)
    save_file(peft_names, Path(folder, "adapter_model.safetensors"))
    about = {"transformer_lora_adapter_metadata": metadata}
    StableDiffusion3Pipeline.save_lora_weights(folder, saved, **about)
