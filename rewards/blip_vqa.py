"""BLIP answers a question about an image with yes or no: P(yes), for T2I-CompBench's scorers.

    from rewards import blip_vqa
    model = blip_vqa.load(device="cuda")  # network and tokenizer
    blip_vqa.ask(model, pictures, [["a red car?", "a white sheep?"], …])  # [[.93, .41], …]

The network is that of BLIPvqa_eval in Karine-Huang/T2I-CompBench: ViT-B/16 at 480 pixels, a BERT
encoder that reads the question and looks at the image, and a BERT decoder that is asked for one
token. P(yes) = softmax over the whole vocabulary, yes / (yes + no) = sigmoid(logit_yes - logit_no).

All questions of an image go through the encoder as one sequence in which no question sees another:
the keys and values of the image's 901 tokens, most of the work, are computed once per image.

Weights: model_base_vqa_capfilt_large.pth of salesforce/BLIP (BSD-3), converted once, and the
vocabulary of google-bert/bert-base-uncased (Apache-2.0). FETCH below is the command for both. The
file's hash is not known here. The converter checks every name and shape, and that the decoder's
output matrix is its word embeddings. Salesforce/blip-vqa-capfilt-large on the hub is this network
with its positions interpolated to 384 pixels: its answers differ, and it is refused.
Checked here: BLIP's published forward pass, written as plain functions, on random weights
(experiments/published_blip.py). The real weights were not at hand.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering

from rewards.blip import rename

FILE, TOKENIZER = "model_base_vqa_capfilt_large.pth", "google-bert/bert-base-uncased"
WEIGHTS = "weights/blip_vqa"
FETCH = (
    f"curl -LO https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/{FILE} && "
    f"python -m rewards.convert blip_vqa {FILE} --out {WEIGHTS} && "
    f"hf download {TOKENIZER} --include 'tokenizer*.json' --include vocab.txt"
)
SHA256, REFUSED = None, {}  # for rewards/convert.py: any file whose every weight has its place
START, ENCODE = 30522, 30523  # [DEC], [ENC]: BLIP's two tokens after BERT's vocabulary
YES, NO = 2748, 2053  # of bert-base-uncased
LONGEST = 35  # tokens of a question
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


# ---- The published file


def make_config() -> BlipConfig:
    """Two defaults of transformers differ from BLIP, see rewards/blip.py."""
    vision = {"image_size": 480, "layer_norm_eps": 1e-6}
    return BlipConfig(vision_config=vision, text_config={"num_attention_heads": 12})


make_network = BlipForQuestionAnswering


def convert(content: dict) -> dict[str, torch.Tensor]:
    """The published file -> 789 weights under transformers' names."""
    state = rename(content["model"])
    embeddings = state.get("text_decoder.bert.embeddings.word_embeddings.weight")
    output = state.get("text_decoder.cls.predictions.decoder.weight")
    if embeddings is None or output is None or not torch.equal(embeddings, output):
        raise ValueError("the decoder's output matrix is not its word embeddings, as in BLIP's VQA")
    return state


