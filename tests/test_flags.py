"""Every flag of the scripts is seen in its effect, here or in a row of test_iteration.py; defaults
are what is written here; every slip of experiments/slips.py can still be made."""

import contextlib
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_iteration
import torch
from conftest import ROOT, call
from pytest import approx

from experiments import slips
from support import flags, lora, model

RUN = "--iterations 5 --eval_prompts 1 --eval_steps 1"
LOOP = f"{RUN} --prompts_per_iteration 1 --group_size 2 --updates 1 --steps 2"
SCRIPTS = {  # the smallest run of each
    "train_opd": f"{LOOP} --teacher ocr=toy/adapters/ocr --sample_every 0",
    "train_teacher": f"{LOOP} --reward ocr",
    "train_sft": f"{RUN} --teacher ocr=toy/adapters/ocr --sft_images 2 --batch 2",
    "evaluate": "--models base --num_prompts 1 --steps 1 --tasks ocr",
}


def is_fresh(student):
    """B is 0, and A normal with standard deviation 1 / rank, here 1 / 4."""
    A = torch.cat([tensor.flatten() for name, tensor in student.items() if "lora_A" in name])
    B = torch.cat([tensor.flatten() for name, tensor in student.items() if "lora_B" in name])
    return not B.any() and A.std().item() == approx(1 / 4, rel=0.05)


MODEL = {  # flag: a value, and what is seen with it and not without it
    "model": ("HERE/toy", lambda run: Path(run.pipe.name_or_path).parent == run.folder),
    "dtype": ("bf16", lambda run: model.backbone_dtype(run.pipe.transformer) == torch.bfloat16),
    "checkpointing": (None, lambda run: run.pipe.transformer.gradient_checkpointing),
    "no_t5": (None, lambda run: not run.text["embeds"][1, 9:].any()),  # 9 positions are CLIP's
    "text_length": ("4", lambda run: run.text["embeds"].shape[1] == 9 + 4),
    "cache_embeddings": ("HERE/cache", lambda run: len([*run.folder.glob("cache/*/*")]) > 1),
    "size": ("16", lambda run: run.pipe.transformer.config.sample_size == 4),
    "time_grid": ("single", lambda run: model.time_grid(run.pipe, 4)[1] == approx(0.9)),
    "prompts": ("ocr=HERE/own.txt", lambda run: "sign reads K K in red" in run.text["rows"]),
    "rewards": ("own_rewards", lambda run: run.scorer is not None),
    "reward_device": ("cpu", lambda run: run.scorer and run.scorer.device == "cpu"),
    "out": ("HERE/run", lambda run: (run.folder / "run").exists()),
}
TRAINING = MODEL | {
    "init": ("base", lambda run: is_fresh(run.start)),
    "rank": ("4", lambda run: run.config["r"] == 4),
    "alpha": ("12", lambda run: run.scales["student"] == 12 / 4),
    "save_every": ("2", lambda run: {"step_4", "step_5"} <= run.saved),
    "keep": ("3", lambda run: len(run.saved) == 3),
    "grad_norm": ("0", lambda run: run.largest == math.inf),  # 0 would freeze the model
    "test_prompts": ("ocr=HERE/test.txt", lambda run: "sign reads T K in red" in run.text["rows"]),
}
SEEN = {script: TRAINING for script in SCRIPTS} | {"evaluate": MODEL}
ALPHA = {"teacher_alpha": ("ocr=8", lambda run: run.scales["teacher_ocr"] == 8 / 16)}
SEEN |= {script: TRAINING | ALPHA for script in ("train_opd", "train_sft")}
ELSEWHERE = {  # the flags that the tests of another file see in their effect
    "test_memory.py": "compile dry_run",
    "test_resume.py": "resume overwrite",
    "test_scripts.py": "on_reward_error",
    "test_evaluate.py": "models prompt scores_only table tasks num_prompts published steps "
    "guidance model_guidance seed batch overwrite",
}
ALL = "model=toy time_grid=double text_length=128 rewards=toy seed=0 guidance=1.0"
TRAIN = f"""{ALL} grad_norm=1.0 ema_decay=0.9 ema_every=1 micro_batch=128 label_batch=128
    eval_steps=16 save_every=20 keep=2 max_bad_steps=10"""
ROLLOUT = f"""{TRAIN} prompts_per_iteration=8 steps=6 updates=2 noise=0.7
    noise_kind=flow"""
