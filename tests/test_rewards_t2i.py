"""T2I-CompBench: rules on cases worked out by hand (t2i_cases.json, each with what it is about), BLIP's
VQA with tiny random weights against plain functions, images and results in the authors' layout.

    python -m pytest tests/test_rewards_t2i.py --slow -rs     # with the published weights
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import raises
from PIL import Image
from test_rewards import MEAN, STD, as_image, as_pixels, noise
from torch.testing import assert_close
from transformers import BertTokenizer

import rewards
from experiments.published_blip import VQA, VQA_TINY, vqa_shapes, vqa_state, vqa_yes
from rewards import blip_vqa, convert, t2i_export
from rewards import t2i_rules as rules
from rewards.t2i_compbench import AttributeBinding, Numeracy, Spatial3D

CASES = json.loads(Path(__file__).with_name("t2i_cases.json").read_text("utf-8"))
PROMPTS = [case[2] for case in CASES["questions"][:3]]
SIZES = [(64, 64), (70, 33), (48, 99)]
NEAR_RIGHT = (torch.arange(479) >= 240).float().expand(479, 479)  # depth: near where x >= 240


def cases(name):
    return pytest.mark.parametrize("case", [pytest.param(c[1:], id=c[0]) for c in CASES[name]])


def found(objects):
    """[(label, score, box), ...] -> detections of an image."""
    labels, scores, boxes = zip(*objects) if objects else ((), (), ())
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"labels": list(labels), "scores": torch.tensor(scores), "boxes": boxes}


def check(expected, message, rule, *given):
    if expected is None:
        raises(message, rule, *given)
    else:
        assert rule(*given) == expected


# ---- Rules


@cases("questions")
def test_questions(case):
    attribute, prompt, expected = case
    check(expected, "expected one of the 300 of", rules.questions, prompt, attribute)


def test_phrase_table_and_answers():
    table = rules.phrase_table()
    assert [len(table[name]) for name in ("color", "shape", "texture")] == [300] * 3
    spans = [spans for entries in table.values() for spans in entries.values()]
    assert sum(map(len, spans)) == 2137 and {len(s) for s in spans} == set(range(1, 9))
    assert rules.clean('A "B" (C) * #D: e; f~!. ?  ') == "a b c  d e f ?"
    assert len(rules.clean("w " * 60).split()) == 50
    assert rules.binding_score([0.98765, 0.43215]) == 0.4268  # .9877 * .4321
    assert rules.binding_score([]) == 1 and rules.binding_score([0.00004, 1]) == 0


@cases("requested")
def test_requested(case):
    prompt, expected = case
    expected = expected and [tuple(pair) for pair in expected]
    check(expected, "asks for no known object", rules.requested, prompt)


@cases("numeracy")
def test_numeracy(case):
    labels, requests, expected = case
    objects = [(name, 0.9, (100 * i, 0, 100 * i + 50, 50)) for i, name in enumerate(labels)]
    assert rules.numeracy_score(found(objects), requests) == pytest.approx(expected)


@cases("distinct")
def test_distinct(case):
    a, b, same = case
    objects = found([("cup", 0.9, a), ("cup", 0.8, b), ("mug", 0.7, a)])
    assert rules.distinct_labels(objects) == ["cup"] * (2 - same) + ["mug"]


@cases("position")
def test_position(case):
    *given, official, fixed = case
    assert rules.position(*given, NEAR_RIGHT) == pytest.approx(official)
    assert rules.position(*given, NEAR_RIGHT, "fixed") == pytest.approx(fixed)


@cases("spatial")
def test_spatial(case):
    objects, prompt, expected = case
    score = rules.spatial_score(found(objects), NEAR_RIGHT, rules.relation(prompt))
    assert score == pytest.approx(expected)


# ---- BLIP's VQA


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Published names with random weights, converted: a folder, and the state."""
    folder, state = tmp_path_factory.mktemp("vqa"), vqa_state(VQA_TINY)
    config = blip_vqa.make_config()
    for part, image in ((config.vision_config, {"image_size": 48}), (config.text_config, {})):
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 96}
        part.update(sizes | {"encoder_hidden_size": 24} | image)
    torch.save({"model": state}, folder / "file.pth")
    scorer = SimpleNamespace(**vars(blip_vqa) | {"make_config": lambda: config})
    assert convert.convert_file(scorer, folder / "file.pth", folder) == len(state) - 2
    words = {i: f"[unused{i}]" for i in range(30522)} | {2748: "yes", 2053: "no", 4: "?"}
    words |= dict(enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"]))
    letters = "abcdefghijklmnopqrstuvwxyz"
    words |= {i: letter for i, letter in enumerate(letters, 100)}
    words |= {i: "##" + letter for i, letter in enumerate(letters, 200)}
    BertTokenizer(vocab={word: i for i, word in words.items()}).save_pretrained(folder)
    return folder, state


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_binding_equals_the_published_network(tiny, batch):
    """Whatever shares the batch, and with one, two or three questions of an image packed."""
    folder, state = tiny
    scorer = AttributeBinding("color", weights=folder, tokenizer=folder, batch=batch)
    assert scorer([], []).shape == (0,) and scorer.model is None
    pictures = [as_image(noise(*size, seed)) for seed, size in enumerate(SIZES)]
    expected, asked = [], [rules.questions(prompt, "color") for prompt in PROMPTS]
    scores = scorer(pictures, PROMPTS)
    for picture, texts in zip(pictures, asked):
        pixels = (as_pixels(picture.resize((48, 48), 3)) - MEAN) / STD
        tokens = [[30523, *scorer.model[1](text).input_ids[1:]] for text in texts]
        expected.append([vqa_yes(state, (12, 12), pixels, torch.tensor(ids)) for ids in tokens])
    answers = blip_vqa.ask(scorer.model, pictures, asked, batch)
    for ours, published in zip(answers, expected, strict=True):
        assert_close(ours, published, atol=1e-5, rtol=0)
    expected = torch.tensor([rules.binding_score(yes) for yes in expected])
    assert_close(scores, expected, atol=1.01e-4, rtol=0)  # the fourth decimal may round otherwise
    assert len(set(scores.tolist())) > 2
    assert_close(scorer(pictures[::-1], PROMPTS[::-1]), scores.flip(0), atol=1.01e-4, rtol=0)


def test_published_names_and_refusals(tiny, tmp_path):
    folder, state = tiny
    shapes = vqa_shapes(**VQA)
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        network = blip_vqa.make_network(blip_vqa.make_config())
    convert.check_fit(blip_vqa.rename(meta), network.state_dict())
    assert len(shapes) == 789 + 2
    untied = state | {"text_decoder.cls.predictions.decoder.weight": torch.zeros(30524, 24)}
    raises("not its word embeddings", blip_vqa.convert, {"model": untied})
    for weights, words, why in ((tmp_path, folder, "cannot load"), (folder, tmp_path, "BERT")):
        scorer = AttributeBinding("shape", weights=weights, tokenizer=words)
        prompt = CASES["questions"][3][2]
        raises(f"{why}.*; curl", scorer, torch.rand(1, 3, 9, 9), [prompt])
    raises("not color, shape or texture", AttributeBinding, "colour")
    raises("neither 'official' nor 'fixed'", Spatial3D, "true")


# ---- Numeracy and 3D, and the authors' files

MAN = "a man in front of a car"


@pytest.mark.parametrize(
    "scorer, bad", [(Numeracy(), "cups"), (Spatial3D(), "a cat on a dog"), (Spatial3D("fixed"), "")]
)
def test_detections_reach_the_rules(scorer, bad):
    """In the order of the images; the networks are not asked where a prompt is wrong."""
    man = found(CASES["spatial"][7][1])
    by_width = SimpleNamespace(
        detect=lambda pictures: [(found([]), man)[picture.width == 8] for picture in pictures],
        depth=lambda pictures: [NEAR_RIGHT for _ in pictures],
    )
    pictures = [as_image(noise(8, width)) for width in (8, 9, 8)]
    for prompts in ([bad], [MAN, bad, MAN]):
        raises(f"{scorer.name}: prompt '{bad}'", scorer.check, prompts, None)
        raises(f"{scorer.name}: prompt '{bad}'", scorer, pictures, prompts)
    raises("3 images and 1 prompts", scorer, pictures, [MAN])
    assert scorer([], []).shape == (0,) and scorer.model is None
    scorer.model = by_width
    if scorer.name != "t2i_numeracy":
        scorer.model = by_width, by_width
    best = {"t2i_numeracy": 1.0, "t2i_3d": 0.8, "t2i_3d_fixed": 0.3}[scorer.name]
    assert_close(scorer(pictures, [MAN] * 3), torch.tensor([best, 0, best]))
    scorer.model = None


def test_export_and_comparison(tmp_path, monkeypatch, capsys):
    def run(*words, error=None):
        if error is None:
            return t2i_export.main([str(word) for word in words]), capsys.readouterr().out
        with pytest.raises(SystemExit) as end:
            t2i_export.main([str(word) for word in words])
        message = capsys.readouterr().err
        assert end.value.code == 2 and error in message and message.count("\n") == 1, message

    class Width(SimpleNamespace):
        def __call__(self, images, prompts):
            return torch.tensor([image.width / 10 for image in images])

    monkeypatch.setitem(rewards.REWARDS, "t2i_numeracy", Width(check=lambda prompts: None))
    source, prompts, made, out = (tmp_path / name for name in ("n.txt", "d/p.txt", "made", "out"))
    source.write_text("two cups\na cup\n")
    run("prompts", source, "--repeat", 2, "--out", prompts)
    assert prompts.read_text() == "two cups\ntwo cups\na cup\na cup\n"
    run("prompts", source, "--out", prompts, error="exists")
    run("prompts", source, "--out", tmp_path / "p.jsonl", error=".txt")
    made.mkdir()
    for i in range(4):
        run("images", made, "--prompts", prompts, "--out", out, error=f"no file {made}/0000{i}.png")
        as_image(noise(4, i + 1)).save(made / f"0000{i}.png")
    run("images", made, "--prompts", prompts, "--out", out)
    names = ["a cup_000002.png", "a cup_000003.png", "two cups_000000.png", "two cups_000001.png"]
    assert sorted(file.name for file in (out / "samples").iterdir()) == names
    run("images", made, "--prompts", prompts, "--out", out, error="holds images already")
    source.write_text("two_cups\n")
    run("images", made, "--prompts", source, "--out", tmp_path / "new", error="'two_cups'")

    compare, result = (
        ("compare", out, "--task", "t2i_numeracy"),
        out / "annotation_num/vqa_result.json",
    )
    run(*compare, error="run the authors' script first")
    result.parent.mkdir()
    entries = [
        {"question_id": i, "answer": a} for i, a in ((3, "0.4"), (1, 0.2), (0, 0.5), (2, 0.3))
    ]
    for bad in (
        "{",
        json.dumps(entries[1:]),
        json.dumps([*entries, entries[0]]),
        '[{"answer": 1}]',
    ):
        result.write_text(bad)
        run(*compare, error="expected [{")
    result.write_text(json.dumps(entries))
    _, text = run(*compare, "--batch", 3)
    lines = text.splitlines()
    assert lines[1].split(None, 4) == ["000000", "0.1000", "0.5000", "-0.4000", "two cups"]
    assert lines[4].split(None, 4) == ["000003", "0.4000", "0.4000", "+0.0000", "a cup"]
    assert lines[5].split() == ["mean", "0.2500", "0.3500", "-0.1000"]
    assert "-0.4000, image 000000; 4 images" in lines[6]
    (out / "samples" / names[0]).rename(out / "samples/x_000003.png")
    run(*compare, error="number 3 occurs twice")


@pytest.mark.slow
def test_real_weights_tell_the_colours_apart():
    scorer, pictures = AttributeBinding("color"), []
    for bench, bowl in (("green", "blue"), ("red", "red")):
        picture = Image.new("RGB", (512, 512), bench)
        picture.paste(bowl, (0, 0, 512, 256))
        pictures.append(picture)
    try:
        scores = scorer(pictures, PROMPTS[:1] * 2)
    except ValueError as error:
        pytest.skip(str(error))
    assert scores[0] > scores[1]
