"""HPSv2.1 and ImageReward: random weights under the published names, converted and scored on the path
of the real ones, against the original forward passes written as plain functions.

    python -m pytest tests/test_rewards_quality.py --slow -rs     # with the published weights
"""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import raises
from PIL import Image
from torch.testing import assert_close

from experiments import published_networks as networks
from rewards import blip, convert, hpsv2, imagereward

SIZES = [(64, 64), (56, 28), (71, 20), (49, 48), (19, 90)]  # width, height
PROMPTS = ["a cat", "", "two dogs " * 30, "Ünïcödé ½ 猫 “q” &amp;amp;", "a cat"]
MODULES = {"hpsv2": hpsv2, "imagereward": imagereward}
SCORERS = {"hpsv2": hpsv2.HPSv2, "imagereward": imagereward.ImageReward}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def content(name):
    """What the published file would hold, tiny."""
    if name == "hpsv2":
        return {"state_dict": networks.random_state(networks.open_clip_shapes(**networks.OPEN_CLIP_TINY))}
    return networks.random_state(networks.imagereward_shapes(**networks.IMAGEREWARD_TINY))


def tiny_config(name):
    """The published one with other sizes: heads, activation and epsilons stay."""
    config, sizes = MODULES[name].make_config(), {"hpsv2": networks.OPEN_CLIP_TINY, "imagereward": networks.IMAGEREWARD_TINY}[name]
    for part, of in ((config.vision_config, "vision"), (config.text_config, "text")):
        part.hidden_size, part.num_hidden_layers = sizes[of]
        part.intermediate_size = 4 * part.hidden_size
    config.vision_config.image_size, config.text_config.vocab_size = sizes["side"], sizes["words"]
    config.text_config.encoder_hidden_size = sizes["vision"][0]
    if name == "hpsv2":
        config.projection_dim = sizes["projection"]
        config.text_config.bos_token_id, config.text_config.eos_token_id = 512, 513
    return config
