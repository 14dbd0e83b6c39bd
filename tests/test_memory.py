"""The dry run's numbers against a real run; out of memory; compiled blocks; fp16. python -m pytest tests/test_memory.py"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from test_scripts import OPD, call

import support.lora as adapters
import support.files as files
import support.run as common
import support.memory as memory
import support.model as model
import train_opd
import train_teacher  # noqa: F401  before a test below replaces what it imports
from support.flags import TASKS

CPU = torch.device("cpu")


def parse(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train_opd.py", *map(str, flags)])
    return train_opd.parse_args()


@pytest.mark.parametrize(
    "flags",
    [
        ["--label_batch", 3, "--rollout_batch", 5, "--micro_batch", 1, "--guidance", 3],
        ["--anchor", "toy/adapters/ocr", "--train_steps", "0,1", "--steps", 4, "--task_mix"]
        + ["geneval=2", "ocr=1", "deqa=1", "pickscore=1"],
        ["--anchor", "base", "--rollout", "teacher", "--objective", "kl", "--group_size", 4],
        ["--mar_weight", 0, "--prompts_per_iteration", 3],
    ],
)
def test_the_passes_are_those_of_a_real_iteration(monkeypatch, tmp_path, flags):
    flags = [*OPD, "--iterations", 1, *flags, "--out", tmp_path / "run"]
    promised = memory.passes(parse(monkeypatch, *flags))
    made, velocity = {True: [], False: []}, train_opd.velocity

    def counted(transformer, x, *rest):
        made[torch.is_grad_enabled()].append(len(x))
        return velocity(transformer, x, *rest)

    monkeypatch.setattr(train_opd, "velocity", counted)
    call(monkeypatch, "train_opd", *flags)
    assert promised["update"] == (len(made[True]), max(made[True]))
    rollout, labels = promised["rollout"], promised["labels"]
    assert rollout[0] + labels[0] == len(made[False]) and max(rollout[1], labels[1]) == max(made[False])


def test_every_adapter_is_asked_once_and_at_its_own_scale(monkeypatch, tmp_path):
    """One switch per teacher and iteration; the student's guidance, a teacher's own, and the anchor's apart."""
    asked, switches, active, velocity, adapter = {}, [], ["student"], train_opd.velocity, adapters.adapter

    def recorded(transformer, x, t, text, rows, guidance):
        asked.setdefault(active[-1], set()).add(guidance)
        return velocity(transformer, x, t, text, rows, guidance)

    @contextlib.contextmanager
    def switched(transformer, name):
        switches.append(name)
        active.append(name)
        with adapter(transformer, name):
            yield
        active.pop()

    flags = [*OPD, "--iterations", 1, "--guidance", 3, "--student_guidance", 1.5, "--teacher_guidance", "ocr=2", "--anchor"]
    monkeypatch.setattr(train_opd, "velocity", recorded)
    monkeypatch.setattr(adapters, "adapter", switched)
    call(monkeypatch, "train_opd", *flags, "base", "--label_batch", 1, "--out", tmp_path / "run")
    teachers = {f"teacher_{task}": {2.0 if task == "ocr" else 3.0} for task in TASKS}
    assert asked == {"student": {1.5}, None: {3.0}} | teachers
    assert switches == ["student", *teachers, None, "student"]  # rollout, labels, anchor, the log's KL after the update


def test_uneven_processes_are_a_notice(capsys):
    flags = argparse.Namespace(prompts_per_iteration=6, group_size=4, updates=2, steps=3)
    common.print_batch(flags, 2, 3)
    assert "notice" not in capsys.readouterr().out
    common.print_batch(flags, 2, 16)
    assert "16 processes, 1 or 2 samples each: the same result, but some wait; equal with --prompts_per_iteration 8" in (
        capsys.readouterr().out
    )


def real_model(args):
    pipe = model.load_pipeline("toy", CPU, args.dtype, checkpointing=args.checkpointing)
    for task, path in args.teacher.items():
        adapters.add_adapter(pipe.transformer, task, adapters.read_adapter(path, ""))
    return pipe.transformer, adapters.add_student(pipe.transformer, args, adapters.read_adapter(args.init, ""))[0]


