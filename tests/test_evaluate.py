"""evaluate.py: images once, images made elsewhere, failing scorers, tables, the next command."""

import importlib
import json
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image
from pytest import approx
from torch.testing import assert_close

import evaluate as script
import rewards.scoring as scoring
import rewards.tables as tables
import toy
from rewards.geneval_rules import TAGS, summary
from rewards.images import as_pictures
from rewards.pictures import picture_grid, read_pictures, save_grid, save_picture
from support.flags import TASKS
from support.run import draw_schedule


def evaluate(monkeypatch, out, *flags, models=("base", "ocr=toy/adapters/ocr")):
    """evaluate.py on three prompts a task -> (its table, the number of images that it made)."""
    made, sample = [], scoring.sample_images

    def counted(pipe, text, prompts, keys, steps, scale, *more):
        made.extend((key, scale) for key in keys)
        return sample(pipe, text, prompts, keys, steps, scale, *more)

    source = [] if "--scores_only" in flags else ["--models", *models]
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "sample_images", counted)
        call(patch, "evaluate", *source, "--num_prompts", 3, "--steps", 2, "--out", out, *flags)
    evaluate.made = made  # [(key of the noise, guidance scale)] in turn, model by model
    return (out / "table.md").read_text(), len(made)


def test_models_differ_in_adapter_and_guidance_alone(monkeypatch, tmp_path):
    """All get the same prompts and noise; no two images of a model share their noise."""
    grids, flags = [], ["--model_guidance", "ocr=1.5", "--seed", 7, "--guidance", 1.25]
    monkeypatch.setattr(script, "save_grid", lambda *given: grids.append(given))
    evaluate(monkeypatch, tmp_path / "out", *flags)
    keys = [(7, "evaluate", task, j) for task in TASKS for j in range(3)]
    assert evaluate.made == [(key, scale) for scale in (1.25, 1.5) for key in keys]
    (_, scores, _, tests, first), (*_, differences) = grids
    assert first == {task: range(2) for task in TASKS}
    assert differences == tables.most_different(scores, tests)
    monkeypatch.setattr(script, "picture_grid", lambda _, columns, prompts: grids.append(columns))
    models = ["a=base", "b=base", "c=base", "ocr=toy/adapters/ocr"]
    flags = ["--models", *models, "--model_guidance", "c=2", "--steps", 2, "--out", tmp_path / "b"]
    call(monkeypatch, "evaluate", *flags, "--prompt", "red circle", "--prompt", "red circle")
    columns = grids[-1]
    same = {name: torch.equal(columns["a"], images) for name, images in columns.items()}
    assert same == {"a": True, "b": True, "c": False, "ocr": False}
    assert not torch.equal(*columns["a"])  # the same prompt twice: other noise


def test_images_are_made_once(monkeypatch, tmp_path):
    """A later call makes what is missing, damaged or different, and nothing else."""
    out = tmp_path / "out"
    again = lambda *flags, **given: evaluate(monkeypatch, out, "--overwrite", *flags, **given)
    first, made = evaluate(monkeypatch, out)
    assert made == 2 * 4 * 3 and (out / "differences.png").exists()
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, out)  # it holds results
    assert again("--batch", 2) == (first, 0)
    (out / "images/base/ocr/00001.png").unlink()
    (out / "images/ocr/deqa/00002.png").write_bytes(b"not a picture")
    assert again() == (first, 2)
    for task in ("deqa", "ocr"):  # the same name and folder, trained again
        shutil.copytree(f"toy/adapters/{task}", tmp_path / "lora/ocr", dirs_exist_ok=True)
        table, made = again(models=("base", tmp_path / "lora/ocr"))
        assert (table == first, made) == (task == "ocr", 4 * 3)
    own = tmp_path / "prompts.txt"
    own.write_text("".join(f"sign reads {x} in red\n" for x in ("K T", "T K", "K K")))
    changes = "--seed 1,--steps 3,--guidance 2,--text_length 8,--size 32,--no_t5".split(",")
    flags = ["--tasks", "ocr"]
    for change in (*changes, "--model_guidance base=3", f"--prompts ocr={own}"):
        flags += change.split()  # one more than in the call before
        assert again(*flags, models=["base"])[1] == 3, change


