"""Monitors of reward hacking: numbers to log beside the rewards, never to train on. Pure torch.

    from rewards.monitors import colour_entropy, diversity, edge_density
    for monitor in (edge_density, colour_entropy, diversity):
        log[monitor.name] = monitor(images, prompts).nanmean().item()

If the reward rises while a monitor drifts from its early values, suspect reward hacking. Typically:
edge_density    rises with grids, stripes and over-sharpened texture, which aesthetic and preference
                scores like; falls with blur
colour_entropy  falls with flat backgrounds and with washed-out or posterised colours
diversity       falls to 0 when all images of a prompt become one image: no per-image score sees it
Compare only images of one size. The definitions are ours, and deliberately simple.

Signature and attributes are those of every reward: (images, prompts, metadata) -> (B,) float32 on
the CPU; images are floats (B, 3, H, W) in [0, 1]; higher_is_better is None.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from rewards.images import check_tensor


def edge_density(
    images: torch.Tensor,
    prompts: Sequence[str] | None = None,
    metadata: Sequence[dict] | None = None,
    threshold: float = 0.25,
) -> torch.Tensor:
    """Share of pixels on an edge.

    Edge: the Sobel gradient of the grey image is above `threshold`; from black to white it is 1."""
    grey = luminance(checked(images))  # (B, 1, H, W)
    smooth = grey.new_tensor([1.0, 2.0, 1.0]) / 4
    slope = grey.new_tensor([-1.0, 0.0, 1.0])
    along_x, along_y = smooth[:, None] * slope, slope[:, None] * smooth  # (3, 3)
    kernels = torch.stack([along_x, along_y])[:, None]  # (2, 1, 3, 3)
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(padded, kernels).norm(dim=1)  # (B, H, W)
    return (gradient > threshold).flatten(1).float().mean(1).cpu()


def colour_entropy(
    images: torch.Tensor,
    prompts: Sequence[str] | None = None,
    metadata: Sequence[dict] | None = None,
    bins: int = 8,
) -> torch.Tensor:
    """Entropy in bits of the image's colours on a grid of bins^3.

    0 for one flat colour, at most 9 with 8 bins."""
    levels = (checked(images) * bins).long().clamp(0, bins - 1)  # (B, 3, H, W)
    cells = ((levels[:, 0] * bins + levels[:, 1]) * bins + levels[:, 2]).flatten(1)  # (B, H W)
    ones = torch.ones_like(cells, dtype=torch.float32)
    count = torch.zeros(len(cells), bins**3, device=cells.device).scatter_add(1, cells, ones)
    share = count / count.sum(1, keepdim=True)
    nats = torch.special.entr(share).sum(1)  # entr(p) = -p log p, 0 at p = 0
    return (nats / torch.log(share.new_tensor(2.0))).cpu()


def diversity(
    images: torch.Tensor,
    prompts: Sequence[str],
    metadata: Sequence[dict] | None = None,
) -> torch.Tensor:
    """How far each image is from the others of its prompt; 0: they are all alike.

    The mean over the others of the root mean square difference of two images at 32 x 32 pixels.
    NaN where a prompt has one image: there is nothing to compare with. Several processes gather
    their `thumbnails`, which are all that it looks at."""
    small = thumbnails(images).flatten(1)  # (B, 3 32 32)
    prompts = list(prompts)
    if len(prompts) != len(small):
        counts = f"{len(small)} images and {len(prompts)} prompts"
        raise ValueError(f"diversity: {counts}; give one prompt per image")
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    numbers = [number[prompt] for prompt in prompts]
    group = torch.tensor(numbers, dtype=torch.long, device=small.device)  # (B,)
    itself = torch.eye(len(small), dtype=torch.bool, device=small.device)
    others = (group[:, None] == group) & ~itself  # (B, B)
    # A matrix product would round: equal images would get a distance above 0.
    distance = torch.cdist(small, small, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / small.shape[1] ** 0.5  # (B, B)
    return ((distance * others).sum(1) / others.sum(1)).cpu()


edge_density.name, edge_density.range = "edge_density", (0.0, 1.0)
colour_entropy.name, colour_entropy.range = "colour_entropy", (0.0, 9.0)
diversity.name, diversity.range = "diversity", (0.0, 1.0)
for monitor in (edge_density, colour_entropy, diversity):
    monitor.higher_is_better = None


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 3, 32, 32); images of that size stay as they are."""
    resize = {"mode": "bilinear", "antialias": True, "align_corners": False}
    return F.interpolate(checked(images), (32, 32), **resize)


def luminance(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), with the weights of ITU-R BT.601."""
    weights = images.new_tensor([0.299, 0.587, 0.114])
    return torch.einsum("bchw,c->bhw", images, weights)[:, None]


def checked(images: torch.Tensor) -> torch.Tensor:
    """The images as float32, clipped to [0, 1]; ValueError where they are something else."""
    check_tensor(images)
    return images.detach().float().clamp(0, 1)
