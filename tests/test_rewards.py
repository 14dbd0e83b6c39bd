"""rewards/ without downloads: what all scorers have in common, on the path of real weights with
tiny random ones, and against the same steps written out anew; then the parts of some.

    python -m pytest tests/test_rewards.py --slow     # with the published weights, where they are
"""

import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from conftest import raises
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch.testing import assert_close

from experiments import published_networks as networks
from experiments import published_steps as steps
from experiments.tiny_scorers import inputs
from rewards import REWARDS, aesthetic, clipscore, deqa, monitors, pickscore
from rewards.images import as_pictures, exact_float32

PICTURES = networks.coarse_pictures((64, 64), (56, 28), (71, 22), (64, 64), (49, 48), (21, 94))
PROMPTS = ["a cat", "", "two dogs " * 30, "Ünïcödé ½ 猫 “q” &amp;amp;", "a cat", "x"]
QUALITY = ["hpsv2", "imagereward"]
NAMES = ["pickscore", "clipscore", "aesthetic", "deqa", "ocr", "geneval", *QUALITY]
LINE = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}  # GenEval's metadata


# ---- What all scorers have in common


@pytest.mark.parametrize("name", NAMES)
def test_scores_depend_on_the_image_and_the_prompt_alone(name, tiny):
    """Not on batch size, order, the images beside it, its form, or whether the model is new."""
    reward = tiny[name]()
    assert reward.higher_is_better is True and reward.name == name
    for nothing in ([], torch.empty(0, 3, 8, 8)):
        assert reward(nothing, [], []).shape == (0,)
    if name not in ("aesthetic", "deqa"):  # these do not read prompts
        raises("2 images and 1 ", reward, PICTURES[:2], ['"a"'], [LINE])
    assert reward.model is None  # so far nothing was loaded

    prompts, metadata = inputs(reward, PICTURES, PROMPTS)

    def score(*numbers):
        pick = lambda given: [given[n] for n in numbers]
        return reward(pick(PICTURES), pick(prompts), pick(metadata))

    scores = score(*range(6))
    assert scores.shape == (6,) and scores.dtype == torch.float32 and not scores.requires_grad
    assert len({round(s, 4) for s in scores.tolist()}) > 2  # they tell pictures apart
    order = [3, 0, 5, 1, 4, 2]  # number 0 and 3 are of one size
    reward.batch = 2
    assert_close(score(*order), scores[order], rtol=1e-5, atol=1e-5)
    tensor = networks.as_pixels(PICTURES[0])[None]
    assert_close(reward(tensor, prompts[:1], metadata[:1]), scores[:1], rtol=1e-5, atol=1e-5)

    reward.model = None  # drops everything large; the next call loads it again
    assert not [v for v in vars(reward).values() if isinstance(v, torch.nn.Module)]
    assert_close(score(0, 1), scores[:2], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic", "deqa"] + QUALITY)
def test_scores_are_those_of_the_published_steps(name, tiny):
    reward = tiny[name]()
    folder = reward.weights.parent  # of all the tiny networks
    expected = getattr(steps, name)(folder, PICTURES, PROMPTS)
    assert_close(reward(PICTURES, PROMPTS), expected, rtol=1e-5, atol=1e-5)


def truncated():
    file = io.BytesIO()
    as_pictures(torch.rand(1, 3, 64, 64))[0].save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue()[:-500]))


