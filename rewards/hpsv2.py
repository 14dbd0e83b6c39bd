"""HPSv2.1: which of several images for one prompt people would choose.

    from rewards.hpsv2 import HPSv2
    scores = HPSv2(device="cuda")(images, prompts)  # (B,), typically 0.2 to 0.35

score = cos(image, text), float32, without logit scale: a CLIP ViT-H/14 fine-tuned on human choices
(tgxs002/HPSv2). Compare images of the same prompt only: the level depends on the prompt. The
Flow-OPD paper has .298 in its table; `hpsv2.evaluate` prints 100 times the score. Upstream runs in
mixed float16, which rounds scores to a grid of 2.4e-4.

HPSv2.1 and HPSv2.0 share code and shapes, not weights; their scores are not comparable.
`hpsv2.score` uses v2.0 by default, `hpsv2.evaluate` v2.1. Here v2.0 is refused by its hash.

Images: the longer side to 224, both sides rounded; bicubic on the float tensor with antialiasing
and without clamping; then black padding around it. Antialiasing is torchvision's default since
0.17. Before that it was off, and at 512 -> 224 pixels differ by .03 on average.
Prompts: upstream cleans them with ftfy. `clean` does the part of it that real prompts need; broken
encodings and ligatures stay as they are. With it the tokens of all 4,072 test prompts of Flow-OPD's
pickscore, pickscore_sfw and drawbench equal upstream's (ftfy 6.3.1); without it 26 prompts differ.

Weights: HPS_v2.1_compressed.pt of xswu/HPSv2 (Apache-2.0; its SHA-256 is checked), converted once.
Tokenizer: laion/CLIP-ViT-H-14-laion2B-s32B-b79K (MIT). FETCH below is the command for both.
Checked here: open_clip's forward pass, written as plain functions, on random weights. The real
weights were not at hand.
"""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from rewards.images import as_pictures

FILE, WEIGHTS = "HPS_v2.1_compressed.pt", "weights/hpsv2"
SHA256 = "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"
V20 = "is HPS v2.0 (also published as HPS_v2_1.pt); its scores are not comparable with v2.1"
REFUSED = {"07cb0d20": V20}  # by the first digits of the hash
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FETCH = (
    f"hf download xswu/HPSv2 {FILE} --local-dir weights"
    f" && python -m rewards.convert hpsv2 weights/{FILE} --out {WEIGHTS}"
    f" && hf download {TOKENIZER} --include '*.json' --include merges.txt"
)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
# What ftfy changes in real prompts: curly quotes, full-width ASCII, a byte order mark
REPLACED = str.maketrans("ʼ‘’‚‛“”„‟", "'" * 5 + '"' * 4)
REPLACED |= {code + 0xFEE0: code for code in range(0x21, 0x7F)} | {0xFEFF: None}


class HPSv2:
    """Callable (images, prompts, metadata=None) -> (B,) float32 on the CPU.

    images: see `as_pictures`.
    device: where the model is loaded at the first call; `reward.model = None` drops it again.
    weights: folder that rewards.convert wrote; tokenizer: hub id or folder. Nothing is downloaded:
    where one is missing, ValueError names the command.
    batch: images per forward pass; it changes scores by no more than rounding.
    sha256: hash of the .pt that the weights must come from; None accepts any."""

    name, higher_is_better = "hpsv2", True
    range = (0.0, 0.4)  # the usual values, not bounds: any cosine is possible

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path = WEIGHTS,
        tokenizer: str | Path = TOKENIZER,
        batch: int = 32,
        sha256: str | None = SHA256,
    ) -> None:
        self.device = device
        self.weights = weights
        self.vocabulary = tokenizer
        self.batch = batch
        self.sha256 = sha256
        self.model = None

    def load(self) -> None:
        try:
            with safe_open(Path(self.weights) / "model.safetensors", "pt") as file:
                source = (file.metadata() or {}).get("source_sha256")
            model, info = CLIPModel.from_pretrained(
                self.weights,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,  # the file holds float16
                output_loading_info=True,
            )
            self.tokenizer = CLIPTokenizer.from_pretrained(self.vocabulary, local_files_only=True)
        except Exception as error:
            what = f"{self.weights}, {self.vocabulary}"
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"hpsv2: cannot load {what} ({reason}); {FETCH}") from error
        if self.sha256 and source != self.sha256:
            what = f"{self.weights} was not converted from {FILE}"
            raise ValueError(f"hpsv2: {what}; {FETCH}")
        missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        if missing:  # transformers would use random weights in their place
            what = f"{self.weights} lacks {len(missing)} weights ({missing[0]}, …)"
            raise ValueError(f"hpsv2: {what}; {FETCH}")
        # After an incomplete download transformers makes an empty tokenizer.
        if len(self.tokenizer) != model.config.text_config.vocab_size:
            what = f"{self.vocabulary} and {self.weights} differ in vocabulary"
            raise ValueError(f"hpsv2: {what}; {FETCH}")
        self.model = model.eval().to(self.device)

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor | Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[dict] | None = None,
    ) -> torch.Tensor:
        pictures, prompts = as_pictures(images), [clean(prompt) for prompt in prompts]
        if len(pictures) != len(prompts):
            counts = f"{len(pictures)} images and {len(prompts)} prompts"
            raise ValueError(f"hpsv2: {counts}; give one prompt per image")
        if pictures and self.model is None:
            self.load()
        scores = [torch.empty(0)]
        for i in range(0, len(pictures), self.batch):
            side = self.model.config.vision_config.image_size
            prepared = [prepare(picture, side) for picture in pictures[i : i + self.batch]]
            pixels = torch.stack(prepared).to(self.device)  # (b, 3, 224, 224)
            # Padding changes nothing: attention is causal, and the vector is read at the end token.
            tokens = self.tokenizer(
                prompts[i : i + self.batch],
                padding=True,
                truncation=True,
                max_length=77,
                return_tensors="pt",
            ).to(self.device)
            # transformers 5 returns the projected vectors (b, D) as .pooler_output
            image = self.model.get_image_features(pixels).pooler_output
            text = self.model.get_text_features(**tokens).pooler_output
            scores.append(torch.cosine_similarity(image, text).cpu())
        return torch.cat(scores)


