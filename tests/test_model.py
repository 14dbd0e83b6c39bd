"""support/model.py: loading, precisions, text embeddings; support/run.py: prompts and gradients."""

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import PROMPTS, ROOT, call, embed, load, predict, shell
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import merge
from experiments import slow_loops as reference
from experiments.fake_gpu import fake_gpu
from rewards import scoring
from rewards.pictures import sample_images
from support import files, lora, metrics, model, run

# The flags of add_student.
STUDENT = {"model": "toy", "init": "toy/adapters/ocr", "seed": 0, "rank": 4, "alpha": 8}


def test_only_what_is_used_is_fetched(monkeypatch, tmp_path):
    """Without T5 its 9.5 GB stay on the hub; fusing needs the transformer alone."""
    fetched = []

    def snapshot_download(name, revision=None, allow_patterns=None):
        fetched.append(set(allow_patterns))
        return "toy"

    files.fetch.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load(model="some/model")
    load(model="some/model", no_t5=True)
    merge.fuse("some/model", {}, tmp_path / "fused")
    files.fetch.cache_clear()
    folders = lambda patterns: {pattern.split("/")[0] for pattern in patterns}
    assert folders(fetched[0] - fetched[1]) == {"text_encoder_3", "tokenizer_3"}
    assert fetched[2] == {"model_index.json", "transformer/*"}
    index = json.loads(Path("toy/model_index.json").read_text())
    parts = {part for part in index if Path("toy", part).is_dir()}
    assert folders(fetched[0]) == parts | {"model_index.json"}  # no single-file copies


def test_hub_ids_work_offline_from_the_hubs_own_cache(tmp_path, monkeypatch):
    """In a fresh process, from a cache in the layout of `hf download`."""
    assert all(map(files.hub_id, ("stabilityai/stable-diffusion-3.5-medium", "me/lora@refs/pr/1")))
    assert not any(map(files.hub_id, ("toy", "toy/adapters", "runs/a/b", "/data/model")))
    number, name = "0123456789" * 4, tmp_path / "models--me--lora"
    shutil.copytree("toy/adapters/ocr", name / "snapshots" / number)
    (name / "refs").mkdir()
    (name / "refs" / "v2").write_text(number)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = "from support.files import ADAPTER, fetch; print(fetch('me/lora@v2', '--init', ADAPTER))"
    assert shell("-c", code).stdout.strip() == str(name / "snapshots" / number)


def test_sharded_and_half_precision_transformers_load(pipe, text, tmp_path):
    shutil.copytree("toy", tmp_path / "toy", ignore=shutil.ignore_patterns("transformer"))
    stock = SD3Transformer2DModel.from_pretrained("toy/transformer").half()
    stock.save_pretrained(tmp_path / "toy/transformer", max_shard_size="2MB")
    assert len(list((tmp_path / "toy/transformer").glob("*.safetensors"))) > 1
    half = load(model=str(tmp_path / "toy")).transformer
    assert model.backbone_dtype(half) == torch.float32
    assert_close(predict(half, text), predict(pipe.transformer, text), atol=2e-2, rtol=1e-2)


def test_the_fused_transformer_makes_the_pictures_of_the_adapter(monkeypatch, tmp_path):
    """The same noise in stock diffusers: with load_lora_weights, and with the fused transformer.
    A .fp16 file beside the usual one comes first in the alphabet; it is not what is loaded."""
    base = shutil.copytree("toy", tmp_path / "toy", ignore=shutil.ignore_patterns("adapters"))
    usual = base / "transformer/diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(usual).items()}
    save_file(half, usual.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    command = ["merge", "--adapters", "toy/adapters/ocr", "--fuse", base]
    call(monkeypatch, *command, "--out", tmp_path / "fused")
    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    stock.load_lora_weights("toy/adapters/ocr")
    transformer = SD3Transformer2DModel.from_pretrained(tmp_path / "fused")
    fused = StableDiffusion3Pipeline.from_pretrained("toy", transformer=transformer)
    how = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 8}
    how |= {"height": 32, "width": 32, "latents": torch.randn(2, 8, 8, 8), "output_type": "pt"}
    pictures = [pipe(PROMPTS, **how).images for pipe in (stock, fused)]
    assert_close(pictures[1], pictures[0], atol=1e-4, rtol=1e-4)
    (file,) = (tmp_path / "fused").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    index = tmp_path / "fused/diffusion_pytorch_model.safetensors.index.json"
    index.write_text("{}")  # of an older model in several files
    call(monkeypatch, *command, "--out", tmp_path / "fused", "--overwrite")
    assert not index.exists()


