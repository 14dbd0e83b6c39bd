"""LAION aesthetic score: how beautiful people would call the image, whatever the prompt. Exact port.

    from rewards.aesthetic import Aesthetic
    scores = Aesthetic(device="cuda")(images)  # (B,) some 3 to 7

CLIP ViT-L/14 image vector (768), normalised, through five linear layers without anything between them
(christophschuhmann/improved-aesthetic-predictor, flow_grpo/aesthetic_scorer.py), so through one affine map: of the
published file |w| is 17.995625 and b 5.236646, which bounds the score to -12.76 .. 23.23. Not divided, as in flow_grpo.

Weights: openai/clip-vit-large-patch14 (MIT) and sac+logos+ava1-l14-linearMSE.pth (Apache-2.0), whose SHA-256 is checked.
    hf download openai/clip-vit-large-patch14 --include "*.json" --include model.safetensors
    curl -LO https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac+logos+ava1-l14-linearMSE.pth
Not checked against the real weights here.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

FILE = "sac+logos+ava1-l14-linearMSE.pth"
SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
FETCH_HEAD = f"curl -LO https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/{FILE}"
FETCH_CLIP = "hf download openai/clip-vit-large-patch14 --include '*.json' --include model.safetensors"
LAYERS, SIZES = (0, 2, 4, 6, 7), (768, 1024, 128, 64, 16, 1)  # numbers left out in the file are dropout


class Aesthetic:
    """Callable (images, prompts=None, metadata=None) -> (B,) float32 on the CPU. images: see `as_pictures`.

    device: where the model lives once it is needed (first call); `reward.model = None` drops it again.
    weights: hub id or directory of CLIP; head: path of the .pth, refused where its hash is not sha256 (None: any file).
    Nothing is downloaded here: ValueError with the command where something is missing."""

    name, higher_is_better = "aesthetic", True
    range = (1.0, 10.0)  # the ratings it was fitted to

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path = "openai/clip-vit-large-patch14",
        head: str | Path = FILE,
        sha256: str | None = SHA256,
        batch: int = 32,
    ) -> None:
        self.device, self.weights, self.head, self.sha256, self.batch = device, weights, Path(head), sha256, batch
        self.model = None

    def load(self) -> None:
        if not self.head.is_file():
            raise ValueError(f"aesthetic: no file {self.head}; fetch it with: {FETCH_HEAD}")
        if self.sha256 and hashlib.sha256(self.head.read_bytes()).hexdigest() != self.sha256:
            raise ValueError(f"aesthetic: {self.head} is not the published file (SHA-256); fetch it with: {FETCH_HEAD}")
        try:
            w, b = fold(torch.load(self.head, map_location="cpu", weights_only=True))
            model, info = CLIPModel.from_pretrained(
                self.weights, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"aesthetic: cannot load {self.weights} or {self.head} ({reason}); {FETCH_CLIP}") from error
        missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        if missing:  # transformers would go on with random weights in their place
            raise ValueError(f"aesthetic: {self.weights} lacks {len(missing)} weights ({missing[0]}, …); {FETCH_CLIP}")
        side = model.config.vision_config.image_size
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        self.w, self.b = w.to(self.device), b.to(self.device)
        self.model = model.eval().to(self.device)

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor | Sequence[Image.Image],
        prompts: Sequence[str] | None = None,
        metadata: Sequence[dict] | None = None,
    ) -> torch.Tensor:
        pictures = as_pictures(images)
        if pictures and self.model is None:
            self.load()
        scores = [torch.empty(0)]
        for i in range(0, len(pictures), self.batch):
            pixels = self.processor(pictures[i : i + self.batch], return_tensors="pt").pixel_values  # (b, 3, 224, 224)
            vector = self.model.get_image_features(pixels.to(self.device)).pooler_output  # (b, 768)
            vector = vector / vector.norm(dim=1, keepdim=True)
            scores.append((vector @ self.w + self.b).cpu())
        return torch.cat(scores)


def fold(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The file's five layers as one affine map: w (768,), b (). Every key must be there and be used; in float64."""
    state = dict(state)
    w, b = torch.eye(SIZES[0], dtype=torch.float64), torch.zeros(SIZES[0], dtype=torch.float64)
    for layer, inner, outer in zip(LAYERS, SIZES, SIZES[1:]):
        W, B = state.pop(f"layers.{layer}.weight", None), state.pop(f"layers.{layer}.bias", None)
        if W is None or B is None or W.shape != (outer, inner) or B.shape != (outer,):
            raise ValueError(f"aesthetic: layers.{layer} is not a linear layer {inner} -> {outer}; expected {FILE}")
        w, b = W.double() @ w, W.double() @ b + B.double()  # w (outer, 768), b (outer,)
    if state:
        raise ValueError(f"aesthetic: {len(state)} weights too many ({next(iter(state))}, …); expected {FILE}")
    return w[0].float(), b[0].float()


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