DEFAULTS = {
    "train_opd": f"""{ROLLOUT} rank=32 alpha=64 objective=ppo mar_weight=0.02 train_steps=first
        step_weights=kl group_size=2 iterations=160 lr=0.002 out=runs/opd sample_every=20
        eval_prompts=256""",
    "train_teacher": f"""{ROLLOUT} group_size=16 lr=0.001 rank=16 alpha=32 init=base
        mix_quality=0.2 on_reward_error=stop window=0 window_end=0 iterations=100 clip_range=0.01
        beta=0.0 std=global eval_every=20 eval_prompts=64 final=last""",
    "train_sft": f"""{TRAIN} lr=0.001 rank=32 alpha=64 init=base sft_images=2048 batch=64
        iterations=160 out=runs/sft eval_prompts=256""",
    "evaluate": f"{ALL} table=main num_prompts=0 steps=16 batch=128 out=runs/evaluate",
}


def observe(monkeypatch, folder, script, more):
    """Run a script and return what the checks above look at."""
    module = importlib.import_module(
        script
    )  # not below: what it imports from model would stay spied on
    run = SimpleNamespace(folder=folder, start={}, scales={})
    (folder / "toy").symlink_to(ROOT / "toy")
    for name, words in (("own", "K K"), ("test", "T K")):
        (folder / f"{name}.txt").write_text(f"sign reads {words} in red\n")
    (folder / "own_rewards.py").write_text(
        "def ocr(images, prompts, metadata=None):\n    return images[:, 0].mean((1, 2))\n\n"
        "ocr.range, ocr.device = (0, 1), None\nREWARDS = {'ocr': ocr}\n"
    )

    def spy(patch, module, name, keep):
        original = getattr(module, name)

        def spied(*given, **named):
            result = original(*given, **named)
            keep(result)
            return result

        patch.setattr(module, name, spied)

    def clip(parameters, largest):
        run.largest = largest
        return torch.nn.utils.clip_grad_norm_(parameters, largest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "clip_grad_norm_", clip, raising=False)
        patch.syspath_prepend(folder)
        patch.delitem(sys.modules, "own_rewards", raising=False)
        spy(patch, model, "load_pipeline", lambda pipe: setattr(run, "pipe", pipe))
        spy(patch, model, "embed_prompts", lambda text: setattr(run, "text", text))
        see = lambda pair: run.start.update({k: p.detach().clone() for k, p in pair[0].items()})
        spy(patch, lora, "add_student", see)
        words = [word.replace("HERE", str(folder)) for word in more]
        call(patch, script, *SCRIPTS[script].split(), *words)
        run.scorer = getattr(sys.modules.get("own_rewards"), "ocr", None)
    out = Path(words[words.index("--out") + 1])
    run.saved = {path.name for path in out.glob("checkpoints/step_*")}
    if run.saved:
        run.config = json.loads((out / "adapter/adapter_config.json").read_text())
    for part in run.pipe.transformer.modules():
        run.scales = getattr(part, "scaling", run.scales)
    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_have_their_effect(monkeypatch, tmp_path, script):
    with_flags, without = [], ["--out", f"{tmp_path}/without/other"]
    if script in ("train_teacher", "train_sft"):
        without += ["--init", "toy/adapters/ocr"]  # the default is the base
    for flag, (value, _) in SEEN[script].items():
        with_flags += [f"--{flag}", *([value] if value else [])]
    runs = []
    for name, words in (("with", with_flags), ("without", without)):
        (tmp_path / name).mkdir()
        runs.append(observe(monkeypatch, tmp_path / name, script, words))
    for flag, (_, check) in SEEN[script].items():
        assert [bool(check(run)) for run in runs] == [True, False], flag


def parser_of(monkeypatch, script):
    """The parser that a script builds."""
    found = []

    def stop(parser, *given):
        found.append(parser)
        raise SystemExit

    monkeypatch.setattr(flags.Parser, "parse_args", stop)
    with contextlib.suppress(SystemExit):
        importlib.import_module(script).parse_args()
    return found[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_is_forgotten(monkeypatch, script):
    names = {action.option_strings[0] for action in parser_of(monkeypatch, script)._actions}
    tested = {f"--{flag}" for flag in SEEN[script]} | test_iteration.flags_in_rows(script)
    for file, words in ELSEWHERE.items():
        tests = (ROOT / "tests" / file).read_text()
        tested |= {f"--{flag}" for flag in words.split() if f"--{flag}" in tests}
    assert names - tested == {"-h"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults(monkeypatch, script):
    """Recorded results and recipes stand on them."""
    found = parser_of(monkeypatch, script)._actions
    numbers = {f"{a.dest}={a.default}" for a in found if type(a.default) in (int, float, str)}
    assert numbers - {"help===SUPPRESS=="} == set(DEFAULTS[script].split())


def test_every_slip_can_still_be_made():
    """Each text that experiments/slips.py replaces occurs once."""
    slips.check(ROOT)
