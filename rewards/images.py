"""What the scorers of real images share: checking images, making pictures of them, exact float32.

Copy a scorer's file together with this one (GenEval's needs the geneval_*.py files too).
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

TOLERANCE = 1e-3  # a value of -0.0004 or 1.0002 is rounding; one of -1 is another range


def check_tensor(images: torch.Tensor) -> None:
    """ValueError, one line, unless images are floats (B, 3, H, W) in [0, 1]."""
    needed = "images: a tensor of floats (B, 3, H, W) in [0, 1] is needed"
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"{needed}, not {type(images).__name__}")
    right_shape = images.ndim == 4 and images.shape[1] == 3 and 0 not in images.shape[2:]
    if not right_shape or not images.is_floating_point():
        raise ValueError(f"{needed}, not {images.dtype} {tuple(images.shape)}")
    if not len(images):
        return
    low, high = images.amin().item(), images.amax().item()
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # in this form NaN fails too
        raise ValueError(f"images must lie in [0, 1]; these span {low:.3g} to {high:.3g}")


def as_pictures(images: torch.Tensor | Sequence[Image.Image]) -> list[Image.Image]:
    """Floats (B, 3, H, W) in [0, 1] or PIL images of any sizes -> RGB PIL images.

    Floats are rounded to bytes, not truncated, as flow_grpo's training does."""
    if isinstance(images, torch.Tensor):
        check_tensor(images)
        pixels = (images.detach().float() * 255).round().clamp(0, 255).byte()  # (B, 3, H, W)
        return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]
    pictures = []
    for i, image in enumerate(images):
        try:
            pictures.append(as_rgb(image))
        except Exception as error:  # Pillow decodes only here; a damaged file can fail in many ways
            needed = "a PIL image of a whole file is needed"
            raise ValueError(f"image {i} cannot be decoded ({error}); {needed}") from error
    return pictures


def as_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as people see it: turned by its EXIF orientation, 8 bits a channel.

    PIL's own conversion of 16-bit grey cuts all above 255 to white; here 65,535 is white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.array(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image.convert("RGB")


@contextlib.contextmanager
def exact_float32(device: torch.device | str) -> Iterator[None]:
    """No autocast and no TF32 inside; the caller's settings are restored afterwards.

    For scorers whose decisions hang on a threshold: a box just above or just below it is an object
    more or less (geneval issue 15: an A100 with TF32 scores differently)."""
    matmul = torch.get_float32_matmul_precision()
    convolution = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
