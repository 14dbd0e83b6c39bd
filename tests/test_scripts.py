"""Every script end to end on tiny settings, alone and with two processes. python -m pytest tests/test_scripts.py"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from support.flags import TASKS

TINY = "--prompts_per_iteration 4 --group_size 2 --steps 3 --iterations 2 --eval_steps 2".split()
OPD = [*TINY, "--eval_prompts", "0", "--sample_every", "0"]


def call(monkeypatch, script, *flags):
    """Run a script's own main in this process: `python SCRIPT.py FLAGS`."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    module = importlib.import_module(script)
    module.main(module.parse_args())


def shell(*words, processes=1):
    """The same in fresh processes, under torchrun where there are several."""
    if processes > 1:
        words = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, timeout=300)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


OBJECTIVES = ["ppo", "ppo-scalar", "ppo-published", "ppo-public-code", "kl", "trajectory", "ode", "sft"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_opd_trains_with_every_objective(monkeypatch, tmp_path, objective):
    start = {"sft": ["--init", "base", "--sft_images", 16]}.get(objective, [])
    call(monkeypatch, "train_opd", *OPD, "--objective", objective, "--out", tmp_path / "run", *start)
    log = metrics(tmp_path / "run")
    assert [line["iteration"] for line in log] == [0, 1]
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in log)
    assert all(line["grad_norm"] > 0 for line in log)
    if objective != "sft":
        assert all(log[0][f"kl/{task}"] > 0 for task in TASKS)
    if objective.startswith("ppo"):
        assert log[0]["ratio_gap"] > 0  # the second update of an iteration sees a student that has moved
    assert (tmp_path / "run/adapter/pytorch_lora_weights.safetensors").exists() and (tmp_path / "run/curves.png").exists()
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


def test_the_ratio_is_one_before_the_first_update(monkeypatch, tmp_path):
    """One update an iteration: every ratio is that of an unchanged policy, up to the rounding of another batch shape."""
    call(monkeypatch, "train_opd", *OPD, "--updates", 1, "--out", tmp_path / "run")
    assert all(line["ratio_gap"] < 1e-4 and line["clip_fraction"] == 0 for line in metrics(tmp_path / "run"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--rollout", "teacher", "--objective", "kl"],
        ["--train_steps", "random:1"],
        ["--train_steps", "0,2"],
        ["--mar_weight", "0", "--anchor", "nowhere"],
        ["--anchor", "base"],
        ["--guidance", "3"],
        ["--noise_kind", "cps"],
        ["--noise_kind", "dance"],
        ["--teacher_guidance", "ocr=1.5"],
        ["--task_mix", "geneval=3", "ocr=1", "deqa=1", "pickscore=1"],
        ["--init", "base", "--rank", "4"],
        ["--dtype", "bf16"],
        ["--checkpointing"],
        ["--guidance", "3", "--student_guidance", "1"],
        ["--no_t5", "--text_length", "8"],
        ["--label_batch", "3", "--micro_batch", "1"],
    ],
)
def test_opd_flags(monkeypatch, tmp_path, flags):
    call(monkeypatch, "train_opd", *OPD, "--iterations", 1, *flags, "--out", tmp_path / "run")
    line = metrics(tmp_path / "run")[0]
    assert line["grad_norm"] > 0 and all(value > 0 for key, value in line.items() if key.startswith("kl"))


def test_an_anchor_that_is_a_teacher_says_the_same_as_one_of_its_own(monkeypatch, tmp_path):
    """The default anchor is the deqa teacher: its adapter is not held twice, its own prompts are not labelled twice."""
    shutil.copytree("toy/adapters/deqa", tmp_path / "lora/copy")
    for anchor in ("toy/adapters/deqa", tmp_path / "lora/copy"):
        call(monkeypatch, "train_opd", *OPD, "--anchor", anchor, "--out", tmp_path / Path(anchor).name)
    one, two = metrics(tmp_path / "deqa"), metrics(tmp_path / "copy")
    assert one[0]["mar"] > 0
    for a, b in zip(one, two):
        assert all(b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6) for key in a if not key.startswith("seconds"))
    torch.testing.assert_close(weights(tmp_path / "deqa"), weights(tmp_path / "copy"))


