"""Names of BLIP's weights: those of salesforce/BLIP -> those of transformers' BLIP.

    with torch.device("meta"):  # shapes alone
        model = BlipForQuestionAnswering(config)
    check_fit(rename(state), model.state_dict())  # rewards/convert.py; one to one, or ValueError

The original's names are those of BLIP's models/vit.py and models/med.py. Text encoder and text
decoder have the same names in transformers, and in both the vision encoder's qkv is one matrix.
Tensors: vision 294 (ViT-L) or 150 (ViT-B), text encoder 316, text decoder 323 (its word embeddings
are there twice, also as cls.predictions.decoder.weight).

Two of transformers' defaults differ from BLIP: text_config needs num_attention_heads=12 (not 8),
vision_config needs layer_norm_eps=1e-6 (not 1e-5). Neither changes a shape, so no check finds them.
"""

import re

import torch

BLOCK, BLOCK_TO = r"visual_encoder\.blocks\.(\d+)\.", r"vision_model.encoder.layers.\1."
NAMES = (
    (r"visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (BLOCK + r"norm([12])\.", BLOCK_TO + r"layer_norm\2."),
    (BLOCK + r"attn\.qkv\.", BLOCK_TO + "self_attn.qkv."),
    (BLOCK + r"attn\.proj\.", BLOCK_TO + "self_attn.projection."),
    (BLOCK + r"mlp\.fc([12])\.", BLOCK_TO + r"mlp.fc\2."),
    (r"visual_encoder\.norm\.", "vision_model.post_layernorm."),
)


def rename(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """BLIP's state_dict under transformers' names.

    position_ids are left out: transformers computes them. A key that BLIP does not have keeps its
    name, so that a comparison with the model's own names finds it."""
    renamed = {}
    for key, tensor in state.items():
        if key.endswith(".embeddings.position_ids"):
            continue
        for source, target in NAMES:
            key = re.sub("^" + source, target, key)
        renamed[key] = tensor
    return renamed
