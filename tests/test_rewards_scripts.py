"""The real scorers through evaluate.py and train_teacher.py, from sampling to the table: with tiny
random weights, the miniature as the model, and prompt files as GenEval and Flow-GRPO have them."""

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call
from PIL import Image

from rewards import geneval_rules, scoring

TASKS = ("geneval", "ocr", "deqa", "pickscore")
TEACHER = "--prompts_per_iteration 4 --group_size 2 --steps 3 --iterations 1 --eval_every 0".split()
CASES = json.loads(Path(__file__).with_name("geneval_cases.json").read_text("utf-8"))
GENEVAL = list({line["tag"]: line for line in CASES["metadata"].values()}.values())  # of every task


@pytest.fixture
def scorers(tiny, monkeypatch):
    """{name: scorer}, which --rewards tiny finds."""
    scorers = {name: tiny[name]() for name in ("geneval", "geneval_official", *TASKS[1:])}
    monkeypatch.setitem(sys.modules, "tiny", SimpleNamespace(REWARDS=scorers))
    return scorers


@pytest.fixture
def prompts(tmp_path):
    """TASK=FOLDER for --prompts: test and training files under the names that upstream uses."""
    lines = [line | {"prompt": f"a photo of {n} things"} for n, line in enumerate(GENEVAL)]
    metadata = "".join(json.dumps(line) + "\n" for line in lines)
    texts = 'a sign that says "E=mc²"\nа plaque with "½"\n'
    files = {f"{task}/{name}.txt": texts for task in TASKS[1:] for name in ("test", "train")}
    files["geneval/evaluation_metadata.jsonl"] = files["geneval/train_metadata.jsonl"] = metadata
    for name, text in files.items():
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return [f"{task}={tmp_path}/data/{task}" for task in TASKS]


def test_the_papers_table_with_every_scorer(scorers, prompts, monkeypatch, tmp_path):
    """table.md holds what each scorer gives for the files in images/; one scorer at a time has its
    weights: once to see that they are there, once to score."""
    loaded, out = [], tmp_path / "out"
    for name, scorer in scorers.items():

        def alone(name=name, load=scorer.load):
            assert all(other.model is None for other in scorers.values())
            loaded.append(name)
            load()

        scorer.load = alone
    models = ["--models", "base", "ocr=toy/adapters/ocr", "--steps", 2, "--published"]
    flags = [*models, "--rewards", "tiny", "--prompts", *prompts, "--out", out]
    call(monkeypatch, "evaluate", *flags)
    assert loaded == 2 * list(scorers) and all(scorer.model is None for scorer in scorers.values())

    for scorer in scorers.values():
        del scorer.load  # the class's own
    results = json.loads((out / "results.json").read_text())["results"]
    table = (out / "table.md").read_text()
    texts = Path(prompts[1].split("=")[1], "test.txt").read_text().splitlines()
    for model in ("base", "ocr"):
        images = {}
        for task in TASKS:
            files = sorted((out / "images" / model / task).iterdir())
            images[task] = [Image.open(file) for file in files]
        soft = geneval_rules.summary(scorers["geneval"].judge(images["geneval"], GENEVAL))
        judged = scorers["geneval_official"].judge(images["geneval"], GENEVAL)
        official = geneval_rules.summary(judged)
        expected = {"geneval_tasks": official["official"], "geneval": soft["softened"]}
        expected |= {"geneval_official": official["official_images"]}
        expected |= {"geneval_strict": soft["strict"]}
        for task in ("ocr", "deqa", "pickscore"):
            expected[task] = scorers[task](images[task], texts, None).double().mean().item()
        quality = expected["deqa"] / 5 + expected["pickscore"] / 26
        expected["average"] = (expected["geneval"] + expected["ocr"] + quality) / 4
        row = {name: cell["mean"] for name, cell in results[model].items()}
        assert row == pytest.approx(expected, abs=1e-5)
        assert f"| {model} | {row['geneval']:.3f} ± " in table
        assert f"{row['pickscore']:.2f} ± " in table
    assert "| SD3.5-M (published) | 0.63 | 0.59 | 4.07 | 21.64 | 0.7165 |" in table
    titles = "official, mean of the task means | official, image mean | strict | softened"
    assert f"| model | {titles} |" in table


def test_a_teacher_trains_on_a_weighted_sum(scorers, prompts, monkeypatch, tmp_path):
    """Each score on 0..1 by its range: GenEval as it is, DeQA less 1 over 4."""
    given, query = {}, scoring.query

    def spy(scorer, *arguments):
        given[scorer.name] = query(scorer, *arguments)
        return given[scorer.name]

    monkeypatch.setattr(scoring, "query", spy)
    flags = [*TEACHER, "--rewards", "tiny", "--reward", "geneval=0.8", "deqa=0.2"]
    call(monkeypatch, "train_teacher", *flags, "--prompts", prompts[0], "--out", tmp_path / "run")
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    expected = 0.8 * given["geneval"] + 0.2 * (given["deqa"] - 1) / 4
    assert len(expected) == 8
    assert json.loads(line)["reward"] == pytest.approx(expected.mean().item(), abs=1e-6)


def test_the_flag_names_the_device_of_the_scorers(monkeypatch, tmp_path):
    """`meta` holds no numbers: anything else that ran there would fail."""
    devices = []

    class Scorer:
        device, range = "cpu", (0, 1)

        def __call__(self, images, prompts, metadata=None):
            devices.append(str(self.device))
            return torch.zeros(len(prompts))

    monkeypatch.setitem(sys.modules, "tiny", SimpleNamespace(REWARDS={"ocr": Scorer()}))
    flags = ["--rewards", "tiny", "--reward_device", "meta"]
    evaluate = [*flags, "--tasks", "ocr", "--num_prompts", 2, "--steps", 1]
    call(monkeypatch, "evaluate", *evaluate, "--out", tmp_path / "evaluation")
    teacher = [*flags, *TEACHER, "--reward", "ocr", "--out", tmp_path / "teacher"]
    call(monkeypatch, "train_teacher", *teacher)
    assert devices == ["meta"] * 2


SHARED = ("scoring", "tables", "pictures", "t2i_export")  # of this project, not of a scorer
NEEDS = {"imagereward": "blip", "blip_vqa": "blip", "depth": "unidet"}
NEEDS |= {"t2i_compbench": "blip_vqa depth t2i_rules unidet"}
FILES = [f for f in sorted((ROOT / "rewards").glob("[!_]*.py")) if f.stem not in SHARED]


def imported(file):
    """The modules that a file imports, by their full names."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "rewards":
            names |= {f"rewards.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_every_scorer_can_be_copied_with_images_py():
    """Of this project it needs images.py, and what the README names: GenEval's files each other."""
    packages = {"torch", "transformers", "safetensors", "numpy", "PIL", *sys.stdlib_module_names}
    for file in FILES:
        allowed = {f"rewards.{name}" for name in ["images", *NEEDS.get(file.stem, "").split()]}
        needed = {name for name in imported(file) if name.split(".")[0] not in packages}
        if file.stem.startswith("geneval"):
            needed = {name for name in needed if "rewards.geneval_" not in name}
        if file.stem == "ocr":
            allowed.add("paddleocr")
        assert needed <= allowed, file