def test_batches_of_any_size_give_the_same_student(monkeypatch, tmp_path):
    """Down to one state: a sample's steps need not be in one batch."""
    for size in (1, 128):
        flags = ["--iterations", 1, "--micro_batch", size, "--label_batch", size, "--out", tmp_path / str(size)]
        call(monkeypatch, "train_opd", *OPD, "--lr", "1e-4", *flags)
    torch.testing.assert_close(weights(tmp_path / "1"), weights(tmp_path / "128"), rtol=1e-3, atol=2e-5)
    kl = [metrics(tmp_path / str(size))[0]["kl/geneval"] for size in (1, 128)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)


def test_opd_lowers_the_kl(monkeypatch, tmp_path):
    """Learning, not only running: on the same states the KL to the teachers is lower after the updates than before."""
    settings = "--group_size 8 --steps 4 --iterations 6 --mar_weight 0 --eval_prompts 0 --sample_every 0"
    call(monkeypatch, "train_opd", *settings.split(), "--out", tmp_path / "run")
    log = metrics(tmp_path / "run")
    before, after = (sum(line[f"{name}/{task}"] for line in log for task in TASKS) for name in ("kl_before", "kl_after"))
    assert after < before


def test_opd_needs_no_scorer_and_no_vae(monkeypatch, tmp_path):
    import support.model as model

    def refuse(*_):
        raise AssertionError("the training path decoded or scored an image")

    monkeypatch.setattr(model, "decode", refuse)
    call(monkeypatch, "train_opd", *OPD, "--rewards", "no_such_module", "--out", tmp_path / "run")


def test_opd_final_evaluation_and_pictures(monkeypatch, tmp_path, capsys):
    call(
        monkeypatch,
        "train_opd",
        *TINY,
        "--iterations",
        1,
        "--eval_prompts",
        6,
        "--sample_every",
        1,
        "--out",
        tmp_path / "run",
    )
    out = capsys.readouterr().out
    assert (
        "merged start" in out and "recorded" in out and "oracle" in out and "student - merged start" in out and "next:" in out
    )
    for name in ("table.md", "results.json", "grid.png", "samples/00001.png", "args.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--reward", "ocr"],
        ["--reward", "deqa=0.4", "pickscore=0.6", "--tasks", "geneval", "ocr", "deqa", "pickscore"],
        ["--mix", "geneval=3", "ocr=1", "pickscore=1"],
        ["--reward", "ocr", "--window", "1", "--final", "best"],
        ["--reward", "deqa", "--beta", "0.04", "--std", "group"],
        ["--reward", "ocr", "--init", "toy/adapters/merged"],
    ],
)
def test_teacher_trains(monkeypatch, tmp_path, flags):
    call(monkeypatch, "train_teacher", *TINY, "--eval_prompts", 4, "--eval_every", 2, *flags, "--out", tmp_path / "run")
    log = metrics(tmp_path / "run")
    if "deqa" in flags:  # after three noisy steps nothing is legible, but something is dirty
        assert all(line["grad_norm"] > 0 for line in log)
    assert len(log) == 2 and all(0 <= line["reward"] <= 1 for line in log) and any(k.startswith("test/") for k in log[-1])
    assert (tmp_path / "run/adapter/adapter_config.json").exists() and list((tmp_path / "run/samples").glob("*.png"))
    assert all(0 < line[f"monitor/{name}"] < 9 for line in log for name in ("edge_density", "colour_entropy", "diversity"))
    if "--beta" in flags:
        assert all("kl_base" in line for line in log)


