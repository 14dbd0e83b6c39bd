"""Two iterations of every training script against the slow loops of tests/reference.py.

The same adapter, the same average and every number of the log. Each row changes flags whose effect
the first row does not show."""

import json

import pytest
import reference
from conftest import call
from safetensors.torch import load_file
from torch.testing import assert_close


def flags_of(values):
    """{"teacher_guidance": {"ocr": 1.5}, "lr": 1e-3} -> ["--teacher_guidance", "ocr=1.5", ...]."""
    words = []
    for name, value in values.items():
        words.append(f"--{name}")
        if isinstance(value, dict):
            words += [f"{key}={number}" for key, number in value.items()]
        elif isinstance(value, tuple):
            words += value
        else:
            words.append(str(value))
    return words


def compare(run, models, log):
    """Adam turns the rounding of tiny gradients into visible steps of single entries: a tensor may
    differ by 5 % of the way that training moved it."""
    state = load_file(max((run / "checkpoints").glob("step_*")) / "state.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    student = {name: p.detach() for name, p in models.named.items()}
    for expected, prefix in ((student, "student."), (models.average, "average.")):
        for name, tensor in expected.items():
            moved = (tensor - models.start[name]).norm()
            assert (state[prefix + name] - tensor).norm() <= 0.05 * moved + 1e-6, prefix + name
    for name in student:  # the average is what is published
        assert_close(adapter[f"base_model.model.{name}"], state[f"average.{name}"], rtol=0, atol=0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(log)
    for line, expected in zip(lines, log):
        other = ("seconds", "monitor/", "test")  # not in the reference
        line = {k: v for k, v in line.items() if not k.startswith(other) and k != "flat_groups"}
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=2e-3, abs=2e-6), name


SMALL = {"prompts_per_iteration": 2, "group_size": 2, "steps": 4, "iterations": 2}
TWO_TASKS = {"tasks": ("ocr", "deqa")}
OPD = {
    "ppo": (
        SMALL | {"clip_range": 0.01, "grad_norm": 0.01, "mar_weight": 0.5, "ema_every": 2},
        ["--micro_batch", "3", "--label_batch", "5"],
    ),
    "guidance and shares": (
        SMALL
        | {"guidance": 1.3, "student_guidance": 1.1, "teacher_guidance": {"ocr": 1.6}, "seed": 3}
        | {"task_mix": {"ocr": 2, "geneval": 1, "deqa": 1, "pickscore": 1}, "updates": 1},
        ["--micro_batch", "4"],
    ),
    "kl, random steps, dance": (
        SMALL
        | {"objective": "kl", "noise_kind": "dance", "noise": 0.4, "anchor": "base", "lr": 3e-4},
        ["--train_steps", "random:2", "--anchor", "base"],
    ),
    "cps, some steps": (
        SMALL
        | TWO_TASKS
        | {"noise_kind": "cps", "noise": 0.5, "anchor": "ocr", "ema_decay": 0.1, "updates": 1},
        ["--train_steps", "0,2", "--anchor", "toy/adapters/ocr"],
    ),
    "ode": (SMALL | TWO_TASKS | {"objective": "ode", "noise": 0.0, "init": "ocr"}, []),
    "trajectory": (SMALL | TWO_TASKS | {"objective": "trajectory", "clip_range": 1e-4}, []),
}


@pytest.mark.parametrize("row", OPD)
def test_opd(monkeypatch, row, tmp_path):
    values, more = OPD[row]
    extra = {}
    if "--train_steps" in more:
        which = more[more.index("--train_steps") + 1]
        extra = {"random_steps": 2} if which == "random:2" else {"trained": [0, 2]}
    models, log = reference.opd(**values, **extra)
    own = {k: v for k, v in values.items() if k not in ("tasks", "anchor", "init")}
    words = [*flags_of(own), "--init", f"toy/adapters/{values.get('init', 'merged')}", *more]
    if "tasks" in values:
        words += ["--teacher", *(f"{task}=toy/adapters/{task}" for task in values["tasks"])]
    words += ["--eval_prompts", "0", "--sample_every", "0", "--out", tmp_path / "run"]
    call(monkeypatch, "train_opd", *words)
    compare(tmp_path / "run", models, log)


GRPO = {
    "one task": (
        {"reward": {"ocr": 1.0}, "beta": 0.5, "std": "group", "updates": 3, "clip_range": 1e-4},
        ["--micro_batch", "2"],
    ),
    "mix and window": (
        {"mix": {"geneval": 3, "ocr": 1}, "mix_quality": 0.3, "window": 2, "window_end": 3}
        | {"steps": 5, "guidance": 1.2, "grad_norm": 0.01, "ema_every": 2, "updates": 1, "seed": 5},
        ["--micro_batch", "5", "--label_batch", "3"],
    ),
    "weighted rewards": (
        {"reward": {"deqa": 0.8, "pickscore": 0.2}, "tasks": ("ocr", "deqa"), "noise_kind": "cps"}
        | {"noise": 0.4, "lr": 3e-4, "ema_decay": 0.3},
        [],
    ),
}


@pytest.mark.parametrize("row", GRPO)
def test_grpo(monkeypatch, row, tmp_path):
    values, more = GRPO[row]
    values = {"prompts_per_iteration": 2, "group_size": 3, "steps": 4, "iterations": 2} | values
    models, log = reference.grpo(**({"updates": 1} | values))
    words = flags_of({"updates": 1} | values) + ["--init", "toy/adapters/merged", *more]
    call(monkeypatch, "train_teacher", *words, "--eval_every", 0, "--out", tmp_path / "run")
    compare(tmp_path / "run", models, log)


@pytest.mark.parametrize(
    "values",
    [
        {"grad_norm": 0.1, "ema_every": 2},
        {"guidance": 1.3, "teacher_guidance": {"ocr": 1.6}, "task_mix": {"ocr": 2, "deqa": 1}},
    ],
)
def test_sft(monkeypatch, values, tmp_path):
    models, log = reference.sft(**values)
    words = flags_of({"sft_images": 5, "batch": 3, "eval_steps": 2, "iterations": 3} | values)
    words += ["--teacher", "ocr=toy/adapters/ocr", "deqa=toy/adapters/deqa", "--micro_batch", "2"]
    words += ["--init", "toy/adapters/merged", "--eval_prompts", "0", "--out", tmp_path / "run"]
    call(monkeypatch, "train_sft", *words)
    compare(tmp_path / "run", models, log)
