"""LAION aesthetic score: how beautiful people would rate the image, whatever the prompt.

    from rewards.aesthetic import Aesthetic
    scores = Aesthetic(device="cuda")(images)  # (B,), typically 3 to 7

An exact port of christophschuhmann/improved-aesthetic-predictor (flow_grpo/aesthetic_scorer.py):
CLIP ViT-L/14's image vector (768), normalised, then five linear layers. There is no activation
between the layers, so together they are one affine map w x + b. In the published file |w| is
17.995625 and b is 5.236646, so scores lie between -12.76 and 23.23. Like flow_grpo we do not divide
the score.

Weights: openai/clip-vit-large-patch14 (MIT) and sac+logos+ava1-l14-linearMSE.pth (Apache-2.0; its
SHA-256 is checked). FETCH_CLIP and FETCH_HEAD below are the commands that download them.
`fold` was checked against the five layers of the real head (9.5e-7 apart); the real CLIP was not at
hand.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from rewards.images import as_pictures

CLIP = "openai/clip-vit-large-patch14"
FILE = "sac+logos+ava1-l14-linearMSE.pth"
SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
REPOSITORY = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
FETCH_HEAD = f"curl -LO {REPOSITORY}/raw/main/{FILE}"
FETCH_CLIP = f"hf download {CLIP} --include '*.json' --include model.safetensors"
LAYERS = (0, 2, 4, 6, 7)  # the numbers between them are dropout
SIZES = (768, 1024, 128, 64, 16, 1)


class Aesthetic:
    """Callable (images, prompts=None, metadata=None) -> (B,) float32 on the CPU.

    images: see `as_pictures`.
    device: where the model is loaded at the first call; `reward.model = None` drops it again.
    weights: hub id or folder of CLIP; head: path of the .pth.
    sha256: the hash that the head must have; None accepts any file.
    Nothing is downloaded: where a file is missing, ValueError names the command."""

    name, higher_is_better = "aesthetic", True
    range = (1.0, 10.0)  # the scale of the ratings that it was fitted to

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path = CLIP,
        head: str | Path = FILE,
        sha256: str | None = SHA256,
        batch: int = 32,
    ) -> None:
        self.device = device
        self.weights = weights
        self.head = Path(head)
        self.sha256 = sha256
        self.batch = batch
        self.model = None

    def load(self) -> None:
        if not self.head.is_file():
            raise ValueError(f"aesthetic: no file {self.head}; fetch it with: {FETCH_HEAD}")
        digest = hashlib.sha256(self.head.read_bytes()).hexdigest()
        if self.sha256 and digest != self.sha256:
            what = f"{self.head} is not the published file (SHA-256)"
            raise ValueError(f"aesthetic: {what}; fetch it with: {FETCH_HEAD}")
        try:
            w, b = fold(torch.load(self.head, map_location="cpu", weights_only=True))
            model, info = CLIPModel.from_pretrained(
                self.weights,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:
            what = f"{self.weights} or {self.head}"
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"aesthetic: cannot load {what} ({reason}); {FETCH_CLIP}") from error
        missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        if missing:  # transformers would use random weights in their place
            what = f"{self.weights} lacks {len(missing)} weights ({missing[0]}, …)"
            raise ValueError(f"aesthetic: {what}; {FETCH_CLIP}")
        side = model.config.vision_config.image_size
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
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
            prepared = self.processor(pictures[i : i + self.batch], return_tensors="pt")
            pixels = prepared.pixel_values.to(self.device)  # (b, 3, 224, 224)
            vector = self.model.get_image_features(pixels).pooler_output  # (b, 768)
            vector = vector / vector.norm(dim=1, keepdim=True)
            scores.append((vector @ self.w + self.b).cpu())
        return torch.cat(scores)


def fold(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The file's five layers as one affine map: w (768,), b (), computed in float64.

    ValueError unless every weight is there and no other one is."""
    state = dict(state)
    w = torch.eye(SIZES[0], dtype=torch.float64)
    b = torch.zeros(SIZES[0], dtype=torch.float64)
    for layer, inner, outer in zip(LAYERS, SIZES, SIZES[1:]):
        weight = state.pop(f"layers.{layer}.weight", None)
        bias = state.pop(f"layers.{layer}.bias", None)
        complete = weight is not None and bias is not None
        if not complete or weight.shape != (outer, inner) or bias.shape != (outer,):
            what = f"layers.{layer} is not a linear layer {inner} -> {outer}"
            raise ValueError(f"aesthetic: {what}; expected {FILE}")
        w, b = weight.double() @ w, weight.double() @ b + bias.double()  # (outer, 768), (outer,)
    if state:
        first = next(iter(state))
        raise ValueError(f"aesthetic: {len(state)} weights too many ({first}, …); expected {FILE}")
    return w[0].float(), b[0].float()
