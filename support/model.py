"""The frozen model, a stock diffusers pipeline: loading, text embeddings, velocities, noise."""

import argparse
import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModelWithProjection, T5EncoderModel
from transformers.utils import logging as transformers_logging

from support.files import PIPELINE, TEXT, check_model, fetch, sha256
from support.flags import fail, reason
from support.lora import lora_layers, use
from support.run import check_disk, chunks

for library in (diffusers_logging, transformers_logging):
    library.set_verbosity_error()  # our errors are one line, which theirs would bury
    library.disable_progress_bar()

COMPILER = "inductor"  # of --compile; tests take one that needs no C++ compiler
ENCODERS = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}


def precision(dtype: str | None, device: torch.device) -> torch.dtype:
    """--dtype -> dtype of the frozen backbone. Default: bf16 on a GPU, fp32 on a CPU."""
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {None: default, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]


def load_pipeline(args: argparse.Namespace, device: torch.device) -> StableDiffusion3Pipeline:
    """The stock pipeline without text encoders, frozen, in eval mode, by the flags of model_flags.

    Eval mode: dropout would make the update's log-probs differ from the rollout's. The VAE, in
    float32, stays on the CPU until it decodes. No pickle is opened, no remote code run."""
    parts = tuple(part for part in PIPELINE if not (args.no_t5 and "_3/" in part))
    folder = fetch(args.model, "--model", parts)
    check_model(folder)  # now that a hub id has become a folder
    kinds = {"transformer": precision(args.dtype, device), "default": torch.float32}
    how = {"dtype": kinds, "use_safetensors": True} | dict.fromkeys(TEXT)
    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, **how)
        check_weights(pipe.transformer, device)  # a CPU takes 15 s for those of SD3.5
        check_weights(pipe.vae, device)
    except Exception as error:  # whatever a damaged or foreign file leads to
        fail(f"--model {args.model}: cannot be loaded as Stable Diffusion 3 ({reason(error)})")
    set_size(pipe.transformer, pipe.vae, args.size)
    pipe.time_grid = args.time_grid
    counts = pipe.scheduler.config.num_train_timesteps  # the transformer's t = 1; 1000 in SD3
    pipe.transformer.register_to_config(num_train_timesteps=counts)
    pipe.transformer.requires_grad_(False).eval().to(device)
    pipe.vae.requires_grad_(False).eval()
    if args.checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    if args.compile:
        # By block: equal blocks compile once. The limit must hold a variant per LoRA, with and
        # without gradient.
        limits = torch._dynamo.config
        limits.recompile_limit = limits.accumulated_recompile_limit = 512
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend=COMPILER)
    return pipe


