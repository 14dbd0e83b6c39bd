"""Loading: directories and hub ids, precisions, text embeddings and their cache, sharded and fused transformers.

No hub is asked: its cache is laid out by hand. python -m pytest tests/test_model.py
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

import support.lora as adapters
import support.files as files
import merge
import support.model as model

CPU = torch.device("cpu")
PROMPTS = ["red circle", "sign reads K T in red"]


def predict(pipe, text, name=None, guidance=1.0):
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([text["rows"][p] for p in PROMPTS])
    with torch.no_grad(), adapters.adapter(pipe.transformer, name):
        return model.velocity(pipe.transformer, x, 0.5, text, rows, guidance)


def ask_hub(monkeypatch, answer):
    """Whatever is asked of the hub gives `answer`: a folder, or an exception that is raised."""

    def snapshot_download(name, revision=None, allow_patterns=None):
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    files.fetch.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@pytest.mark.parametrize(
    "path,hub",
    [
        ("stabilityai/stable-diffusion-3.5-medium", True),
        ("me/lora@refs/pr/1", True),
        ("toy/adapters", False),  # toy is a folder here
        ("toy", False),
        ("runs/a/b", False),
        ("/data/model", False),
    ],
)
def test_what_counts_as_a_hub_id(path, hub):
    assert files.hub_id(path) == hub


def test_a_checkpoint_of_another_model_is_refused(monkeypatch, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    ask_hub(monkeypatch, tmp_path)
    for name in (str(tmp_path), "some/flux"):  # known at once, and known only when it has been fetched
        with pytest.raises(SystemExit):
            model.load_pipeline(name, CPU)
        assert "FluxPipeline" in capsys.readouterr().err


def test_the_patterns_fetch_the_pipeline_and_not_the_single_files_beside_it():
    from fnmatch import fnmatch

    wanted = [str(f.relative_to("toy")) for f in Path("toy").rglob("*") if f.is_file()]
    parts = {name.split("/")[0] for name in wanted if any(fnmatch(name, p) for p in files.PIPELINE)}
    assert parts == {f.name for f in Path("toy").iterdir()} - {"adapters", "prompts", "results.json", "grid.png"}
    for name in ("sd3.5_medium.safetensors", "text_encoders/t5xxl_fp16.safetensors"):
        assert not any(fnmatch(name, p) for p in files.PIPELINE)


def test_only_what_is_used_is_fetched(monkeypatch, tmp_path):
    """Without T5 its 9.5 GB stay on the hub; fusing wants the transformer alone."""
    asked = []

    def snapshot_download(name, revision=None, allow_patterns=None):
        asked.append(set(allow_patterns))
        return "toy"

    files.fetch.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model.load_pipeline("some/model", CPU)
    model.load_pipeline("some/model", CPU, no_t5=True)
    merge.fuse("some/model", {}, tmp_path / "fused")
    assert asked[0] - asked[1] == {"text_encoder_3/*", "tokenizer_3/*"}
    assert asked[2] == {"model_index.json", "transformer/*"}
    files.fetch.cache_clear()


@pytest.mark.slow
def test_hub_ids_work_offline_from_the_hubs_own_cache(tmp_path):
    """Base and an adapter's revision by name, in a fresh process, from a cache in the layout that `hf download` leaves."""
    for name, folder, revision in (("models--me--toy", "toy", "main"), ("models--me--lora", "toy/adapters/ocr", "v2")):
        sha = "0123456789" * 4
        shutil.copytree(folder, tmp_path / name / "snapshots" / sha, ignore=shutil.ignore_patterns("adapters"))
        (tmp_path / name / "refs").mkdir()
        (tmp_path / name / "refs" / revision).write_text(sha)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = "evaluate.py --model me/toy --models base ocr=me/lora@v2 --num_prompts 2 --steps 2 --out".split()
    run = lambda *more: subprocess.run(
        [sys.executable, *words, tmp_path / "out", *more], env=environment, capture_output=True, text=True
    )
    done = run()
    assert done.returncode == 0 and "| ocr |" in done.stdout, done.stderr
    done = run("--model", "me/absent", "--out", tmp_path / "other")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "hf download me/absent" in done.stderr