def test_evaluate_is_deterministic_and_draws_the_grid(monkeypatch, tmp_path):
    pages = []
    for name in ("one", "two"):
        call(
            monkeypatch,
            "evaluate",
            "--models",
            "base",
            "ocr=toy/adapters/ocr",
            "--num_prompts",
            6,
            "--steps",
            2,
            "--out",
            tmp_path / name,
        )
        pages.append((tmp_path / name / "table.md").read_text())
    assert pages[0] == pages[1] and "GenEval" in pages[0] and "Average" in pages[0] and "| ocr |" in pages[0]
    assert (tmp_path / "one/grid.png").exists()
    results = json.loads((tmp_path / "one/results.json").read_text())["results"]
    assert results["base"]["geneval"]["n"] == 6 and 0 < results["base"]["average"]["mean"] < 1


def evaluate(monkeypatch, out, *flags, models=("base", "ocr=toy/adapters/ocr")):
    """evaluate.py on three prompts a task -> (its table, the number of images that it painted)."""
    import evaluate as script

    painted, paint = [], script.paint
    with monkeypatch.context() as patch:
        patch.setattr(script, "paint", lambda *given: painted.extend(given[2]) or paint(*given))
        source = [] if "--scores_only" in flags else ["--models", *models]
        call(patch, "evaluate", *source, "--num_prompts", 3, "--steps", 2, "--out", out, *flags)
    return (out / "table.md").read_text(), len(painted)


def test_images_are_painted_once(monkeypatch, tmp_path):
    """A later call paints what is missing, damaged, or was made in another way, and nothing else; the table is the same."""
    out = tmp_path / "out"
    first, painted = evaluate(monkeypatch, out)
    assert painted == 2 * 4 * 3 and (out / "differences.png").stat().st_size > 0
    assert evaluate(monkeypatch, out, "--overwrite", "--batch", 2) == (first, 0)
    (out / "images/base/ocr/00001.png").unlink()
    (out / "images/ocr/deqa/00002.png").write_bytes(b"not a picture")
    assert evaluate(monkeypatch, out, "--overwrite") == (first, 2)
    other, painted = evaluate(monkeypatch, out, "--overwrite", models=("base", "ocr=toy/adapters/deqa"))  # another adapter
    assert painted == 4 * 3 and other != first
    assert evaluate(monkeypatch, out, "--overwrite") == (first, 4 * 3)
    for flags in (["--seed", 1], ["--steps", 3], ["--guidance", 2], ["--text_length", 8], ["--size", 32], ["--no_t5"]):
        assert evaluate(monkeypatch, out, "--overwrite", *flags, "--tasks", "ocr", models=["base"])[1] == 3, flags
    third = tmp_path / "prompts.txt"
    third.write_text("".join(f"sign reads {x} in red\n" for x in ("K T", "T K", "K K")))
    assert evaluate(monkeypatch, out, "--overwrite", "--tasks", "ocr", "--prompts", f"ocr={third}", models=["base"])[1] == 3


def test_an_interrupted_evaluation_goes_on(monkeypatch, tmp_path):
    import evaluate as script

    save, count = script.save_picture, []

    def stop_at_seven(*args):
        count.append(save(*args))
        if len(count) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "save_picture", stop_at_seven)
        evaluate(patch, tmp_path / "a")
    assert not (tmp_path / "a/results.json").exists()
    assert evaluate(monkeypatch, tmp_path / "a") == (evaluate(monkeypatch, tmp_path / "b")[0], 2 * 4 * 3 - 7)