def set_size(transformer: torch.nn.Module, vae: torch.nn.Module, size: int | None) -> None:
    """Set the image side to --size pixels, a whole number of patches; None: the model's own."""
    if size is None:
        return
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)  # per latent, along a side
    unit = pixels * transformer.config.patch_size
    largest = unit * transformer.config.pos_embed_max_size
    if size % unit or size > largest:
        fail(f"--size {size}: this model makes multiples of {unit} pixels, up to {largest}")
    transformer.register_to_config(sample_size=size // pixels)


def check_weights(module: torch.nn.Module, device: torch.device | str = "cpu") -> None:
    """ValueError unless every weight was in the files (else it is on "meta") and is finite."""
    for name, weight in module.named_parameters():
        if weight.is_meta or not weight.to(device).isfinite().all():
            raise ValueError(f"{name} is missing, nan or infinite; download it again")


@torch.no_grad()
def embed_prompts(pipe, prompts: Iterable[str], args: argparse.Namespace) -> dict:
    """Text embeddings on the CPU: {"rows": {prompt: row}, "embeds": (P, L, E), "pooled": (P, E')}.

    Row 0 is the empty prompt of guidance. The text encoders are loaded for this and dropped; with
    --cache_embeddings, only if a prompt is new. The tokenizer's limit caps --text_length."""
    distinct = ["", *sorted(set(prompts) - {""})]
    files, found = cache_files(pipe, distinct, args), {}
    for prompt, file in files.items():
        with contextlib.suppress(OSError, SafetensorError, KeyError):  # new or damaged: made again
            cached = load_file(file)
            found[prompt] = {"embeds": cached["embeds"], "pooled": cached["pooled"]}
    new = [prompt for prompt in distinct if prompt not in found]
    if new:
        text = load_text_encoders(pipe, backbone_dtype(pipe.transformer), args.no_t5)
        text, length = text.to(pipe.transformer.device), args.text_length
        if text.tokenizer_3 is not None:
            length = min(length, text.tokenizer_3.model_max_length)
        how = {"do_classifier_free_guidance": False, "max_sequence_length": length}
        batches = range(0, len(new), 64)
        for i in tqdm(batches, "embedding prompts", unit="batch", disable=len(new) < 2000):
            batch = new[i : i + 64]
            embeds, _, pooled, _ = text.encode_prompt(batch, None, None, **how)  # (n, L, E), (n, E)
            if files:  # GB of this batch and those to come
                size = (embeds[0].nbytes + pooled[0].nbytes) * (len(new) - i) / 1e9
                check_disk(args.cache_embeddings, "--cache_embeddings", size, "make room")
            for prompt, *tensors in zip(batch, embeds.cpu(), pooled.cpu()):
                if not all(tensor.isfinite().all() for tensor in tensors):
                    fail(f"--model: the embedding of {prompt[:100]!r} is nan; try another --dtype")
                found[prompt] = {"embeds": tensors[0], "pooled": tensors[1]}
                if prompt in files:  # written beside, then renamed: processes share a cache
                    beside = f"{files[prompt]}.{os.getpid()}"
                    files[prompt].parent.mkdir(parents=True, exist_ok=True)
                    save_file({part: x.clone() for part, x in found[prompt].items()}, beside)
                    os.replace(beside, files[prompt])
    table = {"rows": {prompt: row for row, prompt in enumerate(distinct)}}
    for part, first in list(found[""].items()):
        table[part] = torch.empty(len(distinct), *first.shape, dtype=first.dtype)
        for row, prompt in enumerate(distinct):  # row by row: a stack would hold all of it twice
            table[part][row] = found[prompt].pop(part)
    return table


def cache_files(pipe, prompts: list[str], args: argparse.Namespace) -> dict[str, Path]:
    """{prompt: file} in --cache_embeddings, named by all that it depends on; {} without a cache."""
    if not args.cache_embeddings:
        return {}
    cache, folders = Path(args.cache_embeddings), sorted(Path(pipe.name_or_path).glob("t*"))
    if cache.exists() and not cache.is_dir():
        fail(f"--cache_embeddings {cache} is a file; give a folder")
    model = "".join(sha256(folder) for folder in folders if folder.name in TEXT)
    about = f"{model}/{backbone_dtype(pipe.transformer)}/{args.no_t5}/{args.text_length}"
    files = {}
    for prompt in prompts:
        key = hashlib.sha256(f"{about}/{prompt}".encode()).hexdigest()
        files[prompt] = cache / key[:2] / f"{key}.safetensors"
    return files


def load_text_encoders(pipe: StableDiffusion3Pipeline, dtype: torch.dtype, no_t5: bool):
    """The stock pipeline with its text encoders; a missing weight or tokenizer is an error."""
    folder, parts = pipe.name_or_path, {"transformer": pipe.transformer, "vae": None}
    if no_t5:
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    how = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        for name, kind in ENCODERS.items():
            if name not in parts:
                parts[name], info = kind.from_pretrained(folder, subfolder=name, **how)
                if info["missing_keys"]:
                    raise ValueError(f"{name} lacks {min(info['missing_keys'])}")
        text = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(text, name)
            if tokenizer is not None and len(tokenizer) < len(tokenizer.all_special_ids) + 2:
                raise ValueError(f"{name} lacks files, so it knows no word; download it again")
        return text
    except Exception as error:
        fail(f"--model {folder}: cannot load its text encoders ({reason(error)})")


def backbone_dtype(transformer: torch.nn.Module) -> torch.dtype:
    """dtype of the frozen weights (`transformer.dtype` may report a LoRA's)."""
    return transformer.pos_embed.proj.weight.dtype


def velocity(transformer, x, t, text: dict, rows: Tensor, guidance: float) -> Tensor:
    """Guided velocity of the active LoRA at x (B, C, H, W): float32, shaped like x.

    t in [0, 1], one or B of them. rows (B,), on the CPU: the prompts, as rows of the table `text`.
    Classifier-free guidance needs a second forward pass, except at 1."""
    t = torch.as_tensor(t, device=x.device, dtype=torch.float32).flatten().expand(len(x))  # (B,)
    if guidance != 1:  # (2B, ...): the empty prompt (row 0) first
        x, t, rows = torch.cat([x, x]), torch.cat([t, t]), torch.cat([0 * rows, rows])
    dtype, device = backbone_dtype(transformer), x.device
    embeds = text["embeds"][rows].to(device, dtype, non_blocking=True)  # (B or 2B, L, E)
    pooled = text["pooled"][rows].to(device, dtype, non_blocking=True)  # (B or 2B, E')
    timestep = transformer.config.get("num_train_timesteps", 1000) * t  # as its scheduler counts
    (v,) = transformer(x.to(dtype), embeds, pooled, timestep=timestep, return_dict=False)
    v = v.float()
    if guidance == 1:
        return v
    v_empty, v_prompt = v.chunk(2)  # (B, C, H, W) each
    return v_empty + guidance * (v_prompt - v_empty)


class Backbone:
    """A frozen transformer and its LoRAs: guided velocities by the LoRA's name (None: the base).
    guidance {name: scale}; batch: states per forward pass without gradient."""

    def __init__(self, transformer: torch.nn.Module, text: dict, guidance: dict, batch: int):
        self.transformer, self.text = transformer, text
        self.guidance, self.batch, self.layers = guidance, batch, lora_layers(transformer)

    def velocity(self, name: str | None, x: Tensor, t: Tensor | float, prompt: Tensor) -> Tensor:
        """At states x (n, C, H, W), t (n, 1, 1, 1) or a float, prompt rows (n,): like x."""
        # Many states share few prompts: a prompt's row, 1.7 MB in SD3.5, is uploaded once.
        used, rows = torch.cat([0 * prompt[:1], prompt]).unique(return_inverse=True)  # row 0 first
        text = {part: self.text[part][used].to(x.device) for part in ("embeds", "pooled")}
        with use(self.transformer, name, self.layers):
            return velocity(self.transformer, x, t, text, rows[1:], self.guidance[name])

    @torch.no_grad()
    def predict(self, name: str | None, x: Tensor, t: Tensor | float, prompt: Tensor) -> Tensor:
        """The same without gradient, in batches."""
        t = torch.as_tensor(t, device=x.device).expand(len(x), 1, 1, 1)
        v = torch.empty_like(x)
        for rows in chunks(torch.arange(len(x)), self.batch):
            v[rows] = self.velocity(name, x[rows], t[rows], prompt[rows])
        return v


def time_grid(pipe: StableDiffusion3Pipeline, steps: int) -> list[float]:
    """The scheduler's own grid as floats: 1 = t_0 > t_1 > ... > t_steps = 0.

    diffusers shifts SD3's times twice (its issue 13243): "double", as in Flow-GRPO and Flow-OPD.
    "single" shifts once, as in DiffusionNFT. Dynamic shifting depends on the number of patches."""
    how, config = {"num_inference_steps": steps}, pipe.scheduler.config
    if pipe.time_grid == "single":
        how = {"sigmas": [1 - i / steps for i in range(steps)]}
    if config.use_dynamic_shifting:
        patches = (pipe.transformer.config.sample_size // pipe.transformer.config.patch_size) ** 2
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        how["mu"] = calculate_shift(patches, *(config[name] for name in names))
    pipe.scheduler.set_timesteps(**how)
    return [float(sigma) for sigma in pipe.scheduler.sigmas]


def initial_noise(pipe, generators: Sequence[torch.Generator]) -> Tensor:
    """Normal noise, one (C, H, W) per generator: (B, C, H, W)."""
    config, number = pipe.transformer.config, len(generators)
    noise = torch.empty(number, config.in_channels, config.sample_size, config.sample_size)
    for sample, generator in zip(noise, generators):
        sample.normal_(generator=generator)
    return noise.to(pipe.transformer.device)
