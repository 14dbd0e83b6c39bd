"""Stable Diffusion 3.5 Medium without its weights: its public configuration, for benchmark.py.

    torchrun --nproc_per_node=8 experiments/sd35m.py sd35m_opd

estimates the memory of recipes/sd35m_opd.args as train_opd.py --dry_run does, without hub and GPU.
"""

import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_opd
from recipes import memory
from support import lora
from support.files import save_json
from support.flags import TASKS

ROOT = Path(__file__).resolve().parents[1]
TRANSFORMER = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16}
TRANSFORMER |= {"num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24}
TRANSFORMER |= {"caption_projection_dim": 1536, "joint_attention_dim": 4096, "qk_norm": "rms_norm"}
TRANSFORMER |= {"pooled_projection_dim": 2048, "pos_embed_max_size": 384}
TRANSFORMER |= {"dual_attention_layers": tuple(range(13))}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4}
VAE |= {"up_block_types": ("UpDecoderBlock2D",) * 4}
VAE |= {"use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024}
VAE |= {"scaling_factor": 1.5305, "shift_factor": 0.0609}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_L |= {"num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
CLIP_G |= {"num_attention_heads": 20, "projection_dim": 1280}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
T5_XXL |= {"vocab_size": 32128, "feed_forward_proj": "gated-gelu"}


def save_random_lora(folder, transformer, name):
    """A LoRA of rank 32, as the published teachers; transformer may be on "meta"."""
    lora.add_adapter(transformer, name, rank=32, alpha=64)
    shapes = lora.adapter_parameters(transformer, name)
    tensors = {key: 0.01 * torch.randn(shape.shape) for key, shape in shapes.items()}
    lora.save_adapter(folder, tensors, 64 / 32)


def dry_run(recipe):
    """train_opd.py --dry_run with a recipe. Configurations and a random LoRA replace the hub."""
    with tempfile.TemporaryDirectory() as work:
        folder, index = Path(work), {"_class_name": "StableDiffusion3Pipeline"}
        with torch.device("meta"):
            transformer = SD3Transformer2DModel(**TRANSFORMER)
            transformer.save_config(folder / "transformer")
            AutoencoderKL(**VAE).save_config(folder / "vae")
        encoders = {"text_encoder": CLIPTextConfig(**CLIP_L)}
        encoders |= {"text_encoder_2": CLIPTextConfig(**CLIP_G)}
        encoders |= {"text_encoder_3": T5Config(**T5_XXL)}
        for name, config in encoders.items():
            config.save_pretrained(folder / name)
            index[name] = ["transformers", "CLIPTextModelWithProjection"]
        index["text_encoder_3"] = ["transformers", "T5EncoderModel"]
        for name, length in (("tokenizer", 77), ("tokenizer_3", 512)):
            save_json(folder / name / "tokenizer_config.json", {"model_max_length": length})
        save_json(folder / "model_index.json", index)
        save_random_lora(folder / "lora", transformer, "any")
        memory.fetch = lambda *_: str(folder)
        lora.fetch = lambda *_: str(folder / "lora")
        prompts = [f"{task}={ROOT}/toy/prompts/{task}_train.txt" for task in TASKS]
        sys.argv = ["train_opd.py", f"@{ROOT}/recipes/{recipe}.args", "--dry_run"]
        sys.argv += ["--dtype", "bf16", "--init", "base", "--prompts", *prompts]
        train_opd.main(train_opd.parse_args())


def save_pipeline(folder):
    """A folder with SD3.5-Medium's transformer and VAE (random weights) and five random LoRAs."""
    torch.manual_seed(0)
    small = StableDiffusion3Pipeline.from_pretrained(ROOT / "toy")
    small.tokenizer.model_max_length = 77
    small.tokenizer_3.model_max_length = 256
    text = {"vocab_size": len(small.tokenizer), "hidden_size": 64, "intermediate_size": 128}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    t5 = {"vocab_size": len(small.tokenizer_3), "d_model": 4096, "d_kv": 64, "d_ff": 128}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        transformer = SD3Transformer2DModel(**TRANSFORMER)
    StableDiffusion3Pipeline(
        transformer=transformer.to("cpu", torch.bfloat16),
        vae=AutoencoderKL(**VAE),
        scheduler=small.scheduler,
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**text, projection_dim=768)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text, projection_dim=1280)),
        text_encoder_3=T5EncoderModel(T5Config(**t5, num_layers=1, num_heads=2)),
        tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer,
        tokenizer_3=small.tokenizer_3,
    ).save_pretrained(folder)
    for name in (*TASKS, "merged"):
        save_random_lora(Path(folder) / "adapters" / name, transformer, name)
    return folder


if __name__ == "__main__":
    dry_run(sys.argv[1])