def test_pictures_are_rounded_and_stand_in_their_rows(tmp_path):
    exact = (torch.arange(256) / 255).view(1, 16, 16).expand(3, 16, 16)
    for shift in (-0.4, 0.4):
        save_picture(tmp_path / "a.png", (exact + shift / 255).clamp(0, 1), "mark")
        assert torch.equal(*read_pictures([tmp_path / "a.png"]), exact)
    flat = [torch.full((3, 112, 112), value / 255) for value in (50, 200)]
    picture_grid(tmp_path / "grid.png", {"a": flat, "b": flat[::-1]}, ["x", "y"])
    page = Image.open(tmp_path / "grid.png")
    centres = [page.getpixel((x, y))[0] for y in (96, 232) for x in (64, 184)]
    assert centres == [50, 200, 200, 50]


def test_a_grid_of_nothing_is_no_file(tmp_path):
    picture_grid(tmp_path / "none.png", {"student": []}, [], {"student": []})
    (tmp_path / "old.png").write_bytes(b"of an earlier call")
    save_grid(tmp_path / "old.png", {}, {}, {"ocr": (["K"], [{}])}, {"ocr": []})
    assert not list(tmp_path.iterdir())


def test_scores_only_gives_the_table_of_the_same_images(monkeypatch, tmp_path):
    """The three ways to hand over a folder, against the run that made its images."""
    table, _ = evaluate(monkeypatch, tmp_path / "out", models=["base"])
    one, _ = evaluate(monkeypatch, tmp_path / "one", "--tasks", "ocr", models=["base"])
    images = tmp_path / "out/images/base"

    def scored(folder, *flags):
        out = tmp_path / "scores" / folder.name
        return evaluate(monkeypatch, out, "--scores_only", f"base={folder}", *flags)

    assert scored(images) == (table, 0)
    assert scored(images / "ocr", "--tasks", "ocr") == (one, 0)  # a single task's folder itself

    prompts = Path("toy/prompts/ocr_test.txt").read_text().splitlines()
    listed, nested, lines = tmp_path / "listed", tmp_path / "nested", []
    listed.mkdir()
    for j in (2, 0, 1):
        shutil.copy(images / f"ocr/{j:05d}.png", listed / f"some name {j}.png")
        lines.append(json.dumps({"file_name": f"some name {j}.png", "prompt": prompts[j]}) + "\n")
        samples = nested / f"{j:05d}/samples"
        samples.mkdir(parents=True)
        (samples.parent / "grid.png").write_bytes(b"no sample")  # as GenEval's scripts leave it
        for k in range(2):
            shutil.copy(images / f"ocr/{j:05d}.png", samples / f"{k:04d}.png")
    (listed / "metadata.jsonl").write_text("".join(lines))
    assert scored(listed, "--tasks", "ocr") == (one, 0)
    assert scored(nested, "--tasks", "ocr") == (one, 0)  # twice the images: equally certain
    assert '"n": 6' in (tmp_path / "scores/nested/results.json").read_text()


FAILURES = {
    "no weights here": ValueError("ocr: no weights here\nand a second line"),
    "RuntimeError: out of memory": RuntimeError("out of memory"),
    "AssertionError: no message": AssertionError(),
    "nan": torch.full((3,), torch.nan),
    "(4,), not a tensor of shape (3,)": torch.zeros(4),
    "NoneType": None,
}


def failing(reason):
    def scorer(images, prompts, metadata=None):
        if isinstance(FAILURES[reason], Exception):
            raise FAILURES[reason]
        return FAILURES[reason]

    return scorer


@pytest.mark.parametrize("reason", FAILURES)
def test_whatever_goes_wrong_in_a_scorer_is_an_error_of_one_line(reason):
    with pytest.raises(ValueError) as error:
        scoring.query(failing(reason), torch.zeros(3, 3, 32, 32), ["a", "b", "c"], [{}] * 3)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_failed_metric_is_left_out_of_every_row(monkeypatch, tmp_path, capsys):
    """Never a 0, for any model: the base's scores, which were good, are withdrawn too."""
    scorers = iter([toy.REWARDS["ocr"], failing("no weights here")])  # for the base, for the LoRA
    monkeypatch.setitem(toy.REWARDS, "ocr", lambda *given: next(scorers)(*given))
    monkeypatch.setitem(toy.REWARDS, "geneval_strict", failing("NoneType"))
    table, _ = evaluate(monkeypatch, tmp_path / "out", "--tasks", "ocr", "geneval")
    strict = "it gave NoneType, not a tensor of shape (3,)"
    last = ["not scored: ocr: no weights here", f"not scored: geneval_strict: {strict}"]
    lines = [line for line in table.splitlines() if line]
    assert lines[-2:] == last and "OCR" not in table and "GenEval" in table
    assert "not scored: ocr: no weights here" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["not_scored"] == {"ocr": "no weights here", "geneval_strict": strict}
    assert ["ocr" in row for row in results["results"].values()] == [False, False]


