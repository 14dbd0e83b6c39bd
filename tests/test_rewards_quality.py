"""HPSv2.1 and ImageReward: random weights under the published names, converted and scored on the
path of the real ones, against the original forward passes written as plain functions."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import raises, shell
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from experiments import published_networks as networks
from experiments.published_networks import MEAN, QUALITY, STD
from rewards import convert, hpsv2, imagereward

MODULES = {"hpsv2": hpsv2, "imagereward": imagereward}
SCORERS = {"hpsv2": hpsv2.HPSv2, "imagereward": imagereward.ImageReward}
SIZES = [(64, 64), (56, 28), (71, 22), (49, 48), (19, 90)]  # width, height
PROMPTS = ["a cat", "", "two dogs " * 30, "Ünïcödé ½ 猫 “q” &amp;amp;", "a cat"]
CLEANED = [*PROMPTS[:3], 'Ünïcödé ½ 猫 "q" &', "a cat"]


@pytest.fixture(scope="module")
def pictures():
    coarse = [np.random.randint(0, 256, (5, 5, 3), np.uint8) for _ in SIZES]
    return [Image.fromarray(c).resize(size, 0) for c, size in zip(coarse, SIZES)]


@pytest.fixture
def make(tmp_path):
    """(name, state) -> a scorer of this state, published as the real one is, and converted."""
    networks.save_letter_tokenizers(tmp_path)

    def make(name, state):
        torch.save({"state_dict": state} if name == "hpsv2" else state, tmp_path / "file.pt")
        digest = hashlib.sha256((tmp_path / "file.pt").read_bytes()).hexdigest()
        config = networks.shrink(MODULES[name].make_config(), **QUALITY[name][2])
        own = {"SHA256": digest, "make_config": lambda: config}
        module = SimpleNamespace(**vars(MODULES[name]) | own)
        convert.convert_file(module, tmp_path / "file.pt", tmp_path / name)
        vocabulary = tmp_path / {"hpsv2": "clip", "imagereward": "bert"}[name]
        return SCORERS[name](weights=tmp_path / name, tokenizer=vocabulary, sha256=digest)

    return make


@pytest.mark.parametrize("name", MODULES)
def test_scores_are_those_of_the_original(name, make, pictures):
    """Whatever the batch, the order and the form of the images; also after a second load."""
    state = networks.quality_state(name)
    reward = make(name, state)
    assert reward([], []).shape == reward(torch.empty(0, 3, 8, 8), []).shape == (0,)
    raises("2 images and 1 prompts", reward, pictures[:2], ["a"])
    raises("span 2 to 2", reward, torch.full((1, 3, 8, 8), 2.0), ["a"])
    assert reward.model is None and reward.name == name  # so far nothing was loaded
    scores = reward(pictures, PROMPTS)
    tokens = hf.AutoTokenizer.from_pretrained(reward.vocabulary)
    words = tokens({"hpsv2": CLEANED}.get(name, PROMPTS), add_special_tokens=False).input_ids
    expected = getattr(networks, f"{name}_from_pictures")(state, pictures, words)
    assert scores.dtype == torch.float32 and expected.std() > 0.02
    assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    reward.batch, reward.model, order = 2, None, [3, 0, 4, 2, 1]
    shuffled = reward([pictures[i] for i in order], [PROMPTS[i] for i in order])
    assert_close(shuffled, scores[order], rtol=1e-5, atol=1e-5)
    pixels = torch.tensor(np.array(pictures[0])).permute(2, 0, 1)[None] / 255
    assert_close(reward(pixels, PROMPTS[:1]), scores[:1], rtol=1e-5, atol=1e-5)


PARTS = {"hpsv2": {"vision_model": 519, "text_model": 388, "visual_projection": 1},
         "imagereward": {"vision_model": 294, "text_encoder": 316, "head": 2}}  # fmt: skip


@pytest.mark.parametrize(
    "name, before, after, size",
    [("hpsv2", 686, 910, 1_972_490_005 / 2), ("imagereward", 625, 612, 1.79e9 / 4)],
)
def test_every_published_weight_has_its_place(name, before, after, size):
    shapes = QUALITY[name][0](**QUALITY[name][1])
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert len(state) == before  # size: numbers in the published file
    assert sum(tensor.numel() for tensor in state.values()) == pytest.approx(size, rel=0.002)
    state |= {key: torch.zeros(shapes[key]) for key in state if key.startswith("mlp.")}
    converted = MODULES[name].convert({"state_dict": state} if name == "hpsv2" else state)
    with torch.device("meta"):
        network = MODULES[name].make_network(MODULES[name].make_config())
    convert.check_fit(converted, network.state_dict())
    assert len(converted) == after
    for part, count in PARTS[name].items():
        assert sum(key.startswith(part + ".") for key in converted) == count


CHANGES = [({"x.weight": 2}, "1 unknown weights: .*x.weight"), ({}, "1 missing weights: "),
           ({"ln_final.bias": 3, "blip.visual_encoder.norm.bias": 3}, r"\(3,\), not \(")]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("change, message", CHANGES)
def test_conversion_is_strict(name, change, message, make, tmp_path):
    state = networks.quality_state(name)
    change = {k: n for k, n in change.items() if k in state or k == "x.weight"}
    state |= {key: torch.zeros(n) for key, n in change.items()}
    if not change:
        state.pop(next(key for key in state if "token_embedding" in key or "word_emb" in key))
    raises(message, make, name, state)
    assert not (tmp_path / name).exists()


def test_another_file_is_not_opened(tmp_path):
    file, out = tmp_path / "file.pt", tmp_path / "out"
    torch.save({"state_dict": print}, file)  # more than tensors
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    raises("cannot be read .*[Ww]eights", convert.read_published, file, digest, hpsv2.REFUSED)
    raises("is HPS v2.0", convert.read_published, file, None, {digest[:8]: hpsv2.V20})
    assert hpsv2.REFUSED == {"07cb0d20": hpsv2.V20}  # HPS_v2_compressed.pt
    ended = shell("-m", "rewards.convert", "hpsv2", file, "--out", out)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and not out.exists()
    assert ended.stderr.startswith("error: hpsv2: ") and hpsv2.FETCH in ended.stderr


@pytest.mark.parametrize("name", MODULES)
def test_other_weights_get_no_score(name, make, tmp_path, pictures):
    """The error has the command that fetches and converts."""
    reward, file = make(name, networks.quality_state(name)), tmp_path / name / "model.safetensors"
    command = f"; hf download .* && python -m rewards.convert {name} weights/.*hf download"
    refused = lambda message, **options: raises(
        f"{name}: .*{message}.*{command}",
        SCORERS[name](**{"weights": tmp_path / name, "tokenizer": reward.vocabulary} | options),
        pictures[:1], ["a"],
    )  # fmt: skip
    refused("cannot load no/such", weights="no/such")
    refused("was not converted from")
    other = tmp_path / {"hpsv2": "bert", "imagereward": "clip"}[name]
    refused("(vocabulary|cannot load)", tokenizer=other, sha256=None)
    state = load_file(file)
    state.pop("logit_scale" if name == "hpsv2" else "head.bias")
    save_file(state, file)
    refused("(lacks 1 weights .logit|Missing key.*head.bias)", sha256=None)


@pytest.mark.parametrize("last, golden", [(0.0, -0.161780), (1.0, 0.805956)])
def test_imagereward_standardises_the_mlp(last, golden, make, pictures):
    state = networks.quality_state("imagereward")
    state |= {key: torch.zeros_like(state[key]) for key in state if key.startswith("mlp.")}
    state["mlp.layers.7.bias"] += last
    score = make("imagereward", state)(pictures[:1], ["a"])
    assert_close(score, torch.tensor([golden]), rtol=0, atol=1e-6)


def test_what_does_not_change_a_score(make, pictures, monkeypatch):
    """HPSv2: the logit scale. ImageReward: more padding."""
    hps, image = (make(name, networks.quality_state(name)) for name in MODULES)
    scores = hps(pictures, PROMPTS), image(pictures[:2], PROMPTS[:2])
    hps.model.logit_scale.data.fill_(9.0)
    monkeypatch.setattr(imagereward, "LENGTH", 60)
    assert torch.equal(hps(pictures, PROMPTS), scores[0]) and scores[0].abs().max() <= 1
    assert_close(image(pictures[:2], PROMPTS[:2]), scores[1], rtol=1e-5, atol=1e-6)


def test_images_are_prepared_as_upstream_does():
    x = hpsv2.prepare(Image.new("RGB", (512, 256), "white"), 224)
    black = (-MEAN / STD).expand(3, 56, 224)
    assert x.shape == (3, 224, 224) and x[:, 56:168].min() > 1.9  # 112 rows of the picture
    assert torch.equal(x[:, :56], black) and torch.equal(x[:, 168:], black)
    assert hpsv2.prepare(Image.new("RGB", (1, 1000)), 224).shape == (3, 224, 224)
    columns = Image.fromarray(np.arange(35, dtype=np.uint8)[None].repeat(32, 0)).convert("RGB")
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


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_the_published_weights(name):
    """The right prompt scores higher; ImageReward's four published scores."""
    reward, images = SCORERS[name](), [Image.new("RGB", (512, 512), "white") for _ in range(2)]
    for image, colour in zip(images, ("red", "blue")):
        ImageDraw.Draw(image).ellipse((100, 100, 400, 400), fill=colour)
    try:
        right = reward(images, ["a red circle", "a blue circle"])
    except ValueError as error:
        pytest.skip(str(error))
    assert (right > reward(images, ["a blue circle", "a red circle"])).all()
    if name == "imagereward":
        files = [Path(f"weights/{i}.webp") for i in (1, 2, 3, 4)]
        if not files[0].is_file():
            page = "https://github.com/THUDM/ImageReward/raw/main/assets/images"
            pytest.skip(f"curl -L --output-dir weights -O '{page}/[1-4].webp'")
        prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
        scores = reward([Image.open(file) for file in files], [prompt] * 4)
        golden = torch.tensor([0.581162, 0.274528, -1.413182, -2.029570])
        assert_close(scores, golden, rtol=0, atol=1e-3)