@pytest.mark.parametrize("flags", [[], ["--dtype", "bf16", "--checkpointing"]])
def test_the_bytes_are_those_of_a_real_model(monkeypatch, flags):
    """Of its weights, and of the tensors alive in a forward and a backward pass: to the byte."""
    args = parse(monkeypatch, *flags, "--guidance", 2, "--micro_batch", 40)
    held, extra = memory.phases(args, "toy", CPU, model.precision(args.dtype, CPU))
    transformer, student = real_model(args)
    weights = [size for name, size in held.items() if name.startswith(("transformer", "LoRA", "student"))]
    assert sum(weights) == memory.size_of(transformer)
    assert held["Adam's two moments"] == 2 * sum(p.numel() * 4 for p in student.values())
    assert extra["update"] == memory.peak_of(transformer, 40, 8, 17, 2.0, CPU, backward=True)
    assert extra["labels"] == memory.peak_of(transformer, 125, 8, 17, 2.0, CPU)


def test_the_bytes_are_what_the_allocator_gives(monkeypatch):
    """By another way of counting: torch's profiler records every allocation."""
    transformer, _ = real_model(parse(monkeypatch))
    counted = memory.peak_of(transformer, 40, 8, 17, 1.0, CPU, backward=True)
    for parameter in transformer.parameters():
        parameter.grad = None
    x, text = torch.zeros(40, 8, 8, 8), {"embeds": torch.zeros(1, 17, 128), "pooled": torch.zeros(1, 128)}
    with adapters.adapter(transformer, "student"), torch.profiler.profile(profile_memory=True) as profile:
        model.velocity(transformer, x, 0.5, text, torch.zeros(40, dtype=torch.long), 1.0).square().mean().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert counted == pytest.approx(peak, rel=0.05)


def test_a_dry_run_prints_and_leaves_nothing(monkeypatch, tmp_path, capsys):
    call(monkeypatch, "train_opd", "--dry_run", "--out", tmp_path / "run")
    out = capsys.readouterr().out
    for word in ("transformer, float32", "Adam", "rollout", "labels", "update", "pictures", "text encoders", "estimate"):
        assert word in out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_fetches_no_weight(monkeypatch, tmp_path, capsys):
    """Of a model and an adapter on the hub the configuration alone: what is asked for is all that comes."""

    def snapshot_download(name, revision=None, allow_patterns=None):
        source = Path("toy/adapters/ocr" if name == "some/lora" else "toy")
        for file in source.rglob("*"):
            part = file.relative_to(source)
            if file.is_file() and any(fnmatch(part, pattern) for pattern in allow_patterns):
                (tmp_path / name / part).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / name / part)
        return str(tmp_path / name)

    files.fetch.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    words = "--model some/model --teacher ocr=some/lora --init base --anchor some/lora --eval_prompts 0 --dry_run".split()
    words += ["--prompts", "ocr=toy/prompts/ocr_train.txt"]
    call(monkeypatch, "train_opd", *words)
    files.fetch.cache_clear()
    assert "held all the time" in capsys.readouterr().out
    assert (tmp_path / "some/model/transformer/config.json").is_file() and not list(tmp_path.rglob("*.safetensors"))


def lacking(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nsecond line")


@pytest.mark.parametrize(
    "script,place,name,named",
    [
        ("train_opd", "sde", "log_prob", "(rollout): try a smaller --rollout_batch"),
        ("train_opd", "train_opd", "means", "(update): try a smaller --micro_batch, or --checkpointing"),
        ("train_opd", "model.StableDiffusion3Pipeline", "encode_prompt", "--no_t5, or --cache_embeddings"),
        ("train_teacher", "sde", "log_prob", "(rollout): try a smaller --micro_batch"),
        ("evaluate", "sde", "step", "(evaluation): try a smaller --batch"),
    ],
)
def test_out_of_memory_is_one_line(monkeypatch, tmp_path, capsys, script, place, name, named):
    flags = {"train_opd": OPD, "train_teacher": ["--reward", "ocr"], "evaluate": ["--num_prompts", 2]}[script]
    monkeypatch.setattr(f"{place}.{name}", lacking)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, script, *flags, "--out", tmp_path / "run")
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stopped.value.code == 2 and len(lines) == 1 and named in lines[0] and "2.00 GiB" in lines[0]