def test_metadata_goes_with_its_prompt(monkeypatch, tmp_path):
    """In batches of an evaluation, and in the groups of a training."""
    lines = [{"prompt": f"sign reads K {x} in red", "n": n} for n, x in enumerate("KTX")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scorer = lambda images, prompts, metadata: torch.tensor([line["n"] / 4 for line in metadata])
    scorer.range = (0, 1)
    monkeypatch.setitem(toy.REWARDS, "ocr", scorer)
    flags = ["--prompts", f"ocr={tmp_path}/own.jsonl", "--tasks", "ocr", "--batch", 2]
    evaluate(monkeypatch, tmp_path / "out", *flags, models=["base"])
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert results["base"]["ocr"]["mean"] == approx(0.25)
    args = {"rewards": "toy", "reward_device": None, "reward": {"ocr": 1.0}, "mix": {}}
    args |= {"tasks": ["ocr"], "prompts": {}, "test_prompts": {}, "on_reward_error": "stop"}
    reward = scoring.make_reward(SimpleNamespace(**args), "cpu", {}, {})
    train = {"ocr": ([line["prompt"] for line in lines], lines)}
    (drawn,) = draw_schedule(train, {"ocr": 1}, 3, 1, 0)
    slots = [("ocr", line["prompt"], line) for line in lines]
    assert sorted(drawn, key=lambda slot: slot[2]["n"]) == slots
    assert reward(torch.zeros(3, 3, 32, 32), slots).tolist() == approx([0, 0.25, 0.5])


SCORED = {"t2i_color": "a green bench and a blue bowl", "t2i_numeracy": "two cats and a dog"}
SCORED |= {"t2i_shape": "an oblong cucumber and a teardrop plum", "t2i_3d": "a cat behind a dog"}


@pytest.mark.parametrize("which, metrics", [("main", 5), ("quality", 6), ("compbench", 5)])
def test_without_weights_nothing_is_scored_and_the_images_are_kept(
    monkeypatch, tmp_path, capsys, which, metrics
):
    """The real scorers without weights: a line each with the command that fetches them, exit 2."""
    line = {"prompt": "a photo of a cat", "tag": "single_object"}
    line["include"] = [{"class": "cat", "count": 1}]
    (tmp_path / "geneval.jsonl").write_text(json.dumps(line))
    for task in tables.TABLES[which]:
        (tmp_path / f"{task}.txt").write_text(SCORED.get(task, 'a sign that says "Hi"'))
    prompts = {task: f"{task}={tmp_path}/{task}.txt" for task in tables.TABLES[which]}
    if which == "main":
        prompts["geneval"] = f"geneval={tmp_path}/geneval.jsonl"
    flags = ["--model", Path("toy").resolve(), "--rewards", "rewards", "--published"]
    flags += ["--table", which, "--prompts", *prompts.values(), "--steps", 1, "--out", "out"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "evaluate", *flags)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and "nothing was scored" in err.splitlines()[-1]
    missing = [line for line in out.splitlines() if line.startswith("not scored: ")]
    assert ["hf download" in line or "curl -L" in line for line in missing] == [True] * metrics
    early = [line for line in out.splitlines() if line.startswith("will not be scored: ")]
    assert [line.replace("will not be", "not") for line in early] == missing
    assert len(list(Path("out/images").rglob("*.png"))) == len(prompts)
    assert not Path("out/results.json").exists()


def test_standard_errors_and_the_four_names_of_geneval():
    rng = torch.Generator().manual_seed(0)
    scores = torch.rand(20, generator=rng, dtype=torch.float64)
    distinct, error = [str(n) for n in range(20)], scores.std().item() / 20**0.5
    assert tables.standard_error(scores, distinct) == approx(error)
    assert tables.standard_error(scores.repeat(4), distinct * 4) == approx(error)
    groups = scores.view(5, 4).mean(1)  # five prompts of four images: as sure as five numbers
    error = groups.std().item() / 5**0.5
    assert tables.standard_error(scores, list("aaaabbbbccccddddeeee")) == approx(error)

    tags = [tag for n, tag in enumerate(TAGS) for _ in range(4 + n)]
    values = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)
    soft = values[torch.randint(3, (len(tags),), generator=rng)]
    official = torch.randint(2, (len(tags),), generator=rng).double()
    rows = []
    for tag, correct, score in zip(tags, official.tolist(), soft.tolist()):
        rows.append({"tag": tag, "correct": bool(correct), "soft": score, "strict": score == 1})
    tests = {"geneval": ([str(n) for n in range(len(tags))], [{"tag": tag} for tag in tags])}
    row = tables.summarise({"base": {"geneval": soft, "geneval_official": official}}, tests)["base"]
    wanted = summary(rows)
    for metric, name in zip(tables.GENEVAL, ["official", "official_images", "strict", "softened"]):
        assert row[metric]["mean"] == approx(wanted[name]), name
    squares = [part.var().item() / len(part) for part in official.split([4, 5, 6, 7, 8, 9])]
    assert row["geneval_tasks"]["se"] == approx(sum(squares) ** 0.5 / 6)
    assert "| strict | softened |" in tables.table({"base": row}, columns=tables.GENEVAL)


