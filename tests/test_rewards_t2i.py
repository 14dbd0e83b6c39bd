"""T2I-CompBench: rules on cases worked out by hand (t2i_cases.json: what a case shows, what is given,
what is expected), BLIP's VQA against plain functions, images and results in the authors' layout.

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

import rewards
from experiments import published_blip as published
from rewards import blip_vqa, convert, t2i_export
from rewards import t2i_rules as rules
from rewards.t2i_compbench import AttributeBinding, Numeracy, Spatial3D

CASES = json.loads(Path(__file__).with_name("t2i_cases.json").read_text("utf-8"))
LINES = [pytest.param(name, c[1:], id=f"{name}: {c[0]}") for name in CASES for c in CASES[name]]
NEAR_RIGHT = (torch.arange(479) >= 240).float().expand(479, 479)  # depth: near where x >= 240


def found(objects):
    """[(label, score, box), ...] -> detections of an image."""
    labels, scores, boxes = zip(*objects) if objects else ((), (), ())
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"labels": list(labels), "scores": torch.tensor(scores), "boxes": boxes}


RULES = {
    "questions": rules.questions,
    "clean": rules.clean,
    "binding": rules.binding_score,
    "requested": rules.requested,
    "relation": rules.relation,
    "numeracy": lambda objects, asked: rules.numeracy_score(found(objects), asked),
    "distinct": lambda *b: rules.distinct_labels(found([("cup", 0.9, box) for box in b])),
    "position": lambda *g: [rules.position(*g, NEAR_RIGHT, m) for m in ("official", "fixed")],
    "spatial": lambda x, text: rules.spatial_score(found(x), NEAR_RIGHT, rules.relation(text)),
}


@pytest.mark.parametrize("name, case", LINES)
def test_rules(name, case):
    *given, expected = case
    if expected is None:
        return raises("^prompt .*; expected ", RULES[name], *given)
    result = json.dumps(RULES[name](*given))  # tuples become lists, numbers are rounded
    assert json.loads(result, parse_float=lambda text: round(float(text), 7)) == expected


def test_tables():
    table = rules.phrase_table()
    assert [len(table[name]) for name in ("color", "shape", "texture")] == [300] * 3
    spans = [spans for entries in table.values() for spans in entries.values()]
    assert sum(map(len, spans)) == 2137 and {len(s) for s in spans} == set(range(1, 9))
    assert len(rules.WORDS) == len(set(rules.WORDS)) == len(rules.PLURALS) == 88


# ---- BLIP's VQA


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Random weights under the published names, converted: the folder, and the state."""
    folder, state = tmp_path_factory.mktemp("vqa"), published.vqa_state(published.VQA_TINY)
    published.save_vqa(folder, state)
    config = published.tiny_config(blip_vqa.make_config())
    scorer = SimpleNamespace(**vars(blip_vqa) | {"make_config": lambda: config})
    assert convert.convert_file(scorer, folder / "file.pth", folder) == len(state) - 2
    return folder, state


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_binding_equals_the_published_network(tiny, batch):
    """Which is asked one question at a time, about one image."""
    prompts = [case[1] for case in CASES["questions"][:3]]  # of two, one and one questions
    scorer = AttributeBinding("color", weights=tiny[0], tokenizer=tiny[0], batch=batch)
    assert scorer([], []).shape == (0,) and scorer.model is None
    pictures = [as_image(noise(*size, i)) for i, size in enumerate([(64, 64), (70, 33), (48, 99)])]
    scores, expected = scorer(pictures, prompts), []
    for picture, prompt in zip(pictures, prompts):
        pixels = (as_pixels(picture.resize((48, 48), Image.Resampling.BICUBIC)) - MEAN) / STD
        for question in rules.questions(prompt, "color"):
            ids = torch.tensor([30523, *scorer.model[1](question).input_ids[1:]])
            expected.append(published.vqa_yes(tiny[1], (12, 12), pixels, ids))
    asked = [rules.questions(prompt, "color") for prompt in prompts]
    assert_close(sum(blip_vqa.ask(scorer.model, pictures, asked), []), expected, atol=1e-5, rtol=0)
    expected = [rules.binding_score(yes) for yes in (expected[:2], expected[2:3], expected[3:])]
    assert_close(scores, torch.tensor(expected), atol=1.01e-4, rtol=0)  # a last decimal
    assert_close(scorer(pictures[::-1], prompts[::-1]), scores.flip(0), atol=1.01e-4, rtol=0)


