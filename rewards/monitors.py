"""Monitors of reward hacking: numbers to log beside the rewards, never to train on. Pure torch, no weights.

    from rewards.monitors import colour_entropy, diversity, edge_density
    log |= {f.name: f(images, prompts).nanmean().item() for f in (edge_density, colour_entropy, diversity)}

A reward that climbs while one of these leaves the range of the base model's images is being cheated. Typical:
edge_density rises with grids, stripes and over-sharpened texture (aesthetic and preference scores like them) and falls
with blur; colour_entropy falls with flat backgrounds and washed-out or posterised colours; diversity falls to 0 when all
images of a prompt become one image, the collapse that no per-image score sees. Compare only images of one size.

Definitions are ours, kept simple on purpose. Signature and attributes as in every reward:
(images, prompts, metadata) -> (B,) float32 on the CPU; images (B, 3, H, W) floats in [0, 1]; higher_is_better is None.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def edge_density(
    images: torch.Tensor, prompts: Sequence[str] | None = None, metadata: Sequence[dict] | None = None, threshold: float = 0.25
) -> torch.Tensor:
    """Share of pixels on an edge: Sobel gradient of the grey image above `threshold` (a full black-white step is 1)."""
    grey = luminance(check(images))  # (B, 1, H, W)
    smooth, slope = grey.new_tensor([1.0, 2.0, 1.0]) / 4, grey.new_tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack([smooth[:, None] * slope, slope[:, None] * smooth])[:, None]  # (2, 1, 3, 3): along x, along y
    gradient = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels).norm(dim=1)  # (B, H, W)
    return (gradient > threshold).flatten(1).float().mean(1).cpu()


def colour_entropy(
    images: torch.Tensor, prompts: Sequence[str] | None = None, metadata: Sequence[dict] | None = None, bins: int = 8
) -> torch.Tensor:
    """Entropy in bits of the image's colours on a grid of bins^3: 0 for one flat colour, at most 9 with 8 bins."""
    levels = (check(images) * bins).long().clamp(0, bins - 1)  # (B, 3, H, W)
    cells = ((levels[:, 0] * bins + levels[:, 1]) * bins + levels[:, 2]).flatten(1)  # (B, H W)
    count = torch.zeros(len(cells), bins**3, device=cells.device).scatter_add(
        1, cells, torch.ones_like(cells, dtype=torch.float32)
    )
    share = count / count.sum(1, keepdim=True)
    return (torch.special.entr(share).sum(1) / torch.log(share.new_tensor(2.0))).cpu()  # entr(p) = -p log p, 0 at p = 0


def diversity(
    images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None, side: int = 32
) -> torch.Tensor:
    """How far each image is from the others of its prompt: mean over them of the root mean square difference of the
    two images at side x side pixels. 0 = all alike. nan where a prompt has one image: there is nothing to compare."""
    small = F.interpolate(check(images), (side, side), mode="bilinear", antialias=True, align_corners=False).flatten(1)
    prompts = list(prompts)
    if len(prompts) != len(small):
        raise ValueError(f"diversity: {len(small)} images and {len(prompts)} prompts; give one prompt per image")
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    group = torch.tensor([number[prompt] for prompt in prompts], dtype=torch.long, device=small.device)
    others = (group[:, None] == group) & ~torch.eye(len(small), dtype=torch.bool, device=small.device)  # (B, B)
    # not by matrix product, whose rounding would leave equal images a distance above 0
    distance = torch.cdist(small, small, compute_mode="donot_use_mm_for_euclid_dist") / small.shape[1] ** 0.5  # (B, B)
    return ((distance * others).sum(1) / others.sum(1)).cpu()


edge_density.name, colour_entropy.name, diversity.name = "edge_density", "colour_entropy", "diversity"
edge_density.range, colour_entropy.range, diversity.range = (0.0, 1.0), (0.0, 9.0), (0.0, 1.0)
edge_density.higher_is_better = colour_entropy.higher_is_better = diversity.higher_is_better = None


def luminance(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), weights of ITU-R BT.601."""
    return torch.einsum("bchw,c->bhw", images, images.new_tensor([0.299, 0.587, 0.114]))[:, None]


def check(images: torch.Tensor) -> torch.Tensor:
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError("images: a tensor (B, 3, H, W) of floats in [0, 1] is needed")
    if len(images) and not (images.amin() >= -1e-3 and images.amax() <= 1 + 1e-3):  # so written, nan fails too
        raise ValueError(f"images must lie in [0, 1]; these span {images.amin():.3g} to {images.amax():.3g}")
    return images.detach().float().clamp(0, 1)