def test_bf16_backbone_with_a_float32_student(pipe, text):
    """Its labels are near those of fp32. Student and gradients are fp32, teachers bf16."""
    other = load(dtype="bf16")
    for transformer in (pipe.transformer, other.transformer):
        lora.load_adapter(transformer, "teacher", "toy/adapters/ocr", "--teacher")
        lora.add_student(transformer, argparse.Namespace(**STUDENT))
    assert model.backbone_dtype(other.transformer) == torch.bfloat16
    for name, guidance in ((None, 4.5), ("teacher", 1.0), ("student", 4.5)):
        with lora.use(pipe.transformer, name), lora.use(other.transformer, name):
            exact = predict(pipe.transformer, text, guidance)
            rounded = predict(other.transformer, embed(other), guidance)
        assert rounded.dtype == torch.float32 and (exact - rounded).norm() < 0.03 * exact.norm()
    rounded.square().mean().backward()
    student = lora.adapter_parameters(other.transformer, "student").values()
    assert {p.dtype for p in student} == {torch.float32}
    assert {p.grad.dtype for p in student if p.grad is not None} == {torch.float32}
    teacher = lora.adapter_parameters(other.transformer, "teacher").values()
    assert {p.dtype for p in teacher} == {torch.bfloat16}


def test_checkpointing_changes_no_gradient(text):
    gradients = []
    for checkpointing in (False, True):
        transformer = load(checkpointing=checkpointing).transformer
        student, _ = lora.add_student(transformer, argparse.Namespace(**STUDENT))
        predict(transformer, text).square().mean().backward()
        assert transformer.is_gradient_checkpointing == checkpointing
        gradients.append({key: p.grad for key, p in student.items() if p.grad is not None})
    assert gradients[0]
    assert_close(gradients[1], gradients[0])


def test_a_batch_uploads_the_rows_of_its_prompts_once(monkeypatch, pipe, text):
    given, real = [], model.velocity
    monkeypatch.setattr(model, "velocity", lambda *words: given.append(words[3]) or real(*words))
    x, prompt = torch.randn(4, 8, 8, 8), torch.tensor([2, 1, 2, 2])
    for guidance in (1.0, 3.0):
        backbone = model.Backbone(pipe.transformer, text, {None: guidance}, 4)
        v = backbone.predict(None, x, 0.5, prompt)
        assert_close(v, real(pipe.transformer, x, 0.5, text, prompt, guidance), rtol=0, atol=0)
        assert len(given[-1]["embeds"]) == len(given[-1]["pooled"]) == 3
    backbone.predict(None, x, 0.5, 0 * prompt + 2)
    assert_close(given[-1]["embeds"], text["embeds"][[0, 2]])


def test_a_full_disk_is_known_before_the_cache_is_written(monkeypatch, pipe, tmp_path, capsys):
    free = shutil.disk_usage("/")._replace(free=3 * 4 * (17 * 128 + 128) - 1)  # of three prompts
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(SystemExit):
        embed(pipe, cache_embeddings=str(tmp_path / "cache"))
    assert f"--cache_embeddings {tmp_path}/cache: 0.00 GB free" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=free.free + 1))
    embed(pipe, cache_embeddings=str(tmp_path / "cache"))


