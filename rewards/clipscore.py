"""CLIPScore: how well the image fits the prompt, judged by OpenAI's CLIP ViT-L/14.

    from rewards.clipscore import CLIPScore
    scores = CLIPScore(device="cuda")(images, prompts)  # (B,), typically 0.3 to 1.2

An exact port of flow_grpo/clip_scorer.py: score = exp(logit_scale) cos(image, text) / 30, float32.
Unlike in PickScore the image stays a float tensor. It is resized bilinearly with antialiasing (224
on the shorter side), then cropped in the centre; CLIP's own processor is bicubic, on bytes.

Weights: openai/clip-vit-large-patch14 (MIT). FETCH below is the command that downloads it.
Not checked here against the real weights; with random ones it equals CLIPModel's own
logits_per_image / 30.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from rewards.images import as_pictures, check_tensor

MODEL = "openai/clip-vit-large-patch14"
FETCH = f"hf download {MODEL} --include '*.json' --include merges.txt --include model.safetensors"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


class CLIPScore:
    """Callable (images, prompts, metadata=None) -> (B,) float32 on the CPU.

    images: see `as_tensors`.
    device: where the model is loaded at the first call; `reward.model = None` drops it again.
    weights: hub id or folder. Nothing is downloaded: where it is missing, ValueError names the
    command.
    batch: images per forward pass; it changes scores by no more than rounding."""

    name, higher_is_better = "clipscore", True
    range = (0.0, 1.2)  # the usual values, not bounds: a cosine can be negative

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path = MODEL,
        batch: int = 32,
    ) -> None:
        self.device = device
        self.weights = weights
        self.batch = batch
        self.model = None

    def load(self) -> None:
        try:
            model, info = CLIPModel.from_pretrained(
                self.weights,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            self.tokenizer = CLIPTokenizer.from_pretrained(self.weights, local_files_only=True)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            what = f"cannot load {self.weights} ({reason})"
            raise ValueError(f"clipscore: {what}; {FETCH}") from error
        missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        if missing:  # transformers would use random weights in their place
            what = f"{self.weights} lacks {len(missing)} weights ({missing[0]}, …)"
            raise ValueError(f"clipscore: {what}; {FETCH}")
        # After an incomplete download transformers makes an empty tokenizer.
        if len(self.tokenizer) != model.config.text_config.vocab_size:
            what = f"{self.weights}: tokenizer and model differ in vocabulary"
            raise ValueError(f"clipscore: {what}; {FETCH}")
        self.model = model.eval().to(self.device)

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor | Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[dict] | None = None,
    ) -> torch.Tensor:
        pixels, prompts = as_tensors(images), list(prompts)
        if len(pixels) != len(prompts):
            counts = f"{len(pixels)} images and {len(prompts)} prompts"
            raise ValueError(f"clipscore: {counts}; give one prompt per image")
        if pixels and self.model is None:
            self.load()
        scores = [torch.empty(0)]
        for i in range(0, len(pixels), self.batch):
            side = self.model.config.vision_config.image_size
            prepared = [prepare(p.to(self.device), side) for p in pixels[i : i + self.batch]]
            tokens = self.tokenizer(
                prompts[i : i + self.batch],
                padding="max_length",
                truncation=True,
                max_length=77,
                return_tensors="pt",
            ).to(self.device)
            # transformers 5 returns the projected vectors (b, D) as .pooler_output
            image = self.model.get_image_features(torch.stack(prepared)).pooler_output
            text = self.model.get_text_features(**tokens).pooler_output
            cosine = torch.cosine_similarity(image, text)  # (b,)
            scores.append((self.model.logit_scale.exp() * cosine / 30).cpu())
        return torch.cat(scores)


def prepare(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """(3, H, W) in [0, 1] -> (3, side, side), normalised.

    This is torchvision's Resize, CenterCrop and Normalize on a tensor."""
    H, W = pixels.shape[1:]
    short = min(H, W)
    h = side if H == short else int(side * H / short)
    w = side if W == short else int(side * W / short)
    resize = {"mode": "bilinear", "antialias": True, "align_corners": False}
    pixels = F.interpolate(pixels[None], (h, w), **resize)[0]
    # torchvision rounds the offset, transformers rounds it down
    top, left = round((h - side) / 2), round((w - side) / 2)
    pixels = pixels[:, top : top + side, left : left + side]
    return (pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[:, None, None]


def as_tensors(images: torch.Tensor | Sequence[Image.Image]) -> list[torch.Tensor]:
    """Floats (B, 3, H, W) in [0, 1] or PIL images of any sizes -> [(3, H, W) float32 in [0, 1]]."""
    if isinstance(images, torch.Tensor):
        check_tensor(images)
        return list(images.detach().float())
    arrays = [torch.from_numpy(np.array(picture)) for picture in as_pictures(images)]
    return [array.permute(2, 0, 1) / 255 for array in arrays]
