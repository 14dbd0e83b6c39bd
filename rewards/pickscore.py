"""PickScore: how much people would prefer this image for this prompt.

    from rewards.pickscore import PickScore
    scores = PickScore(device="cuda")(images, prompts)  # (B,), typically 18 to 24

score = exp(logit_scale) cos(image, text), float32, from a CLIP ViT-H/14 that was fine-tuned on half
a million human choices (yuvalkirstain/PickScore). Flow-OPD's table has 21.64 for SD3.5-Medium and
23.08 for its student. flow_grpo/pickscore_scorer.py divides the score by 26, as `range` does
here. The published tables do not divide, nor do we.

Weights: yuvalkirstain/PickScore_v1 (MIT). Tokenizer and image preparation (bicubic on bytes to 224
on the shorter side, centre crop) are those of laion/CLIP-ViT-H-14-laion2B-s32B-b79K (MIT). FETCH
below is the command that downloads both.
Not checked here against the real weights; with random ones it equals CLIPModel's own
logits_per_image.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from rewards.images import as_pictures

MODEL, TOKENIZER = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FETCH = (
    f"hf download {MODEL} --include '*.json' --include model.safetensors && "
    f"hf download {TOKENIZER} --include '*.json' --include merges.txt"
)


class PickScore:
    """Callable (images, prompts, metadata=None) -> (B,) float32 on the CPU.

    images: see `as_pictures`.
    device: where the model is loaded at the first call; `reward.model = None` drops it again.
    weights, tokenizer: hub ids or folders. Nothing is downloaded: where one is missing, ValueError
    names the command.
    batch: images per forward pass; it changes scores by no more than rounding."""

    name, higher_is_better = "pickscore", True
    range = (0.0, 26.0)  # not bounds: (score - 0) / 26 is the reward that flow_grpo trains on

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path = MODEL,
        tokenizer: str | Path = TOKENIZER,
        batch: int = 32,
    ) -> None:
        self.device = device
        self.weights = weights
        self.vocabulary = tokenizer
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
            self.tokenizer = CLIPTokenizer.from_pretrained(self.vocabulary, local_files_only=True)
        except Exception as error:
            what = f"{self.weights}, {self.vocabulary}"
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"pickscore: cannot load {what} ({reason}); {FETCH}") from error
        missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        if missing:  # transformers would use random weights in their place
            what = f"{self.weights} lacks {len(missing)} weights ({missing[0]}, …)"
            raise ValueError(f"pickscore: {what}; {FETCH}")
        # After an incomplete download transformers makes an empty tokenizer.
        if len(self.tokenizer) != model.config.text_config.vocab_size:
            what = f"{self.vocabulary} and {self.weights} differ in vocabulary"
            raise ValueError(f"pickscore: {what}; {FETCH}")
        side = model.config.vision_config.image_size
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        self.model = model.eval().to(self.device)

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor | Sequence[Image.Image],
        prompts: Sequence[str],
        metadata: Sequence[dict] | None = None,
    ) -> torch.Tensor:
        pictures, prompts = as_pictures(images), list(prompts)
        if len(pictures) != len(prompts):
            counts = f"{len(pictures)} images and {len(prompts)} prompts"
            raise ValueError(f"pickscore: {counts}; give one prompt per image")
        if pictures and self.model is None:
            self.load()
        scores = [torch.empty(0)]
        for i in range(0, len(pictures), self.batch):
            prepared = self.processor(pictures[i : i + self.batch], return_tensors="pt")
            pixels = prepared.pixel_values.to(self.device)  # (b, 3, 224, 224)
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
            cosine = torch.cosine_similarity(image, text)  # (b,)
            scores.append((self.model.logit_scale.exp() * cosine).cpu())
        return torch.cat(scores)
