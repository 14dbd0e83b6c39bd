"""Stable Diffusion 3.5 Medium without its weights: its public configuration, and random weights.

    torchrun --nproc_per_node=8 experiments/sd35m.py sd35m_opd

estimates the memory of recipes/sd35m_opd.args as train_opd.py --dry_run does, without hub and GPU.
cost.py counts a recipe's operations from the same configuration. benchmark.py and
experiments/full_size.py run it with random weights.
"""

import contextlib
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

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
TEXT = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
CLIP_L = TEXT | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_L |= {"num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu"}
CLIP_L |= {"pad_token_id": 1}
CLIP_G = TEXT | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
CLIP_G |= {"num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"}
CLIP_G |= {"pad_token_id": 1}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
T5_XXL |= {"vocab_size": 32128, "feed_forward_proj": "gated-gelu"}
# T5-XXL has 4.8 billion numbers; one small layer gives embeddings of the same width.
ONE_LAYER = {"d_ff": 128, "num_layers": 1, "num_heads": 2}
PARTS = {"transformer": TRANSFORMER, "vae": VAE, "clip_l": CLIP_L, "clip_g": CLIP_G}
PARTS["t5"] = T5_XXL | ONE_LAYER

# The same layers a tenth as wide and a tenth as many, to try a script that is for the real ones.
TINY = {"transformer": TRANSFORMER | {"num_layers": 3, "num_attention_heads": 2}}
TINY["transformer"] |= {"caption_projection_dim": 128, "joint_attention_dim": 256}
TINY["transformer"] |= {"pooled_projection_dim": 128, "dual_attention_layers": (0, 1)}
TINY["transformer"] |= {"pos_embed_max_size": 64, "sample_size": 64}
TINY["vae"] = VAE | {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "projection_dim": 64}
TINY |= {"clip_l": CLIP_L | SMALL, "clip_g": CLIP_G | SMALL}
TINY["t5"] = T5_XXL | ONE_LAYER | {"d_model": 256}


def clip_tokenizer(pad):
    """CLIP's, with its special tokens, its 49,408 numbers and its 77 places, and no merges: a token
    is a letter. CLIP-L pads with the end token, CLIP-G with "!", which has number 0."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [f"<unused {n}>" for n in range(49406 - len(words))]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: n for n, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=77)


def t5_tokenizer():
    """T5's, with its special tokens and its 32,100 numbers; a token is a letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "etaoinshrdlucmfwypvbgkqjxz,.0123456789"]
    pieces += [(f"<unused {n}>", -99.0) for n in range(32000 - len(pieces))]
    return T5TokenizerFast(vocab=pieces, extra_ids=100, model_max_length=512)


def save_random_lora(folder, transformer, name, rank=32):
    """A LoRA of rank 32, as the published teachers, whose updates are about as large as the random
    weights; transformer may be on "meta"."""
    lora.add_adapter(transformer, name, rank=rank, alpha=2 * rank)
    shapes = lora.adapter_parameters(transformer, name)
    tensors = {key: 0.03 * torch.randn(shape.shape) for key, shape in shapes.items()}
    lora.save_adapter(folder, tensors, 2)


@contextlib.contextmanager
def recipe_args(recipe, *flags):
    """The flags of train_opd.py with a recipe. Inside, configurations and a random LoRA replace the
    hub, and the miniature's prompts those of the recipe."""
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
        prompts = [f"{task}={ROOT}/toy/prompts/{task}_train.txt" for task in TASKS]
        words = ["train_opd.py", f"@{ROOT}/recipes/{recipe}.args", "--dry_run"]
        words += ["--init", "base", "--prompts", *prompts, *flags]
        with (
            patch.object(memory, "fetch", lambda *_: str(folder)),
            patch.object(lora, "fetch", lambda *_: str(folder / "lora")),
            patch.object(sys, "argv", words),
        ):
            yield train_opd.parse_args()


def save_pipeline(folder, parts=None):
    """A folder with SD3.5-Medium's transformer and VAE (random weights, two bytes a number) and
    five random LoRAs. Without `parts` its text encoders are small, with the widths of the real
    ones; parts: configurations like PARTS and TINY."""
    torch.manual_seed(0)
    if parts is None:
        small = {"num_hidden_layers": 2, "intermediate_size": 128}
        parts = PARTS | {"clip_l": CLIP_L | small, "clip_g": CLIP_G | small}
    clip = lambda name: CLIPTextModelWithProjection(CLIPTextConfig(**parts[name]))
    before, device = torch.get_default_dtype(), "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)  # so that it is never there in four bytes
    with torch.device(device):
        pipe = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**parts["transformer"]),
            vae=AutoencoderKL(**parts["vae"]),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=clip("clip_l"),
            text_encoder_2=clip("clip_g"),
            text_encoder_3=T5EncoderModel(T5Config(**parts["t5"])),
            tokenizer=clip_tokenizer("<|endoftext|>"),
            tokenizer_2=clip_tokenizer("!"),
            tokenizer_3=t5_tokenizer(),
        )
    torch.set_default_dtype(before)
    pipe.to("cpu", torch.bfloat16)  # with the transformer's table of positions
    pipe.save_pretrained(folder)
    for name in (*TASKS, "merged"):
        save_random_lora(Path(folder) / "adapters" / name, pipe.transformer, name)
    return folder


def dry_run(recipe):
    with recipe_args(recipe) as args:
        train_opd.main(args)


if __name__ == "__main__":
    dry_run(sys.argv[1])
