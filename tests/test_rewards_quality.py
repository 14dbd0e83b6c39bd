"""HPSv2.1 and ImageReward: the conversion of the published files, and what only these two do. That
their scores are the originals' is in test_rewards.py, with the other scorers'."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import raises
from PIL import Image
from test_rewards import PICTURES, PROMPTS, QUALITY
from torch.testing import assert_close

from experiments import published_networks as networks
from rewards import convert, hpsv2, imagereward

MODULES = {"hpsv2": hpsv2, "imagereward": imagereward}
SCORERS = {"hpsv2": hpsv2.HPSv2, "imagereward": imagereward.ImageReward}
both = pytest.mark.parametrize("name", QUALITY)


@pytest.mark.parametrize(  # size: numbers in the published file, by its bytes
    "name, before, after, size", [("hpsv2", 686, 910, 1_972_490_005 / 2),
                                  ("imagereward", 625, 294 + 316 + 2, 1.79e9 / 4)])  # fmt: skip
def test_every_published_weight_has_its_place(name, before, after, size):
    state = networks.empty_state(name)
    assert len(state) == before
    assert sum(tensor.numel() for tensor in state.values()) == pytest.approx(size, rel=0.002)
    converted = MODULES[name].convert(networks.as_published(name, state))
    with torch.device("meta"):
        network = MODULES[name].make_network(MODULES[name].make_config())
    convert.check_fit(converted, network.state_dict())
    assert len(converted) == after


@both
def test_a_file_that_is_not_the_published_one_is_refused(name, tmp_path, monkeypatch, capsys):
    state, file = networks.quality_state(name), tmp_path / "file.pt"
    last = list(state)[-1 if name == "hpsv2" else 7]
    publish = lambda state: networks.publish(MODULES[name], tmp_path, state)
    raises("1 unknown weights: .*x.weight", publish, state | {"x.weight": torch.zeros(2)})
    raises("1 weights of other shapes: .*7", publish, state | {last: torch.zeros(7)})
    state.pop(last)
    raises("1 missing weights: ", publish, state)
    torch.save(print, file)  # no tensor
    raises("cannot be read .*[Ww]eights", convert.read_published, file, None, {})
    v20 = SimpleNamespace(hexdigest=lambda: "07cb0d20")
    monkeypatch.setattr("hashlib.file_digest", lambda *given: v20)
    monkeypatch.setattr("sys.argv", ["", name, str(file), "--out", str(tmp_path / name)])
    with pytest.raises(SystemExit, match="2"):
        convert.main()
    line, reason = capsys.readouterr().err, {"hpsv2": "is HPS v2.0"}.get(name, "has SHA-256 07cb")
    assert reason in line and line.endswith(MODULES[name].FETCH + "\n") and line.count("\n") == 1
    assert not (tmp_path / name).exists()


@both
def test_weights_of_another_file_get_no_score(name, tiny):
    """The error has the command that fetches and converts."""
    command = f"hf download .* && python -m rewards.convert {name} weights/.*hf download"
    other = tiny[name](sha256=MODULES[name].SHA256)
    raises(f"{name}: .*was not converted from.*; {command}", other, PICTURES[:1], ["a"])


def test_golden_values_without_the_weights(tiny, tmp_path, monkeypatch):
    """ImageReward: an MLP of 0 and of 1, and more padding. HPSv2: the logit scale has no effect."""
    hps, image = tiny["hpsv2"](), tiny["imagereward"]()
    scores = hps(PICTURES, PROMPTS), image(PICTURES[:2], PROMPTS[:2])
    hps.model.logit_scale.data.fill_(9.0)
    monkeypatch.setattr(imagereward, "LENGTH", 60)
    assert torch.equal(hps(PICTURES, PROMPTS), scores[0]) and scores[0].abs().max() <= 1
    assert_close(image(PICTURES[:2], PROMPTS[:2]), scores[1], rtol=1e-5, atol=1e-6)
    for mlp, golden in ((0.0, -0.161780), (1.0, 0.805956)):
        state = networks.quality_state("imagereward", mlp)
        constant = imagereward.ImageReward(**networks.publish(imagereward, tmp_path, state))
        assert_close(constant(PICTURES[:1], ["a"]), torch.tensor([golden]), rtol=0, atol=1e-6)


def test_images_and_prompts_are_prepared_as_upstream_does():
    x = hpsv2.prepare(Image.new("RGB", (512, 256), "white"), 224)
    assert x[:, 56:168].min() > 1.9  # 112 rows of the picture between 56 black ones
    black = (-networks.MEAN / networks.STD).expand(3, 112, 224)
    assert torch.equal(torch.cat((x[:, :56], x[:, 168:]), 1), black)
    assert hpsv2.prepare(Image.new("RGB", (1, 1000)), 224).shape == (3, 224, 224)
    columns = Image.fromarray(np.arange(35, dtype=np.uint8)[None].repeat(32, 0)).convert("RGB")
    for width, first in ((32, 0), (33, 0), (34, 1), (35, 2)):  # 3 surplus columns: 1.5 -> 2
        x = imagereward.prepare(columns.crop((0, 0, width, 32)), 32) * networks.STD + networks.MEAN
        assert_close(x[0, 0] * 255, torch.arange(first, first + 32.0), rtol=0, atol=1e-4)
    assert hpsv2.clean("\ufeff“Ü½猫’s” ‘ﬁ‛ &amp;quot;ＡＢ，&amp;quot;") == '"Ü½猫\'s" \'ﬁ\' "AB,"'


@pytest.mark.slow
@both
def test_the_published_weights(name):
    reward, example = SCORERS[name](), networks.EXAMPLE
    images = [Image.new("RGB", (512, 512), colour) for colour in ("red", "blue")]
    try:
        right = reward(images, ["the colour red", "the colour blue"])
    except ValueError as error:
        pytest.skip(f"{error} && {example['fetch']}")
    assert (right > reward(images, ["the colour blue", "the colour red"])).all()
    if name == "imagereward":
        scores = reward([Image.open(f) for f in example["files"]], [example["prompt"]] * 4)
        assert_close(scores, torch.tensor(example["scores"]), rtol=0, atol=1e-3)