def test_published_names_and_refusals(tiny, tmp_path):
    shapes = published.vqa_shapes(**published.VQA)
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = blip_vqa.make_config()
    with torch.device("meta"):
        convert.check_fit(blip_vqa.rename(meta), blip_vqa.make_network(config).state_dict())
    assert len(meta) == 789 + 2  # and position_ids
    untied = tiny[1] | {"text_decoder.cls.predictions.decoder.weight": torch.zeros(30524, 24)}
    raises("not its word embeddings", blip_vqa.convert, {"model": untied})
    raises("cannot load .*; curl", blip_vqa.load, tmp_path, tiny[0])
    raises("BERT's uncased vocabulary.*; curl", blip_vqa.load, tiny[0], tmp_path)
    config.vision_config.image_size = 384
    config.save_pretrained(tmp_path)
    raises("BLIP at 384 pixels", blip_vqa.load, tmp_path, tiny[0])


# ---- Numeracy and 3D, and the authors' files


@pytest.mark.parametrize(
    "scorer, best", [(Numeracy(), 1.0), (Spatial3D(), 0.8), (Spatial3D("fixed"), 0.3)]
)
def test_detections_reach_the_rules(scorer, best):
    """In the order of the images. A prompt without a rule is refused before anything is loaded."""
    objects, prompt, _ = CASES["spatial"][7][1:]
    raises(f"{scorer.name}: prompt 'no' .*; expected", scorer.check, [prompt, "no"], None)
    raises("3 images and 1 prompts", scorer, torch.rand(3, 3, 8, 8), [prompt])
    assert scorer([], []).shape == (0,) and scorer.model is None
    of_width = {8: found(objects), 9: found([])}
    network = SimpleNamespace(
        detect=lambda pictures: [of_width[picture.width] for picture in pictures],
        depth=lambda pictures: [NEAR_RIGHT for _ in pictures],
    )
    scorer.model = network if isinstance(scorer, Numeracy) else (network, network)
    scores = scorer([as_image(noise(8, width)) for width in (8, 9, 8)], [prompt] * 3)
    assert_close(scores, best * torch.tensor([1.0, 0, 1]))


def test_export_and_comparison(tmp_path, monkeypatch, capsys):
    def run(*words, error=""):
        if error:
            with pytest.raises(SystemExit, match="2"):
                t2i_export.main([str(word) for word in words])
            assert error in capsys.readouterr().err
        else:
            t2i_export.main([str(word) for word in words])
        return capsys.readouterr().out

    width = lambda images, prompts: torch.tensor([image.width / 10 for image in images])
    width.check = lambda prompts: None
    monkeypatch.setitem(rewards.REWARDS, "t2i_numeracy", width)
    file, prompts, made, out = (tmp_path / name for name in ("n.txt", "d/p.txt", "made", "out"))
    file.write_text("two cups\na cup\n")
    run("prompts", file, "--repeat", 2, "--out", prompts)
    assert prompts.read_text() == "two cups\ntwo cups\na cup\na cup\n"
    run("prompts", file, "--out", prompts, error="exists")
    made.mkdir()
    images = ("images", made, "--prompts", prompts, "--out", out)
    for i in range(4):
        run(*images, error=f"no file {made}/0000{i}.png")
        as_image(noise(4, i + 1)).save(made / f"0000{i}.png")
    run(*images)
    names = ["a cup_000002.png", "a cup_000003.png", "two cups_000000.png", "two cups_000001.png"]
    assert sorted(file.name for file in (out / "samples").iterdir()) == names
    run(*images, error="holds images already")
    theirs = [
        {"question_id": i, "answer": a} for i, a in ((3, "0.4"), (1, 0.2), (0, 0.5), (2, 0.3))
    ]
    compare, file = (
        ("compare", out, "--task", "t2i_numeracy"),
        out / "annotation_num/vqa_result.json",
    )
    run(*compare, error="run the authors' script first")
    file.parent.mkdir()
    for bad in (
        3,
        theirs[1:],
        theirs + theirs[:1],
        [*theirs[:3], {"question_id": 2, "answer": "nan"}],
    ):
        file.write_text(json.dumps(bad))
        run(*compare, error="expected [{")
    file.write_text(json.dumps(theirs))
    text = " ".join(run(*compare, "--batch", 3).split())
    assert "000000 0.1000 0.5000 -0.4000 two cups 000001 0.2000 0.2000 +0.0000 two cups" in text
    assert "mean 0.2500 0.3500 -0.1000 largest difference: -0.4000, image 000000; 4" in text
    (out / "samples" / names[0]).rename(out / "samples/x_000003.png")
    run(*compare, error="number 3 occurs twice")


@pytest.mark.slow
def test_real_weights_know_red_from_blue():
    try:
        model = blip_vqa.load()
    except ValueError as error:
        pytest.skip(str(error))
    questions = ["is the picture red?", "is the picture blue?"]
    ((red, blue),) = blip_vqa.ask(model, [Image.new("RGB", (512, 512), "red")], [questions])
    assert red > 0.5 > blue