def clean(prompt: str) -> str:
    """Upstream's cleaning: HTML entities, also those escaped twice, and the part of ftfy above."""
    return html.unescape(html.unescape(prompt)).translate(REPLACED)


def prepare(picture: Image.Image, side: int) -> torch.Tensor:
    """RGB picture of any size -> (3, side, side): ResizeMaxSize of open_clip's transform.py.

    Upstream does not pad, and so fails, where the longer side is already `side`; here it pads."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255  # (3, H, W)
    H, W = pixels.shape[1:]
    scale = side / max(H, W)
    h, w = max(round(H * scale), 1), max(round(W * scale), 1)
    pixels = F.interpolate(
        pixels[None], (h, w), mode="bicubic", antialias=True, align_corners=False
    )[0]
    left, top = (side - w) // 2, (side - h) // 2
    pixels = F.pad(pixels, (left, side - w - left, top, side - h - top))  # black
    return (pixels - MEAN) / STD


# ---- For rewards/convert.py


def make_config() -> CLIPConfig:
    """open_clip's ViT-H-14. Its activation is the exact GELU, not CLIPConfig's quick_gelu."""
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    vision |= {"image_size": 224, "patch_size": 14}
    for part in (text, vision):
        part |= {"num_attention_heads": 16, "hidden_act": "gelu"}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)


make_network = CLIPModel

# open_clip's name -> transformers', after the prefix
RENAMED = {
    ".transformer.resblocks.": ".encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".class_embedding": ".embeddings.class_embedding",
    ".positional_embedding": ".embeddings.position_embedding.weight",
    ".token_embedding.": ".embeddings.token_embedding.",
    ".conv1.": ".embeddings.patch_embedding.",
    ".ln_pre.": ".pre_layrnorm.",  # so spelt in transformers
    ".ln_post.": ".post_layernorm.",
    ".ln_final.": ".final_layer_norm.",
}


def convert(content: dict) -> dict[str, torch.Tensor]:
    """The published file -> CLIPModel's weights: 686 tensors -> 910, as qkv is three matrices.

    A key that open_clip does not have gets a name that CLIPModel does not have."""
    converted = {}
    for key, tensor in content["state_dict"].items():
        if key == "logit_scale":
            converted[key] = tensor
        elif key == "visual.proj":  # x @ proj; a linear layer holds the transpose
            converted["visual_projection.weight"] = tensor.T
        elif key == "text_projection":
            converted["text_projection.weight"] = tensor.T
        else:
            name = "text_model." + key
            if key.startswith("visual."):
                name = "vision_model." + key.removeprefix("visual.")
            for source, target in RENAMED.items():
                name = name.replace(source, target)
            if ".in_proj_" in name:
                for letter, piece in zip("qkv", tensor.chunk(3)):
                    converted[name.replace(".in_proj_", f".{letter}_proj.")] = piece
            else:
                converted[name] = tensor
    return converted