@pytest.mark.parametrize("kept", [range(4), range(0, 6, 2)])
def test_missing_images_are_dealt_out(monkeypatch, tmp_path, kept):
    """Of six images in two processes: after a crash both have equally many, and none twice."""
    monkeypatch.setattr(scoring, "is_kept", lambda file, mark: int(file.stem) in kept)
    alone = scoring.find_missing(tmp_path, {"ocr": ([*"abcdef"], [])}, {"base": {}})[1]
    halves = [alone[: len(alone) // 2], alone[len(alone) // 2 :]]
    monkeypatch.setattr(scoring, "gather", lambda own: halves)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(scoring, "rank_and_world", lambda rank=rank: (rank, 2))
        parts.append(scoring.find_missing(tmp_path, {"ocr": ([*"abcdef"], [])}, {"base": {}})[1])
    assert parts[0] + parts[1] == alone and len(alone) == 6 - len(kept)
    assert abs(len(parts[0]) - len(parts[1])) <= 1


def test_embeddings_are_the_stock_pipelines(pipe, text, tmp_path):
    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    how = {"do_classifier_free_guidance": False, "max_sequence_length": 8}
    for prompt in ("", *PROMPTS):
        embeds, _, pooled, _ = stock.encode_prompt(prompt, None, None, **how)
        row = text["rows"][prompt]
        assert_close((text["embeds"][row], text["pooled"][row]), (embeds[0], pooled[0]))
    for length in (8, 4):  # of another length another entry of the cache
        cached = embed(pipe, text_length=length, cache_embeddings=str(tmp_path / "cache"))
        assert cached["embeds"].shape[1] == 9 + length
    assert pipe.text_encoder is None and pipe.text_encoder_3 is None  # dropped
    without = embed(pipe, no_t5=True)["embeds"]
    assert_close(without[:, :9], text["embeds"][:, :9])  # CLIP's tokens
    assert not without[:, 9:].any() and text["embeds"][:, 9:].any()  # T5's
    stock.text_encoder_3 = stock.tokenizer_3 = None
    stock.save_pretrained(tmp_path / "toy")  # a model that has no T5
    assert_close(embed(load(model=str(tmp_path / "toy")), no_t5=True)["embeds"], without)


def test_the_schedule_of_prompts():
    """Through several passes, against the slow one; a process embeds what it draws, and tests."""
    train = {"ocr": [f"ocr {n}" for n in range(5)], "deqa": [f"deqa {n}" for n in range(3)]}
    shares, metadata = {"ocr": 2, "deqa": 1}, [{"n": n} for n in range(5)]
    expected = reference.schedule(train, shares, 7, 4, 15)
    train = {task: (prompts, metadata) for task, prompts in train.items()}
    schedule = run.draw_schedule(train, shares, 4, 15, 7)
    for slots, wanted in zip(schedule, expected, strict=True):
        assert [slot[:2] for slot in slots] == wanted
        assert all(prompt.endswith(f" {about['n']}") for _, prompt, about in slots)
    used = run.prompts_used(schedule, [2, 3, 4], 2, {"ocr": (["test"], [{}])})
    assert set(used) == {slots[place][1] for slots in schedule for place in (1, 2)} | {"test"}


@pytest.mark.parametrize("recipe", sorted(path.name for path in ROOT.glob("recipes/*.args")))
def test_recipes_parse(monkeypatch, tmp_path, recipe):
    """Every flag in them exists and every value fits. The files that they name need not exist."""
    lines = Path("recipes", recipe).read_text().splitlines()
    command = next(line for line in lines if f"@recipes/{recipe}" in line).split()
    script = next(word for word in command if word.endswith(".py"))
    module = importlib.import_module(script.removesuffix(".py"))
    everywhere = [m for name, m in sys.modules.items() if name.startswith("support.")]
    for place in (module, *everywhere):
        monkeypatch.setattr(place, "check_adapter", lambda *_: None, raising=False)
        monkeypatch.setattr(place, "prompt_files", lambda given, *_: given, raising=False)
    monkeypatch.setattr(sys, "argv", [script, f"@recipes/{recipe}", "--out", str(tmp_path)])
    assert vars(module.parse_args())


def test_the_laps_of_an_iteration_add_up(monkeypatch):
    clock = iter([10.0, 11.5, 14.0, 14.5])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    watch = metrics.Stopwatch(torch.device("cpu"))
    watch.lap("rollout")
    watch.lap("labels")
    assert watch.result() == {"seconds": 4.5, "seconds/rollout": 1.5, "seconds/labels": 2.5}


def test_torchrun_joins_its_processes(monkeypatch, tmp_path):
    code = "from support import run\nrank, *_ = run.start_processes()\nprint(run.gather(rank))\n"
    (tmp_path / "join.py").write_text(f"{code}run.stop_processes()\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    done = shell(*launch, tmp_path / "join.py")
    assert done.stdout.count("[0, 1]") == 2, done.stderr  # two lines may mix


# ---- The scheduler


def test_both_grids_are_those_of_their_projects():
    """SD3.5's ten steps: t after one shift by 3, and after diffusers' two (see test_sde.py)."""
    single = [3 * s / (1 + 2 * s) for s in (1 - i / 10 for i in range(11))]
    assert_close(model.time_grid(load(time_grid="single"), 10), single)
    double = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
    assert_close(model.time_grid(load(), 10), double, rtol=0, atol=5.1e-5)


CONFIGURATIONS = [
    ("scheduler", {"use_dynamic_shifting": True, "max_shift": 3.0}),
    ("scheduler", {"num_train_timesteps": 500, "shift": 2.0}),
    ("scheduler", {"use_karras_sigmas": True}),
    ("vae", {"shift_factor": None}),
    ("vae", {"shift_factor": 0.3, "scaling_factor": 0.7}),
]


@pytest.mark.parametrize("part, values", CONFIGURATIONS)
def test_other_configurations_paint_what_the_stock_pipeline_paints(tmp_path, part, values):
    folder = tmp_path / "model"
    shutil.copytree("toy", folder, ignore=shutil.ignore_patterns("adapters", "__pycache__"))
    file = next((folder / part).glob("*config.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    stock = StableDiffusion3Pipeline.from_pretrained(folder)
    if stock.vae.config.shift_factor is None:  # the stock pipeline fails
        stock.vae.register_to_config(shift_factor=0.0)
    stock.set_progress_bar_config(disable=True)
    pipe = load(model=str(folder))
    noise = model.initial_noise(pipe, [run.generator(1, "sample")])
    how = {"num_inference_steps": 5, "guidance_scale": 1, "max_sequence_length": 8}
    expected = stock("red circle", latents=noise, height=32, width=32, output_type="pt", **how)
    found = sample_images(pipe, embed(pipe), ["red circle"], [(1, "sample")], 5, 1.0)
    assert_close(found, expected.images, rtol=0, atol=2e-4)


# ---- A GPU that is not there


ITERATION = "--prompts_per_iteration 4 --group_size 2 --steps 3 --iterations 1 --eval_steps 2"
ITERATION += " --guidance 2"
ON_GPU = {
    "train_opd.py": f"{ITERATION} --eval_prompts 2 --sample_every 1 --anchor base",
    "train_opd.py --resume": f"{ITERATION} --iterations 2 --eval_prompts 0 --anchor base",
    "train_teacher.py": f"--reward ocr {ITERATION} --beta 0.1 --eval_every 1 --eval_prompts 2",
    "train_sft.py": "--sft_images 4 --batch 4 --iterations 1 --eval_steps 2 --eval_prompts 2",
    "evaluate.py": "--models base toy/adapters/ocr --num_prompts 2 --steps 2",
}


@pytest.mark.slow
def test_the_scripts_run_on_a_simulated_gpu(tmp_path):
    """No tensor is left on another device, in bf16."""
    for script, flags in ON_GPU.items():
        out = tmp_path / script.split(".")[0]
        done = shell("experiments/fake_gpu.py", *script.split(), *flags.split(), "--out", out)
        assert done.returncode == 0, f"{script}\n{done.stderr[-2000:]}"
        assert (out / "args.json").exists() or (out / "results.json").exists()


LEFT = ("x + torch.ones(2)", "x.numpy()", "torch.ones(2)[x.long()]", "torch.stack([x, x.cpu()])")


@pytest.mark.parametrize("slip", LEFT)
def test_the_simulated_gpu_finds_a_tensor_elsewhere(slip):
    with fake_gpu():
        x = torch.ones(2, device="cuda")
        x[torch.tensor([0])] + 1  # an index may be elsewhere
        with pytest.raises((RuntimeError, TypeError), match="same device|numpy"):
            eval(slip)
