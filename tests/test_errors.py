"""Every mistake that the scripts know: one line that names it, exit code 2, no traceback, no file made or changed.

One table, a row a mistake: what is typed and what the line must say. The last test fails when a `fail(` anywhere has no
row. All rows run in one folder, which the `place` fixture fills, in this process.

    python -m pytest tests/test_errors.py
"""

import ast
import contextlib
import errno
import fcntl
import gc
import hashlib
import importlib
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

import support.checkpoint as checkpoint
import support.checks as checks
import support.files as files
import support.flags as cli
import support.run as common

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "cli",
    "adapters",
    "model",
    "merge",
    "train_opd",
    "train_teacher",
    "evaluate",
    "common",
    "checkpoint",
    "checks",
    "toy",
)
LAYER = "transformer_blocks.0.attn.to_q"  # 128 x 128 in the miniature
TINY = "--teacher ocr=toy/adapters/ocr --prompts_per_iteration 2 --group_size 2 --steps 2 --sample_every 0 --eval_prompts 0"


def call(script, *flags):
    """`python SCRIPT.py FLAGS` in this process."""
    module = importlib.import_module(script)
    if script == "rewards.geneval":  # stands alone, and returns its exit code
        sys.exit(module.main(list(flags)))
    before, sys.argv = sys.argv, [f"{script}.py", *flags]
    try:
        module.main(module.parse_args())
    finally:
        sys.argv = before


# ---- What is wrong, set up once


def adapter(folder, config='{"lora_alpha": 4}', drop=(), **changes):
    """An adapter of one layer, rank 2, for the miniature; changes: {key: tensor}."""
    folder.mkdir(parents=True)
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(2, 128), f"{LAYER}.lora_B.weight": torch.ones(128, 2)} | changes
    save_file({k: t for k, t in tensors.items() if k not in drop}, folder / "adapter_model.safetensors")
    if config:
        (folder / "adapter_config.json").write_text(config)