FOUR = {  # three prompts a task
    "student": {"geneval": [1, 0, 0.5], "ocr": [1, 1, 1], "deqa": [5, 4, 3]},
    "start": {"geneval": [0.5, 0, 0], "ocr": [1, 1, 1], "deqa": [5, 4, 3]},
}
TESTS = {task: (["a", "b", "c"], [{}] * 3) for task in TASKS}


def four(name):
    values = FOUR[name] | {"pickscore": [26, 13, 0]}
    return {task: torch.tensor(values[task]).double() for task in TASKS}


def test_average_oracle_and_differences_by_hand():
    """Average: (.5 + 1 + 4 / 5 + 13 / 26) / 4. Its error: the roots of 1/12, 0, 1/75 and 1/12 are
    the standard errors of the four parts, together the root of .18 / 16."""
    student, start = four("student"), four("start")
    assert tables.average(student, TESTS) == approx((0.7, (0.18 / 16) ** 0.5))
    # Paired: GenEval differs by .5, 0, .5, whose error is 1/6; the other three cancel.
    assert tables.compare(student, start, TESTS) == approx((1 / 12, 1 / 24))
    rows = {"student": student, "start": start}
    assert tables.most_different(rows, TESTS) == dict.fromkeys(TASKS, []) | {"geneval": [0, 2]}
    rows["other"] = four("start") | {"geneval": torch.tensor([0.5, 0.9, 0.75]).double()}
    assert tables.most_different(rows, TESTS)["geneval"] == [1, 2, 0]
    assert tables.most_different(rows, TESTS, 1)["geneval"] == [1]
    teachers = {}
    for n, task in enumerate(TASKS):
        teachers[task] = {name: (n + 1) * values for name, values in student.items()}
    summary = tables.summarise(teachers | {"student": student}, TESTS)
    assert [summary["oracle"][task]["mean"] for task in TASKS] == approx([0.5, 2, 12, 52])
    parts = ["0.500 ± 0.289", "1.000 ± 0.000", "4.00 ± 0.58", "13.00 ± 7.51", "0.7000 ± 0.1061"]
    lines = tables.table({"student": summary["student"]}, {"student": "ours"}).splitlines()
    assert lines[0] == "| model | GenEval | OCR | DeQA | PickScore | Average |"
    assert lines[2] == " | ".join(["| student (ours)", *parts]) + " |"


