"""PickScore: how much people would prefer this image for this prompt, by a CLIP trained on half a million choices.

    from rewards.pickscore import PickScore
    scores = PickScore(device="cuda")(images, prompts)  # (B,) some 18 to 24; SD3.5-Medium 21.64, Flow-OPD 23.08

score = exp(logit_scale) cos(image, text), float32 (yuvalkirstain/PickScore; flow_grpo/pickscore_scorer.py divides it
by 26, which is what `range` does here). The published tables do not divide, nor do we.

Weights: yuvalkirstain/PickScore_v1 (MIT), a fine-tuned CLIP ViT-H/14. The tokenizer and the picture's preparation
(bicubic on bytes to 224 on the shorter side, centre crop) are those of laion/CLIP-ViT-H-14-laion2B-s32B-b79K (MIT).
    hf download yuvalkirstain/PickScore_v1 --include "*.json" --include model.safetensors
    hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K --include "*.json" --include merges.txt
Not checked against the real weights here; with random ones it equals CLIPModel's own logits_per_image.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

MODEL, TOKENIZER = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FETCH = (
    f"hf download {MODEL} --include '*.json' --include model.safetensors && "
    f"hf download {TOKENIZER} --include '*.json' --include merges.txt"
)


class PickScore:
    """Callable (images, prompts, metadata=None) -> (B,) float32 on the CPU. images: see `as_pictures`.

    device: where the model lives once it is needed (first call); `reward.model = None` drops it again.
    weights, tokenizer: hub ids or directories; never downloaded here, ValueError with the command where one is missing.
    batch: images per forward pass; scores do not depend on it beyond rounding."""

    name, higher_is_better = "pickscore", True
    range = (0.0, 26.0)  # not bounds: (score - 0) / 26 is the reward that flow_grpo trains on

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path = MODEL,
        tokenizer: str | Path = TOKENIZER,
        batch: int = 32,
    ) -> None:
        self.device, self.weights, self.words, self.batch, self.model = device, weights, tokenizer, batch, None

    def load(self) -> None:
        try:
            model, info = CLIPModel.from_pretrained(
                self.weights, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            self.tokenizer = CLIPTokenizer.from_pretrained(self.words, local_files_only=True)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"pickscore: cannot load {self.weights}, {self.words} ({reason}); {FETCH}") from error
        missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        if missing:  # transformers would go on with random weights in their place
            raise ValueError(f"pickscore: {self.weights} lacks {len(missing)} weights ({missing[0]}, …); {FETCH}")
        if len(self.tokenizer) != model.config.text_config.vocab_size:  # an incomplete download loads as an empty tokenizer
            raise ValueError(f"pickscore: {self.words} and {self.weights} differ in vocabulary; {FETCH}")
        side = model.config.vision_config.image_size
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        self.model = model.eval().to(self.device)

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor | Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[dict] | None = None
    ) -> torch.Tensor:
        pictures, prompts = as_pictures(images), list(prompts)
        if len(pictures) != len(prompts):
            raise ValueError(f"pickscore: {len(pictures)} images and {len(prompts)} prompts; give one prompt per image")
        if pictures and self.model is None:
            self.load()
        scores = [torch.empty(0)]
        for i in range(0, len(pictures), self.batch):
            pixels = self.processor(pictures[i : i + self.batch], return_tensors="pt").pixel_values  # (b, 3, 224, 224)
            # Padding changes nothing: attention is causal and the text's vector is read at its end token.
            words = self.tokenizer(
                prompts[i : i + self.batch], padding=True, truncation=True, max_length=77, return_tensors="pt"
            ).to(self.device)
            # transformers 5 returns the projected vectors (b, D) as .pooler_output
            image = self.model.get_image_features(pixels.to(self.device)).pooler_output
            text = self.model.get_text_features(words.input_ids, words.attention_mask).pooler_output
            cosine = torch.cosine_similarity(image, text)  # (b,)
            scores.append((self.model.logit_scale.exp() * cosine).cpu())
        return torch.cat(scores)


def as_pictures(images: torch.Tensor | Sequence[Image.Image]) -> list[Image.Image]:
    """(B, 3, H, W) floats in [0, 1], rounded to bytes as flow_grpo's training does, or PIL images -> RGB PIL images."""
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:] or not images.is_floating_point():
            raise ValueError(f"images: (B, 3, H, W) floats in [0, 1] are needed, not {images.dtype} {tuple(images.shape)}")
        if len(images) and not (images.amin() >= -1e-3 and images.amax() <= 1 + 1e-3):  # so written, nan fails too
            raise ValueError(f"images must lie in [0, 1]; these span {images.amin():.3g} to {images.amax():.3g}")
        pixels = (images.detach().float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(p) for p in pixels]
    pictures = []
    for i, image in enumerate(images):
        try:
            pictures.append(image.convert("RGB"))
        except (AttributeError, OSError, SyntaxError) as error:
            raise ValueError(f"image {i} cannot be decoded ({error}); a PIL image of a whole file is needed") from error
    return pictures
