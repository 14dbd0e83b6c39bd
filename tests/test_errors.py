"""Every mistake that the scripts know: one line that names it, exit code 2, no file changed.

mistakes.txt has a row per mistake: what is typed | what the line must contain | what to arrange
before. The last test fails if any call of `fail` has no row. All rows run in this process, in one
folder that the fixture `place` fills.

    python -m pytest tests/test_errors.py
"""

import ast
import contextlib
import errno
import fcntl
import gc
import json
import os
import re
import shutil
import traceback
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ROOT, call
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

import toy
from support import checkpoint, files, run

LAYER = "transformer_blocks.0.attn.to_q"  # 128 x 128 in the miniature
SHORT = {  # words in mistakes.txt for several flags
    "TINY": "--teacher ocr=toy/adapters/ocr --prompts_per_iteration 2 --group_size 2 --steps 2 "
    "--sample_every 0 --eval_prompts 0",
    "GRPO": "--reward ocr --prompts_per_iteration 1 --group_size 2 --steps 2 --eval_every 0",
    "LORA": "--eval_prompts 0 --teacher",
    "TWO": "--adapters good good",
    "HUB": "--tasks ocr --prompts ocr=good.txt --model",
    "PICTURES": "--tasks ocr --num_prompts 1 --scores_only",
    "BOTH": "--tasks ocr --prompts ocr=good.txt --scores_only",
    "LONG": "x" * 999,
}

ROWS, script = [], None  # [(script, typed, says, a name in ARRANGE or None), ...]
for line in Path(__file__).with_name("mistakes.txt").read_text().splitlines():
    if line.startswith("["):
        script = line[1:-1]
    elif line and line[0] != "#":
        typed, says, *arrange = [part.strip() for part in f" {line} ".split(" | ")]
        ROWS.append((script, typed, says, *(arrange or [None])))


# ---- What is wrong, set up once

A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
ONES = torch.ones(2, 128)
ADAPTERS = {  # folder: ({key: another tensor, or none}, what its config has besides)
    "good": ({}, {}),
    "rank3": ({A: torch.ones(3, 128), B: torch.ones(128, 3)}, {}),
    "bad/nan": ({A: ONES * torch.nan}, {}),
    "bad/key": ({"hello": ONES}, {}),
    "bad/alpha": ({f"{LAYER}.alpha": torch.ones(())}, {}),
    "bad/half": ({A: None}, {}),
    "bad/zero": ({B: 0 * ONES.T}, {}),
    "bad/kohya": ({"lora_unet_x": ONES}, {}),
    "bad/shape": ({A: torch.ones(2, 99)}, {}),
    "bad/layer": ({"nowhere.lora_A.weight": ONES}, {}),
    "bad/qkv": ({"diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight": ONES}, {}),
    "bad/prefix": ({f"diffusion_model.{A}": ONES}, {}),
    "bad/text": ({"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": ONES}, {}),
    "bad/single": ({f"transformer.single_{A}": ONES}, {}),
    "bad/block": ({A.replace("0", "9"): ONES, B.replace("0", "9"): ONES.T}, {}),
    "bad/silent": ({}, {"lora_alpha": None}),
    "bad/negative": ({}, {"lora_alpha": -4}),
    "bad/pattern": ({}, {"alpha_pattern": ["to_q"]}),
    "bad/expression": ({}, {"alpha_pattern": {"(x+)+y": 4}}),
    "bad/pissa": ({}, {"init_lora_weights": "pissa"}),
    "bad/dora": ({}, {"use_dora": True}),
}


def make_adapters(place):
    for name, (changes, config) in ADAPTERS.items():
        tensors = {A: ONES, B: ONES.T} | changes
        tensors = {key: t.clone().contiguous() for key, t in tensors.items() if t is not None}
        (place / name).mkdir(parents=True)
        save_file(tensors, place / name / "adapter_model.safetensors")
        config = json.dumps({"lora_alpha": 4} | config)
        (place / name / "adapter_config.json").write_text(config)


