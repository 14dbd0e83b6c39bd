"""Scripts end to end on tiny settings: what they print, need, survive and read.

Their numbers are compared with an independent implementation in test_iteration.py."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import call, codes_of, fork, linux
from safetensors.torch import load_file
from torch.testing import assert_close

import toy
import train_opd
from rewards import pictures
from support.files import prompt_files, read_prompts
from support.metrics import read_log

TINY = "--prompts_per_iteration 4 --group_size 2 --steps 3 --iterations 2 --eval_steps 2".split()
OPD = [*TINY, "--eval_prompts", "0", "--sample_every", "0"]
GRPO = [*TINY, "--reward", "deqa", "--eval_every", "0"]
SFT = "--batch 6 --iterations 4 --sft_images 12 --eval_steps 2 --eval_prompts 0 --lr 3e-3".split()


# ---- Stage 3


def test_opd_lowers_the_kl_without_scorer_and_vae(monkeypatch, tmp_path):
    """One prompt a task, so that iterations are alike but for noise."""

    def refuse(*_):
        raise AssertionError("the training path decoded an image")

    monkeypatch.setattr(pictures, "decode", refuse)
    flags = "--dtype bf16 --no_t5 --text_length 8 --rewards no_such_module --init base --rank 4"
    flags += " --mar_weight 0 --anchor nowhere --iterations 5 --updates 1 --prompts"
    for task in ("ocr", "deqa", "geneval", "pickscore"):
        first = Path(f"toy/prompts/{task}_train.txt").read_text().splitlines()[0]
        (tmp_path / f"{task}.txt").write_text(first)
        flags += f" {task}={tmp_path}/{task}.txt"
    call(monkeypatch, "train_opd", *OPD, *flags.split(), "--out", tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert [line["iteration"] for line in log] == list(range(5))
    for line in log:
        assert line["grad_norm"] > 0 and torch.tensor(list(line.values())).isfinite().all()
    total = lambda line: sum(value for name, value in line.items() if name.startswith("kl/"))
    assert 0 < total(log[-1]) < 0.8 * total(log[0])
    for file in ("adapter/pytorch_lora_weights.safetensors", "args.json"):
        assert (tmp_path / "run" / file).stat().st_size > 0
    assert not (tmp_path / "run/samples").exists()  # the last line would announce it


# ---- The command that a script prints for the next stage

OWN_REWARDS = """
from toy import REWARDS as toy

def red(images, prompts, metadata=None):
    return images[:, 0].mean((1, 2))

