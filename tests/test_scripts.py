"""Every training script end to end on tiny settings, alone and with two processes.

Its numbers are compared with an independent implementation in test_iteration.py."""

import contextlib
import io
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
from conftest import call, shell
from safetensors.torch import load_file

TINY = "--prompts_per_iteration 4 --group_size 2 --steps 3 --iterations 2 --eval_steps 2".split()
OPD = [*TINY, "--eval_prompts", "0", "--sample_every", "0"]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "flags",
    [
        ["--objective", "ppo-scalar"],
        ["--objective", "ppo-published"],
        ["--objective", "ppo-public-code"],
        ["--init", "base", "--rank", "4", "--mar_weight", "0", "--anchor", "nowhere"],
        ["--dtype", "bf16", "--checkpointing"],
        ["--no_t5", "--text_length", "8"],
    ],
)
def test_opd_trains(monkeypatch, tmp_path, flags):
    call(monkeypatch, "train_opd", *OPD, *flags, "--out", tmp_path / "run")
    log = metrics(tmp_path / "run")
    assert [line["iteration"] for line in log] == [0, 1]
    for line in log:
        assert line["grad_norm"] > 0 and line["kl/ocr"] > 0
        assert torch.tensor(list(line.values())).isfinite().all()
    assert (tmp_path / "run/adapter/pytorch_lora_weights.safetensors").exists()
    assert (tmp_path / "run/curves.png").exists()


def test_checkpointing_gives_the_same_student(monkeypatch, tmp_path):
    for name, more in (("kept", []), ("again", ["--checkpointing"])):
        call(monkeypatch, "train_opd", *OPD, "--lr", "1e-4", *more, "--out", tmp_path / name)
    student = weights(tmp_path / "kept")
    torch.testing.assert_close(weights(tmp_path / "again"), student, rtol=1e-4, atol=1e-6)


def test_opd_lowers_the_kl(monkeypatch, tmp_path):
    """Learning, not only running: the same prompts and noise, before and after six iterations."""
    settings = "--group_size 4 --steps 4 --iterations 6 --mar_weight 0 --eval_prompts 0".split()
    settings += ["--sample_every", "0", "--prompts_per_iteration", "4"]
    call(monkeypatch, "train_opd", *settings, "--out", tmp_path / "run")
    again = ["--init", tmp_path / "run/adapter", "--iterations", "1", "--out", tmp_path / "after"]
    call(monkeypatch, "train_opd", *settings, *again)
    total = lambda line: sum(value for name, value in line.items() if name.startswith("kl/"))
    assert total(metrics(tmp_path / "after")[0]) < 0.9 * total(metrics(tmp_path / "run")[0])


def test_the_ratio_is_one_before_the_first_update(monkeypatch, tmp_path):
    call(monkeypatch, "train_opd", *OPD, "--updates", 1, "--out", tmp_path / "run")
    for line in metrics(tmp_path / "run"):
        assert line["ratio_gap"] < 1e-4 and line["clip_fraction"] == 0


SFT = "--batch 6 --iterations 4 --sft_images 12 --eval_steps 2 --eval_prompts 0 --lr 3e-3".split()


def printed(script, monkeypatch, *flags):
    """The command after "next:" that a script prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        call(monkeypatch, script, *flags)
    return re.search(r"^next: python (.*)$", out.getvalue(), re.M)[1], out.getvalue()


@pytest.mark.parametrize("script", ["train_teacher", "train_opd", "train_sft", "merge"])
def test_the_next_command_runs_as_printed(monkeypatch, tmp_path, script):
    """With a module of rewards and a task of one's own, which the next command must name."""
    (tmp_path / "own_rewards.py").write_text(
        "from toy import REWARDS as toy\n\n\ndef red(images, prompts, metadata=None):\n"
        "    return images[:, 0].mean((1, 2))\n\n\nred.range = (0, 1)\n"
        'REWARDS = {**toy, "red": red}\n'
    )
    (tmp_path / "red.txt").write_text("red circle\nblue square\n")
    monkeypatch.syspath_prepend(tmp_path)
    files = [f"red={tmp_path}/red.txt"]
    own = ["--rewards", "own_rewards", "--prompts", *files, "--test_prompts", *files]
    teacher = ["--teacher", "red=toy/adapters/ocr"]
    flags = {
        "train_teacher": [
            *TINY,
            *own,
            "--reward",
            "red",
            "--guidance",
            "1.5",
            "--eval_prompts",
            "2",
        ],
        "train_opd": [*TINY, *own, *teacher, "--eval_prompts", "2", "--guidance", "1.5"],
        "train_sft": [*SFT, *own, *teacher],
        "merge": ["--rank", "4"],
    }[script]
    command, out = printed(script, monkeypatch, *flags, "--out", tmp_path / "run")
    words = shlex.split(command)
    words[words.index("--out") + 1] = str(tmp_path / "next")
    if script == "train_opd":
        assert "student - " not in out and (tmp_path / "run/grid.png").exists()  # no Average
    if script != "merge":
        assert words[words.index("--rewards") + 1] == "own_rewards"
        call(monkeypatch, "evaluate", *words[1:])
        assert list((tmp_path / "next").glob("*.png"))
    else:
        call(monkeypatch, "train_opd", *words[1:], *OPD)


