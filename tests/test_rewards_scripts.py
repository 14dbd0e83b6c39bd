"""The real scorers through evaluate.py and train_teacher.py, from painting to the table: with tiny random weights, the
miniature as the painter, and prompt files in the formats of GenEval and Flow-GRPO.

    python -m pytest tests/test_rewards_scripts.py          # --slow: two processes too
"""

import ast
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_rewards import clip_folder, deqa_folder, detector_folder, reader_folder  # noqa: F401 (fixtures)
from test_rewards_geneval import tiny_files, weights  # noqa: F401
from test_scripts import TINY, call, metrics, shell

from rewards import deqa, geneval, ocr, pickscore

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("geneval", "ocr", "deqa", "pickscore")
CAT = {"class": "cat", "count": 1}
GENEVAL = [  # a line of every task
    {"tag": "single_object", "include": [CAT]},
    {"tag": "two_object", "include": [CAT, {"class": "dog", "count": 1}]},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
    {"tag": "colors", "include": [CAT | {"color": "red"}]},
    {"tag": "position", "include": [CAT, {"class": "dog", "count": 1, "position": ["above", 0]}]},
    {"tag": "color_attr", "include": [CAT | {"color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]},
]


@pytest.fixture
def folders(weights, clip_folder, deqa_folder, detector_folder, reader_folder):  # noqa: F811
    return {
        "geneval": {name: str(folder) for name, folder in weights.items()},
        "ocr": {"detector": str(detector_folder), "reader": str(reader_folder)},
        "deqa": {"weights": str(deqa_folder)},
        "pickscore": {"weights": str(clip_folder), "tokenizer": str(clip_folder)},
    }


@pytest.fixture
def scorers(folders):
    return {
        "geneval": geneval.GenEval(**folders["geneval"]),
        "geneval_official": geneval.GenEval(mode="official", **folders["geneval"]),
        "ocr": ocr.OCR(**folders["ocr"]),
        "deqa": deqa.DeQA(**folders["deqa"]),
        "pickscore": pickscore.PickScore(**folders["pickscore"]),
    }


@pytest.fixture
def prompts(tmp_path):
    """TASK=FOLDER for --prompts: GenEval's own prompts/ and folders of Flow-GRPO's dataset/, training files beside them."""
    lines = "".join(json.dumps(line | {"prompt": f"a photo of {n} things"}) + "\n" for n, line in enumerate(GENEVAL))
    texts = 'a sign that says "E=mc²"\nа plaque with "½"\n'
    files = {"geneval": ("evaluation_metadata.jsonl", "train_metadata.jsonl"), "ocr": ("test.txt", "train.txt")}
    for task in TASKS:
        (tmp_path / "data" / task).mkdir(parents=True)
        for name in files.get(task, ("test.txt", "train.txt")):
            (tmp_path / "data" / task / name).write_text(lines if task == "geneval" else texts)
    return [f"{task}={tmp_path}/data/{task}" for task in TASKS]


def paint(*flags):
    return ["--models", "base", "ocr=toy/adapters/ocr", "--steps", 2, "--published", *flags]


def test_the_papers_table_with_every_scorer(scorers, prompts, monkeypatch, tmp_path):
    """What stands in table.md is what each scorer says about the files in images/; one scorer at a time has its weights."""
    loaded = []
    for name, scorer in scorers.items():
        load = scorer.load

        def alone(name=name, load=load):
            assert all(other.model is None for other in scorers.values())
            loaded.append(name)
            load()

        monkeypatch.setattr(scorer, "load", alone)
    monkeypatch.setitem(sys.modules, "tiny", types.SimpleNamespace(REWARDS=scorers))
    out = tmp_path / "out"
    call(monkeypatch, "evaluate", *paint("--rewards", "tiny", "--prompts", *prompts, "--out", out))
    assert loaded == list(scorers) and all(scorer.model is None for scorer in scorers.values())

    results, table = json.loads((out / "results.json").read_text())["results"], (out / "table.md").read_text()
    monkeypatch.undo()  # of `load` above, and of the tiny detector's settings
    monkeypatch.setattr(geneval, "SHA256", "")
    monkeypatch.setattr(geneval, "EDGES", (133, 80))
    for model in ("base", "ocr"):
        images = {task: [Image.open(f) for f in sorted((out / "images" / model / task).iterdir())] for task in TASKS}
        row = {name: cell["mean"] for name, cell in results[model].items()}
        both = [scorers[name].judge(images["geneval"], GENEVAL) for name in ("geneval", "geneval_official")]
        soft, official = map(geneval.summary, both)
        assert row["geneval_tasks"] == pytest.approx(official["official"])
        assert row["geneval_official"] == pytest.approx(official["official_images"])
        assert row["geneval_strict"] == pytest.approx(soft["strict"])
        assert row["geneval"] == pytest.approx(soft["softened"])
        texts = Path(prompts[1].split("=")[1], "test.txt").read_text().splitlines()
        for task in ("ocr", "deqa", "pickscore"):
            assert row[task] == pytest.approx(scorers[task](images[task], texts, None).mean().item(), abs=1e-5)
        average = (row["geneval"] + row["ocr"] + row["deqa"] / 5 + row["pickscore"] / 26) / 4
        assert row["average"] == pytest.approx(average)
        assert f"| {model} | {row['geneval']:.3f} ± " in table and f"{row['pickscore']:.2f} ± " in table
    assert "| SD3.5-M (published) | 0.63 | 0.59 | 4.07 | 21.64 | 0.7165 |" in table
    assert "| model | official, mean of the task means | official, image mean | strict | softened |" in table


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(folders, prompts, monkeypatch, tmp_path):
    """Six and two prompts a task over two processes: the scores of real scorers, digit by digit."""
    (tmp_path / "tiny.py").write_text(
        f"""from rewards import deqa, geneval, ocr, pickscore
geneval.SHA256, geneval.EDGES = {geneval.SHA256!r}, (133, 80)
FOLDERS = {folders!r}
REWARDS = {{
    "geneval": geneval.GenEval(**FOLDERS["geneval"]),
    "geneval_official": geneval.GenEval(mode="official", **FOLDERS["geneval"]),
    "ocr": ocr.OCR(**FOLDERS["ocr"]),
    "deqa": deqa.DeQA(**FOLDERS["deqa"]),
    "pickscore": pickscore.PickScore(**FOLDERS["pickscore"]),
}}
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = paint("--rewards", "tiny", "--prompts", *prompts, "--batch", 1, "--out", out)
        done = shell("evaluate.py", *flags, processes=processes)
        assert done.returncode == 0, done.stderr
        results.append((json.loads((out / "results.json").read_text())["results"], (out / "table.md").read_text()))
    assert results[0] == results[1]


def test_a_teacher_trains_on_a_weighted_sum_of_real_scorers(scorers, prompts, monkeypatch, tmp_path):
    """--reward geneval=0.8 deqa=0.2, each brought to 0..1 by its range: GenEval as it is, DeQA less 1 over 4."""
    import train_teacher as script

    asked, ask = {}, script.ask
    monkeypatch.setattr(script, "ask", lambda scorer, *given: asked.setdefault(scorer.name, ask(scorer, *given)))
    monkeypatch.setitem(sys.modules, "tiny", types.SimpleNamespace(REWARDS=scorers))
    flags = [*TINY, "--iterations", 1, "--eval_every", 0, "--reward", "geneval=0.8", "deqa=0.2", "--rewards", "tiny"]
    call(monkeypatch, "train_teacher", *flags, "--prompts", prompts[0], "--out", tmp_path / "run")
    (line,) = metrics(tmp_path / "run")
    wanted = 0.8 * asked["geneval"] + 0.2 * (asked["deqa"] - 1) / 4
    assert len(wanted) == 8 and line["reward"] == pytest.approx(wanted.mean().item(), abs=1e-6)


def test_the_flag_names_the_device_of_the_scorers(monkeypatch, tmp_path):
    """`meta` has no numbers: whoever runs there fails, and only the scorer does."""
    asked = []

    class Scorer:
        device, range = "cpu", (0, 1)

        def __call__(self, images, prompts, metadata=None):
            asked.append(str(self.device))
            return torch.zeros(len(prompts))

    monkeypatch.setitem(sys.modules, "tiny", types.SimpleNamespace(REWARDS={"ocr": Scorer()}))
    flags = ["--rewards", "tiny", "--reward_device", "meta"]
    call(monkeypatch, "evaluate", *flags, "--tasks", "ocr", "--num_prompts", 2, "--steps", 1, "--out", tmp_path / "evaluation")
    teacher = [*TINY, "--iterations", 1, "--eval_every", 0, "--reward", "ocr"]
    call(monkeypatch, "train_teacher", *teacher, *flags, "--out", tmp_path / "teacher")
    assert asked == ["meta"] * 2


@pytest.mark.parametrize("file", sorted((ROOT / "rewards").glob("[!_]*.py")), ids=lambda file: file.stem)
def test_every_file_can_be_copied_alone(file):
    """torch, transformers (which brings safetensors), numpy, Pillow and the standard library; nothing of this project."""
    tree, names = ast.parse(file.read_text()), set()
    for node in ast.walk(tree):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module)
    others = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert others <= {"torch", "transformers", "safetensors", "numpy", "PIL"} | ({"paddleocr"} if file.stem == "ocr" else set())