def miniature(folder, part):
    """The miniature, with a copy of one part that may be changed."""
    folder.mkdir(parents=True)
    for entry in (ROOT / "toy").iterdir():
        if entry.name != part:
            (folder / entry.name).symlink_to(entry)
    return Path(shutil.copytree(ROOT / "toy" / part, folder / part))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which everything is typed."""
    place = tmp_path_factory.mktemp("place")
    for name in ("toy", "recipes"):
        (place / name).symlink_to(ROOT / name)
    A, B, zero = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", torch.zeros(128, 2)
    bad = place / "bad"
    adapter(place / "good")
    adapter(place / "rank3", **{A: torch.ones(3, 128), B: torch.ones(128, 3)})
    adapter(bad / "nan", **{A: torch.full((2, 128), torch.nan)})
    adapter(bad / "key", hello=torch.zeros(2, 2))
    adapter(bad / "half", drop=[A])
    adapter(bad / "zero", **{B: zero})
    adapter(bad / "silent", config=None)
    adapter(bad / "negative", '{"lora_alpha": -4}')
    adapter(bad / "pattern", '{"lora_alpha": 4, "alpha_pattern": ["to_q"]}')
    adapter(bad / "expression", '{"lora_alpha": 4, "alpha_pattern": {"(x+)+y": 4}}')
    adapter(bad / "json", "{")
    adapter(
        bad / "layer", drop=[A, B], **{"nowhere.lora_A.weight": torch.ones(2, 8), "nowhere.lora_B.weight": torch.ones(8, 2)}
    )
    adapter(bad / "norm", **{f"{LAYER[:-4]}norm_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"})
    adapter(bad / "shape", **{A: torch.ones(2, 99)})
    adapter(bad / "bytes")
    (bad / "bytes/adapter_model.safetensors").write_bytes(b"garbage" * 10)
    (bad / "pickle").mkdir()
    (bad / "pickle/adapter_model.bin").write_bytes(b"")
    (place / "file").write_text("no folder")
    (place / "not_utf8.args").write_bytes(b"--steps 3\xff\n")
    (place / "itself.args").write_text("# flags\n--steps 3\n@itself.args\n")

    models = place / "models"
    for name, index in {"flux": '{"_class_name": "FluxPipeline"}', "listed": "[]", "nested": "[" * 100_000}.items():
        (models / name).mkdir(parents=True)
        (models / name / "model_index.json").write_text(index)
    for name, index in {"index": "[]", "outside": '{"weight_map": {"a": "../../x.safetensors"}}'}.items():
        (miniature(models / name, "vae") / "x.safetensors.index.json").write_text(index)
    part = miniature(models / "pickled", "transformer")
    (part / "diffusion_pytorch_model.safetensors").rename(part / "diffusion_pytorch_model.bin")
    (miniature(models / "cut", "transformer") / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    (miniature(models / "text", "text_encoder") / "model.safetensors").write_bytes(b"cut")
    file = miniature(models / "nan", "text_encoder_2") / "model.safetensors"
    save_file({k: t * torch.nan for k, t in load_file(file).items()}, file, metadata={"format": "pt"})

    pictures = {
        "list/metadata.jsonl": b'{"prompt": "a", "file_name": "0.png"}\n',
        "large/0.png": (ROOT / "examples" / "picture.png").read_bytes(),
    }
    for name in ("named/cat.png", "cut/0.png", "two/0/samples/0.png", "two/0/samples/1.png"):
        pictures[name] = b"cut"
    for name, content in pictures.items():
        (place / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "pictures" / name).write_bytes(content)

    prompts = {"empty.txt": b" \n\n", "utf16.txt": "red circle".encode("utf-16"), "nul.txt": b"red\0circle", "list.json": b"[]"}
    prompts |= {"text.jsonl": b"red circle\n", "number.jsonl": b'{"prompt": 7}\n', "half.jsonl": b'{"prompt": "\\ud800"}\n'}
    prompts |= {"nested.jsonl": b"[" * 100_000, "metadata.jsonl": b"[]\n", "good.txt": b"red circle\nblue square\n"}
    for name, data in prompts.items():
        (place / name).write_bytes(data)

    for name in ("used", "full", "empty_run", "evaluated"):
        (place / name).mkdir()
    (place / "used/args.json").write_text("{}")
    (place / "evaluated/results.json").write_text("{}")
    (place / "full/mine.txt").write_text("not a run")
    (place / "blocked.tmp").write_text("in the way of what is written beside `blocked`")
    with contextlib.chdir(place):
        call("train_opd", *shlex.split(TINY), "--iterations", "1", "--out", "run")
    return place


def hub(error):
    """Whatever is asked of the hub raises this."""

    def prepare(monkeypatch):
        def snapshot_download(*_, **__):
            made = error.__new__(error)  # the hub's errors want an HTTP response to be made with
            made.args = ("no\nsecond line",)
            raise made

        files.fetch.cache_clear()
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    return prepare


def many_processes(monkeypatch):
    monkeypatch.setattr(common, "start_processes", lambda: (0, 64, torch.device("cpu")))


def no_permission(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)


def broken_scorer(monkeypatch):
    import toy

    def broken(images, prompts, metadata=None):
        raise ValueError("ocr: no weights here")

    broken.range = (0, 1)
    monkeypatch.setitem(toy.REWARDS, "ocr", broken)


def no_range(monkeypatch):
    import toy

    monkeypatch.setitem(toy.REWARDS, "ocr", lambda images, prompts, metadata=None: images.mean(dim=(1, 2, 3)))


def locked(monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(BlockingIOError()))


def damaged(monkeypatch):
    monkeypatch.setattr(checkpoint, "whole", lambda *_: False)


def strange_state(monkeypatch):
    monkeypatch.setattr(checkpoint, "whole", lambda *_: True)
    monkeypatch.setattr(checkpoint, "read_json", lambda text: ["flags"])


def small_disk(monkeypatch):
    full = shutil.disk_usage("/")._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)


def other_step(monkeypatch):
    real = checks.step
    monkeypatch.setattr(checks, "step", lambda *a: (real(*a)[0] + 1e-3, None))


def full_disk(monkeypatch):
    def save_file(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", save_file)


def nan_gradient(monkeypatch):
    real = common.take_gradients
    monkeypatch.setattr(common, "take_gradients", lambda parameters, scale=1: real(parameters, scale) * torch.nan)


# ---- The table: {script: [(what is typed, what the line must say, what must be arranged before)]}

OPD_LORA = "--eval_prompts 0 --teacher"
ADAPTER_ROWS = [
    ("bad/bytes", "damaged adapter"),
    ("bad/json", "damaged adapter"),
    ("bad/key", "unexpected tensor 'hello'"),
    ("bad/nan", "nan, infinity"),
    ("bad/half", "no matching pair"),
    ("bad/zero", "all-zero"),
    ("bad/negative", "alpha -4"),
    ("bad/pattern", "alpha_pattern must be an object"),
    ("bad/expression", "is an expression"),
    ("bad/pickle", "pickle can run code"),
    ("bad", "not an adapter"),
    ("nowhere", "not an adapter"),
]
HUB = "--tasks ocr --prompts ocr=good.txt --model"
TABLE = {
    "train_opd": [
        ("--task_mix ocr=1 ocr=2", "ocr is given twice"),
        ("--itertions 5", "unrecognized arguments: --itertions 5; did you mean --iterations?"),
        *((f"{OPD_LORA} ocr={folder}", says) for folder, says in ADAPTER_ROWS),
        (f"{OPD_LORA} ocr=bad/silent", "give --teacher_alpha"),
        (f"{OPD_LORA} ocr=good --teacher_alpha ocr=0", "alpha 0.0"),
        (f"{OPD_LORA} ocr=bad/layer", "nowhere is not a linear layer"),
        (f"{OPD_LORA} ocr=bad/norm", "norm_q is not a linear layer"),
        (f"{OPD_LORA} ocr=bad/shape", "128x99, the model's is 128x128"),
        (f"{OPD_LORA} ocr=good --init bad/silent", "add its adapter_config.json"),
        ("--teacher zebra=toy/adapters/ocr", "zebra"),
        ("--teacher ../x=good --prompts ../x=good.txt --test_prompts ../x=good.txt", "letters, digits"),
        ("--teacher ocr", "NAME=VALUE"),
        ("--teacher ocr=good --task_mix geneval=1", "'geneval' has no teacher"),
        ("--task_mix geneval=1", "ocr: its task is not in --task_mix"),
        ("--task_mix geneval=x", "'x' is not a number"),
        ("--task_mix geneval=nan", "'nan' is not a finite number"),
        ("--task_mix geneval=-1e400", "not a finite number"),
        ("--task_mix geneval=0 ocr=1 deqa=1 pickscore=1", "--task_mix: shares"),
        ("--task_mix geneval=1.5 ocr=1 deqa=1 pickscore=1", "--task_mix: shares"),
        ("--teacher_guidance zebra=2", "zebra"),
        ("--teacher_alpha zebra=2", "zebra"),
        ("--prompts ocr=nowhere.txt", "nowhere.txt is not a file"),
        ("--prompts zebra=good.txt", "zebra"),
        ("--test_prompts ocr=nowhere.txt", "--test_prompts"),
        *((f"{TINY} --prompts ocr={file}", f"{file} {says}") for file, says in [
            ("empty.txt", "holds no prompt"), ("text.jsonl", "is not a JSON object"), ("number.jsonl", "is not a JSON object"),
            ("nested.jsonl", "is not a JSON object"), ("nul.txt", "is not text"), ("half.jsonl", "is not text"),
        ]),
        (f"{TINY} --prompts ocr=utf16.txt", "cannot read utf16.txt (not UTF-8)"),
        (f"{TINY} --prompts ocr=list.json", "list.json: expected a .txt"),
        ("--init toy/vae", "--init toy/vae"),
        ("--anchor toy/vae", "--anchor toy/vae"),
        ("--model nowhere", "nowhere: not a diffusers pipeline"),
        ("--model models/listed", "not a diffusers pipeline"),
        ("--model models/nested", "not a diffusers pipeline"),
        ("--model models/flux", "a FluxPipeline; this code trains Stable Diffusion 3"),
        ("--model models/index", "index.json is damaged"),
        ("--model models/outside", "outside its folder: ../../x.safetensors"),
        ("--model models/pickled", "no safetensors in transformer"),
        (f"{TINY} --model models/cut --init toy/adapters/merged", "cannot be loaded as a Stable Diffusion 3 pipeline"),
        (f"{TINY} --model models/text --init toy/adapters/merged", "cannot load its text encoders"),
        (f"{TINY} --model models/nan --init toy/adapters/merged", "make nan of the prompt"),
        (f"{TINY} --dtype fp16", "fp16 without CUDA is not supported"),
        (f"{TINY} --cache_embeddings file", "--cache_embeddings file is a file"),
        ("--noise 0", "--noise must be above 0"),
        ("--noise nan", "not a finite number"),
        ("--noise 0 --objective kl", "--noise must be above 0"),
        ("--noise -1", "'-1' is not a number from 0 on"),
        ("--ema_decay 3", "'3' is not a number from 0 to 1"),
        ("--model some/model", "some/model/prompts/geneval_train.txt is not a file; give --prompts"),
        ("--lr nan", "--lr"),
        ("--rank -1", "--rank"),
        ("--seed -1", "--seed"),
        ("--eval_prompts -1", "--eval_prompts"),
        ("--task_mix geneval=1e300 ocr=1 deqa=1 pickscore=1", "--task_mix: shares"),
        (f"{TINY} --size 33", "--size 33: this model paints multiples of 8 pixels"),
        ("--steps 1", "--steps"),
        ("--steps 2.5", "whole number of at least 2"),
        ("--updates 3", "must divide --group_size"),
        ("--updates 0", "--updates"),
        ("--micro_batch x", "--micro_batch"),
        ("--micro_batch 9999999999999999999", "at most 18 digits"),
        ("--train_steps 9", "there are 6 steps"),
        ("--train_steps random:0", "there are 6 steps"),
        ("--train_steps soon", "expected first, all"),
        ("--train_steps all --noise_kind cps", "last cps step"),
        ("--objective trajectory --train_steps random:1", "look ahead"),
        ("--rollout teacher", "--rollout teacher goes with"),
        ("--objective sft --mar_weight 0.1", "--mar_weight: sft"),
        ("--objective sft --init base --sft_images 3", "at least 4"),
        ("--objective nonsense", "--objective"),
        ("--itertions 3", "--itertions"),
        ("@nowhere.args", "nowhere.args"),
        ("@itself.args", "@itself.args: a file of flags cannot name another"),
        ("@not_utf8.args", "UTF-8"),
        ("@full", "full"),
        (f"{TINY} --eval_prompts 1 --rewards no_such_module", "no_such_module"),
        (f"{TINY} --prompts_per_iteration 2", "64 processes for 4 samples", many_processes),
        ("--out used", "--overwrite"),
        ("--out full --overwrite", "--out full is not an empty folder"),
        ("--out new --resume", "there is no run in new"),
        ("--out file", "file is a file"),
        ("--out file/inside", "file is a file"),
        (f"--out {'x' * 999}", "choose another folder"),
        ("--out new", "no permission", no_permission),
        ("--resume --overwrite", "choose one"),
        (f"{TINY} --out run --resume run/checkpoints/step_9", "not one of this run's checkpoints"),
        (f"{TINY} --out run --resume run/samples", "not one of this run's checkpoints"),
        (f"{TINY} --out run --resume run/checkpoints/step_1", "damaged", damaged),
        (f"{TINY} --out run --resume", "none of the checkpoints in run is whole", damaged),
        (f"{TINY} --out run --resume", "state.json is not one that this code writes", strange_state),
        (f"{TINY} --out run --resume", "another process is writing into this run", locked),
        (f"{TINY} --out run --overwrite", "another process is writing into this run", locked),
        (TINY, "GB free", small_disk),
        (TINY, "not the Euler step", other_step),
        (f"{TINY} --iterations 1 --out late", "cannot save step_1 ([Errno 28] No space left on device)", full_disk),
        (f"{TINY} --max_bad_steps 1 --out late", "updates in a row had a NaN", nan_gradient),
        (f"{TINY} --out run --resume --lr 2e-3", "lr"),
        (f"{TINY} --out run --resume --prompts ocr=good.txt", "prompts"),
    ],
    "train_teacher": [
        ("--reward ocr=-1", "weights are above 0"),
        ("--reward ocr --final best --eval_every 0", "--final best needs test rewards"),
        ("", "--reward"),
        ("--reward ocr --mix ocr=1", "--reward"),
        ("--reward ocr=x", "not a number"),
        ("--reward ocr=inf", "not a finite number"),
        ("--reward zebra", "zebra"),
        ("--reward zebra --tasks ocr", "unknown reward 'zebra'"),
        ("--reward ocr --tasks zebra", "unknown task 'zebra'"),
        ("--reward ocr --rewards no_such_module", "no_such_module"),
        ("--mix zebra=1", "zebra"),
        ("--mix ocr=0", "--mix: shares"),
        ("--reward ocr --group_size 1", "--group_size"),
        ("--reward ocr --updates 3", "must divide --group_size"),
        ("--reward ocr --steps 1", "--steps"),
        ("--reward ocr --noise 0", "--noise"),
        ("--reward ocr --window 8", "--window"),
        ("--reward ocr --init nowhere", "--init nowhere"),
        ("--reward ocr --init bad/nan", "nan, infinity"),
        ("--reward ocr --model nowhere", "--model nowhere"),
        ("--reward ocr --out used", "--overwrite"),
        ("--reward ocr --prompts ocr=empty.txt", "holds no prompt"),
        ("--reward ocr --prompts_per_iteration 2 --group_size 2", "64 processes for 4 samples", many_processes),
        ("--reward ocr --on_reward_error zero", "--on_reward_error"),
        ("--reward ocr=0.8 deqa=0.2 --rewards rewards", "quotes no text"),
        ("--reward geneval=0.8 deqa=0.2 --rewards rewards", '"tag"'),
        ("--reward ocr", "give it .range = (low, high)", no_range),
        ("--reward ocr --group_size 2 --steps 2 --prompts_per_iteration 1 --eval_every 0 --out late",
         "reward ocr cannot score: no weights here", broken_scorer),
    ],
    "merge": [
        ("--adapters good", "at least two"),
        ("--adapters good nowhere", "nowhere"),
        ("--adapters good bad/pickle", "pickle can run code"),
        ("--adapters good bad/silent", "add its adapter_config.json"),
        ("--adapters good bad/shape", "has different sizes"),
        ("--adapters good rank3 --method factor-mean", "needs adapters of one rank"),
        ("--adapters good good --weights 1 2 3", "3 weights for 2 adapters"),
        ("--adapters good good --weights 0 0", "--weights must be"),
        ("--adapters good good --weights 1 nan", "--weights must be"),
        ("--adapters good good --weights 1e308 1e308", "their sum finite"),
        ("--adapters good good --weights 1 x", "--weights"),
        ("--adapters good good --rank -1", "--rank"),
        ("--adapters good good --seed 1e3", "--seed"),
        ("--adapters good good --density 0", "--density"),
        ("--adapters good good --alpha_per_rank nan", "--alpha_per_rank"),
        ("--adapters good good --method ties", "--rank"),
        ("--adapters good good --method median", "--method"),
        ("--adapters good good --out full", "--out full is not empty"),
        ("--adapters good good --out file", "file is a file"),
        ("--adapters good good --out blocked", "File exists"),
        ("--adapters good --fuse nowhere", "--fuse nowhere"),
        ("--adapters good --fuse models/flux", "FluxPipeline"),
        ("--adapters good --fuse models/cut", "its transformer cannot be loaded"),
        ("--adapters bad/layer --fuse toy", "layer nowhere"),
        ("--adapters bad/shape --fuse toy", "another size"),
    ],
    "evaluate": [
        ("--model nowhere", "nowhere"),
        ("--models nowhere", "--models nowhere"),
        ("--models base base", "two models are called 'base'"),
        ("--models base bad/half --num_prompts 1 --tasks ocr", "no matching pair"),
        ("--tasks zebra", "unknown task 'zebra'"),
        ("--tasks zebra --prompts zebra=good.txt", "'zebra' has no scorer"),
        ("--rewards no_such_module", "no_such_module"),
        ("--rewards ..", "--rewards .."),
        ("--rewards json", "REWARDS"),
        ("--prompts ocr=nul.txt", "is not text"),
        ("--prompt 'half \udcff'", "--prompt is not text"),
        ("--model_guidance zebra=1", "zebra"),
        ("--model_guidance base=inf", "not a finite number"),
        ("--guidance nan", "not a finite number"),
        ("--guidance x", "not a finite number"),
        ("--num_prompts -3", "--num_prompts"),
        ("--steps 0", "--steps"),
        ("--size 0", "--size"),
        ("--size 33 --tasks ocr", "--size 33: this model paints multiples of 8 pixels, up to 32"),
        ("--size 64 --tasks ocr", "up to 32"),
        ("--dtype fp16 --tasks ocr", "fp16 without CUDA", lambda m: m.setattr(torch.cuda, "is_available", lambda: False)),
        (f"{HUB} some/model", "gated; accept its licence", hub(errors.GatedRepoError)),
        (f"{HUB} some/model@v9", "no revision 'v9' of some/model", hub(errors.RevisionNotFoundError)),
        (f"{HUB} some/model", "neither a directory here nor a model", hub(errors.RepositoryNotFoundError)),
        (f"{HUB} some/model", "try `hf download some/model`", hub(errors.LocalEntryNotFoundError)),
        (f"{HUB} some/model", "try `hf download some/model`", hub(errors.OfflineModeIsEnabled)),
        (f"{HUB} some--/model", "a name that the hub allows", hub(errors.HFValidationError)),
        ("--models some/lora", "gated; accept its licence", hub(errors.GatedRepoError)),
        ("--prompt a --scores_only toy", "choose one"),
        ("--models base --scores_only pictures", "choose one"),
        ("--models run", "did you mean run/adapter?"),
        ("--scores_only nowhere", "nowhere"),
        ("--scores_only models", "no folder models/geneval"),
        ("--scores_only pictures/list --tasks ocr", 'needs the "file_name"'),
        ("--scores_only pictures/named --tasks ocr", "its name is no line number"),
        ("--scores_only pictures/cut --tasks ocr", "0 image(s) of prompt 00001"),
        ("--scores_only pictures/cut pictures/two --tasks ocr --num_prompts 1", "not the ocr prompts, or not as many images"),
        ("--scores_only pictures/cut --tasks ocr --num_prompts 1", "cannot be decoded"),
        ("--scores_only pictures/large --tasks ocr --num_prompts 1", "nothing could be scored"),  # no 32 x 32 pixels
        ("--models a/b=base", "a/b"),
        ("--published", "--rewards rewards"),
        ("--reward_device zebra --tasks ocr", "--reward_device zebra: "),
        ("--tasks ocr --prompts deqa=good.txt", "this run has ocr"),
        ("--rewards rewards --tasks ocr", "quotes no text"),
        ("--rewards rewards --tasks geneval", '"tag"'),
        ("--out used", "--out used"),
        ("--out evaluated", "--overwrite the evaluation"),
        ("--out file", "file is a file"),
    ],
    "toy": [("--steps 0", "--steps"), ("--stage zebra", "zebra")],
    "rewards.geneval": [
        ("", "--out"),
        ("--out new", "one of the arguments --convert --prompts"),
        ("--prompts 5 --out new", "--test"),
        ("--prompts x --test good.txt --out new", "--prompts"),
        ("--prompts 5 --test nowhere.jsonl --out new", "nowhere.jsonl"),
        ("--prompts 5 --test metadata.jsonl --out new", "metadata.jsonl is not JSON lines"),
        ("--prompts 5 --test nested.jsonl --out new", "nested.jsonl is not JSON lines"),
        ("--convert nowhere.pth --out new", "nowhere.pth is not a file"),
        ("--convert file --out new", "has SHA-256"),
    ],
}  # fmt: skip
ROWS = [(script, *row, *[None] * (3 - len(row))) for script, rows in TABLE.items() for row in rows]
LATE = {"late"}  # a run that begins and then fails: its own folder is there, everything else as it was
seen, ran = set(), 0  # (file, line) that an error came through; rows that have run


def snapshot(place):
    """{path: hash of a file, target of a link, None of a folder}"""
    content = lambda p: os.readlink(p) if p.is_symlink() else hashlib.sha256(p.read_bytes()).digest() if p.is_file() else None
    return {path: content(path) for path in sorted(place.rglob("*"))}


@pytest.mark.parametrize("script,typed,says,arrange", ROWS, ids=[f"{row[0]} {row[1][:60]}" for row in ROWS])
def test_mistakes_are_one_line_exit_code_2_and_nothing_written(place, monkeypatch, capsys, script, typed, says, arrange):
    global ran
    flags = shlex.split(typed)
    if "--out" not in flags and script not in ("rewards.geneval", "toy"):
        flags += ["--out", "new"]
    if "--resume" in typed:
        gc.collect()  # the lock on the run, which the frames of the error before may still hold
    before = snapshot(place)
    if arrange:
        arrange(monkeypatch)
    with contextlib.chdir(place), pytest.raises(SystemExit) as stopped:
        call(script, *flags)
    err = re.sub(r"\r?(training|painting|scoring):[^\r\n]*\]", "", capsys.readouterr().err)  # without a progress bar
    lines = [line for line in err.splitlines() if line.strip()]
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], lines
    for name in LATE:
        shutil.rmtree(place / name, ignore_errors=True)
    assert snapshot(place) == before
    ran, error = ran + 1, stopped.value
    while error is not None:  # what argparse makes of an error of ours keeps it as its context
        trace, error = error.__traceback__, error.__context__
        while trace is not None:
            seen.add((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
            trace = trace.tb_next


def test_no_error_is_without_a_row():
    """Every `fail(…)` of the scripts, and every error that argparse is given, has come up above."""
    if ran < len(ROWS):
        pytest.skip("only when the whole table has run")
    missing = []
    for script in SCRIPTS:
        file = ROOT / f"{script}.py"
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(getattr(node, "func", None), "id", getattr(getattr(node, "func", None), "attr", None))
            if name in ("fail", "ArgumentTypeError"):
                lines = {(str(file), line) for line in range(node.lineno, node.end_lineno + 1)}
                if not lines & seen:
                    missing.append(f"{file.name}:{node.lineno}")
    assert not missing, f"{missing} have no row in TABLE"