def test_opd_reports_what_it_made(monkeypatch, tmp_path):
    flags = [*TINY, "--iterations", 1, "--eval_prompts", 6, "--sample_every", 1]
    command, out = printed("train_opd", monkeypatch, *flags, "--out", tmp_path / "run")
    for words in ("merged start", "recorded", "oracle", "student - merged start", "samples"):
        assert words in out
    for name in ("table.md", "results.json", "grid.png", "samples/00001.png", "args.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0


TWO = {
    "train_opd": ["--eval_prompts", "0", "--sample_every", "0"],
    "train_teacher": ["--reward", "deqa", "--eval_prompts", "1", "--eval_every", "3"],
    "train_sft": SFT,
}


@pytest.mark.parametrize("script", TWO)
def test_two_processes_give_the_curve_of_one(tmp_path, script):
    """Also with fewer test prompts than processes."""
    words = [f"{script}.py", *TWO[script], "--lr", "1e-4"]
    if script != "train_sft":
        words += "--prompts_per_iteration 3 --group_size 4 --steps 3 --iterations 3".split()
        words += ["--eval_steps", "2"]
    for processes in (1, 2):
        done = shell(*words, "--out", tmp_path / str(processes), processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    torch.testing.assert_close(
        weights(tmp_path / "2"), weights(tmp_path / "1"), rtol=1e-4, atol=1e-5
    )
    differ = ("seconds", "ratio_gap", "clip_fraction", "monitor/diversity")  # of one process
    for line, other in zip(one, two, strict=True):
        for name in line:
            if not name.startswith(differ):
                assert other[name] == pytest.approx(line[name], rel=1e-2, abs=1e-4), name


@pytest.mark.parametrize("script", ["train_teacher", "merge", "train_opd", "train_sft", "evaluate"])
def test_help_has_defaults(monkeypatch, capsys, script):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, script, "--help")
    assert stopped.value.code == 0 and "default" in capsys.readouterr().out


def test_a_scorer_that_fails_stops_a_teacher_or_drops_the_batch(monkeypatch, tmp_path, capsys):
    import toy

    def broken(images, prompts, metadata=None):
        raise ValueError("ocr: no weights here\nand a second line")

    broken.range = (0, 1)
    good, calls = toy.REWARDS["deqa"], []
    flags = [*TINY, "--reward", "deqa", "--eval_every", "0", "--out"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setitem(toy.REWARDS, "deqa", broken)
        call(patch, "train_teacher", *flags, tmp_path / "stop")
    assert (
        stopped.value.code == 2
        and "reward deqa cannot score: ocr: no weights here" in capsys.readouterr().err
    )

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
    assert (
        log[1]["reward"] is None and len(log[1]["skipped_prompts"]) == 4 and log[2]["grad_norm"] > 0
    )
    call(
        monkeypatch, "train_teacher", *flags, tmp_path / "one", "--iterations", 1
    )  # the dropped batch changed nothing
    states = [tmp_path / "one/checkpoints/step_1", tmp_path / "skip/checkpoints/step_3"]
    before, after = (load_file(state / "state.safetensors") for state in states)
    steps = [
        next(v for k, v in state.items() if k.startswith("optimizer.step.")).item()
        for state in (before, after)
    ]
    assert steps == [2, 4]

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setitem(toy.REWARDS, "deqa", broken)
        call(patch, "train_teacher", *flags, tmp_path / "never", *skip, 20)
    assert stopped.value.code == 2 and "10 updates in a row" in capsys.readouterr().err
    assert (
        len(metrics(tmp_path / "never")) == 5 and (tmp_path / "never/checkpoints/step_5").is_dir()
    )


@pytest.mark.slow
def test_a_batch_that_one_process_cannot_score_is_dropped_by_both(monkeypatch, tmp_path):
    module = "import os, toy\ndef deqa(images, prompts, metadata=None):\n    deqa.n += 1\n"
    module += "    if deqa.n == 2 and os.environ['RANK'] == '1': raise RuntimeError('only here')\n"
    module += "    return toy.REWARDS['deqa'](images, prompts)\ndeqa.n, deqa.range = 0, (1, 5)\n"
    module += "REWARDS = {'deqa': deqa}\n"
    (tmp_path / "mine.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = [
        *TINY,
        "--iterations",
        3,
        "--reward",
        "deqa",
        "--rewards",
        "mine",
        "--eval_every",
        0,
        "--on_reward_error",
        "skip",
    ]
    done = shell("train_teacher.py", *flags, "--out", tmp_path / "run", processes=2)
    assert done.returncode == 0 and "only here" in done.stderr, done.stderr
    assert [line.get("skipped_updates", 0) for line in metrics(tmp_path / "run")] == [0, 2, 0]


def test_the_command_line_overrules_a_file_of_flags_name_by_name(monkeypatch, tmp_path):
    import train_opd

    (tmp_path / "r.args").write_text(
        "--teacher ocr=toy/adapters/ocr deqa=toy/adapters/deqa  # a recipe's\n"
    )
    flags = [
        f"@{tmp_path}/r.args",
        "--teacher",
        "ocr=toy/adapters/merged",
        "--out",
        str(tmp_path / "run"),
    ]
    monkeypatch.setattr(sys, "argv", ["train_opd.py", *flags])
    assert train_opd.parse_args().teacher == {
        "ocr": "toy/adapters/merged",
        "deqa": "toy/adapters/deqa",
    }


@pytest.mark.parametrize(
    "split, name",
    [
        ("train", "train.txt"),
        ("train", "train_metadata.jsonl"),
        ("test", "test.txt"),
        ("test", "test_metadata.jsonl"),
        ("test", "evaluation_metadata.jsonl"),
    ],
)
def test_folders_of_prompts_as_flow_grpo_and_geneval_have_them(tmp_path, split, name):
    from support.files import prompt_files, read_prompts

    line = {
        "tag": "counting",
        "include": [{"class": "cat", "count": 2}],
        "prompt": "a photo of two cats ½ 猫",
    }
    (tmp_path / name).write_text(
        json.dumps(line) + "\n" if name.endswith("l") else line["prompt"] + "\n", encoding="utf-8"
    )
    file = prompt_files([f"geneval={tmp_path}"], ["geneval"], split, "toy")["geneval"]
    prompts, metadata = read_prompts(file)
    assert (
        file == str(tmp_path / name)
        and prompts == [line["prompt"]]
        and metadata == [line if name.endswith("l") else {}]
    )
    with pytest.raises(SystemExit):
        prompt_files([f"geneval={tmp_path}"], ["geneval"], "other", "toy")


def test_an_anchor_that_is_a_teacher_says_the_same_as_one_of_its_own(monkeypatch, tmp_path):
    """The default anchor is the deqa teacher: its LoRA is loaded once, its states labelled once."""
    shutil.copytree("toy/adapters/deqa", tmp_path / "lora/copy")
    for anchor in ("toy/adapters/deqa", tmp_path / "lora/copy"):
        call(
            monkeypatch,
            "train_opd",
            *OPD,
            "--anchor",
            anchor,
            "--out",
            tmp_path / Path(anchor).name,
        )
    one, two = metrics(tmp_path / "deqa"), metrics(tmp_path / "copy")
    assert one[0]["mar"] > 0
    for a, b in zip(one, two):
        assert all(
            b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6)
            for key in a
            if not key.startswith("seconds")
        )
    torch.testing.assert_close(weights(tmp_path / "deqa"), weights(tmp_path / "copy"))


def test_opd_needs_no_scorer_and_no_vae(monkeypatch, tmp_path):
    import support.model as model

    def refuse(*_):
        raise AssertionError("the training path decoded or scored an image")

    monkeypatch.setattr(model, "decode", refuse)
    call(monkeypatch, "train_opd", *OPD, "--rewards", "no_such_module", "--out", tmp_path / "run")


@pytest.mark.slow
def test_two_machines_give_the_curve_of_one(tmp_path):
    """Two launchers with node ranks of their own, as on two machines that see one folder."""
    words = "train_opd.py --prompts_per_iteration 4 --group_size 4 --steps 3 --iterations 2".split()
    words += ["--lr", "1e-4"]
    words += ["--eval_prompts", "0", "--sample_every", "0", "--out"]
    assert shell(*words, tmp_path / "one").returncode == 0
    launch = [
        sys.executable,
        *"-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --master_addr=127.0.0.1".split(),
    ]
    port = 29500 + os.getpid() % 1000
    nodes = [
        subprocess.Popen(
            [
                *launch,
                f"--master_port={port}",
                f"--node_rank={rank}",
                *words,
                str(tmp_path / "two"),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    torch.testing.assert_close(
        weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-4, atol=1e-5
    )


def test_a_damaged_teacher_stops_the_real_process_in_one_line(tmp_path):
    """In a fresh process: nothing else on stderr, no traceback."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_model.safetensors").write_bytes(b"garbage" * 10)
    done = shell("train_opd.py", "--teacher", f"ocr={bad}", *OPD, "--out", tmp_path / "run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert len(done.stderr.strip().splitlines()) == 1 and "damaged" in done.stderr
