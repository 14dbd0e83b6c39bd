"""Relative depth of an image by DPT-Hybrid (MiDaS): which of two objects is nearer. For 3D.

    from rewards.depth import Depth
    depth = Depth(device="cuda").depth(pictures)[0]  # of the first: (H, W) in 0 … 1, near is large

As T2I-CompBench prepares and stores it: the image squashed to 480 x 480, values (x - .5) / .5; the
network's output stretched to 0 … 1 over the image, resized to the image's size and stored in 8
bits; resized again to the size of UniDet's input, so that UniDet's boxes fit it.

Weights: Intel/dpt-hybrid-midas (Apache-2.0), MiDaS's dpt_hybrid-midas-501f0c75.pt in the names of
transformers. FETCH below is the command that downloads it.
Checked here with random weights: the steps around the network, against each of them by hand.
Not checked here: the real weights, and that the hub's equal those of the .pt.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import DPTForDepthEstimation

from rewards.images import as_pictures, exact_float32
from rewards.unidet import input_size

MODEL = "Intel/dpt-hybrid-midas"
FETCH = f"hf download {MODEL} --include '*.json' --include model.safetensors"
SIDE = 480  # of the network's input; it was trained at 384, and its positions are interpolated
UNUSED = "neck.fusion_stage.layers.0.residual_layer1."  # not in the file: nothing comes before it


class Depth:
    """`depth` estimates the depth of pictures.

    device: where the network is loaded at the first call; `.model = None` drops it again.
    weights: hub id or folder. Nothing is downloaded: where it is missing, ValueError names the
    command. batch: pictures per forward pass; it changes results by no more than rounding."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        weights: str | Path = MODEL,
        batch: int = 8,
    ) -> None:
        self.device = device
        self.weights = weights
        self.batch = batch
        self.model = None

    def load(self) -> None:
        try:
            model, info = DPTForDepthEstimation.from_pretrained(
                self.weights,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"depth: cannot load {self.weights} ({reason}); {FETCH}") from error
        missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        missing = [key for key in missing if not key.startswith(UNUSED)]
        if missing:  # transformers would use random weights in their place
            what = f"{self.weights} lacks {len(missing)} weights ({missing[0]}, …)"
            raise ValueError(f"depth: {what}; {FETCH}")
        if not model.config.is_hybrid:
            raise ValueError(f"depth: {self.weights} is not DPT-Hybrid; {FETCH}")
        model.dpt.embeddings.image_size = (SIDE, SIDE)  # else it refuses all but 384 x 384
        self.model = model.eval().to(self.device)

    @torch.no_grad()
    def depth(self, pictures: torch.Tensor | Sequence[Image.Image]) -> list[torch.Tensor]:
        """PIL pictures of any sizes -> for each its depth (H, W) float32 in 0 … 1, near is large.

        H and W are those of UniDet's input (`rewards.unidet.input_size`)."""
        pictures = as_pictures(pictures)
        if pictures and self.model is None:
            self.load()
        results = []
        for start in range(0, len(pictures), self.batch):
            chosen = pictures[start : start + self.batch]
            x = torch.stack([prepare(picture) for picture in chosen]).to(self.device)
            with exact_float32(self.device):
                outputs = self.model(x).predicted_depth.cpu()  # (b, 480, 480)
            for picture, output in zip(chosen, outputs):
                results.append(finish(output, *picture.size))
        return results


def prepare(picture: Image.Image) -> torch.Tensor:
    """RGB picture -> (3, 480, 480) in -1 … 1."""
    squashed = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(squashed)).permute(2, 0, 1) / 255 * 2 - 1


def finish(output: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """The network's output (480, 480) for a picture of width x height -> its depth (H, W)."""
    span = output.max() - output.min()
    if not span > 0:  # NaN too
        raise ValueError("depth: the network's output is constant or not finite; check the device")
    depth = ((output - output.min()) / span)[None, None]
    depth = F.interpolate(depth, (height, width), mode="bilinear", align_corners=True)[0, 0]
    stored = Image.fromarray((depth * 255).numpy()).convert("L")  # cut to whole numbers
    resized = stored.resize(input_size(width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).float() / 255