BAD_IMAGES = [
    (lambda: torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
    (lambda: torch.zeros(1, 8, 8, 3), r"\(1, 8, 8, 3\)"),
    (lambda: torch.zeros(1, 1, 8, 8), r"\(1, 1, 8, 8\)"),
    (lambda: torch.zeros(3, 8, 8), r"\(B, 3, H, W\)"),
    (lambda: torch.zeros(1, 3, 0, 8), r"\(B, 3, H, W\)"),
    (lambda: torch.linspace(-1, 1, 192).view(1, 3, 8, 8), "-1 to 1"),
    (lambda: torch.full((1, 3, 8, 8), math.nan), "nan"),
    (lambda: [truncated()], "image 0 cannot be decoded.*truncated"),
    (lambda: ["cat.png"], "image 0 cannot be decoded"),
]


@pytest.mark.parametrize("make, message", BAD_IMAGES)
def test_bad_images_get_no_score(make, message):
    """Neither from a scorer nor from a monitor, and before anything is loaded."""
    images, scorers = make(), [REWARDS[name] for name in REWARDS if "t2i" not in name]
    if isinstance(images, torch.Tensor):
        scorers += [monitors.edge_density, monitors.colour_entropy, monitors.diversity]
    for scorer in scorers:
        raises(message, scorer, images, ['a "sign"'], [LINE])
        assert getattr(scorer, "model", None) is None


def test_floats_become_bytes_by_rounding():
    values = torch.tensor([0.999, 0.5, 1.0009, -0.0009])  # 254.7, 127.5, and two rounding errors
    (picture,) = as_pictures(values.expand(1, 3, 2, 4))
    assert picture.size == (4, 2) and picture.mode == "RGB"
    assert np.array(picture)[1, :, 2].tolist() == [255, 128, 255, 0]


def test_exact_float32_restores_the_callers_settings(monkeypatch):
    settings = lambda: (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    product = lambda: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact_float32("cpu"):
            inside = (*settings(), product())
        after = (*settings(), product())
    torch.set_float32_matmul_precision("highest")
    assert inside == ("highest", False, torch.float32) and after == ("high", True, torch.bfloat16)


@pytest.mark.parametrize("name", ["ocr", "geneval"])
def test_thresholds_are_held_against_float32_and_never_nan(name, tiny):
    """NaN would mean "nothing found", or other letters, and some score."""
    reward, seen, pictures = tiny[name](), set(), PICTURES[:2]
    prompts, metadata = inputs(reward, pictures, PROMPTS[:2])

    def note(module, given, output):
        if isinstance(output, torch.Tensor):
            seen.add(output.dtype)

    for network in reward.model:
        for module in network.modules():
            module.register_forward_hook(note)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reward(pictures, prompts, metadata)
    assert seen == {torch.float32}
    for network in reversed(reward.model):  # what comes first hides what follows
        for parameter in network.parameters():
            parameter.data.fill_(math.nan)
        raises(f"{name}: .*output is not finite", reward, pictures, prompts, metadata)


# ---- Weights that are missing, damaged or of something else


@pytest.mark.parametrize("name", NAMES)
def test_missing_weights_name_the_command(name, tiny, tmp_path):
    for option in tiny[name].keywords:
        for nowhere in ("no/such/weights", tmp_path):
            if option != "sha256":
                reward = tiny[name](**{option: nowhere})
                raises(f"{name}: .*(hf download|curl -LO)", reward.load)


FOLDERS = [("pickscore", "weights"), ("clipscore", "weights"), ("aesthetic", "weights"),
           ("ocr", "detector"), ("ocr", "reader"), ("hpsv2", "weights"), ("imagereward", "weights"),
           ("geneval", "weights"), ("geneval", "clip")]  # fmt: skip


@pytest.mark.parametrize("name, option", FOLDERS)
def test_weights_that_lack_one_or_are_pickled_are_refused(name, option, tiny, tmp_path):
    """transformers would make up a missing one, and open a pickle."""
    published = tiny[name].keywords[option]
    folder = shutil.copytree(published, tmp_path / "copy")
    reward = tiny[name](**{option: folder})
    networks.lose_weight(folder / "model.safetensors")
    raises(f"{name}: .*(lacks|Missing key).*(hf download|curl)", reward.load)
    torch.save(load_file(published / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    raises(f"{name}: ", reward.load)


TOKENIZERS = {"pickscore": "tokenizer", "clipscore": "weights", "hpsv2": "tokenizer",
              "imagereward": "tokenizer", "geneval": "clip"}  # fmt: skip


@pytest.mark.parametrize("name, option", TOKENIZERS.items())
def test_an_empty_tokenizer_is_refused(name, option, tiny, tmp_path):
    """transformers makes one after an incomplete download."""
    folder = shutil.copytree(tiny[name].keywords[option], tmp_path / "copy")
    kind = hf.BertTokenizer if name == "imagereward" else hf.CLIPTokenizer
    kind().save_pretrained(folder)
    raises(f"{name}: .*differ in vocabulary.*hf download", tiny[name](**{option: folder}).load)


def test_no_code_beside_the_weights_is_run(tiny, tmp_path):
    """A kind of model that transformers does not know, with its own code."""
    folder = shutil.copytree(tiny["ocr"].keywords["detector"], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "zebra"}
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForObjectDetection"), "z.Zebra")
    (folder / "config.json").write_text(json.dumps(config))
    code = f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Zebra:\n    pass\n"
    (folder / "z.py").write_text(code)
    raises("ocr: cannot load", tiny["ocr"](detector=folder).load)
    assert not (tmp_path / "executed").exists()


def test_another_head_is_refused(tiny):
    head = tiny["aesthetic"].keywords["head"]
    state = torch.load(head, weights_only=True)
    without = {key: tensor for key, tensor in state.items() if key != "layers.2.bias"}
    more, shape = {"layers.1.weight": torch.zeros(2)}, {"layers.7.weight": torch.zeros(3, 5)}
    raises("1 weights too many .layers.1.weight", aesthetic.fold, state | more)
    raises("layers.2 is not a linear layer", aesthetic.fold, without)
    raises("layers.7 is not a linear layer", aesthetic.fold, state | shape)
    reward = tiny["aesthetic"](sha256=aesthetic.SHA256)
    raises("not the published file .SHA-256.*curl -LO", reward.load)


# ---- DeQA


def test_the_expected_level_and_the_padding():
    rows = [[7.0] * 5, [2.0, 1.0, 0.0, -1.0, -2.0], [200.0, 0, 0, 0, 0], [0, 0, 0, 0, 200.0]]
    levels = deqa.expected_level(torch.tensor(rows))
    assert_close(levels, torch.tensor([3.0, 4.451941, 5.0, 1.0]), rtol=0, atol=1e-6)
    assert deqa.expected_level(torch.tensor(rows).half()).dtype == torch.float32
    mean, red = (122, 116, 104), (255, 0, 0)
    square = deqa.square(Image.new("RGB", (3, 6), "red"))  # 1 column to the left, 2 to the right
    assert square.size == (6, 6)
    assert [square.getpixel((x, 0)) for x in range(6)] == [mean, red, red, red, mean, mean]


def test_every_published_weight_of_the_7b_has_its_place():
    shapes = networks.deqa_shapes(networks.DEQA_7B)
    total = sum(math.prod(shape) for shape in shapes.values())
    assert total == pytest.approx(8.2e9, rel=0.01)
    published = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"  # older files have it
    published[table] = torch.empty(64, device="meta")
    converted = deqa.convert(published, networks.DEQA_7B)
    assert sum(t.numel() for t in converted.values()) == total
    model = deqa.build(networks.DEQA_7B, converted)  # load_state_dict is strict: names and shapes
    assert set(model.state_dict()) == set(converted)


@pytest.mark.parametrize("key", ["few", "many", "shape", "shard", "tokenizer", "code"])
def test_deqa_refuses_other_weights(key, tmp_path):
    class Evil:  # its pickle would make a file
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    state = dict(networks.deqa_state())
    if key == "few":
        del state["model.norm.weight"]
    changes = {"many": {"model.extra.weight": torch.zeros(2)},
               "shape": {"lm_head.weight": torch.zeros(31999, 32)},
               "code": {"lm_head.weight": Evil()}}  # fmt: skip
    networks.save_deqa(tmp_path, state | changes.get(key, {}))
    if key == "shard":
        (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    if key == "tokenizer":
        other = networks.tokenizer_model(change=deqa.LEVELS["poor"])
        (tmp_path / "tokenizer.model").write_bytes(other)
    raises(f"deqa: cannot load.*{deqa.FETCH}", deqa.DeQA(weights=tmp_path).load)
    assert not (tmp_path / "executed").exists()


# ---- Monitors


def test_edges_and_colours():
    edges, colours = torch.zeros(3, 3, 16, 20), torch.zeros(3, 3, 8, 8)
    edges[0, :, :, 7:] = 1.0  # one upright edge: the columns on both sides of it
    edges[1, :, :8] = 0.5
    edges[2, :, ::2] = 0.2  # stripes below the threshold
    assert_close(monitors.edge_density(edges), torch.tensor([2 / 20, 2 / 16, 0.0]))

    colours[1, :, :4] = 1.0  # half black, half white: 1 bit
    for k in range(8):  # eight colours, one in each row: 3 bits
        colours[2, :, k] = torch.tensor([k & 1, k >> 1 & 1, k >> 2]).float()[:, None]
    assert_close(monitors.colour_entropy(colours), torch.tensor([0.0, 1.0, 3.0]))
    assert monitors.colour_entropy(torch.rand(1, 3, 256, 256)).item() == pytest.approx(9, abs=0.05)


def test_diversity():
    black, white, grey = (torch.full((3, 40, 56), v) for v in (0.0, 1.0, 0.5))
    images, prompts = torch.stack([black, white, grey, white, grey]), ["a", "b", "a", "b", "c"]
    expected = torch.tensor([0.5, 0.0, 0.5, 0.0, math.nan])
    assert_close(monitors.diversity(images, prompts), expected, equal_nan=True)
    mixed = monitors.diversity(torch.stack([black, white, grey]), ["a"] * 3)
    assert_close(mixed, torch.tensor([0.75, 0.75, 0.5]))
    raises("3 images and 1 prompts", monitors.diversity, images[:3], ["a"])


@pytest.mark.parametrize("name", ["edge_density", "colour_entropy", "diversity"])
def test_monitors_have_the_form_of_a_reward(name):
    monitor = getattr(monitors, name)
    assert monitor(torch.empty(0, 3, 9, 9), []).shape == (0,)
    assert monitor.name == name and monitor.higher_is_better is None
    raises("is needed, not list", monitor, [1, 2], ["a"])


# ---- With the published weights


def fetched(reward):
    """The reward with its weights, or a skipped test with the command that fetches them."""
    reward.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        reward.load()
    except ValueError as error:
        pytest.skip(str(error))
    return reward


def drawing(colour):
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).ellipse((100, 100, 412, 412), fill=colour)
    return image


@pytest.mark.slow
def test_the_right_prompt_and_the_clean_picture_score_higher():
    images = [drawing(colour) for colour in ("red", "red", "blue", "blue")]
    for kind, low, high in ((pickscore.PickScore, 10, 30), (clipscore.CLIPScore, 0.2, 1.4)):
        scores = fetched(kind())(images, ["a red circle", "a blue circle"] * 2)
        assert scores[0] > scores[1] and scores[3] > scores[2]
        assert low < scores.min() and scores.max() < high
    noisy = np.array(images[0]) + np.random.default_rng(0).normal(0, 90, (512, 512, 3))
    noisy = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    clean_score, noisy_score = fetched(deqa.DeQA())([images[0], noisy])
    assert clean_score > noisy_score + 0.5


@pytest.mark.slow
def test_the_published_aesthetic_head():
    file = aesthetic.Aesthetic().head
    if not file.is_file():
        pytest.skip(aesthetic.FETCH_HEAD)
    w, b = aesthetic.fold(torch.load(file, weights_only=True))
    expected = torch.tensor([17.995625, 5.236646])
    assert_close(torch.stack([w.norm(), b]), expected, rtol=1e-5, atol=1e-5)
    score = F.normalize(torch.arange(768.0).sin(), dim=0) @ w + b
    assert_close(score, torch.tensor(5.867869), rtol=0, atol=1e-5)