def load(
    weights: str | Path = WEIGHTS,
    tokenizer: str | Path = TOKENIZER,
    device: torch.device | str = "cpu",
) -> tuple[BlipForQuestionAnswering, BertTokenizer]:
    """ValueError, one line with the command, where something is missing. No download."""
    try:
        config = BlipConfig.from_pretrained(weights, local_files_only=True)
        if config.vision_config.image_size == 384:
            raise OSError("BLIP at 384 pixels gives other answers than at 480")
        network, info = BlipForQuestionAnswering.from_pretrained(
            weights,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        if missing:  # transformers would use random weights in their place
            raise OSError(f"it lacks {len(missing)} weights: {missing[0]}, …")
        words = BertTokenizer.from_pretrained(tokenizer, local_files_only=True)
        # After an incomplete download transformers makes an empty tokenizer.
        if words.convert_tokens_to_ids(["yes", "no"]) != [YES, NO]:
            raise OSError(f"{tokenizer} is not BERT's uncased vocabulary")
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        what = f"cannot load {weights}, {tokenizer} ({reason})"
        raise ValueError(f"blip_vqa: {what}; {FETCH}") from error
    return network.eval().to(device), words


# ---- Questions


@torch.no_grad()
def ask(
    model: tuple[BlipForQuestionAnswering, BertTokenizer],
    pictures: Sequence[Image.Image],
    questions: Sequence[Sequence[str]],
    batch: int = 8,
) -> list[list[float]]:
    """P(yes) of each question of each picture; every picture has one or more.

    batch: pictures per forward pass."""
    network, tokenizer = model
    answers = []
    for i in range(0, len(pictures), batch):
        ids = [tokenize(tokenizer, texts) for texts in questions[i : i + batch]]
        pixels = torch.stack([prepare(picture, network) for picture in pictures[i : i + batch]])
        image = network.vision_model(pixels.to(network.device)).last_hidden_state  # (b, 901, 768)
        yes = decode(network, encode(network, ids, image))  # of all questions in turn
        for of_picture in ids:
            answers.append(yes[: len(of_picture)])
            yes = yes[len(of_picture) :]
    return answers


def prepare(picture: Image.Image, network: BlipForQuestionAnswering) -> torch.Tensor:
    """RGB picture -> (3, 480, 480), squashed to a square, bicubic on bytes."""
    side = network.config.vision_config.image_size
    squashed = picture.resize((side, side), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(squashed)).permute(2, 0, 1) / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def tokenize(tokenizer: BertTokenizer, texts: Sequence[str]) -> list[torch.Tensor]:
    """[CLS] question [SEP], with [ENC] in place of [CLS]: ids (L,) of each question."""
    tokens = [tokenizer(text, truncation=True, max_length=LONGEST).input_ids for text in texts]
    return [torch.tensor([ENCODE, *ids[1:]]) for ids in tokens]


def encode(
    network: BlipForQuestionAnswering, ids: list[list[torch.Tensor]], image: torch.Tensor
) -> list[torch.Tensor]:
    """The questions (L,) of each image -> the states (L, 768) of all questions in turn.

    The questions of an image are one sequence of N tokens. Positions start again at each question,
    and a token sees those of its own question alone."""
    packed, positions, owners = [], [], []
    for of_image in ids:
        lengths = [len(question) for question in of_image]
        packed.append(torch.cat(of_image))
        positions.append(torch.cat([torch.arange(length) for length in lengths]))
        owners.append(torch.repeat_interleave(torch.tensor(lengths)))  # 0 0 0 1 1 2 2 2 2 ...
    owner = pad_sequence(owners, batch_first=True, padding_value=-1)  # (b, N): of which question
    apart = owner[:, None, :, None] != owner[:, None, None, :]  # (b, 1, N, N)
    mask = torch.zeros(apart.shape).masked_fill(apart, torch.finfo(torch.float32).min)
    encoded = network.text_encoder(
        input_ids=pad_sequence(packed, batch_first=True).to(image.device),
        position_ids=pad_sequence(positions, batch_first=True).to(image.device),
        attention_mask=mask.to(image.device),
        encoder_hidden_states=image,
    ).last_hidden_state  # (b, N, 768)
    states = []
    for row, of_image in zip(encoded, ids):
        lengths = [len(question) for question in of_image]
        states += row[: sum(lengths)].split(lengths)
    return states


def decode(network: BlipForQuestionAnswering, states: list[torch.Tensor]) -> list[float]:
    """P(yes) of each question from its states (L, 768).

    transformers 5.23 ignores the mask of cross-attention, so that a padded question would look at
    its padding: questions of one length go together, without any."""
    answers = [0.0] * len(states)
    for length in {len(state) for state in states}:
        rows = [i for i, state in enumerate(states) if len(state) == length]
        start = torch.full((len(rows), 1), START, device=network.device)
        seen = torch.stack([states[i] for i in rows])  # (n, L, 768)
        logits = network.text_decoder(start, encoder_hidden_states=seen).logits[:, 0]
        yes = torch.sigmoid(logits[:, YES] - logits[:, NO])  # (n,)
        for i, value in zip(rows, yes.tolist()):
            answers[i] = value
    return answers
