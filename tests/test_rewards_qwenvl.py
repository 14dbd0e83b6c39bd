"""rewards/qwenvl.py on tiny random models of each kind: its tokens, its decoding, its scores."""

import hashlib
import shutil

import pytest
import torch
from conftest import raises
from PIL import Image

from experiments.published_networks import coarse_pictures, lose_weight, save_qwenvl
from rewards import qwenvl
from rewards.qwenvl import KINDS, PROMPT, QwenVL

PICTURES = coarse_pictures((40, 90), (64, 48), (56, 56))
PROMPTS = ["a {red} cat", "“ü” 猫 {prompt} {}", "a"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_qwenvl(folder, request.param)
    return folder


def judge(folder):
    scorer = QwenVL(folder, dtype=torch.float32, max_new_tokens=4)
    scorer.load()
    return scorer


REPLIES = {
    "<Thought>fine</Thought>\n<OverallScore>4</OverallScore>": 4,
    "<OverallScore>2</OverallScore><OverallScore>5</OverallScore>": 2,
    "<OverallScore>10</OverallScore>": 10,
    "<OverallScore>4.5</OverallScore>": 0,
    "<OverallScore>4/5</OverallScore>": 0,
    "<OverallScore> 4 </OverallScore>": 0,
    "<Score>4</Score> <QualityScore>5</QualityScore>": 0,
}


def test_scores_are_read_as_the_public_code_reads_them(monkeypatch):
    digest = "578ce7772dee3667a97758269180c51a5d3023b4eec2ed0da29c01c985e18a47"
    assert hashlib.sha256(PROMPT.encode()).hexdigest() == digest  # the published prompt
    scorer, replies = QwenVL("Qwen/Qwen3-VL-8B-Instruct", batch=2), iter(REPLIES)
    scorer.model = "loaded"
    write = lambda pictures, prompts: [next(replies) for _ in zip(pictures, prompts)]
    monkeypatch.setattr(scorer, "replies", write)
    assert scorer.name == "qwenvl@Qwen3-VL-8B-Instruct"
    assert scorer(torch.zeros(7, 3, 8, 8), ["a"] * 7).tolist() == list(REPLIES.values())
    assert scorer([], []).shape == (0,)
    raises("2 images and 1 prompts", scorer, torch.zeros(2, 3, 8, 8), ["a"])


def test_the_turn_of_the_chat(folder):
    """As the models' chat templates write it. What a prompt holds is text."""
    scorer, number = judge(folder), 6
    start = "<|im_start|>user\n<|vision_start|>"
    if "qwen2" in scorer.model.config.model_type:
        start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + start
    for prompt in PROMPTS:
        text = start + "<|image_pad|>" * number + "<|vision_end|>"
        text += PROMPT.replace("{prompt}", prompt) + "<|im_end|>\n<|im_start|>assistant\n"
        assert scorer.tokens(prompt, number) == scorer.tokenizer(text).input_ids
    special = lambda prompt: [token for token in scorer.tokens(prompt, 3) if token > 255]
    assert special("<|im_end|> <|image_pad|>") == special("a")
    grid = scorer.processor([Image.new("RGB", (512, 512))], return_tensors="pt").image_grid_thw
    assert grid.prod() // 4 == {14: 324, 16: 256}[scorer.processor.patch_size]


@torch.no_grad()
def test_replies_are_those_of_an_argmax_loop(folder, monkeypatch):
    """Greedy, whatever the model's own settings; padding and a cache change nothing."""
    monkeypatch.setattr(qwenvl, "PROMPT", "Rate {prompt}!")  # the real one is 2,000 letters long
    scorer, expected = judge(folder), []
    for picture, prompt in zip(PICTURES, PROMPTS):
        seen, reply = scorer.processor([picture], return_tensors="pt"), []
        ids = scorer.tokens(prompt, int(seen.image_grid_thw.prod()) // 4)
        for _ in range(4):
            row = torch.tensor([ids + reply])
            types = {"mm_token_type_ids": (row == scorer.model.config.image_token_id).long()}
            reply.append(int(scorer.model(row, **types, **seen).logits[0, -1].argmax()))
        expected.append(scorer.tokenizer.decode(reply))
    assert len(set(expected)) > 1
    assert scorer.replies(PICTURES, PROMPTS) == expected
    assert [scorer.replies([x], [y])[0] for x, y in zip(PICTURES, PROMPTS)] == expected


@pytest.mark.parametrize("file", ["config", "model", "tokenizer", "preprocessor_config"])
def test_an_incomplete_folder_is_an_error_of_one_line(folder, tmp_path, file):
    copy = shutil.copytree(folder, tmp_path / "copy")
    if file == "model":
        lose_weight(copy / "model.safetensors")
        raises("qwenvl@copy: .* lacks 1 weights.*; hf download", judge, copy)
    for path in copy.glob(f"{file}.*"):
        path.unlink()
    raises("qwenvl@copy: .*; hf download .+$", judge, copy)
