"""CLIPScore: how well the image fits the prompt, by OpenAI's CLIP ViT-L/14. Exact port of flow_grpo/clip_scorer.py.

    from rewards.clipscore import CLIPScore
    scores = CLIPScore(device="cuda")(images, prompts)  # (B,) some 0.3 to 1.2

score = exp(logit_scale) cos(image, text) / 30, float32. Unlike PickScore the picture stays a float tensor: resized
bilinearly with antialiasing (224 on the shorter side; CLIP's own processor is bicubic on bytes), centre crop.

Weights: openai/clip-vit-large-patch14 (MIT).
    hf download openai/clip-vit-large-patch14 --include "*.json" --include merges.txt --include model.safetensors
Not checked against the real weights here; with random ones it equals CLIPModel's own logits_per_image / 30.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

FETCH = "hf download openai/clip-vit-large-patch14 --include '*.json' --include merges.txt --include model.safetensors"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training pictures


class CLIPScore:
    """Callable (images, prompts, metadata=None) -> (B,) float32 on the CPU. images: see `as_tensors`.

    device: where the model lives once it is needed (first call); `reward.model = None` drops it again.
    weights: hub id or directory; never downloaded here, ValueError with the command where they are missing.
    batch: images per forward pass; scores do not depend on it beyond rounding."""

    name, higher_is_better = "clipscore", True
    range = (0.0, 1.2)  # usual, not bounds: a cosine can be negative

    def __init__(
        self, device: torch.device | str = "cpu", weights: str | Path = "openai/clip-vit-large-patch14", batch: int = 32
    ) -> None:
        self.device, self.weights, self.batch, self.model = device, weights, batch, None

    def load(self) -> None:
        try:
            model, info = CLIPModel.from_pretrained(
                self.weights, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            self.tokenizer = CLIPTokenizer.from_pretrained(self.weights, local_files_only=True)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"clipscore: cannot load {self.weights} ({reason}); {FETCH}") from error
        missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        if missing:  # transformers would go on with random weights in their place
            raise ValueError(f"clipscore: {self.weights} lacks {len(missing)} weights ({missing[0]}, …); {FETCH}")
        if len(self.tokenizer) != model.config.text_config.vocab_size:  # an incomplete download loads as an empty tokenizer
            raise ValueError(f"clipscore: {self.weights}: tokenizer and model differ in vocabulary; {FETCH}")
        self.model = model.eval().to(self.device)

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor | Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[dict] | None = None
    ) -> torch.Tensor:
        pixels, prompts = as_tensors(images), list(prompts)
        if len(pixels) != len(prompts):
            raise ValueError(f"clipscore: {len(pixels)} images and {len(prompts)} prompts; give one prompt per image")
        if pixels and self.model is None:
            self.load()
        scores = [torch.empty(0)]
        for i in range(0, len(pixels), self.batch):
            side = self.model.config.vision_config.image_size
            ready = torch.stack([prepare(p.to(self.device), side) for p in pixels[i : i + self.batch]])  # (b, 3, 224, 224)
            words = self.tokenizer(
                prompts[i : i + self.batch], padding="max_length", truncation=True, max_length=77, return_tensors="pt"
            ).to(self.device)
            # transformers 5 returns the projected vectors (b, D) as .pooler_output
            image = self.model.get_image_features(ready).pooler_output
            text = self.model.get_text_features(words.input_ids, words.attention_mask).pooler_output
            cosine = torch.cosine_similarity(image, text)  # (b,)
            scores.append((self.model.logit_scale.exp() * cosine / 30).cpu())
        return torch.cat(scores)


def prepare(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """(3, H, W) in [0, 1] -> (3, side, side), normalised. torchvision's Resize, CenterCrop, Normalize on a tensor."""
    H, W = pixels.shape[1:]
    short = min(H, W)
    H, W = (side if H == short else int(side * H / short)), (side if W == short else int(side * W / short))
    pixels = F.interpolate(pixels[None], (H, W), mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = round((H - side) / 2), round((W - side) / 2)  # torchvision rounds the offset, transformers floors it
    pixels = pixels[:, top : top + side, left : left + side]
    return (pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[:, None, None]


def as_tensors(images: torch.Tensor | Sequence[Image.Image]) -> list[torch.Tensor]:
    """(B, 3, H, W) floats in [0, 1], or PIL images of any sizes -> [(3, H, W) float32 in [0, 1]]."""
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:] or not images.is_floating_point():
            raise ValueError(f"images: (B, 3, H, W) floats in [0, 1] are needed, not {images.dtype} {tuple(images.shape)}")
        if len(images) and not (images.amin() >= -1e-3 and images.amax() <= 1 + 1e-3):  # so written, nan fails too
            raise ValueError(f"images must lie in [0, 1]; these span {images.amin():.3g} to {images.amax():.3g}")
        return list(images.detach().float())
    pixels = []
    for i, image in enumerate(images):
        try:
            pixels.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255)
        except (AttributeError, OSError, SyntaxError) as error:
            raise ValueError(f"image {i} cannot be decoded ({error}); a PIL image of a whole file is needed") from error
    return pixels