def miniature(folder, part):
    """The miniature, with a copy of one part that may be changed."""
    folder.mkdir(parents=True)
    for entry in (ROOT / "toy").iterdir():
        if entry.name != part:
            (folder / entry.name).symlink_to(entry)
    return Path(shutil.copytree(ROOT / "toy" / part, folder / part))


def make_models(models):
    toy_index = (ROOT / "toy/model_index.json").read_text()
    indices = {"flux": '{"_class_name": "FluxPipeline"}', "nested": "[" * 100_000}
    indices["lcm"] = toy_index.replace("FlowMatchEulerDiscreteScheduler", "LCMScheduler")
    for name, index in indices.items():
        (models / name).mkdir(parents=True)
        (models / name / "model_index.json").write_text(index)
    file = miniature(models / "inverted", "scheduler") / "scheduler_config.json"
    file.write_text(file.read_text().replace('"invert_sigmas": false', '"invert_sigmas": true'))
    name = "diffusion_pytorch_model.safetensors"
    file = miniature(models / "pickled", "transformer") / name
    file.rename(file.with_suffix(".bin"))
    (miniature(models / "cut", "transformer") / name).write_bytes(b"cut")
    (miniature(models / "text", "text_encoder") / "model.safetensors").write_bytes(b"cut")
    file = miniature(models / "nan", "text_encoder_2") / "model.safetensors"
    tensors = {name: tensor * torch.nan for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


FILES = {
    "file": b"no folder",
    "not_utf8.args": b"--steps 3\xff\n",
    "itself.args": b"# flags\n--steps 3\n@itself.args\n",
    "good.txt": b"red circle\nblue square\n",
    "empty.txt": b" \n\n",
    "utf16.txt": "red circle".encode("utf-16"),
    "nul.txt": b"red\0circle",
    "list.json": b"[]",
    "nested.jsonl": b"[" * 100_000,
    "metadata.jsonl": b"[]\n",
    "used/args.json": b"{}",
    "evaluated/results.json": b"{}",
    "full/mine.txt": b"not a run",
    "blocked.tmp": b"in the way of what is written beside `blocked`",
    "bad/bytes/adapter_model.safetensors": b"garbage" * 10,
    "bad/pickle/adapter_model.bin": b"",
    "pictures/list/metadata.jsonl": b'{"prompt": "a", "file_name": "0.png"}\n{"prompt": "a"}\n',
    "pictures/large/0.png": (ROOT / "examples/picture.png").read_bytes(),  # not 32 x 32 pixels
}
PICTURES = {
    "list": "0.png",
    "named": "cat.png",
    "cut": "0.png",
    "kinds": "0.png 1.png 1.jpg",
    "three": "0.png 1.png 2.png",
    "two": "0/samples/0.png 0/samples/1.png",
    "uneven": "0/samples/0.png 0/samples/1.png 1/samples/0.png",
}
for folder, names in PICTURES.items():
    FILES |= {f"pictures/{folder}/{name}": b"cut" for name in names.split()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which everything is typed."""
    place = tmp_path_factory.mktemp("place")
    (place / "toy").symlink_to(ROOT / "toy")
    for name, content in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    make_adapters(place)
    make_models(place / "models")
    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
        call(patch, "train_opd", *words_of("TINY --iterations 2 --out run"))
    gc.collect()  # the lock of the run
    return place


# ---- What is arranged before a row


def raises(error):
    def function(*_, **__):
        raise error

    return function


def hub(kind):
    """Every query to the hub raises this."""
    error = kind.__new__(kind)  # the constructor wants an HTTP response
    error.args = ("no\nsecond line",)
    return [(huggingface_hub, "snapshot_download", raises(error))]


without_range, without_weights = raises(ValueError), raises(ValueError("ocr: no weights here"))
without_weights.range = (0, 1)
NAN, NO_SPACE = float("nan"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL = shutil.disk_usage("/")._replace(free=1)
ARRANGE = {  # [(module, what in it, by what it is replaced), ...]
    "many_processes": [(os, "environ", {**os.environ, "WORLD_SIZE": "64"})],
    "two_processes": [
        (os, "environ", {**os.environ, "WORLD_SIZE": "2"}),
        (torch, "set_num_threads", lambda number: None),
    ],
    "no_permission": [(os, "access", lambda *_: False)],
    "locked": [(fcntl, "flock", raises(BlockingIOError()))],
    "damaged": [(checkpoint, "whole", lambda *_: False)],
    "strange_state": [
        (checkpoint, "whole", lambda *_: True),
        (checkpoint, "read_json", lambda text: ["flags"]),
    ],
    "full_disk": [(checkpoint, "save_file", raises(NO_SPACE))],
    "small_disk": [(shutil, "disk_usage", lambda path: FULL)],
    "nan_gradient": [(run, "take_gradients", lambda p, take=run.take_gradients: take(p) * NAN)],
    "no_range": [(toy, "REWARDS", toy.REWARDS | {"ocr": without_range})],
    "broken_scorer": [(toy, "REWARDS", toy.REWARDS | {"ocr": without_weights})],
    "hub_gated": hub(errors.GatedRepoError),
    "hub_revision": hub(errors.RevisionNotFoundError),
    "hub_missing": hub(errors.RepositoryNotFoundError),
    "hub_offline": hub(errors.OfflineModeIsEnabled),
    "hub_name": hub(errors.HFValidationError),
}


# ---- The tests

seen, ran = set(), set()  # (file, line) that an error came through; rows that have run


def snapshot(place):
    """When each file and folder was last changed, the lock of a run aside."""
    paths = [path for path in place.rglob("*") if path.name != "lock"]
    return {path: path.lstat().st_mtime_ns for path in paths}


def words_of(typed):
    words = " ".join(SHORT.get(word, word) for word in typed.split()).split()
    return ["half \udcff" if word == "SURROGATE" else word for word in words]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]} {row[3] or ''}"[:90])
def test_a_mistake_is_one_line_and_exit_code_2(place, monkeypatch, capsys, row):
    script, typed, says, arrange = row
    flags = words_of(typed)
    if "--out" not in flags and script != "toy.build":
        flags += ["--out", "new"]
    files.fetch.cache_clear()
    shutil.rmtree(place / "new", ignore_errors=True)  # of a row that should have failed
    before = snapshot(place)
    for module, name, value in ARRANGE.get(arrange, ()):
        monkeypatch.setattr(module, name, value)
    with contextlib.chdir(place), pytest.raises(SystemExit) as stopped:
        call(monkeypatch, script, *flags)
    err = re.sub(r"\r?[^\r\n]*\d+%\|[^\r\n]*\]", "", capsys.readouterr().err)  # progress bars
    lines = [line for line in err.splitlines() if line.strip()]
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], lines
    if "late" in flags:  # a run that fails after its start
        shutil.rmtree(place / "late", ignore_errors=True)
    assert snapshot(place) == before
    ran.add(row)
    error = stopped.value
    while error is not None:  # where argparse reports our error, the original is its context
        for frame, line in traceback.walk_tb(error.__traceback__):
            seen.add((frame.f_code.co_filename, line))
        traceback.clear_frames(error.__traceback__)  # they may hold the lock of a run
        error = error.__context__


def test_no_error_is_without_a_row():
    """Every call of `fail` and every error given to argparse came up above."""
    if len(ran) < len(set(ROWS)):
        pytest.skip("only after the whole table")
    missing, files = [], [*ROOT.glob("*.py")]
    for folder in ("support", "rewards", "toy"):
        files += (ROOT / folder).glob("*.py")
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            called = getattr(node, "func", None)
            name = getattr(called, "id", getattr(called, "attr", None))
            if name in ("fail", "ArgumentTypeError"):
                lines = {(str(file), n) for n in range(node.lineno, node.end_lineno + 1)}
                if not lines & seen:
                    missing.append(f"{file.name}:{node.lineno}")
    assert not missing, f"{missing} have no row in tests/mistakes.txt"