red.range = (0, 1)
REWARDS = {**toy, "red": red}
"""
OWN = "--rewards own_rewards --prompts red=PLACE/red.txt --test_prompts red=PLACE/red.txt"
TEACHER = f"{OWN} --teacher red=toy/adapters/ocr"
FIRST = {
    "train_teacher": [*TINY, *f"{OWN} --reward red --guidance 1.5 --eval_prompts 2".split()],
    "train_opd": [*TINY, *f"{TEACHER} --guidance 1.5 --eval_prompts 2".split()],
    "train_sft": [*SFT, *TEACHER.split()],
    "merge": ["--rank", "4"],
}


@pytest.mark.parametrize("script", FIRST)
def test_the_next_command_runs_as_printed(monkeypatch, tmp_path, capsys, script):
    """With a module of rewards and a task of one's own, which the next command must name."""
    (tmp_path / "own_rewards.py").write_text(OWN_REWARDS)
    (tmp_path / "red.txt").write_text("red circle\nblue square\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)  # of another test
    flags = [word.replace("PLACE", str(tmp_path)) for word in FIRST[script]]
    call(monkeypatch, script, *flags, "--out", tmp_path / "run", curves=True)
    out = capsys.readouterr().out
    words = shlex.split(re.search(r"^next: python (.*)$", out, re.M)[1])
    words[words.index("--out") + 1] = str(tmp_path / "next")
    if script == "merge":
        return call(monkeypatch, "train_opd", *words[1:], *OPD)
    assert words[words.index("--rewards") + 1] == "own_rewards"
    call(monkeypatch, "evaluate", *words[1:])
    assert list((tmp_path / "next").glob("*.png"))
    assert (tmp_path / "run/curves.png").stat().st_size > 0
    if script == "train_opd":
        assert "student - " not in out and (tmp_path / "run/grid.png").exists()  # no Average


# ---- Scorers that fail; flags and files


@linux
@pytest.mark.parametrize("world", (1, 2))
def test_a_batch_without_scores_is_dropped_and_changes_nothing(monkeypatch, tmp_path, world):
    """The last process fails in its second batch. All drop it, and go on together."""
    good, calls, log = toy.REWARDS["deqa"], [], tmp_path / "log.txt"

    def broken(images, prompts, metadata=None):
        raise ValueError("deqa: no weights here\nand a second line")

    def sometimes(images, prompts, metadata=None):
        calls.append(len(prompts))
        fails = len(calls) == 2 and os.environ["RANK"] == str(world - 1)
        return (broken if fails else good)(images, prompts, metadata)

    broken.range = sometimes.range = good.range
    words = [*GRPO, "--on_reward_error", "skip", "--iterations", 3, "--save_every", 1, "--keep", 9]
    train = lambda run, *more: codes_of(
        fork(world, log, call, monkeypatch, "train_teacher", *words, "--out", run, *more)
    )
    monkeypatch.setitem(toy.REWARDS, "deqa", sometimes)
    assert train(tmp_path / "run") == [0] * world, log.read_text()
    assert "batch dropped: reward deqa cannot score: no weights here\n" in log.read_text()
    lines = read_log(tmp_path / "run")
    assert [line.get("skipped_updates", 0) for line in lines] == [0, 2, 0]
    assert lines[1]["reward"] is None
    states = []
    for step in (1, 2, 3):
        saved = load_file(tmp_path / f"run/checkpoints/step_{step}/state.safetensors")
        states.append({key: t for key, t in saved.items() if not key.startswith("average.")})
    assert_close(states[1], states[0], rtol=0, atol=0)
    assert any((states[2][key] != t).any() for key, t in states[1].items())
    monkeypatch.setitem(toy.REWARDS, "deqa", broken)  # too many of them end the run
    assert train(tmp_path / "bad", "--max_bad_steps", 4) == [2] * world
    assert "4 updates in a row" in log.read_text() and len(read_log(tmp_path / "bad")) == 2


def test_the_command_line_overrules_a_file_of_flags_name_by_name(monkeypatch, tmp_path):
    recipe = tmp_path / "recipe.args"
    recipe.write_text("--teacher ocr=toy/adapters/ocr deqa=toy/adapters/deqa  # a recipe's\n")
    words = ["train_opd.py", f"@{recipe}", "--teacher", "ocr=toy/adapters/merged"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "run")])
    expected = {"ocr": "toy/adapters/merged", "deqa": "toy/adapters/deqa"}
    assert train_opd.parse_args().teacher == expected


def test_folders_of_prompts_as_flow_grpo_and_geneval_have_them(tmp_path):
    line = {"tag": "counting", "include": [{"class": "cat", "count": 2}]}
    line["prompt"] = "a photo of two cats ½ 猫"
    names = "train.txt train_metadata.jsonl test.txt test_metadata.jsonl evaluation_metadata.jsonl"
    for name in names.split():
        split = "train" if name.startswith("train") else "test"
        text, metadata = line["prompt"], {}
        if name.endswith(".jsonl"):
            text, metadata = json.dumps(line), line
        file = tmp_path / name / name
        file.parent.mkdir()
        file.write_text(text + "\n", encoding="utf-8")
        given = {"geneval": str(file.parent)}
        assert prompt_files(given, ["geneval"], split, "toy") == {"geneval": str(file)}
        assert read_prompts(file) == ([line["prompt"]], [metadata])
        with pytest.raises(SystemExit):
            prompt_files(given, ["geneval"], "other", "toy")
