"""HPSv2.1 and ImageReward: random weights under the published names, converted and scored on the
path of the real ones, against the original forward passes written as plain functions.

    python -m pytest tests/test_rewards_quality.py --slow -rs     # with the published weights
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import raises, shell
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from experiments import published_networks as networks
from rewards import convert, hpsv2, imagereward

NAMES = ["hpsv2", "imagereward"]
MODULE = {"hpsv2": hpsv2, "imagereward": imagereward}
SCORER = {"hpsv2": hpsv2.HPSv2, "imagereward": imagereward.ImageReward}
SHAPES = {"hpsv2": networks.open_clip_shapes, "imagereward": networks.imagereward_shapes}
LARGE = {"hpsv2": networks.OPEN_CLIP_H, "imagereward": networks.IMAGEREWARD}
TINY = {"hpsv2": networks.OPEN_CLIP_TINY, "imagereward": networks.IMAGEREWARD_TINY}
SIZES = [(64, 64), (56, 28), (71, 20), (49, 48), (19, 90)]  # width, height
BICUBIC = Image.Resampling.BICUBIC
PROMPTS = ["a cat", "", "two dogs " * 30, "Ünïcödé ½ 猫 “q” &amp;amp;", "a cat"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(0)
    coarse = [Image.fromarray(generator.integers(0, 256, (5, 5, 3), np.uint8)) for _ in SIZES]
    return [c.resize(size, Image.Resampling.NEAREST) for c, size in zip(coarse, SIZES)]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """(name, change) -> a scorer of tiny weights, published as the real ones are and converted.
    change(state) changes what is published."""

    def make(name, change=lambda state: None, **options):
        module, state = MODULE[name], networks.random_state(SHAPES[name](**TINY[name]))
        change(state)
        content = {"state_dict": state} if name == "hpsv2" else state
        torch.save(content, tmp_path / "published.pt")
        digest = hashlib.sha256((tmp_path / "published.pt").read_bytes()).hexdigest()
        config = networks.shrink(module.make_config(), **TINY[name])
        monkeypatch.setattr(module, "make_config", lambda: config)
        monkeypatch.setattr(module, "SHA256", digest)
        convert.convert_file(module, tmp_path / "published.pt", tmp_path / name)
        monkeypatch.undo()
        networks.save_letter_tokenizers(tmp_path)
        vocabulary = tmp_path / {"hpsv2": "clip", "imagereward": "bert"}[name]
        options = {"tokenizer": vocabulary, "sha256": digest} | options
        return SCORER[name](weights=tmp_path / name, **options), state

    return make


def original_scores(name, state, pictures, tokenizer):
    prepared, tokenizer = [], hf.AutoTokenizer.from_pretrained(tokenizer)
    if name == "hpsv2":  # Pillow's bicubic on floats: antialiased, not clamped
        for picture in pictures:
            size = [round(n * 56 / max(picture.size)) for n in picture.size]
            planes = [p.convert("F").resize(size, BICUBIC) for p in picture.split()]
            pixels = torch.zeros(3, 56, 56)
            left, top = ((56 - n) // 2 for n in size)
            pixels[:, top:, left:][:, : size[1], : size[0]] = torch.tensor(np.stack(planes)) / 255
            prepared.append((pixels - MEAN) / STD)
        ids = torch.zeros(len(PROMPTS), 77, dtype=torch.long)
        for row, prompt in zip(ids, PROMPTS):
            prompt = prompt.replace("“", '"').replace("”", '"').replace("&amp;amp;", "&")
            tokens = tokenizer(prompt).input_ids[1:-1][:75]
            row[: len(tokens) + 2] = torch.tensor([512, *tokens, 513])
        image, text = networks.open_clip_vectors(state, 16, torch.stack(prepared), ids)
        return (image * text).sum(1)
    for picture in pictures:
        size = [int(48 * n / min(picture.size)) for n in picture.size]
        left, top = (int(round((n - 48) / 2.0)) for n in size)
        picture = picture.resize(size, BICUBIC).crop((left, top, left + 48, top + 48))
        prepared.append((torch.tensor(np.array(picture)).permute(2, 0, 1) / 255 - MEAN) / STD)
    ids = torch.zeros(len(PROMPTS), 35, dtype=torch.long)
    for row, prompt in zip(ids, PROMPTS):
        tokens = tokenizer(prompt, add_special_tokens=False).input_ids[:33]
        row[: len(tokens) + 2] = torch.tensor([2, *tokens, 3])  # [CLS], [SEP]
    return networks.imagereward_scores(state, (16, 12), torch.stack(prepared), ids, ids > 0)


def quiet(state):
    """A faint input to the vision encoder, so that the eps of its first norm matters."""
    for part in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        if f"blip.visual_encoder.{part}" in state:
            state[f"blip.visual_encoder.{part}"] *= 0.01


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_original(name, make, pictures):
    """Whatever the batch, the order and the form of the images; also after a second load."""
    reward, state = make(name, quiet)
    assert reward([], []).shape == reward(torch.empty(0, 3, 8, 8), []).shape == (0,)
    raises("2 images and 1 prompts", reward, pictures[:2], ["a"])
    raises("span 2 to 2", reward, torch.full((1, 3, 8, 8), 2.0), ["a"])
    assert reward.model is None and reward.name == name  # so far nothing was loaded
    scores = reward(pictures, PROMPTS)
    expected = original_scores(name, state, pictures, reward.vocabulary)
    assert scores.dtype == torch.float32 and expected.std() > 0.02
    assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    reward.batch, reward.model, order = 2, None, [3, 0, 4, 2, 1]
    shuffled = reward([pictures[i] for i in order], [PROMPTS[i] for i in order])
    assert_close(shuffled, scores[order], rtol=1e-5, atol=1e-5)
    pixels = torch.tensor(np.array(pictures[0])).permute(2, 0, 1)[None] / 255
    assert_close(reward(pixels, PROMPTS[:1]), scores[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, before, after", [("hpsv2", 686, 910), ("imagereward", 625, 612)])
def test_every_published_weight_has_its_place(name, before, after):
    shapes = SHAPES[name](**LARGE[name])
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    state |= {key: torch.zeros(shapes[key]) for key in state if key.startswith("mlp.")}
    assert len(state) == before
    converted = MODULE[name].convert({"state_dict": state} if name == "hpsv2" else state)
    with torch.device("meta"):
        network = MODULE[name].make_network(MODULE[name].make_config())
    convert.check_fit(converted, network.state_dict())
    assert len(converted) == after
    if name == "imagereward":
        towers = [key.partition(".")[0] for key in converted]
        assert [towers.count(t) for t in ("vision_model", "text_encoder", "head")] == [294, 316, 2]


CHANGES = [
    (lambda state: state.update({"x.weight": torch.zeros(2)}), "1 unknown weights: .*x.weight"),
    (lambda state: state.pop([k for k in state if "_emb" in k][-1]), "1 missing weights: .*_emb"),
    (lambda state: state.update({k: state[k].repeat(2) for k in state if k.endswith("ln_post.bias")
                                 or k.endswith("encoder.norm.bias")}), "other shapes: .*64.*32"),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change, message", CHANGES)
def test_conversion_is_strict(name, change, message, make, tmp_path):
    raises(message, make, name, change)
    assert not (tmp_path / name / "model.safetensors").exists()


def test_another_file_is_not_opened(make, tmp_path):
    reward, _ = make("imagereward")
    file, digest = tmp_path / "published.pt", reward.sha256
    read = lambda sha256, refused: convert.read_published(file, sha256, refused)
    raises("is HPS v2.0 .*not comparable with v2.1", read, None, {digest[:8]: hpsv2.V20})
    raises(f"has SHA-256 {digest[:8]}…, not c57a38fb…", read, hpsv2.SHA256, hpsv2.REFUSED)
    torch.save({"state_dict": print}, file)  # more than tensors
    raises("cannot be read .*[Ww]eights", read, None, {})
    raises("there is no file", convert.read_published, tmp_path / "none", None, {})
    assert "07cb0d20" in hpsv2.REFUSED  # HPS_v2_compressed.pt
    ended = shell("-m", "rewards.convert", "hpsv2", file, "--out", tmp_path / "out")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: hpsv2: ") and hpsv2.FETCH in ended.stderr


@pytest.mark.parametrize("name", NAMES)
def test_other_weights_get_no_score(name, make, tmp_path, pictures):
    """The error has the command that fetches and converts."""
    reward, score = make(name)[0], lambda reward: reward(pictures[:1], ["a"])
    command = f"; hf download .* && python -m rewards.convert {name} weights/.*hf download"
    raises(f"{name}: cannot load no/such.*{command}", score, SCORER[name](weights="no/such"))
    reward.sha256 = MODULE[name].SHA256
    raises(f"{name}: .* was not converted from .*{command}", score, reward)
    reward.sha256, reward.vocabulary = (
        None,
        tmp_path / {"hpsv2": "bert", "imagereward": "clip"}[name],
    )
    raises(f"{name}: .*{command}", score, reward)
    state = load_file(tmp_path / name / "model.safetensors")
    state.pop(min(state))
    save_file(state, tmp_path / name / "model.safetensors")
    raises(f"{name}: .*{command}", score, reward)


@pytest.mark.parametrize("last, golden", [(0.0, -0.161780), (1.0, 0.805956)])
def test_imagereward_standardises_the_mlp(last, golden, make, pictures):
    def constant(state):
        for key in state:
            state[key] *= not key.startswith("mlp.")
        state["mlp.layers.7.bias"] += last

    score = make("imagereward", constant)[0](pictures[:1], ["a"])
    assert_close(score, torch.tensor([golden]), rtol=0, atol=1e-6)


def test_what_does_not_change_a_score(make, pictures, monkeypatch):
    """HPSv2: the logit scale. ImageReward: more padding."""
    hps, images = make("hpsv2")[0], make("imagereward")[0]
    scores = [hps(pictures, PROMPTS), images(pictures[:2], PROMPTS[:2])]
    hps.model.logit_scale.data.fill_(9.0)
    monkeypatch.setattr(imagereward, "LENGTH", 60)
    assert_close(hps(pictures, PROMPTS), scores[0], rtol=0, atol=0)
    assert_close(images(pictures[:2], PROMPTS[:2]), scores[1], rtol=1e-5, atol=1e-6)
    assert scores[0].abs().max() <= 1


def test_images_are_prepared_as_upstream_does():
    x = hpsv2.prepare(Image.new("RGB", (512, 256), "white"), 224)
    black = (-MEAN / STD).expand(3, 56, 224)
    assert x.shape == (3, 224, 224) and x[:, 56:168].min() > 1.9  # 112 rows of the picture
    assert_close(x[:, :56], black, rtol=0, atol=0)
    assert_close(x[:, 168:], black, rtol=0, atol=0)
    assert hpsv2.prepare(Image.new("RGB", (1, 1000)), 224).shape == (3, 224, 224)
    columns = Image.fromarray(
        np.arange(35, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2)
    )
    for width, first in ((32, 0), (33, 0), (34, 1), (35, 2)):  # 3 surplus columns: 1.5 -> 2
        x = imagereward.prepare(columns.crop((0, 0, width, 32)), 32) * STD + MEAN
        assert_close(x[0, 0] * 255, torch.arange(first, first + 32.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "prompt, cleaned",
    [("a “cat’s” ‘hat‛", "a \"cat's\" 'hat'"), ("&amp;quot;a&amp;quot; &lt;3", '"a" <3'),
     ("ＡＢ，ｃ！", "AB,c!"), ("\ufeffÜ ½ 猫 ﬁ", "Ü ½ 猫 ﬁ"), ("", "")],
)  # fmt: skip
def test_hpsv2_cleans_prompts(prompt, cleaned):
    assert hpsv2.clean(prompt) == cleaned


# ---- Published weights


def scores_or_skip(reward, images, prompts):
    try:
        return reward(images, prompts)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_imagerewards_published_scores():
    """The example of its README, whose images are in the repository under assets/images."""
    fetch = (
        "curl -L --create-dirs --output-dir weights -O https://github.com/THUDM/ImageReward/raw/"
    )
    files = [Path(f"weights/{i}.webp") for i in (1, 2, 3, 4)]
    if not all(file.is_file() for file in files):
        pytest.skip(f"{fetch}main/assets/images/[1-4].webp")
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    images = [Image.open(file) for file in files]
    scores = scores_or_skip(imagereward.ImageReward(), images, [prompt] * 4)
    golden = torch.tensor([0.581162, 0.274528, -1.413182, -2.029570])
    assert_close(scores, golden, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name, low, high", [("hpsv2", 0.1, 0.45), ("imagereward", -3, 3)])
def test_the_right_prompt_scores_higher(name, low, high):
    images = [Image.new("RGB", (512, 512), "white") for _ in range(2)]
    for image, colour in zip(images, ("red", "blue")):
        ImageDraw.Draw(image).ellipse((100, 100, 400, 400), fill=colour)
    prompts = ["a red circle", "a blue circle"]
    right = scores_or_skip(SCORER[name](), images, prompts)
    wrong = SCORER[name]()(images, prompts[::-1])
    assert (right > wrong).all() and low < right.min() and right.max() < high
