"""T2I-CompBench: rules on cases worked out by hand (t2i_cases.json: function, what it shows, what
is given, what is expected), BLIP's VQA against plain functions, and the authors' file layout."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import raises
from PIL import Image
from torch.testing import assert_close

from experiments import published_blip as published
from experiments.published_networks import MEAN, STD, as_pixels, coarse_pictures
from rewards import blip_vqa, convert, t2i_export
from rewards import t2i_rules as rules
from rewards.t2i_compbench import AttributeBinding, Numeracy, Spatial3D

CASES = json.loads(Path(__file__).with_name("t2i_cases.json").read_text("utf-8"))
RULES = [(name, *case) for name in CASES for case in CASES[name] if hasattr(rules, name)]
NEAR_RIGHT = (torch.arange(479) >= 240).float().expand(479, 479)  # depth: near where x >= 240


def real(value):
    """Detections and depth, which JSON cannot hold."""
    if isinstance(value, dict):
        boxes = torch.tensor(value["boxes"]).float().reshape(-1, 4)
        return value | {"scores": torch.tensor(value["scores"]), "boxes": boxes}
    return NEAR_RIGHT if value == "depth" else value


@pytest.mark.parametrize("case", RULES, ids=[f"{case[0]}: {case[1]}" for case in RULES])
def test_rules(case):
    name, _, *given, expected = map(real, case)
    if expected is None:
        return raises("^prompt .*; expected ", getattr(rules, name), *given)
    result = json.dumps(getattr(rules, name)(*given))  # tuples become lists, numbers are rounded
    assert json.loads(result, parse_float=lambda text: round(float(text), 7)) == expected


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """BLIP's VQA with random weights under the published names, converted: folder and state."""
    folder, config = tmp_path_factory.mktemp("vqa"), published.tiny_config(blip_vqa.make_config())
    state = published.save_vqa(folder)
    scorer = SimpleNamespace(**vars(blip_vqa) | {"make_config": lambda: config})
    assert convert.convert_file(scorer, folder / "file.pth", folder) == len(state) - 2
    return folder, state


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_binding_equals_the_published_network(tiny, batch):
    prompts = [case[1] for case in CASES["questions"][:3]]  # of two, one and one questions
    asked = [rules.questions(prompt, "color") for prompt in prompts]
    scorer = AttributeBinding("color", weights=tiny[0], tokenizer=tiny[0], batch=batch)
    assert scorer([], []).shape == (0,) and scorer.model is None
    pictures = coarse_pictures((64, 64), (33, 70), (99, 48))
    scores, expected = scorer(pictures, prompts), []
    for picture, questions in zip(pictures, asked):
        pixels = (as_pixels(picture.resize((48, 48), Image.Resampling.BICUBIC)) - MEAN) / STD
        ids = scorer.model[1](questions).input_ids
        expected.append([published.vqa_yes(tiny[1], (12, 12), pixels, tokens) for tokens in ids])
    answers = blip_vqa.ask(scorer.model, pictures, asked, batch)
    assert_close(sum(answers, []), sum(expected, []), atol=1e-6, rtol=0)
    expected = torch.tensor([rules.binding_score(yes) for yes in expected])
    assert_close(scores, expected, atol=1.01e-4, rtol=0)  # the last decimal may round otherwise
    assert_close(scorer(pictures[::-1], prompts[::-1]), scores.flip(0), atol=1.01e-4, rtol=0)


