"""The model and its teachers as they lie on the hub, through every loader. Where the layout is
known from, and what in it is not verified: experiments/published_layout.py."""

import http.server
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, embed, load
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close

from experiments.published_layout import MODEL, READ, TEACHERS, Hub
from experiments.published_layout import publish, save_model, save_teacher
from support import files, lora, model
from support.flags import TASKS


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{hub id: folder of its snapshot} in a cache of the hub."""
    hub = tmp_path_factory.mktemp("hub")
    found = {MODEL: publish(hub, MODEL, save_model)}
    for seed, name in enumerate(TEACHERS):
        found[name] = publish(hub, name, save_teacher, seed)
    return found


@pytest.fixture
def offline(published, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(published[MODEL].parents[2]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    files.fetch.cache_clear()


def test_the_model_is_read_from_the_cache_and_from_a_folder(offline, published):
    """T5 from its two shards; neither the variants, which are zero here, nor the single files."""
    tables = []
    for where in (MODEL, str(published[MODEL])):
        pipe = load(model=where, size=64)
        saved = load_file(published[MODEL] / "transformer/diffusion_pytorch_model.safetensors")
        assert_close(pipe.transformer.state_dict(), {key: t.float() for key, t in saved.items()})
        assert len(model.time_grid(pipe, 10)) == 11
        tables.append(embed(pipe, ["a red cab", "seas"], text_length=128))
    assert_close(tables[0]["embeds"], tables[1]["embeds"])
    embeds, pooled = tables[0]["embeds"], tables[0]["pooled"]  # (3, 77 + 128, 64), (3, 32)
    assert embeds.shape == (3, 205, 64) and pooled.shape == (3, 32)
    assert all(part.abs().amax((1, 2)).min() > 0 for part in (embeds[:, :77, :32], embeds[:, 77:]))
    assert (embeds[1] != embeds[2]).any() and (pooled[1] != pooled[2]).any()


def test_the_teachers_are_read_as_peft_reads_them(offline, published):
    pipe, stock = load(model=MODEL, size=64), load(model=MODEL, size=64)
    text = embed(pipe, ["a red cab"], text_length=8)
    given = (torch.randn(1, 16, 8, 8), 0.5, text, torch.tensor([1]), 1.0)
    with torch.no_grad():
        for number, name in enumerate(TEACHERS[::3]):  # of both authors
            lora.load_adapter(pipe.transformer, f"teacher_{number}", name, "--teacher ocr")
            wrapped = PeftModel.from_pretrained(stock.transformer, published[name])
            with lora.use(pipe.transformer, f"teacher_{number}"):
                v = model.velocity(pipe.transformer, *given)
            assert_close(v, model.velocity(wrapped.base_model.model, *given))
            stock.transformer = wrapped.unload()


@pytest.mark.slow
def test_the_recipes_take_them(offline, monkeypatch, tmp_path, capsys):
    """The commands of the README in their order; only the pictures are smaller."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    prompts = [f"{task}={ROOT}/toy/prompts/{task}_train.txt" for task in TASKS]
    small = "--size 64 --eval_steps 2 --iterations 1 --prompts_per_iteration 4 --group_size 2"
    small = [*small.split(), "--sample_every", 0, "--prompts", *prompts]
    call(monkeypatch, "merge", "@recipes/sd35m_merge.args")
    assert "191 layers, rank 32" in capsys.readouterr().out
    call(monkeypatch, "train_opd", "@recipes/sd35m_opd.args", *small, "--dry_run")
    assert "at the peak of each phase" in capsys.readouterr().out
    call(monkeypatch, "train_opd", "@recipes/sd35m_opd.args", *small, "--steps", 3)
    config = json.loads(Path("runs/sd35m_opd/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == MODEL
    call(monkeypatch, "merge", "--adapters", "runs/sd35m_opd/adapter", "--fuse", MODEL)
    assert Path("runs/merged/diffusion_pytorch_model.safetensors").is_file()


MISSING = """model_index.json | no usable model_index.json
    scheduler | scheduler_config.json
    vae/diffusion_pytorch_model.safetensors | diffusion_pytorch_model.safetensors
    tokenizer_2 | tokenizer_2 lacks files
    tokenizer_3 | tokenizer_3 lacks files
    tokenizer/merges.txt | `merges`
    text_encoder_3/model-00002-of-00002.safetensors | model-00002-of-00002.safetensors"""


@pytest.mark.parametrize("row", MISSING.split("\n    "))
def test_what_a_download_lacks_is_an_error(published, tmp_path, capsys, row):
    name, message = row.split(" | ")
    folder = shutil.copytree(published[MODEL], tmp_path / "model")
    remove = shutil.rmtree if (folder / name).is_dir() else os.unlink
    remove(folder / name)
    with pytest.raises(SystemExit):
        embed(load(model=str(folder)), ["a red cab"], text_length=8)
    assert message in capsys.readouterr().err


def test_a_gated_model_is_one_line_and_later_only_what_is_read_is_fetched(
    published, monkeypatch, tmp_path, capsys
):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    changed = {"ENDPOINT": url, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": False}
    changed["HUGGINGFACE_CO_URL_TEMPLATE"] = url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in changed.items():
        monkeypatch.setattr(constants, name, value)
    files.fetch.cache_clear()
    monkeypatch.setattr(Hub, "folder", published[MODEL])
    monkeypatch.setattr(Hub, "gated", True)
    with pytest.raises(SystemExit):
        files.fetch(MODEL, "--model", files.PIPELINE)
    assert "gated; accept its licence on huggingface.co" in capsys.readouterr().err
    monkeypatch.setattr(Hub, "gated", False)
    files.fetch(MODEL, "--model", files.PIPELINE)
    server.shutdown()
    assert Hub.asked == READ
