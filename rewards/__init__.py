"""The scorers of the paper's tables by name, for `--rewards rewards`.

    python evaluate.py --rewards rewards --tasks ocr --prompts ocr=data/ocr_test.txt …

Nothing is loaded until a scorer is first called. A reward and a metric are the same function:
`REWARDS["pickscore"](images, prompts, metadata) -> scores (B,)`.
"""

import support  # noqa: F401  quiets what follows
from rewards.aesthetic import Aesthetic
from rewards.clipscore import CLIPScore
from rewards.deqa import DeQA
from rewards.geneval import GenEval
from rewards.hpsv2 import HPSv2
from rewards.imagereward import ImageReward
from rewards.ocr import OCR
from rewards.pickscore import PickScore
from rewards.qwenvl import JUDGES, QwenVL
from rewards.t2i_compbench import AttributeBinding, Numeracy, Spatial3D

REWARDS = {
    "geneval": GenEval(),  # the softened reward; the published column fits it
    "geneval_official": GenEval(mode="official"),
    "ocr": OCR(),
    "deqa": DeQA(),
    "pickscore": PickScore(),
    "clipscore": CLIPScore(),
    "aesthetic": Aesthetic(),
    "imagereward": ImageReward(),
    "hpsv2": HPSv2(),
    "t2i_color": AttributeBinding("color"),
    "t2i_shape": AttributeBinding("shape"),
    "t2i_texture": AttributeBinding("texture"),
    "t2i_3d": Spatial3D(),
    "t2i_3d_fixed": Spatial3D("fixed"),  # with depth inside the boxes, which upstream transposes
    "t2i_numeracy": Numeracy(),
}
for judge in JUDGES:  # only those whose weights are there give a column
    REWARDS[f"qwenvl@{judge}"] = QwenVL(f"Qwen/{judge}")
