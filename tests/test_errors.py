"""Every mistake that the scripts know: one line that names it, exit code 2, no file changed.

A row per mistake: what is typed | what the line must contain | what to arrange before. The last
test fails if any call of `fail` has no row. All rows run in this process, in one folder that the
fixture `place` fills.

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
SHORT = {  # words in the table for several flags
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

TABLE = {}
TABLE["train_opd"] = r"""
    --itertions 5 | unrecognized arguments: --itertions 5
    @itself.args | must not name itself
    @not_utf8.args | UTF-8
    --micro_batch 9999999999999999999 | from 1 to 1
    --ema_decay 3 | '3' is not a number from 0 to 1
    --dtype fp16 | --dtype
    --noise 0 | --noise must be above 0
    --updates 3 | must divide --group_size
    --train_steps 9 | there are 6 steps
    --train_steps soon | expected first, all
    --train_steps all --noise_kind cps | last cps step
    --noise 1.1 --noise_kind cps | --noise is at most 1
    --objective trajectory --train_steps random:1 | looks ahead
    LORA ocr=bad/silent | give --teacher_alpha
    LORA ocr=bad/layer | nowhere is not a linear layer of an SD3 transformer
    LORA ocr=bad/block | transformer_blocks.9.attn.to_q is not a linear layer of the model
    LORA ocr=bad/kohya | kohya's format
    LORA ocr=bad/pissa | init_lora_weights 'pissa' has changed the base
    LORA ocr=bad/dora | use_dora True in its config
    LORA ocr=bad/shape | bad/shape: layer transformer_blocks.0.attn.to_q is
    --teacher ocr | NAME=VALUE
    --teacher ../x=good --prompts ../x=good.txt --test_prompts ../x=good.txt | letters, digits
    --teacher ocr=good --task_mix geneval=1 | 'geneval' has no teacher
    --task_mix geneval=1 | --teacher ocr: --task_mix has no share
    --task_mix ocr=1 ocr=2 | ocr is given twice
    --task_mix geneval=1.5 | --task_mix geneval=1.5: '1.5' is not a whole number from 1 to 1000
    --teacher_guidance ocr=x | 'x' is not a number from 1 to inf
    --guidance 0 | '0' is not a number from 1
    --clip_range 0 | --clip_range
    --alpha 0 | --alpha
    LORA ocr=good --teacher_alpha ocr=zero | 'zero' is not a number
    --prompts zebra=good.txt | zebra
    --model some/model | some/model/prompts/geneval_train.txt is not a file; give --prompts
    --model models/nested | not a diffusers pipeline
    --model models/flux | a FluxPipeline; this code trains StableDiffusion3Pipeline
    --model models/lcm --dry_run | its scheduler is LCMScheduler; this code samples as
    --model models/inverted | FlowMatchEulerDiscreteScheduler with invert_sigmas
    TINY --model models/pickled --init toy/adapters/merged | cannot be loaded as Stable Diffusion 3
    TINY --model models/cut --init toy/adapters/merged | cannot be loaded as Stable Diffusion 3
    TINY --model models/text --init toy/adapters/merged | cannot load its text encoders
    TINY --model models/nan --init toy/adapters/merged | nan
    TINY --cache_embeddings file | --cache_embeddings file is a file
    TINY --size 33 | --size 33: this model makes multiples of 8 pixels, up to 32
    TINY | 64 processes for 4 samples | many_processes
    TINY | torchrun did not start this | two_processes
    --out used | --overwrite
    --out full --overwrite | --out full is not empty
    --out LONG | choose another folder
    --out new | no folder to write into | no_permission
    --resume --overwrite | choose one
    TINY --out run --resume | damaged | damaged
    TINY --out run --resume | state.json was not written by this version | strange_state
    TINY --out run --resume | another process is writing into this run | locked
    TINY --out run --resume --lr 2e-3 | --lr
    TINY --out run --resume --prompts ocr=good.txt | prompts ocr
    TINY | GB free | small_disk
    TINY --iterations 1 --out late | cannot save checkpoints/step_1 ([Errno 28] No space | full_disk
    TINY --max_bad_steps 1 --out late | updates in a row had a NaN | nan_gradient
    TINY --iterations 1 --out late | every update was skipped | nan_gradient
"""
TABLE["train_sft"] = """
    --sft_images 3 | --sft_images must be at least 4
    --out used | --overwrite
"""
TABLE["train_teacher"] = """
    | --reward
    --reward ocr=-1 | '-1' is not a number
    --reward zebra --tasks ocr | zebra
    --reward ocr --tasks zebra | unknown task 'zebra'
    --reward ocr --final best --eval_every 0 | --final best needs test rewards
    --reward ocr --group_size 1 | --group_size
    --reward ocr --noise 0 | --noise
    --reward ocr --window 8 | --window
    --reward ocr=0.8 deqa=0.2 --rewards rewards | quotes no text
    --reward ocr | range | no_range
    GRPO --out late | no weights here | broken_scorer
"""
TABLE["merge"] = """
    --adapters good | at least two
    --adapters good bad/bytes | damaged adapter
    --adapters good bad/key | unexpected tensor 'hello'
    --adapters good bad/alpha | unexpected tensor
    --adapters good bad/qkv | qkv is not a linear layer of an SD3
    --adapters good bad/prefix | not a linear layer of an SD3
    --adapters good bad/text | fc1 is not a linear layer of an SD3
    --adapters good bad/single | single_transformer_blocks.0.attn.to_q is not a linear layer of an
    --adapters good bad/nan | nan, infinity
    --adapters good bad/half | no matching pair
    --adapters good bad/zero | all-zero
    --adapters good bad/negative | alpha -4
    --adapters good bad/pattern | alpha_pattern must be
    --adapters good bad/expression | is an expression
    --adapters good bad/pickle | a .bin can run code
    --adapters good nowhere | not an adapter
    --adapters good bad/shape | of different models
    --adapters good rank3 --method factor-mean | one rank
    TWO --weights 1 2 3 | 3 for 2 adapters
    TWO --weights 1e308 1e308 | --weights
    TWO --method ties | --rank
    TWO --out full | --out full is not empty
    TWO --out full --overwrite | --overwrite an earlier result
    TWO --out file | file is no folder to write into
    TWO --out blocked | File exists
    --adapters good --fuse models/cut | transformer cannot be loaded
    --adapters bad/block --fuse toy | its layer transformer_blocks.9.attn.to_q is not
"""
TABLE["evaluate"] = r"""
    --model nowhere | nowhere
    --model models/lcm | its scheduler is LCMScheduler
    --models run | did you mean run/adapter?
    --models a/b=base | a/b
    --models LONG | not an adapter
    --tasks ocr --prompts deqa=good.txt | this run has ocr
    --models base base | two models are called 'base'
    --tasks zebra | unknown task 'zebra'
    --tasks zebra --prompts zebra=good.txt | 'zebra' has no scorer
    --prompt SURROGATE | --prompt is not text
    --model_guidance zebra=1 | zebra
    --published | --rewards rewards
    --table compbench | unknown task 't2i_color'
    --table quality --prompts drawbench=good.txt | toy has none of imagereward
    --rewards rewards --tasks t2i_3d --prompts t2i_3d=good.txt | good.txt: t2i_3d
    --rewards no_such_module | no_such_module
    --rewards json | REWARDS
    --rewards rewards --tasks geneval | "tag"
    --reward_device zebra --tasks ocr | --reward_device zebra
    HUB some/model | gated; accept its licence | hub_gated
    HUB some/model@v9 | some/model@v9: neither a folder nor on the hub | hub_revision
    HUB some/model | neither a folder nor on the hub | hub_missing
    HUB some/model | once online, it is downloaded | hub_offline
    HUB some--/model | neither a folder nor on the hub | hub_name
    --models base --scores_only pictures | --scores_only
    --scores_only nowhere | nowhere
    --scores_only models | no folder models/geneval
    --scores_only pictures/list --tasks ocr | line 2 needs the "file_name"
    --scores_only pictures/named --tasks ocr | expected a line number as its name
    --scores_only pictures/cut --tasks ocr | 0 image(s) of prompt 00001
    BOTH full | 0 image(s) of prompt 00000
    BOTH pictures/kinds | 2 image(s) of prompt 00001
    BOTH pictures/three | 1 image(s) of prompt 00002
    BOTH pictures/uneven | 1 image(s) of prompt 00001
    PICTURES pictures/cut --prompts ocr=empty.txt | empty.txt holds no prompt
    PICTURES pictures/cut --prompts ocr=nested.jsonl | nested.jsonl is not a JSON object
    PICTURES pictures/cut --prompts ocr=nul.txt | nul.txt is not text
    PICTURES pictures/cut --prompts ocr=utf16.txt | cannot read utf16.txt (not UTF-8)
    PICTURES pictures/cut --prompts ocr=list.json | list.json: expected .txt
    PICTURES pictures/cut pictures/two | of the first folder
    PICTURES pictures/cut | cannot be decoded
    PICTURES pictures/large | nothing was scored
    --out evaluated | --overwrite
"""
TABLE["toy.build"] = """
    --steps 0 | --steps
"""
TABLE["rewards.geneval_prompts"] = """
    5 --test nowhere.jsonl --out new | nowhere.jsonl
    5 --test metadata.jsonl --out new | metadata.jsonl is not JSON lines
"""
TABLE["rewards.t2i_export"] = """
    prompts metadata.jsonl --out new.txt | expected two .txt files
    prompts good.txt --out file/new.txt | File exists
"""
ROWS = []
for script, text in TABLE.items():
    for line in text.strip("\n").splitlines():
        typed, says, *arrange = [part.strip() for part in line.split(" | ")]
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
        call(patch, "train_opd", *words_of("TINY --iterations 1 --out run"))
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
    assert not missing, f"{missing} have no row in TABLE"