@pytest.mark.parametrize("changed", ["", "steps", "number of prompts"])
def test_the_last_lines_of_a_run(monkeypatch, tmp_path, changed):
    """Paired with the start; beside recorded rows only if those have the same settings."""
    recorded = {
        "grpo_mix": {"average": {"mean": 0.65, "se": 0.08, "n": None}},
        "oracle": {"ocr": {"mean": 0.9, "se": 0.1, "n": 3 + (changed == "number of prompts")}},
    }
    recorded["oracle"]["average"] = {"mean": 0.875, "se": 0.1, "n": None}
    flags = {"guidance": 1.0, "steps": 16 + (changed == "steps"), "prompts": {"ocr": "file"}}
    monkeypatch.setattr(scoring, "read_recorded", lambda model: (flags, recorded))
    scores = {"merged start": four("start"), "student": four("student")}
    monkeypatch.setattr(scoring, "score_files", lambda *_: (scores, {}))
    for name in ("load_adapter", "save_grid", "save_json", "write_card"):
        monkeypatch.setattr(scoring, name, lambda *_: None)
    log = [json.dumps({"iteration": n, "kl/ocr": n / 4, "loss": 1}) for n in range(8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(log))
    sampled = []
    monkeypatch.setattr(scoring, "sample_missing", lambda *given: sampled.append(given[2]))
    monkeypatch.setattr(scoring, "next_command", lambda *_: "")
    args = {"out": tmp_path, "init": "x/merged", "guidance": 1.0, "model": "toy", "size": None}
    args |= {"eval_steps": 16, "label_batch": 1, "test_prompts": {"ocr": "file"}}
    scoring.report(SimpleNamespace(**args), SimpleNamespace(transformer=None), {}, TESTS, {})
    assert sampled == [{"merged start": "start", "student": "average"}]  # by these LoRAs
    lines = (tmp_path / "table.md").read_text().splitlines()
    gain = "student - merged start: +0.0833 ± 0.0417 in Average (paired: same prompts, same noise)"
    assert "KL to its teacher, last quarter: ocr 1.625" in lines  # of iterations 6 and 7
    error = (0.18 / 16 + 0.08**2) ** 0.5
    last = [gain, f"student - grpo_mix: +0.0500 ± {error:.4f}", "student / oracle: 80.0%"]
    if changed:
        warning = f"The recorded rows have other settings ({changed}): not comparable."
        assert lines[0] == warning and lines[-1] == gain
    else:
        assert lines[-3:] == last and lines[0].startswith("| model ")


def test_published_rows_have_the_published_average():
    rows = tables.published()
    for row in rows.values():
        parts = [row[task]["mean"] / scale for task, scale in tables.SCALES.items()]
        assert row["average"]["mean"] == approx(sum(parts) / 4, abs=1e-4)
    assert "| SD3.5-M | 0.63 | 0.59 | 4.07 | 21.64 | 0.7165 |" in tables.table(rows)


def test_published_rows_stand_above(monkeypatch, tmp_path):
    flags = ["--rewards", "toy.scorers", "--published"]
    lines = evaluate(monkeypatch, tmp_path / "out", *flags, models=["base"])[0].splitlines()
    assert lines[2].startswith("| SD3.5-M (published) |") and lines[-1].startswith("| base |")


def test_a_table_of_quality_for_each_set_of_prompts(monkeypatch, tmp_path):
    """Several metrics on the same images. A judge's reply without a score counts 0, visibly."""
    (tmp_path / "own.txt").write_text("red circle\nred circle\nblue square\n")
    score = lambda images, prompts, _: torch.tensor([4.0 * (x == "red circle") for x in prompts])
    for name in ("hpsv2", "qwenvl@tiny"):
        monkeypatch.setitem(toy.REWARDS, name, score)
    sets = ["drawbench", "pickscore"]
    flags = ["--prompts", *(f"{name}={tmp_path}/own.txt" for name in sets), "--published"]
    flags += ["--table", "quality", "--tasks", *sets, "--rewards", "toy.scorers"]
    text, made = evaluate(monkeypatch, tmp_path / "out", *flags, models=["base"])
    # Two draws, one of them twice: 8/3, and the root of 2 ((8/3)^2 + (8/3)^2), by 3 images.
    assert made == 6 and text.count("| base | – | – | 2.6667 ± 1.7778 | – | 2.667 ± 1.778 |\n") == 2
    assert text.count("| Flow-OPD (published) | 1.36 | 6.23 | 0.33 | 4.05 | – |\n") == 2
    for name in sets:
        assert f"3 images of 2 prompts of {name} (the paper does not say which" in text
        missed = "1 of 3 replies hold no score and count 0; the mean of the others is 4.000"
        assert f"base, {name}_qwenvl@tiny: {missed}\n" in text


def test_the_mean_of_four_with_ten_images_a_prompt():
    tests, scores = {}, {}
    for n, task in enumerate(tables.TABLES["compbench"], 1):
        tests[task] = (["a"] * 10 + ["b"] * 10, [{}] * 20)
        scores[task] = torch.tensor([0.0] * 10 + [float(n)] * 10)  # two draws: n/2 ± n/2
    scores["t2i_3d_fixed"] = scores["t2i_3d"] + 1
    summary = tables.summarise({"base": scores}, tests)
    lines = tables.paper_table("compbench", summary, tests, with_published=True).splitlines()
    titles = ["colour", "shape", "3D", "3D, depth not transposed", "numeracy", "mean of 4"]
    assert lines[0] == " | ".join(["| model", *titles]) + " |"
    last = ["0.719", "0.629", "0.457", "–", "0.684", "0.62225"]
    assert lines[-2] == " | ".join(["| Flow-OPD, merge init (published)", *last]) + " |"
    cells = ["0.500 ± 0.500", "1.000 ± 1.000", "1.500 ± 1.500", "2.500 ± 1.500", "2.000 ± 2.000"]
    cells.append(f"1.250 ± {7.5**0.5 / 4:.3f}")
    assert lines[-1] == " | ".join(["| base", *cells]) + " |"
    for *parts, mean in tables.PUBLISHED["compbench"].values():
        assert mean == approx(sum(parts) / 4)


LOOK = {"prompt": ["red circle"]}  # there is no scorer of the task's name
RUNS = [  # script, its flags, what evaluate.py must be given
    ("train_opd", "", {"tasks": list(TASKS)}),
    ("train_opd", "--eval_prompts 0 --eval_steps 2 --student_guidance 2", {"steps": 2}),
    ("train_sft", "--no_t5 --size 16 --dtype bf16 --label_batch 9", {"batch": 9}),
    ("train_teacher", "--reward ocr --text_length 8 --cache_embeddings c", {"batch": 128}),
    ("train_teacher", "--reward ocr --test_prompts ocr=RED --guidance 2", {"tasks": ["ocr"]}),
    ("train_teacher", "--reward red --prompts red=RED --eval_every 0", {"tasks": ["red"]}),
    ("train_teacher", "--reward ocr --tasks new --prompts new=RED --eval_every 0", LOOK),
]


@pytest.mark.parametrize("trainer, flags, wanted", RUNS)
def test_the_next_command(monkeypatch, tmp_path, trainer, flags, wanted):
    """It repeats what the run was given. test_scripts.py runs such commands after real runs."""
    (tmp_path / "red.txt").write_text("red circle\n")
    monkeypatch.setitem(toy.REWARDS, "red", toy.REWARDS["ocr"])
    words = flags.replace("RED", f"{tmp_path}/red.txt").split()
    monkeypatch.setattr(sys, "argv", [trainer, *words, "--out", f"{tmp_path}/a run"])
    args = importlib.import_module(trainer).parse_args()
    if wanted is LOOK:  # a run without scores has not loaded the rewards
        monkeypatch.delitem(sys.modules, "toy")
    printed = scoring.next_command(args, ["base", "student=toy/adapters/ocr"])
    monkeypatch.setattr(sys, "argv", shlex.split(printed.removeprefix("next: python ")))
    given = vars(script.parse_args())
    if not flags:  # nothing is repeated that was not given
        assert "evaluate.py --models base student=toy/adapters/ocr --out" in printed
    same = "model rewards dtype guidance size no_t5 text_length cache_embeddings"
    for name in same.split():
        assert given[name] == vars(args)[name], name
    scale = getattr(args, "student_guidance", args.guidance)
    assert given["model_guidance"].get("student", args.guidance) == scale
    assert given["out"] == f"{tmp_path}/a run/evaluate" and given["models"]["student"]
    assert given | wanted == given
    if args.test_prompts and not given["prompt"]:
        assert given["prompts"] == args.test_prompts


def test_pictures_are_read_as_people_see_them(tmp_path):
    """Turned by their EXIF orientation, as GenEval's code does; 16-bit grey is not all white."""
    left = np.zeros((4, 8, 3), np.uint8)
    left[:, :4] = 255  # white is left of black
    ramp = np.linspace(0, 65535, 32).reshape(4, 8).astype(np.uint16)
    Image.fromarray(left).save(tmp_path / "plain.png")
    turned = Image.fromarray(left)
    exif = turned.getexif()
    exif[274] = 3  # half a turn
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    names = ("plain", "turned", "grey16")
    plain, turned, grey = read_pictures(tmp_path / f"{name}.png" for name in names)
    assert_close(turned, plain.flip(-1))
    assert_close(grey[0], torch.tensor(ramp / 65535).float(), rtol=0, atol=0.5 / 255)
    opened = [Image.open(tmp_path / f"{name}.png") for name in names]
    for picture, expected in zip(as_pictures(opened), (plain, turned, grey)):
        assert_close(torch.tensor(np.array(picture)).permute(2, 0, 1) / 255, expected)


def test_a_path_may_hold_an_equals_sign(monkeypatch, tmp_path):
    folder = shutil.copytree("toy/adapters/ocr", tmp_path / "lr=1e-3" / "adapter")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--models", str(folder), f"a={folder}"])
    assert script.parse_args().models == {"adapter": str(folder), "a": str(folder)}