def test_scores_only_gives_the_table_of_the_same_images(monkeypatch, tmp_path):
    """The three ways to hand over a folder, against the run that painted its images."""
    table, _ = evaluate(monkeypatch, tmp_path / "out", models=["base"])
    images = tmp_path / "out/images/base"
    only = lambda folder: ["--scores_only", f"base={folder}"]
    scored = lambda folder, *flags: evaluate(monkeypatch, tmp_path / folder.name / "s", *only(folder), *flags)
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
    lines = [json.dumps({"file_name": f"some name {j}.png", "prompt": prompts[j]}) for j in (2, 0, 1)]
    (own / "metadata.jsonl").write_text("\n".join(lines))
    assert scored(own, "--tasks", "ocr") == (one, 0)
    assert scored(nested, "--tasks", "ocr") == (one, 0)  # twice the images, and no more certainty than before
    assert json.loads((nested.parent / "nested/s/results.json").read_text())["results"]["base"]["ocr"]["n"] == 6


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
        (["0/samples/0.png", "0/samples/1.png", "1/samples/0.png", "2/samples/0.png"], "1 image(s) of prompt 00001"),
        (["0.png", "1.png", "2.png", "BROKEN"], "cannot be decoded"),
        (["0.png", "LIST"], "line 2 needs"),
        (["0.png", "1.png", "2.png", "TASKS"], "--tasks"),
        (["0.png", "1.png", "2.png", "OTHER"], "not the ocr prompts"),
    ],
)
def test_a_folder_that_does_not_fit_its_prompts_gets_no_score(monkeypatch, tmp_path, capsys, names, says):
    prompts, folder = tmp_path / "prompts.txt", pictures(tmp_path / "images", *(n for n in names if not n.isupper()))
    prompts.write_text("".join(f"sign reads {x} in red\n" for x in ("K T", "T K", "K K")))
    folders, tasks = [folder], ["--tasks", "ocr", "--prompts", f"ocr={prompts}"]
    if "BROKEN" in names:
        (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    if "LIST" in names:
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "prompt": "a"}\n{"file_name": "1.png", "prompt": "a"}')
    if "TASKS" in names:
        tasks = []
    if "OTHER" in names:
        pictures(tmp_path / "more", *(f"{j}/samples/{k}.png" for j in range(3) for k in range(2)))
        folders.append(tmp_path / "more")
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "evaluate", "--scores_only", *folders, *tasks, "--out", tmp_path / "out")
    lines = [line for line in capsys.readouterr().err.splitlines() if "scoring:" not in line and line]
    assert stopped.value.code == 2 and len(lines) == 1 and says in lines[0] and not (tmp_path / "out").exists()


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
    "(4,), not a tensor of shape (3,)": lambda images, prompts, metadata=None: torch.zeros(len(prompts) + 1),
    "NoneType": lambda images, prompts, metadata=None: None,
    "AssertionError: no message": raises(AssertionError()),
}


@pytest.mark.parametrize("says", FAILURES)
def test_whatever_goes_wrong_in_a_scorer_is_not_scored(monkeypatch, tmp_path, capsys, says):
    """Never a 0, for any model: the metric is left out of every row, and the reason stands in each file."""
    import toy

    good = toy.REWARDS["ocr"]

    def broken(images, prompts, metadata=None):  # right on the base's images, so that there is something to withdraw
        broken.calls += 1
        return good(images, prompts) if broken.calls == 1 else FAILURES[says](images, prompts)

    broken.calls = 0
    monkeypatch.setitem(toy.REWARDS, "ocr", broken)
    table, _ = evaluate(monkeypatch, tmp_path / "out", "--tasks", "ocr", "geneval")
    assert "not scored: ocr: " in table and says in table and "second line" not in table and "OCR" not in table
    assert "not scored: ocr: " in capsys.readouterr().out and broken.calls == 2
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert says in results["not_scored"]["ocr"]
    assert all("ocr" not in row and "geneval" in row and "average" not in row for row in results["results"].values())