@pytest.mark.slow
def test_out_of_memory_on_one_process_ends_all(tmp_path):
    """Started by hand: torchrun might end the other one before it has said a word."""
    (tmp_path / "run.py").write_text(
        "import os, sde, torch, train_opd\n"
        "def lacking(*_):\n    raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "if os.environ['RANK'] == '1': sde.log_prob = lacking\n"
        "train_opd.main(train_opd.parse_args())\n"
    )
    words = [sys.executable, tmp_path / "run.py", *OPD, "--out", tmp_path / "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000)}
    start = lambda rank: subprocess.Popen(words, env=environment | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
    processes = [start("0"), start("1")]
    other, lacks = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2] and "Traceback" not in other + lacks
    assert "error: out of memory (rollout)" in lacks and "error: another process has stopped" in other


def tiny_loss(pipe, text, name, states, grad):
    x = torch.randn(states, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(grad), adapters.adapter(pipe.transformer, name):
        return model.velocity(pipe.transformer, x, 0.5, text, torch.ones(states, dtype=torch.long), 1.0)


def with_student(**flags):
    pipe = model.load_pipeline("toy", CPU, **flags)
    adapters.add_adapter(pipe.transformer, "ocr", adapters.read_adapter("toy/adapters/ocr", ""))
    flags = argparse.Namespace(seed=0, rank=4, alpha=8, init="")
    return pipe, adapters.add_student(pipe.transformer, flags, adapters.read_adapter("toy/adapters/merged", ""))[0]


@pytest.mark.slow
def test_compiled_blocks_agree_and_stop_compiling(monkeypatch):
    """Two adapters, with gradient and without, batches of several sizes: a second round compiles nothing."""
    monkeypatch.setattr(model, "COMPILER", "eager")
    (plain, exact), (fast, student) = with_student(), with_student(compile=True)
    text, graphs = model.embed_prompts(plain, ["red circle"]), []
    for _ in range(2):
        for states in (4, 3):
            for name, grad in (("ocr", False), ("student", False), ("student", True)):
                v = tiny_loss(fast, text, name, states, grad)
                u = tiny_loss(plain, text, name, states, grad)
                torch.testing.assert_close(v, u, rtol=1e-4, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    for tensor in (u, v):
        tensor.square().mean().backward()
    gradients = [common.take_gradients(p.values()) for p in (exact, student)]
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_fp16_gradients_need_the_loss_scale(monkeypatch):
    """The mean's gradient vanishes in fp16; scaled by the number of dimensions, as the scripts do, it is that of fp32."""
    with pytest.raises(SystemExit):
        model.load_pipeline("toy", CPU, "fp16")
    found = {}
    for dtype, scale in ((torch.float32, 1), (torch.float16, 512), (torch.float16, 2**-9)):
        monkeypatch.setattr(model, "precision", lambda *_, dtype=dtype: dtype)
        pipe, student = with_student()
        text = model.embed_prompts(pipe, ["red circle"])
        v = tiny_loss(pipe, text, "student", 4, True)
        (1e-3 * scale * v.square().mean()).backward()
        parameters = [p for name, p in student.items() if not name.startswith("transformer_blocks.3.attn.add_q")]
        found[dtype, scale] = common.take_gradients(parameters, scale)
    exact, scaled, lost = found.values()
    assert (scaled - exact).norm() < 0.02 * exact.norm()
    assert (lost - exact).norm() > 0.5 * exact.norm()  # a mean over 512 times as many dimensions