def test_bf16_backbone_with_a_float32_student():
    """The labels of a bf16 backbone are near those of fp32; student and gradients are fp32; teachers take the backbone's."""
    one, two = (model.load_pipeline("toy", CPU, dtype) for dtype in ("fp32", "bf16"))
    texts = [model.embed_prompts(pipe, PROMPTS) for pipe in (one, two)]
    assert [model.backbone_dtype(p.transformer) for p in (one, two)] == [torch.float32, torch.bfloat16]
    layers = adapters.read_adapter("toy/adapters/ocr", "--init")

    class Args:
        seed, rank, alpha, init = 0, 4, 8, "toy/adapters/ocr"

    for pipe in (one, two):
        adapters.add_adapter(pipe.transformer, "teacher", layers)
        adapters.add_student(pipe.transformer, Args, layers)
    for guidance in (1.0, 4.5):
        for name in (None, "teacher", "student"):
            exact, rounded = (predict(p, t, name, guidance) for p, t in zip((one, two), texts))
            assert rounded.dtype == torch.float32
            assert (exact - rounded).norm() < 0.03 * exact.norm()
    student = adapters.adapter_parameters(two.transformer, "student")
    with adapters.adapter(two.transformer, "student"):
        x = torch.randn(2, 8, 8, 8)
        model.velocity(two.transformer, x, 0.5, texts[1], torch.tensor([1, 2]), 1.0).square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in student.values() if p.grad is not None)
    teacher = adapters.adapter_parameters(two.transformer, "teacher")
    assert {p.dtype for p in teacher.values()} == {torch.bfloat16}


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        pipe = model.load_pipeline("toy", CPU, checkpointing=checkpointing)
        text = model.embed_prompts(pipe, PROMPTS)

        class Args:
            seed, rank, alpha, init = 0, 4, 8, "base"

        student, _ = adapters.add_student(pipe.transformer, Args, adapters.read_adapter("toy/adapters/ocr", "--init"))
        x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
        with adapters.adapter(pipe.transformer, "student"):
            model.velocity(pipe.transformer, x, 0.3, text, torch.tensor([1, 2]), 1.0).square().mean().backward()
        gradients.append({k: p.grad for k, p in student.items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    torch.testing.assert_close(gradients[1], gradients[0])


def test_embeddings_are_the_stock_pipelines_and_the_encoders_are_gone(tmp_path):
    pipe = model.load_pipeline("toy", CPU)
    text = model.embed_prompts(pipe, PROMPTS)
    stock = StableDiffusion3Pipeline.from_pretrained("toy")
    for prompt in ["", *PROMPTS]:
        embeds, _, pooled, _ = stock.encode_prompt(prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=8)
        torch.testing.assert_close(text["embeds"][text["rows"][prompt]], embeds[0])
        torch.testing.assert_close(text["pooled"][text["rows"][prompt]], pooled[0])
    assert pipe.text_encoder is None and pipe.text_encoder_3 is None
    without = model.embed_prompts(pipe, PROMPTS, no_t5=True, length=8)["embeds"]
    stock.save_pretrained(tmp_path / "toy")
    for name in ("text_encoder_3", "tokenizer_3"):  # a model without T5
        shutil.rmtree(tmp_path / "toy" / name)
    index = json.loads((tmp_path / "toy/model_index.json").read_text())
    index |= dict.fromkeys(("text_encoder_3", "tokenizer_3"), [None, None])
    (tmp_path / "toy/model_index.json").write_text(json.dumps(index))
    other = model.load_pipeline(str(tmp_path / "toy"), CPU)
    torch.testing.assert_close(model.embed_prompts(other, PROMPTS, no_t5=True, length=8)["embeds"], without)
    torch.testing.assert_close(without[:, :9], text["embeds"][:, :9])  # CLIP's tokens
    assert not without[:, 9:].any() and text["embeds"][:, 9:].any()  # T5's


def test_cached_embeddings_are_the_same_and_need_no_encoder(monkeypatch, tmp_path):
    pipe = model.load_pipeline("toy", CPU)
    plain = model.embed_prompts(pipe, PROMPTS)
    model.embed_prompts(pipe, PROMPTS[:1], cache=tmp_path)
    first = model.embed_prompts(pipe, PROMPTS, cache=tmp_path)  # one from the cache, one new
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3 and not list(tmp_path.rglob("*.safetensors.*"))

    def refuse(*_, **__):
        raise AssertionError("an encoder was used")

    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", refuse)
    second = model.embed_prompts(pipe, PROMPTS, cache=tmp_path)
    for text in (first, second):
        assert text["rows"] == plain["rows"]
        torch.testing.assert_close(text["embeds"], plain["embeds"])
        torch.testing.assert_close(text["pooled"], plain["pooled"])
    with pytest.raises(AssertionError, match="encoder"):  # another length is another embedding
        model.embed_prompts(pipe, PROMPTS, length=4, cache=tmp_path)


def test_sharded_and_half_precision_transformers_load(tmp_path):
    shutil.copytree("toy", tmp_path / "toy", ignore=shutil.ignore_patterns("adapters", "transformer", "prompts"))
    stock = SD3Transformer2DModel.from_pretrained("toy/transformer")
    stock.half().save_pretrained(tmp_path / "toy/transformer", max_shard_size="2MB")
    assert len(list((tmp_path / "toy/transformer").glob("*.safetensors"))) > 1
    pipe, other = model.load_pipeline(str(tmp_path / "toy"), CPU), model.load_pipeline("toy", CPU)
    assert model.backbone_dtype(pipe.transformer) == torch.float32
    text = model.embed_prompts(other, PROMPTS)
    torch.testing.assert_close(predict(pipe, text), predict(other, text), atol=2e-2, rtol=1e-2)


def test_the_fused_transformer_paints_what_the_adapter_paints(monkeypatch, tmp_path, capsys):
    """Same noise, same picture, in stock diffusers: once with load_lora_weights, once with the fused transformer."""
    words = ["merge.py", "--adapters", "toy/adapters/ocr", "--fuse", "toy", "--out", str(tmp_path / "fused")]
    monkeypatch.setattr(sys, "argv", words)
    merge.main(merge.parse_args())
    assert "from_pretrained" in capsys.readouterr().out
    pictures = []
    for fused in (False, True):
        part = {"transformer": SD3Transformer2DModel.from_pretrained(tmp_path / "fused")} if fused else {}
        pipe = StableDiffusion3Pipeline.from_pretrained("toy", **part)
        pipe.set_progress_bar_config(disable=True)
        if not fused:
            pipe.load_lora_weights("toy/adapters/ocr")
        noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
        flags = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 8, "height": 32, "width": 32}
        pictures.append(pipe(PROMPTS, latents=noise, output_type="pt", **flags).images)
    torch.testing.assert_close(pictures[1], pictures[0], atol=1e-4, rtol=1e-4)
    index = tmp_path / "fused/diffusion_pytorch_model.safetensors.index.json"  # of a model in several files, there before
    index.write_text("{}")
    monkeypatch.setattr(sys, "argv", [*words, "--overwrite"])
    merge.main(merge.parse_args())
    assert not index.exists()


def test_an_adapter_that_does_not_fit_is_not_fused(monkeypatch, tmp_path, capsys):
    shutil.copytree("toy/adapters/ocr", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad/adapter_model.safetensors")
    save_file(
        {k: torch.cat([t, t]) if "lora_B" in k else t for k, t in tensors.items()}, tmp_path / "bad/adapter_model.safetensors"
    )
    monkeypatch.setattr(
        sys, "argv", ["merge.py", "--adapters", str(tmp_path / "bad"), "--fuse", "toy", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as stopped:
        merge.main(merge.parse_args())
    assert stopped.value.code == 2 and "another size" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", sorted(p.name for p in Path("recipes").glob("*.args")))
def test_recipes_parse(monkeypatch, tmp_path, recipe):
    """Every flag in them exists, and every value fits; the files that they name are stood in for."""
    text = Path("recipes", recipe).read_text()
    command = next(line for line in text.splitlines() if f"@recipes/{recipe}" in line).lstrip("# ").split()
    script = next(word for word in command if word.endswith(".py"))
    module = importlib.import_module(script.removesuffix(".py"))
    for place in (cli, module):
        monkeypatch.setattr(place, "check_adapter", lambda *_: None, raising=False)
        monkeypatch.setattr(place, "prompt_files", lambda given, *_: given, raising=False)
    monkeypatch.setattr(sys, "argv", [script, f"@recipes/{recipe}", "--out", str(tmp_path / "out")])
    args = module.parse_args()
    assert vars(args)