def test_without_weights_nothing_is_scored_and_the_images_are_kept(monkeypatch, tmp_path, capsys):
    """The real scorers, none of whose weights are here: a line each with the command that fetches them, exit 2, no table."""
    (tmp_path / "g.jsonl").write_text(
        json.dumps({"prompt": "a photo of a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]})
    )
    (tmp_path / "o.txt").write_text('a sign that says "Hi"\n')
    tasks = [f"{task}={tmp_path}/{'g.jsonl' if task == 'geneval' else 'o.txt'}" for task in TASKS]
    toy = Path("toy").resolve()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit) as stopped:
        flags = ["--model", toy, "--rewards", "rewards", "--prompts", *tasks, "--steps", 1, "--published", "--out", "out"]
        call(monkeypatch, "evaluate", *flags)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and "nothing could be scored" in err.splitlines()[-1]
    missing = [line for line in out.splitlines() if line.startswith("not scored: ")]
    assert len(missing) == 5 and all("hf download" in line or "curl -LO" in line for line in missing)
    assert len(list(Path("out/images").rglob("*.png"))) == 4 and not Path("out/results.json").exists()


def test_a_scorer_that_fails_stops_a_teacher_or_drops_the_batch(monkeypatch, tmp_path, capsys):
    import toy

    broken = lambda *_: FAILURES["no weights here"](*_)
    broken.range = (0, 1)
    good, calls = toy.REWARDS["deqa"], []
    flags = [*TINY, "--reward", "deqa", "--eval_every", "0", "--out"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setitem(toy.REWARDS, "deqa", broken)
        call(patch, "train_teacher", *flags, tmp_path / "stop")
    assert stopped.value.code == 2 and "reward deqa cannot score: ocr: no weights here" in capsys.readouterr().err

    def sometimes(images, prompts, metadata=None):
        calls.append(len(prompts))
        return (broken if len(calls) == 2 else good)(images, prompts, metadata)

    sometimes.range = good.range
    skip = ["--on_reward_error", "skip", "--iterations"]
    with monkeypatch.context() as patch:
        patch.setitem(toy.REWARDS, "deqa", sometimes)
        call(patch, "train_teacher", *flags, tmp_path / "skip", *skip, 3)
    assert "batch dropped: reward deqa" in capsys.readouterr().err
    log = metrics(tmp_path / "skip")
    assert [line.get("skipped_updates", 0) for line in log] == [0, 2, 0]
    assert log[1]["reward"] is None and len(log[1]["skipped_prompts"]) == 4 and log[2]["grad_norm"] > 0
    call(monkeypatch, "train_teacher", *flags, tmp_path / "one", "--iterations", 1)  # the dropped batch changed nothing
    states = [tmp_path / "one/checkpoints/step_1", tmp_path / "skip/checkpoints/step_3"]
    before, after = (load_file(state / "state.safetensors") for state in states)
    steps = [next(v for k, v in state.items() if k.startswith("optimizer.step.")).item() for state in (before, after)]
    assert steps == [2, 4]

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setitem(toy.REWARDS, "deqa", broken)
        call(patch, "train_teacher", *flags, tmp_path / "never", *skip, 20)
    assert stopped.value.code == 2 and "10 updates in a row" in capsys.readouterr().err
    assert len(metrics(tmp_path / "never")) == 5 and (tmp_path / "never/checkpoints/step_5").is_dir()


@pytest.mark.slow
def test_a_batch_that_one_process_cannot_score_is_dropped_by_both(monkeypatch, tmp_path):
    module = "import os, toy\ndef deqa(images, prompts, metadata=None):\n    deqa.n += 1\n"
    module += "    if deqa.n == 2 and os.environ['RANK'] == '1': raise RuntimeError('only here')\n"
    module += "    return toy.deqa(images, prompts)\ndeqa.n, deqa.range = 0, (1, 5)\nREWARDS = {'deqa': deqa}\n"
    (tmp_path / "mine.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = [*TINY, "--iterations", 3, "--reward", "deqa", "--rewards", "mine", "--eval_every", 0, "--on_reward_error", "skip"]
    done = shell("train_teacher.py", *flags, "--out", tmp_path / "run", processes=2)
    assert done.returncode == 0 and "only here" in done.stderr, done.stderr
    assert [line.get("skipped_updates", 0) for line in metrics(tmp_path / "run")] == [0, 2, 0]


def test_tables_standard_errors_and_the_names_of_geneval():
    import support.tables as tables
    from rewards.geneval import TAGS, summary

    scores = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distinct = [str(n) for n in range(20)]
    assert tables.standard_error(scores, distinct) == pytest.approx(scores.std().item() / 20**0.5)
    assert tables.standard_error(scores.repeat(4), distinct * 4) == pytest.approx(scores.std().item() / 20**0.5)
    groups = scores.view(5, 4).mean(1)  # five prompts of four images: as sure as five numbers
    assert tables.standard_error(scores, [n for n in "abcde" for _ in range(4)]) == pytest.approx(groups.std().item() / 5**0.5)

    rng = torch.Generator().manual_seed(1)
    tags = [tag for n, tag in enumerate(TAGS) for _ in range(4 + n)]
    soft = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)[torch.randint(3, (len(tags),), generator=rng)]
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
    import support.tables as tables

    rows = tables.published()
    for row in rows.values():
        parts = [row[task]["mean"] / scale for task, scale in tables.SCALES.items()]
        assert row["average"]["mean"] == pytest.approx(sum(parts) / 4, abs=1e-4)
    assert "| SD3.5-M | 0.63 | 0.59 | 4.07 | 21.64 | 0.7165 |" in tables.table(rows)


def test_the_command_line_overrules_a_file_of_flags_name_by_name(monkeypatch, tmp_path):
    import train_opd

    (tmp_path / "r.args").write_text("--teacher ocr=toy/adapters/ocr deqa=toy/adapters/deqa  # a recipe's\n")
    flags = [f"@{tmp_path}/r.args", "--teacher", "ocr=toy/adapters/merged", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train_opd.py", *flags])
    assert train_opd.parse_args().teacher == {"ocr": "toy/adapters/merged", "deqa": "toy/adapters/deqa"}


@pytest.mark.parametrize("split, name", [("train", "train.txt"), ("train", "train_metadata.jsonl"), ("test", "test.txt"),
                                         ("test", "test_metadata.jsonl"), ("test", "evaluation_metadata.jsonl")])  # fmt: skip
def test_folders_of_prompts_as_flow_grpo_and_geneval_have_them(tmp_path, split, name):
    from support.files import prompt_files, read_prompts

    line = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats ½ 猫"}
    (tmp_path / name).write_text(json.dumps(line) + "\n" if name.endswith("l") else line["prompt"] + "\n", encoding="utf-8")
    file = prompt_files([f"geneval={tmp_path}"], ["geneval"], split, "toy")["geneval"]
    prompts, metadata = read_prompts(file)
    assert file == str(tmp_path / name) and prompts == [line["prompt"]] and metadata == [line if name.endswith("l") else {}]
    with pytest.raises(SystemExit):
        prompt_files([f"geneval={tmp_path}"], ["geneval"], "other", "toy")


def test_evaluate_paints_ones_own_prompt(monkeypatch, tmp_path):
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


def test_resume_goes_on_where_it_stopped(monkeypatch, tmp_path):
    call(monkeypatch, "train_opd", *OPD, "--iterations", 3, "--out", tmp_path / "whole")
    call(monkeypatch, "train_opd", *OPD, "--iterations", 2, "--out", tmp_path / "parts")
    call(monkeypatch, "train_opd", *OPD, "--iterations", 3, "--out", tmp_path / "parts", "--resume")
    assert [line["iteration"] for line in metrics(tmp_path / "parts")] == [0, 1, 2]
    torch.testing.assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.parametrize(
    "script,flags",
    [
        ("train_opd", ["--eval_prompts", "0", "--sample_every", "0"]),
        ("train_teacher", ["--reward", "deqa", "--eval_every", "0"]),
    ],
)
def test_two_processes_give_the_curve_of_one(tmp_path, script, flags):
    common_flags = [
        f"{script}.py",
        *"--prompts_per_iteration 3 --group_size 4 --steps 3 --iterations 3 --eval_steps 2 --lr 1e-4".split(),
        *flags,
    ]
    for processes in (1, 2):
        done = shell(*common_flags, "--out", tmp_path / str(processes), processes=processes)
        assert done.returncode == 0, done.stderr
    assert all(line["grad_norm"] > 0 for line in metrics(tmp_path / "1"))  # there was something to disagree about
    torch.testing.assert_close(weights(tmp_path / "2"), weights(tmp_path / "1"), rtol=1e-4, atol=1e-5)
    for one, two in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2")):
        for key in one.keys() - {"ratio_gap", "clip_fraction", "monitor/diversity"}:  # of what one process has
            if key.startswith("seconds"):
                continue
            assert two[key] == pytest.approx(one[key], rel=1e-2, abs=1e-4), key


@pytest.mark.slow
def test_two_machines_give_the_curve_of_one(tmp_path):
    """Two launchers with node ranks of their own, as on two machines that see one folder."""
    words = "train_opd.py --prompts_per_iteration 4 --group_size 4 --steps 3 --iterations 2 --lr 1e-4".split()
    words += ["--eval_prompts", "0", "--sample_every", "0", "--out"]
    assert shell(*words, tmp_path / "one").returncode == 0
    launch = [sys.executable, *"-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --master_addr=127.0.0.1".split()]
    port = 29500 + os.getpid() % 1000
    nodes = [
        subprocess.Popen(
            [*launch, f"--master_port={port}", f"--node_rank={rank}", *words, str(tmp_path / "two")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-4, atol=1e-5)


def test_two_processes_give_the_table_of_one(tmp_path):
    for processes in (1, 2):
        done = shell("evaluate.py", "--num_prompts", 5, "--steps", 2, "--out", tmp_path / str(processes), processes=processes)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1/table.md").read_text() == (tmp_path / "2/table.md").read_text()
    images = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*.png")) for n in ("1", "2")]
    assert images[0] == images[1] and len(images[0]) == 4 * 5 + 1  # none twice, none left out, and the grid


@pytest.mark.parametrize("script", ["train_teacher", "merge", "train_opd", "evaluate", "toy"])
def test_help_is_quick_and_says_units_and_defaults(script):
    done = shell(f"{script}.py", "--help")
    assert done.returncode == 0 and "default" in done.stdout
    assert "torch" not in shell("-X", "importtime", f"{script}.py", "--help").stderr  # what would make it slow


def test_a_damaged_teacher_stops_the_real_process_in_one_line(tmp_path):
    """In a fresh process: nothing else on stderr, no traceback."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_model.safetensors").write_bytes(b"garbage" * 10)
    done = shell("train_opd.py", "--teacher", f"ocr={bad}", *OPD, "--out", tmp_path / "run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert len(done.stderr.strip().splitlines()) == 1 and "damaged" in done.stderr


def readme_commands():
    """Every command line of the README's code blocks, as words."""
    text = Path("README.md").read_text()
    lines = [line for block in re.findall(r"```\n(.*?)```", text, re.S) for line in block.splitlines()]
    commands = [part for line in lines if line.startswith(("python", "torchrun")) for part in line.split("#")[0].split("&&")]
    return [shlex.split(part) for part in commands]


def test_the_readmes_commands_parse(monkeypatch, tmp_path):
    """Scripts accept their flags as written (outputs of earlier commands stand in as the merged adapter); pip and pytest
    commands name files that exist."""
    commands = readme_commands()
    assert any("requirements.txt" in words for words in commands) and any("pytest" in words for words in commands)
    assert sum(words[-1] == "train_opd.py" for words in commands) >= 1  # the main job, without a flag
    for words in commands:
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None or script == "toy.py":
            continue
        flags = [
            "toy/adapters/merged" if re.fullmatch(r"runs/(merged|opd/adapter)", w) else w
            for w in words[words.index(script) + 1 :]
        ]
        flags = [re.sub(r"=runs/.*", "=toy/adapters/merged", flag) for flag in flags]
        if "--out" not in flags:
            flags += ["--out", str(tmp_path / "new")]
        monkeypatch.setattr(sys, "argv", [script, *flags])
        importlib.import_module(script.removesuffix(".py")).parse_args()
