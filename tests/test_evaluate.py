"""evaluate.py and its tables: images once, strangers' images, failing scorers, standard errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call, shell
from PIL import Image

from support.flags import TASKS


def evaluate(monkeypatch, out, *flags, models=("base", "ocr=toy/adapters/ocr")):
    """evaluate.py on three prompts a task -> (its table, the number of images that it made)."""
    import rewards.scoring as scoring

    made, sample = [], scoring.sample_images
    with monkeypatch.context() as patch:
        patch.setattr(
            scoring, "sample_images", lambda *given: made.extend(given[2]) or sample(*given)
        )
        source = [] if "--scores_only" in flags else ["--models", *models]
        call(patch, "evaluate", *source, "--num_prompts", 3, "--steps", 2, "--out", out, *flags)
    return (out / "table.md").read_text(), len(made)


def test_images_are_made_once(monkeypatch, tmp_path):
    """A later call makes what is missing, damaged or different, and nothing else."""
    out = tmp_path / "out"
    first, made = evaluate(monkeypatch, out)
    assert made == 2 * 4 * 3 and (out / "differences.png").stat().st_size > 0
    assert evaluate(monkeypatch, out, "--overwrite", "--batch", 2) == (first, 0)
    (out / "images/base/ocr/00001.png").unlink()
    (out / "images/ocr/deqa/00002.png").write_bytes(b"not a picture")
    assert evaluate(monkeypatch, out, "--overwrite") == (first, 2)
    other, made = evaluate(
        monkeypatch, out, "--overwrite", models=("base", "ocr=toy/adapters/deqa")
    )  # another adapter
    assert made == 4 * 3 and other != first
    assert evaluate(monkeypatch, out, "--overwrite") == (first, 4 * 3)
    for flags in (
        ["--seed", 1],
        ["--steps", 3],
        ["--guidance", 2],
        ["--text_length", 8],
        ["--size", 32],
        ["--no_t5"],
    ):
        assert (
            evaluate(monkeypatch, out, "--overwrite", *flags, "--tasks", "ocr", models=["base"])[1]
            == 3
        ), flags
    third = tmp_path / "prompts.txt"
    third.write_text("".join(f"sign reads {x} in red\n" for x in ("K T", "T K", "K K")))
    assert (
        evaluate(
            monkeypatch,
            out,
            "--overwrite",
            "--tasks",
            "ocr",
            "--prompts",
            f"ocr={third}",
            models=["base"],
        )[1]
        == 3
    )


def test_an_interrupted_evaluation_goes_on(monkeypatch, tmp_path):
    import rewards.scoring as scoring

    save, count = scoring.save_picture, []

    def stop_at_seven(*args):
        count.append(save(*args))
        if len(count) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "save_picture", stop_at_seven)
        evaluate(patch, tmp_path / "a")
    assert not (tmp_path / "a/results.json").exists()
    assert evaluate(monkeypatch, tmp_path / "a") == (
        evaluate(monkeypatch, tmp_path / "b")[0],
        2 * 4 * 3 - 7,
    )


def test_scores_only_gives_the_table_of_the_same_images(monkeypatch, tmp_path):
    """The three ways to hand over a folder, against the run that made its images."""
    table, _ = evaluate(monkeypatch, tmp_path / "out", models=["base"])
    images = tmp_path / "out/images/base"
    only = lambda folder: ["--scores_only", f"base={folder}"]
    scored = lambda folder, *flags: evaluate(
        monkeypatch, tmp_path / folder.name / "s", *only(folder), *flags
    )
    assert scored(images) == (table, 0)
    one, _ = evaluate(monkeypatch, tmp_path / "one", "--tasks", "ocr", models=["base"])
    assert scored(images / "ocr", "--tasks", "ocr") == (one, 0)  # a single task's folder itself
    prompts = Path("toy/prompts/ocr_test.txt").read_text().splitlines()
    own, nested = tmp_path / "own", tmp_path / "nested"
    own.mkdir()
    for j in range(3):
        (nested / f"{j:05d}/samples").mkdir(parents=True)
        (nested / f"{j:05d}/grid.png").write_bytes(b"no sample")  # as GenEval's scripts leave it
        for k in range(2):
            shutil.copy(images / f"ocr/{j:05d}.png", nested / f"{j:05d}/samples/{k:04d}.png")
        shutil.copy(images / f"ocr/{j:05d}.png", own / f"some name {j}.png")
    lines = [
        json.dumps({"file_name": f"some name {j}.png", "prompt": prompts[j]}) for j in (2, 0, 1)
    ]
    (own / "metadata.jsonl").write_text("\n".join(lines))
    assert scored(own, "--tasks", "ocr") == (one, 0)
    assert scored(nested, "--tasks", "ocr") == (
        one,
        0,
    )  # twice the images, and no more certainty than before
    assert (
        json.loads((nested.parent / "nested/s/results.json").read_text())["results"]["base"]["ocr"][
            "n"
        ]
        == 6
    )


def pictures(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(folder / name)
    return folder


@pytest.mark.parametrize(
    "names, says",
    [
        (["00000.png", "00002.png"], "0 image(s) of prompt 00001"),
        (["00001.png", "00002.png"], "0 image(s) of prompt 00000"),
        ([], "0 image(s) of prompt 00000"),
        (["0.png", "1.png", "2.png", "2.jpg"], "2 image(s) of prompt 00002"),
        (["0.png", "1.png", "2.png", "3.png"], "1 image(s) of prompt 00003"),
        (["0.png", "1.png", "cat.png"], "cat.png: its name is no line number"),
        (
            ["0/samples/0.png", "0/samples/1.png", "1/samples/0.png", "2/samples/0.png"],
            "1 image(s) of prompt 00001",
        ),
        (["0.png", "1.png", "2.png", "BROKEN"], "cannot be decoded"),
        (["0.png", "LIST"], "line 2 needs"),
        (["0.png", "1.png", "2.png", "TASKS"], "--tasks"),
        (["0.png", "1.png", "2.png", "OTHER"], "not those of the first folder"),
    ],
)
def test_a_folder_that_does_not_fit_its_prompts_gets_no_score(
    monkeypatch, tmp_path, capsys, names, says
):
    prompts, folder = (
        tmp_path / "prompts.txt",
        pictures(tmp_path / "images", *(n for n in names if not n.isupper())),
    )
    prompts.write_text("".join(f"sign reads {x} in red\n" for x in ("K T", "T K", "K K")))
    folders, tasks = [folder], ["--tasks", "ocr", "--prompts", f"ocr={prompts}"]
    if "BROKEN" in names:
        (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    if "LIST" in names:
        (folder / "metadata.jsonl").write_text(
            '{"file_name": "0.png", "prompt": "a"}\n{"file_name": "1.png", "prompt": "a"}'
        )
    if "TASKS" in names:
        tasks = []
    if "OTHER" in names:
        pictures(tmp_path / "more", *(f"{j}/samples/{k}.png" for j in range(3) for k in range(2)))
        folders.append(tmp_path / "more")
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "evaluate", "--scores_only", *folders, *tasks, "--out", tmp_path / "out")
    lines = [
        line for line in capsys.readouterr().err.splitlines() if "scoring:" not in line and line
    ]
    assert (
        stopped.value.code == 2
        and len(lines) == 1
        and says in lines[0]
        and not (tmp_path / "out").exists()
    )


def raises(error):
    def scorer(images, prompts, metadata=None):
        raise error

    return scorer


FAILURES = {
    "no weights here": raises(ValueError("ocr: no weights here\nand a second line")),
    "RuntimeError: out of memory": raises(RuntimeError("out of memory")),
    "KeyError": raises(KeyError("tag")),
    "nan": lambda images, prompts, metadata=None: torch.full((len(prompts),), torch.nan),
    "inf": lambda images, prompts, metadata=None: torch.full((len(prompts),), torch.inf),
    "(4,), not a tensor of shape (3,)": lambda images, prompts, metadata=None: torch.zeros(
        len(prompts) + 1
    ),
    "NoneType": lambda images, prompts, metadata=None: None,
    "AssertionError: no message": raises(AssertionError()),
}


@pytest.mark.parametrize("says", FAILURES)
def test_whatever_goes_wrong_in_a_scorer_is_not_scored(monkeypatch, tmp_path, capsys, says):
    """Never a 0, for any model: the metric is left out of every row, with its reason."""
    import toy

    good = toy.REWARDS["ocr"]

    def broken(
        images, prompts, metadata=None
    ):  # right on the base's images, so that there is something to withdraw
        broken.calls += 1
        return good(images, prompts) if broken.calls == 1 else FAILURES[says](images, prompts)

    broken.calls = 0
    monkeypatch.setitem(toy.REWARDS, "ocr", broken)
    table, _ = evaluate(monkeypatch, tmp_path / "out", "--tasks", "ocr", "geneval")
    assert (
        "not scored: ocr: " in table
        and says in table
        and "second line" not in table
        and "OCR" not in table
    )
    assert "not scored: ocr: " in capsys.readouterr().out and broken.calls == 2
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert says in results["not_scored"]["ocr"]
    assert all(
        "ocr" not in row and "geneval" in row and "average" not in row
        for row in results["results"].values()
    )


def test_without_weights_nothing_is_scored_and_the_images_are_kept(monkeypatch, tmp_path, capsys):
    """The real scorers without weights: a line each with the command that fetches them, exit 2."""
    (tmp_path / "g.jsonl").write_text(
        json.dumps(
            {
                "prompt": "a photo of a cat",
                "tag": "single_object",
                "include": [{"class": "cat", "count": 1}],
            }
        )
    )
    (tmp_path / "o.txt").write_text('a sign that says "Hi"\n')
    tasks = [f"{task}={tmp_path}/{'g.jsonl' if task == 'geneval' else 'o.txt'}" for task in TASKS]
    toy = Path("toy").resolve()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit) as stopped:
        flags = [
            "--model",
            toy,
            "--rewards",
            "rewards",
            "--prompts",
            *tasks,
            "--steps",
            1,
            "--published",
            "--out",
            "out",
        ]
        call(monkeypatch, "evaluate", *flags)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and "nothing was scored" in err.splitlines()[-1]
    missing = [line for line in out.splitlines() if line.startswith("not scored: ")]
    assert len(missing) == 5 and all(
        "hf download" in line or "curl -LO" in line for line in missing
    )
    assert (
        len(list(Path("out/images").rglob("*.png"))) == 4 and not Path("out/results.json").exists()
    )


def test_tables_standard_errors_and_the_names_of_geneval():
    import rewards.tables as tables
    from rewards.geneval_rules import TAGS, summary

    scores = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distinct = [str(n) for n in range(20)]
    assert tables.standard_error(scores, distinct) == pytest.approx(scores.std().item() / 20**0.5)
    assert tables.standard_error(scores.repeat(4), distinct * 4) == pytest.approx(
        scores.std().item() / 20**0.5
    )
    groups = scores.view(5, 4).mean(1)  # five prompts of four images: as sure as five numbers
    assert tables.standard_error(scores, [n for n in "abcde" for _ in range(4)]) == pytest.approx(
        groups.std().item() / 5**0.5
    )

    rng = torch.Generator().manual_seed(1)
    tags = [tag for n, tag in enumerate(TAGS) for _ in range(4 + n)]
    soft = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)[
        torch.randint(3, (len(tags),), generator=rng)
    ]
    official = torch.randint(2, (len(tags),), generator=rng).double()
    values = zip(tags, official.tolist(), soft.tolist())
    rows = [{"tag": tag, "correct": bool(c), "soft": s, "strict": s == 1} for tag, c, s in values]
    tests = {"geneval": ([str(n) for n in range(len(tags))], [{"tag": tag} for tag in tags])}
    row = tables.summarise({"base": {"geneval": soft, "geneval_official": official}}, tests)["base"]
    wanted = summary(rows)
    for metric, name in zip(tables.GENEVAL, ["official", "official_images", "strict", "softened"]):
        assert row[metric]["mean"] == pytest.approx(wanted[name]), name
    squares = [official[[t == tag for t in tags]].var().item() / tags.count(tag) for tag in TAGS]
    assert row["geneval_tasks"]["se"] == pytest.approx(sum(squares) ** 0.5 / 6)
    assert "| strict | softened |" in tables.table({"base": row}, columns=tables.GENEVAL)


def test_published_rows_have_the_published_average():
    import rewards.tables as tables

    rows = tables.published()
    for row in rows.values():
        parts = [row[task]["mean"] / scale for task, scale in tables.SCALES.items()]
        assert row["average"]["mean"] == pytest.approx(sum(parts) / 4, abs=1e-4)
    assert "| SD3.5-M | 0.63 | 0.59 | 4.07 | 21.64 | 0.7165 |" in tables.table(rows)


def test_evaluate_on_ones_own_prompt(monkeypatch, tmp_path):
    call(
        monkeypatch,
        "evaluate",
        "--models",
        "base",
        "toy/adapters/ocr",
        "--prompt",
        "sign reads K T in red",
        "--steps",
        2,
        "--out",
        tmp_path,
    )
    assert (tmp_path / "prompts.png").stat().st_size > 0


def test_two_processes_give_the_table_of_one(tmp_path):
    for processes in (1, 2):
        done = shell(
            "evaluate.py",
            "--num_prompts",
            5,
            "--steps",
            2,
            "--out",
            tmp_path / str(processes),
            processes=processes,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1/table.md").read_text() == (tmp_path / "2/table.md").read_text()
    images = [
        sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*.png"))
        for n in ("1", "2")
    ]
    assert (
        images[0] == images[1] and len(images[0]) == 4 * 5 + 1
    )  # none twice, none left out, and the grid
