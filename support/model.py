"""The frozen model: loading it, text embeddings, guided velocities, pictures.

One Stable Diffusion 3 pipeline as stock diffusers loads it; the trained parts are LoRAs on its transformer (adapters.py).
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextModelWithProjection, T5EncoderModel
from transformers.utils import logging as transformers_logging

from support.flags import PIPELINE, check_model, fail, fetch, reason
from support.run import generator, sha256
from sde import rollout

diffusers_logging.set_verbosity_error()  # no lines about every prompt that is cut, none beside our own line on an error
transformers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

COMPILER = "inductor"  # of --compile; the tests take one that needs no C++ compiler
ENCODERS = dict(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), [CLIPTextModelWithProjection] * 2 + [T5EncoderModel]))
TEXT = (*ENCODERS, "tokenizer", "tokenizer_2", "tokenizer_3")


def precision(dtype: str | None, device: torch.device) -> torch.dtype:
    """--dtype -> the torch dtype of the frozen backbone on this device; None = bf16 on a GPU, fp32 on a CPU."""
    if dtype == "fp16" and device.type != "cuda":
        fail("--dtype fp16: fp16 without CUDA is not supported here; take bf16 or fp32")
    dtype = dtype or ("bf16" if device.type == "cuda" else "fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def load_pipeline(
    model: str,
    device: torch.device,
    dtype: str | None = None,
    no_t5: bool = False,
    checkpointing: bool = False,
    size: int | None = None,
    compile: bool = False,
) -> StableDiffusion3Pipeline:
    """The stock pipeline without its text encoders, frozen and in eval mode: dropout would make the rollout's log-probs
    differ from the update's. The transformer is on the device, the VAE (fp32) stays behind until `decode` wants it.

    model: directory or hub id. dtype: of the transformer (`precision`). no_t5: the third text encoder is not even
    fetched. checkpointing: activations are computed again in the backward pass, not kept. size: pixels, refused where
    the model cannot paint them. compile: torch.compile of the transformer's blocks.
    Nothing pickled is opened and no code in the directory is run (use_safetensors; trust_remote_code stays off)."""
    folder = fetch(model, "--model", tuple(part for part in PIPELINE if not (no_t5 and "_3/" in part)))
    check_model(folder)  # a hub id has been looked up only now
    try:
        kinds = {"transformer": precision(dtype, device), "default": torch.float32}
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=kinds, use_safetensors=True, **dict.fromkeys(TEXT))
        check_weights(pipe.transformer)
        check_weights(pipe.vae)
    except Exception as error:  # whatever a damaged or foreign file leads to
        fail(f"--model {model}: cannot be loaded as a Stable Diffusion 3 pipeline ({reason(error)})")
    unit = pipe.vae_scale_factor * pipe.transformer.config.patch_size
    most = unit * pipe.transformer.config.pos_embed_max_size
    if size and (size % unit or size > most):
        fail(f"--size {size}: this model paints multiples of {unit} pixels, up to {most}")
    pipe.transformer.requires_grad_(False).eval().to(device)
    pipe.vae.requires_grad_(False).eval()
    if checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    if compile:
        # Block by block: 24 alike are compiled once. A block has a variant per adapter, with gradient and without, and for
        # batches of one and of more (sizes that change become symbols): that many, and then no more. No CUDA graphs: each
        # variant would keep a pool of memory, to save launches that large batches hide.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 512
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend=COMPILER)
    return pipe


def check_weights(module: torch.nn.Module) -> None:
    """ValueError unless all of it was in the files (diffusers leaves the rest on "meta", without data) and is finite."""
    for name, weight in module.named_parameters():
        if weight.is_meta or not weight.isfinite().all():
            raise ValueError(f"{name} is {'missing' if weight.is_meta else 'nan or infinite'}; fetch it again")


@torch.no_grad()
def embed_prompts(
    pipe: StableDiffusion3Pipeline,
    prompts: Iterable[str],
    length: int = 128,
    no_t5: bool = False,
    cache: str | Path | None = None,
) -> dict:
    """A table of text embeddings, one row per distinct prompt, row 0 the empty prompt of guidance; it lies on the CPU.

    The text encoders are loaded for this alone and dropped again; with `cache`, a folder, only if a prompt is new.
    length: T5 tokens, 128 in the papers, never more than the tokenizer's own limit.
    Returns {"rows": {prompt: row}, "embeds": (P, L, E), "pooled": (P, E')}."""
    distinct, device, dtype = ["", *sorted(set(prompts) - {""})], pipe.transformer.device, backbone_dtype(pipe.transformer)
    file_of, table = {}, {}
    if cache:  # a file per prompt, named by everything that its embedding depends on
        model = "".join(sha256(f) for f in sorted(Path(pipe.name_or_path).glob("t*")) if f.name in TEXT)
        keys = {p: hashlib.sha256(f"{model}/{dtype}/{no_t5}/{length}/{p}".encode()).hexdigest() for p in distinct}
        file_of = {p: Path(cache) / key[:2] / f"{key}.safetensors" for p, key in keys.items()}
        if Path(cache).exists() and not Path(cache).is_dir():
            fail(f"--cache_embeddings {cache} is a file; give a folder")
        for p, file in file_of.items():
            with contextlib.suppress(OSError, SafetensorError, KeyError):  # not there yet, or damaged: made again
                found = load_file(file)
                table[p] = {"embeds": found["embeds"], "pooled": found["pooled"]}
    new = [p for p in distinct if p not in table]
    if new:
        text = load_text_encoders(pipe, dtype, no_t5).to(device)
        length = min(length, text.tokenizer_3.model_max_length) if text.tokenizer_3 is not None else length
        for i in tqdm(range(0, len(new), 64), desc="embedding prompts", unit="batch", disable=len(new) < 2000):
            part = new[i : i + 64]
            both = text.encode_prompt(part, None, None, do_classifier_free_guidance=False, max_sequence_length=length)
            for p, embeds, pooled in zip(part, both[0].cpu(), both[2].cpu()):  # (L, E), (E')
                if not (embeds.isfinite().all() and pooled.isfinite().all()):
                    fail(f"--model: the text encoders make nan of the prompt {p[:100]!r}; another --dtype may help")
                table[p] = {"embeds": embeds, "pooled": pooled}
                if file_of:
                    file_of[p].parent.mkdir(parents=True, exist_ok=True)
                    save_file({k: t.clone() for k, t in table[p].items()}, f"{file_of[p]}.{os.getpid()}")
                    os.replace(f"{file_of[p]}.{os.getpid()}", file_of[p])
    rows = {prompt: row for row, prompt in enumerate(distinct)}
    return {"rows": rows} | {name: torch.stack([table[p][name] for p in distinct]) for name in ("embeds", "pooled")}


def load_text_encoders(pipe: StableDiffusion3Pipeline, dtype: torch.dtype, no_t5: bool) -> StableDiffusion3Pipeline:
    """The stock pipeline with the tokenizers and text encoders, all of their weights from the directory: left to itself
    transformers draws at random what is missing."""
    folder, parts = pipe.name_or_path, {"transformer": pipe.transformer, "vae": None}
    parts |= {"text_encoder_3": None, "tokenizer_3": None} if no_t5 else {}
    try:
        for name in (n for n in ENCODERS if n not in parts):
            how = {"subfolder": name, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
            parts[name], info = ENCODERS[name].from_pretrained(folder, **how)
            if info["missing_keys"]:
                raise ValueError(f"its {name} lacks {min(info['missing_keys'])}")
        return StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    except Exception as error:
        fail(f"--model {folder}: cannot load its text encoders ({reason(error)})")


def backbone_dtype(transformer: torch.nn.Module) -> torch.dtype:
    """What the frozen weights are in (`transformer.dtype` may see a LoRA's)."""
    return transformer.pos_embed.proj.weight.dtype


def velocity(
    transformer: torch.nn.Module, x: torch.Tensor, t: torch.Tensor | float, text: dict, rows: torch.Tensor, guidance: float
) -> torch.Tensor:
    """The guided velocity at x (B, C, H, W), t in [0, 1] (one, or one per sample), for the prompts in `rows` (B,; on the
    CPU, as the table `text` is): float32.

    Classifier-free guidance: v = v_empty + guidance (v_prompt - v_empty). At guidance 1 one forward pass, not two."""
    t = torch.as_tensor(t, device=x.device, dtype=torch.float32).expand(len(x))  # (B,)
    if guidance != 1:  # (2B, ...): the empty prompt first
        x, t, rows = torch.cat([x, x]), torch.cat([t, t]), torch.cat([torch.zeros_like(rows), rows])
    dtype, device = backbone_dtype(transformer), x.device
    prompt = {"encoder_hidden_states": text["embeds"][rows], "pooled_projections": text["pooled"][rows]}
    prompt = {name: tensor.to(device, dtype, non_blocking=True) for name, tensor in prompt.items()}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):  # the student's LoRA is fp32, its products are not
        v = transformer(x.to(dtype), timestep=1000 * t, **prompt, return_dict=False)[0].float()
    if guidance != 1:
        empty, v = v.chunk(2)
        v = empty + guidance * (v - empty)
    return v


def time_grid(pipe: StableDiffusion3Pipeline, steps: int) -> list[float]:
    """The scheduler's own grid as floats: 1 = t_0 > t_1 > ... > t_steps = 0."""
    pipe.scheduler.set_timesteps(steps)
    return [float(s) for s in pipe.scheduler.sigmas]


def initial_noise(
    pipe: StableDiffusion3Pipeline, generators: Sequence[torch.Generator], size: int | None = None
) -> torch.Tensor:
    """One (C, H, W) per generator: (B, C, H, W). size: image pixels; default the transformer's own."""
    config = pipe.transformer.config
    side = size // pipe.vae_scale_factor if size else config.sample_size
    if not generators:  # a process without a part
        return torch.empty(0, config.in_channels, side, side, device=pipe.transformer.device)
    return torch.stack([torch.randn(config.in_channels, side, side, generator=g) for g in generators]).to(
        pipe.transformer.device
    )


@torch.no_grad()
def decode(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1]."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.to(latents.device).decode(latents.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def paint(
    pipe: StableDiffusion3Pipeline,
    text: dict,
    prompts: Sequence[str],
    keys: Sequence[tuple],
    steps: int,
    guidance: float,
    batch: int = 128,
    size: int | None = None,
) -> torch.Tensor:
    """ODE samples of the active adapter: images (N, 3, H, W) in [0, 1]. keys[i] seeds the noise of image i, so that
    two models given the same keys start from the same noise."""
    grid, images = time_grid(pipe, steps), []
    for i in range(0, len(prompts), batch):
        rows = torch.tensor([text["rows"][p] for p in prompts[i : i + batch]])
        noise = initial_noise(pipe, [generator(*key) for key in keys[i : i + batch]], size)
        v = lambda x, t, r=rows: velocity(pipe.transformer, x, t, text, r, guidance)
        images.append(decode(pipe.vae, rollout(v, noise, grid, a=0.0).x[-1]).cpu())
    side = size or pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return torch.cat(images) if images else torch.empty(0, 3, side, side)


def as_picture(image: torch.Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> PIL, rounded to bytes."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save_picture(file: str | Path, image: torch.Tensor, mark: str) -> None:
    """(3, H, W) in [0, 1] -> PNG, with a text in it that says what it was made from. Written beside and renamed: it is
    complete, or not there."""
    info, beside = PngInfo(), Path(file).with_suffix(f".{os.getpid()}")
    info.add_text("made from", mark)
    beside.parent.mkdir(parents=True, exist_ok=True)
    as_picture(image).save(beside, "PNG", pnginfo=info)
    beside.replace(file)


def is_kept(file: str | Path, mark: str) -> bool:
    """Whether the file is the image of this mark, which stands in the file itself: the two cannot come apart."""
    try:
        with Image.open(file) as image:
            return image.info.get("made from") == mark
    except (OSError, SyntaxError):
        return False


def read_pictures(files: Iterable[str | Path]) -> list[torch.Tensor]:
    """[(3, H, W) in [0, 1]] of whole bytes, of any sizes. ValueError where a file is no image."""
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255)
        except Exception as error:  # damaged files fail in many ways
            raise ValueError(f"{file} cannot be decoded ({str(error).splitlines()[0]}); make this image again") from error
    return images