def test_published_tables_names_and_refusals(tiny, tmp_path):
    tables = rules.phrase_table().items()  # prompts and phrases of each:
    counts = {name: (len(table), sum(map(len, table.values()))) for name, table in tables}
    assert counts == {"color": (300, 678), "shape": (300, 743), "texture": (300, 716)}
    assert len(rules.WORDS) == len(set(rules.WORDS)) == len(rules.PLURALS) == 88
    shapes, config = published.vqa_shapes(**published.VQA), blip_vqa.make_config()
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        convert.check_fit(blip_vqa.rename(state), blip_vqa.make_network(config).state_dict())
    assert len(state) == 789 + 2  # and position_ids
    untied = tiny[1] | {"text_decoder.cls.predictions.decoder.weight": torch.zeros(30524, 24)}
    raises("not its word embeddings", blip_vqa.convert, {"model": untied})
    raises("cannot load .*; curl", blip_vqa.load, tmp_path, tiny[0])
    raises("BERT's uncased vocabulary.*; curl", blip_vqa.load, tiny[0], tmp_path)
    config.vision_config.image_size = 384
    config.save_pretrained(tmp_path)
    raises("BLIP at 384 pixels", blip_vqa.load, tmp_path, tiny[0])


@pytest.mark.parametrize("mode, best", [("", 1.0), ("official", 0.8), ("fixed", 0.3)])
def test_detections_reach_the_rules(mode, best):
    """In the order of the images. A prompt without a rule is refused before anything is loaded."""
    scorer, prompt = Spatial3D(mode) if mode else Numeracy(), "a man in front of a car"
    raises(f"{scorer.name}: prompt 'no' .*; expected", scorer.check, [prompt, "no"], None)
    raises("3 images and 1 prompts", scorer, torch.rand(3, 3, 8, 8), [prompt])
    assert scorer([], []).shape == (0,) and scorer.model is None
    of_width = {8: real(CASES["spatial_score"][7][1]), 9: real(CASES["spatial_score"][8][1])}
    detect = lambda pictures: [of_width[picture.width] for picture in pictures]
    network = SimpleNamespace(detect=detect, depth=lambda pictures: [NEAR_RIGHT] * 3)
    scorer.model = (network, network) if mode else network
    scores = scorer(coarse_pictures((8, 8), (9, 8), (8, 8)), [prompt] * 3)
    assert_close(scores, best * torch.tensor([1.0, 0, 1]))


def test_export_and_comparison(tmp_path, monkeypatch, capsys):
    def run(*words):
        with contextlib.suppress(SystemExit):
            t2i_export.main(t2i_export.parse_args([str(word) for word in words]))
        return " ".join("".join(capsys.readouterr()).split())

    width = lambda scorer, images, prompts: torch.tensor([image.width / 10 for image in images])
    monkeypatch.setattr(Numeracy, "__call__", width)
    monkeypatch.setitem(t2i_export.REWARDS, "t2i_numeracy", Numeracy())
    file, prompts, out = (tmp_path / name for name in ("two.txt", "new/four.txt", "out"))
    file.write_text("two cups\na cup\n")
    words = ("prompts", file, "--repeat", 2, "--out", prompts)
    assert "2 prompts x 2 ->" in run(*words) and "exists" in run(*words)
    images = ("images", tmp_path, "--prompts", prompts, "--out", out)
    for i in range(4):
        assert f"0000{i}.png; expected one" in run(*images)
        Image.new("RGB", (i + 1, 4)).save(tmp_path / f"0000{i}.png")
    assert "4 images ->" in run(*images) and "holds images already" in run(*images)
    compare = ("compare", out, "--task", "t2i_numeracy", "--batch", 3)
    assert "run the authors' script first" in run(*compare)
    (out / "annotation_num").mkdir()
    for _, results, says in CASES["results"]:
        (out / "annotation_num/vqa_result.json").write_text(json.dumps(results))
        assert says in run(*compare)
    (out / "samples/a cup_000002.png").rename(out / "samples/x_000003.png")
    assert "number 3 occurs twice" in run(*compare)


@pytest.mark.slow
def test_real_weights_know_red_from_blue():
    if not Path(blip_vqa.WEIGHTS).is_dir():
        pytest.skip(blip_vqa.FETCH)
    asked = [["is the picture red?", "is the picture blue?"]]
    ((red, blue),) = blip_vqa.ask(blip_vqa.load(), [Image.new("RGB", (512, 512), "red")], asked)
    assert red > 0.5 > blue
