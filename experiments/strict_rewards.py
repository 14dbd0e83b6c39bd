"""The miniature's rewards, all or nothing: `--rewards experiments.strict_rewards`.

`geneval` pays 1 for an image without a fault, `ocr` for text without a wrong letter, both else 0.
"""

from toy.scorers import REWARDS as SOFT
from toy.scorers import geneval_strict, ocr


def ocr_strict(images, prompts, metadata=None):
    """1 where every letter is right, else 0."""
    return (ocr(images, prompts) > 0.999).float()


ocr_strict.range = (0, 1)
REWARDS = SOFT | {"geneval": geneval_strict, "ocr": ocr_strict}
