"""Files from strangers: adapters, prompts, models, flags. Each is read right, or refused in one line with exit code 2;
never another exception, never a hang, nothing written, nothing unpickled, no code run, nothing outside the folder opened.

    python -m pytest tests/test_hostile.py           # the same inputs every time
    python -m pytest tests/test_hostile.py --slow    # twenty times as many, new ones every time
"""

import contextlib
import io
import json
import math
import os
import pickle
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

import support.lora as adapters
import support.files as files
import support.flags as cli
import evaluate
import support.model as model
from rewards import deqa, geneval

CPU = torch.device("cpu")
SLOW = "--slow" in sys.argv


def fuzz(examples, **strategies):
    """@given with so many inputs, none for longer than 20 seconds; twenty times as many, and new ones, with --slow."""
    how = {"deadline": 20_000, "database": None, "suppress_health_check": list(HealthCheck)}
    how |= {"max_examples": examples * (20 if SLOW else 1), "derandomize": not SLOW}
    return lambda test: settings(**how)(given(**strategies)(test))


def snapshot(folder):
    """What lies in a folder: {path: bytes of a file, None of anything else}."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


def loaded(load, *args):
    """What load returns; None where it refused as it should. Any other end fails the test."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return load(*args)
    except SystemExit as stopped:
        lines = said.getvalue().splitlines()
        assert stopped.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        assert len(lines[0]) < 2010 and all(c.isprintable() for c in lines[0])


def refused(load, *args):
    """The line that says why."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as stopped:
        load(*args)
    assert stopped.value.code == 2 and len(said.getvalue().splitlines()) == 1
    return said.getvalue()


# Any text, half surrogate pairs and control characters among it; any JSON, NaN and numbers beyond a float among it
TEXT = st.text(st.characters(codec=None), max_size=30) | st.sampled_from(
    ["", "\0", "\ud800", "a\u2028b", "../../x", "x" * 9999]
)
NUMBER = st.integers() | st.floats() | st.sampled_from([10**400, -1, 0, 1e308, True])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
NESTED = "[" * 100_000  # RecursionError in Python's json
BROKEN_JSON = st.sampled_from(
    [NESTED, '{"prompt":' + NESTED, "", "null", "{", "NaN", "1e400", '{"a": ' + "9" * 5000 + "}", "\ufeff{}"]
)
AS_JSON = JSON.map(json.dumps) | BROKEN_JSON


# ---- Adapters


def small_transformer():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=1,
        caption_projection_dim=8, joint_attention_dim=8, pooled_projection_dim=8, pos_embed_max_size=2, qk_norm="rms_norm",
    ).requires_grad_(False)  # fmt: skip


BACKBONE = small_transformer()
NAMES = [f"transformer_blocks.{i}.attn.{n}" for i in (0, 1) for n in ("to_q", "to_k", "add_q_proj")]  # linear, 8 x 8
ODD_NAMES = ["", "transformer_blocks.0", "transformer_blocks.0.attn.norm_q", "pos_embed.proj", "proj_out", "a\nb", "x" * 9999]
ODD_NAMES += ["transformer_blocks.0.attn.to_q.base_layer", "transformer_blocks.0.attn.to_q.lora_A.other", "__class__", "to_q"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.uint8]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2]
EXPRESSIONS = ["(a+)+$", "(.*)*x", ".*.*.*.*.*.*.*.*.*.*.*b", "to_q|(x+x+)+y", "[", "(?P<", "\\", "*", "^to_q", r"attn\.to_q$"]


@st.composite
def lora_files(draw):
    """(bytes of a safetensors file, text of adapter_config.json or None): right, nearly right, or neither."""
    tensors, spoil = (
        {},
        draw(st.sampled_from(["nothing"] * 4 + ["config"] * 4 + ["value", "shape", "dtype", "key", "half", "name"])),
    )
    prefix = draw(st.sampled_from(["base_model.model.", "transformer.", ""]))
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=spoil != "key", max_size=3))
    names += [draw(st.sampled_from(ODD_NAMES) | TEXT)] if spoil == "name" else []
    for name in names:
        rank, generator = draw(st.integers(0 if spoil == "shape" else 1, 4)), torch.Generator().manual_seed(len(tensors))
        A, B = torch.randn(rank, 8, generator=generator), torch.randn(8, rank, generator=generator)
        if draw(st.integers(0, 9)) == 0:
            B.zero_()
        tensors |= {f"{prefix}{name}.lora_A.weight": A, f"{prefix}{name}.lora_B.weight": B}
    key = draw(st.sampled_from(sorted(tensors))) if tensors else None
    if key and spoil == "value":
        tensors[key].view(-1)[:1] = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e38]))
    if key and spoil == "shape":
        tensors[key] = torch.ones(draw(st.lists(st.integers(0, 9), max_size=4)))
    if key and spoil == "dtype":
        tensors[key] = (tensors[key] * 9).to(draw(st.sampled_from(DTYPES)))
    if key and spoil == "half":
        tensors.pop(key)
    if spoil == "key":
        tensors[draw(TEXT).encode("utf-8", "replace").decode()] = torch.ones(2, 2)
    config = {"lora_alpha": draw(st.integers(1, 64)), "r": 4}
    if draw(st.booleans()):
        config |= {"use_rslora": True, "alpha_pattern": {draw(st.sampled_from(["to_q", *NAMES])): draw(st.integers(1, 9))}}
    text, header = json.dumps(config), None
    if spoil == "config":
        patterns = st.dictionaries(st.sampled_from(NAMES + EXPRESSIONS) | TEXT, NUMBER, max_size=3)
        fields = {"lora_alpha": JSON, "alpha_pattern": patterns | JSON, "use_rslora": JSON, "rank_pattern": JSON}
        config |= draw(st.fixed_dictionaries({}, optional=fields))
        text = draw(st.sampled_from([json.dumps(config), None]) | AS_JSON)
        header = {"lora_adapter_metadata": draw(AS_JSON)} if text is None else None
    tensors = {k.encode("utf-8", "replace").decode(): t for k, t in tensors.items()}
    metadata = {k: v.encode("utf-8", "replace").decode() for k, v in header.items()} if header else None
    return save(tensors, metadata), text


@st.composite
def damaged(draw, data):
    """Bytes of a file cut short, with flipped bits, or with another length of the header."""
    data, how = bytearray(draw(data)), draw(st.sampled_from(["cut", "flip", "header", "noise"]))
    if how == "cut":
        return bytes(data[: draw(st.integers(0, len(data)))])
    if how == "noise":
        return draw(st.binary(max_size=200))
    if how == "header":
        data[:8] = struct.pack("<Q", draw(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 100_000_001])))
    for _ in range(draw(st.integers(1, 4)) if how == "flip" else 0):
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


def check_adapter_file(weights, config, name="adapter_model.safetensors"):
    """Either it is refused, or what is read is finite float32 and what is put on the backbone is scaling * B A."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / name).write_bytes(weights)
        if config is not None:
            (Path(place) / "adapter_config.json").write_bytes(config.encode("utf-8", "surrogatepass"))
        before = snapshot(place)
        layers = loaded(adapters.read_adapter, place, "--init")
        if layers is not None:
            for A, B, scaling in layers.values():
                assert A.dtype == B.dtype == torch.float32 and A.isfinite().all() and B.isfinite().all()
                assert len(A) == B.shape[1] > 0 and 0 < scaling < math.inf
            loaded(adapters.add_adapter, BACKBONE, "stranger", layers, None, None, place, "--init")
            if "stranger" in getattr(BACKBONE, "peft_config", {}):
                deltas = {layer: BACKBONE.get_submodule(layer).get_delta_weight("stranger") for layer in layers}
                BACKBONE.delete_adapters("stranger")
                for layer, (A, B, scaling) in layers.items():
                    torch.testing.assert_close(deltas[layer], scaling * B @ A, rtol=1e-4, atol=1e-4)
        assert snapshot(place) == before
        return layers


def lora(**changes):
    """Bytes of a small right adapter; changes: {"key": tensor}."""
    A = torch.ones(2, 8)
    return save({f"{NAMES[0]}.lora_A.weight": A, f"{NAMES[0]}.lora_B.weight": A.T.contiguous(), **changes})


@fuzz(250, file=lora_files())
def test_adapters_are_read_right_or_refused(file):
    check_adapter_file(*file)


@fuzz(250, weights=damaged(st.builds(lora)), config=st.just('{"lora_alpha": 8}') | AS_JSON)
def test_damaged_adapters_are_read_right_or_refused(weights, config):
    check_adapter_file(weights, config, "pytorch_lora_weights.safetensors")


def test_the_small_adapter_itself_is_right():
    assert check_adapter_file(lora(), '{"lora_alpha": 8}')[NAMES[0]][2] == 4.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_adapter_with_nan_is_refused(tmp_path, value, dtype):
    """1e30 is finite in most formats, but what it does to a velocity is not."""
    bad = torch.ones(2, 8, dtype=dtype)
    bad[1, 7] = value
    (tmp_path / "adapter_model.safetensors").write_bytes(lora(**{f"{NAMES[0]}.lora_A.weight": bad}))
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    assert "nan, infinity" in refused(adapters.read_adapter, tmp_path, "--init")


@pytest.mark.parametrize("alpha", ["-8", "0", "1e400", "NaN", '"8"', "[8]", "true", "9" * 400, "{}"])
def test_an_alpha_that_is_no_number_above_0_is_refused(tmp_path, alpha):
    (tmp_path / "adapter_model.safetensors").write_bytes(lora())
    for config in (f'{{"lora_alpha": {alpha}}}', f'{{"lora_alpha": 8, "alpha_pattern": {{"to_q": {alpha}}}}}'):
        (tmp_path / "adapter_config.json").write_text(config)
        assert "alpha" in refused(adapters.read_adapter, tmp_path, "--init")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    assert "alpha" in refused(adapters.read_adapter, tmp_path, "--init", -1.0)  # --teacher_alpha


@pytest.mark.parametrize("key", ["to_q", "attn.to_q", NAMES[0], "^" + NAMES[0], f"^{NAMES[0]}$", r"attn\.to_q", "o_q", "^to_q"])
def test_alpha_pattern_is_read_as_peft_reads_it(tmp_path, key):
    """Against peft's own matching, for patterns without expressions."""
    from peft.utils.other import get_pattern_key

    (tmp_path / "adapter_model.safetensors").write_bytes(lora())
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "alpha_pattern": {key: 2}}))
    alpha = {key: 2}.get(get_pattern_key([key], NAMES[0]), 8)
    assert adapters.read_adapter(tmp_path, "--init")[NAMES[0]][2] == alpha / 2


@pytest.mark.parametrize("expression", [e for e in EXPRESSIONS if not e.endswith(("to_q", "to_q$"))])
def test_an_expression_that_may_match_for_ever_is_not_tried(tmp_path, expression):
    layer = "a" * 200
    tensors = {f"{layer}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "alpha_pattern": {expression: 4}}))
    assert "expression" in refused(adapters.read_adapter, tmp_path, "--init")


def test_a_layer_that_comes_twice_is_refused(tmp_path):
    """Under two prefixes: the one that is read last would win."""
    (tmp_path / "adapter_model.safetensors").write_bytes(lora(**{f"transformer.{NAMES[0]}.lora_A.weight": torch.zeros(2, 8)}))
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    assert "once each" in refused(adapters.read_adapter, tmp_path, "--init")


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (Path(self.file),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora_weights.bin"])
def test_a_pickled_adapter_is_refused_and_not_opened(tmp_path, name):
    mark = tmp_path.parent / f"{tmp_path.name}.unpickled"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    assert "pickle can run code" in refused(adapters.read_adapter, tmp_path, "--init") and not mark.exists()


@pytest.mark.parametrize("kind", ["folder", "loop", "dangling", "pipe", "itself a file"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.parent.mkdir()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":  # whoever opens it to read waits for ever
        os.mkfifo(file)
    elif kind == "itself a file":
        file.parent.rmdir()
        file.parent.write_bytes(lora())
    else:
        file.symlink_to(file if kind == "loop" else tmp_path / "nowhere")
    assert "not an adapter" in refused(adapters.read_adapter, tmp_path / "adapter", "--init")


def test_a_config_leads_to_no_other_file(tmp_path, monkeypatch):
    """Of adapter_config.json only numbers are used: what it names as base model is never looked at."""
    (tmp_path / "adapter_model.safetensors").write_bytes(lora())
    paths = dict.fromkeys(["base_model_name_or_path", "revision", "auto_mapping", "parent_library"], "../../etc/passwd")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8} | paths))
    opened, read_text = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *how, **more: opened.append(path) or read_text(path, *how, **more))
    adapters.read_adapter(tmp_path, "--init")
    assert opened == [tmp_path / "adapter_config.json"]


# ---- Prompts


def read(data, name):
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / name).write_bytes(data)
        before = snapshot(place)
        result = loaded(files.read_prompts, f"{place}/{name}")
        assert snapshot(place) == before
    if result is not None:
        prompts, metadata = result
        assert prompts and len(prompts) == len(metadata) and all(isinstance(m, dict) for m in metadata)
        assert all(p.strip() and p.encode() and "\0" not in p for p in prompts)
    return result


ENCODED = TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))
LINES = st.lists(ENCODED | st.binary(max_size=20) | st.just(b"a\tb \xe7\x8c\xab"), max_size=5)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
RIGHT = st.tuples(st.dictionaries(WORDS, JSON, max_size=2), WORDS).map(lambda pair: pair[0] | {"prompt": pair[1]})
WRONG = st.tuples(st.dictionaries(TEXT, JSON, max_size=2), TEXT | JSON).map(lambda pair: pair[0] | {"prompt": pair[1]})
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\xe2\x80\xa8"])


@fuzz(300, lines=LINES, end=ENDS, mark=st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"]))
def test_prompt_files_are_read_or_refused(lines, end, mark):
    read(mark + end.join(lines), "prompts.txt")


@fuzz(
    300,
    lines=st.lists(RIGHT.map(json.dumps), max_size=3),
    odd=st.none() | WRONG.map(json.dumps) | AS_JSON | st.binary(),
    end=ENDS,
)
def test_json_lines_are_read_or_refused(lines, odd, end):
    lines = [*lines, odd] if odd is not None else lines
    read(
        end.join(line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass") for line in lines), "prompts.jsonl"
    )


@fuzz(100, prompts=st.lists(WORDS, min_size=1), ascii=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\n \n"]))
def test_every_text_survives_json_lines(prompts, ascii, end):
    """Newlines, control characters, U+2028, any script: what is written is what is read."""
    prompts = [p for p in prompts if p.strip()] or ["a"]
    text = end.join(json.dumps({"prompt": p, "n": i}, ensure_ascii=ascii) for i, p in enumerate(prompts))
    assert read(text.encode(), "prompts.jsonl") == (prompts, [{"prompt": p, "n": i} for i, p in enumerate(prompts)])


def test_prompts_as_people_write_them():
    """A mark at the start, Windows' line ends, empty lines, duplicates, scripts, a very long line."""
    text = "\ufeffred circle\r\n\r\n  猫と犬\t\r\nred circle\n\u200bعربى\n\n" + "very " * 2000 + "long\nno newline at the end"
    expected = ["red circle", "猫と犬", "red circle", "\u200bعربى", "very " * 2000 + "long", "no newline at the end"]
    assert read(text.encode(), "prompts.txt")[0] == expected
    assert read(b"a\0b", "prompts.txt") is None and read("red circle".encode("utf-16"), "prompts.txt") is None
    assert read(b'{"prompt": "\\ud800"}', "prompts.jsonl") is None and read(b'{"prompt": 7}', "prompts.jsonl") is None
    assert read(b'[{"prompt": "a list, not lines"}]', "prompts.json") is None
    assert read(b'{"prompt": ' + b"[" * 100_000, "prompts.jsonl") is None


ODD_PROMPTS = [
    "a\nb",
    "tab\there",
    "bell\x07",
    "\x1b[31mred\x1b[0m",
    "猫と犬",
    "עברית \u202e",
    "a\u2028b",
    "e\u0301" * 50,
    "🦄" * 200,
]
ODD_PROMPTS += ["very " * 2000, "x" * 10_000, "<|endoftext|></s>", "%s {0} \\n $HOME", "../../x", "\ufffe\uffff", "red circle"]


@pytest.fixture(scope="module")
def pipe():
    return model.load_pipeline("toy", CPU)


def test_any_prompt_is_embedded(pipe, tmp_path):
    """Each to its own finite row, the same from the cache; no prompt becomes the name of a file."""
    text = model.embed_prompts(pipe, ODD_PROMPTS + ODD_PROMPTS[:3], cache=tmp_path)
    assert len(text["rows"]) == 1 + len(ODD_PROMPTS) == len(text["embeds"])
    assert text["embeds"].isfinite().all() and text["pooled"].isfinite().all()
    for file, damage in zip(sorted(tmp_path.rglob("*.safetensors")), (b"", b"noise" * 9, save({"embeds": torch.ones(1)}))):
        file.write_bytes(damage)  # such a row is made again
    again = model.embed_prompts(pipe, ODD_PROMPTS, cache=tmp_path)
    torch.testing.assert_close(again["embeds"], text["embeds"], rtol=0, atol=0)
    assert all(len(p.stem) == 64 for p in tmp_path.rglob("*.safetensors"))


@fuzz(
    4, prompts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=200), min_size=50, max_size=60)
)
def test_random_text_is_embedded(prompts):
    text = model.embed_prompts(model.load_pipeline("toy", CPU), prompts)
    assert text["embeds"].isfinite().all() and text["pooled"].isfinite().all()


@fuzz(50, prompts=st.lists(TEXT, min_size=1, max_size=3), name=TEXT)
def test_any_prompt_is_drawn_as_one_line(prompts, name):
    with tempfile.TemporaryDirectory() as place:
        pictures = {name: torch.zeros(len(prompts), 3, 8, 8)}
        evaluate.picture_grid(f"{place}/page.png", pictures, prompts, {name: torch.zeros(len(prompts))})
        assert [p.name for p in Path(place).iterdir()] == ["page.png"]


def test_a_newline_is_shown_as_an_escape(tmp_path):
    for name, prompt in (("a.png", "one\ntwo\x1b"), ("b.png", "one\\ntwo\\x1b")):
        evaluate.picture_grid(tmp_path / name, {"base": torch.zeros(1, 3, 8, 8)}, [prompt])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert cli.one_line("\n\x1b\u202e\ud800 猫 é") == r"\n\x1b\u202e\ud800 猫 é"


def test_odd_prompts_through_a_whole_run(monkeypatch, tmp_path):
    """Training, samples, evaluation: every line of the log is JSON, every file lies where it should."""
    import train_opd

    lines = [json.dumps({"prompt": p, "file_name": "../../outside", "path": "/outside"}) for p in ODD_PROMPTS]
    (tmp_path / "odd.jsonl").write_text("\n".join(lines))
    words = "--teacher ocr=toy/adapters/ocr --prompts_per_iteration 2 --group_size 2 --steps 2 --iterations 2 --eval_steps 2"
    words += f" --sample_every 1 --eval_prompts 4 --prompts ocr={tmp_path}/odd.jsonl --test_prompts ocr={tmp_path}/odd.jsonl"
    monkeypatch.setattr(sys, "argv", ["train_opd.py", *words.split(), "--out", str(tmp_path / "run")])
    train_opd.main(train_opd.parse_args())
    assert len([json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().split("\n")[:-1]]) == 2
    assert (tmp_path / "run/samples/00002.png").stat().st_size > 0 and (tmp_path / "run/table.md").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"odd.jsonl", "run"}


# ---- Models


@pytest.fixture
def copy(tmp_path):
    """A copy of the miniature in which a test changes something."""
    shutil.copytree("toy", tmp_path / "toy", ignore=shutil.ignore_patterns("adapters", "prompts", "results.json"))
    return tmp_path / "toy"


def load_all(folder):
    return model.embed_prompts(model.load_pipeline(str(folder), CPU), ["red circle"])


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "part,module",
    [("transformer", "my_module"), ("vae", "my_module"), ("text_encoder", "my_module"), ("tokenizer_3", "my_module"),
     ("scheduler", "my_module"), ("transformer", "diffusers"), ("text_encoder", "transformers"), ("vae", "this"),
     (".", "pipeline"), (".", "None"), (".", "my_module"), ("auto_map", "my_module"), ("class", "my_module")],
)  # fmt: skip
def test_no_code_in_a_model_directory_is_run(copy, part, module):
    """A component of a module of its own, a module called like a library, a pipeline.py, auto_map: loaded without it, or
    refused."""
    mark = copy.parent / "executed"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Cls:\n    pass\n"
    places = [copy / part] if (copy / part).is_dir() else [p for p in copy.iterdir() if p.is_dir()]
    for place in [*places, copy]:
        (place / f"{module}.py").write_text(code)
    if part == "auto_map":
        for file in [*copy.glob("*/config.json"), *copy.glob("*/tokenizer_config.json")]:
            names = ("AutoModel", "AutoConfig", "AutoTokenizer")
            rewrite(file, auto_map=dict.fromkeys(names, "my_module.Cls"))
    elif part == "class":
        rewrite(copy / "model_index.json", _class_name=["my_module", "Cls"])
    elif part != "." and module not in ("diffusers", "transformers"):
        rewrite(copy / "model_index.json", **{part: [module, "Cls"]})
    sys.modules.pop("this", None)
    text = loaded(load_all, copy)
    assert not mark.exists() and "this" not in sys.modules
    if part in ("auto_map", ".") and module != "None":  # nothing asks for that code; a None.py diffusers refuses
        assert text is not None


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"])
def test_pickled_weights_are_refused(copy, part):
    """The right weights, as a .bin: safe to read as it happens, but a pickle."""
    (file,) = (copy / part).glob("*.safetensors")
    name = file.stem + ".bin" if "model" != file.stem else "pytorch_model.bin"
    torch.save(load_file(file), copy / part / name)
    file.unlink()
    assert "safetensors" in refused(load_all, copy)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"])
@pytest.mark.parametrize("how", ["missing", "nan", "shape", "cut", "config"])
def test_a_damaged_model_is_refused(copy, part, how):
    """Left to themselves, transformers draws what is missing at random and diffusers leaves it without data."""
    (file,) = (copy / part).glob("*.safetensors")
    tensors = load_file(file)
    key = sorted(tensors)[len(tensors) // 2]
    if how == "missing":
        tensors.pop(key)
    tensors = {k: t * math.nan if (k, how) == (key, "nan") else t for k, t in tensors.items()}
    tensors = {k: torch.zeros(3, 3) if (k, how) == (key, "shape") else t for k, t in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    if how == "config":
        (copy / part / "config.json").write_text('{"sample_size": "x", "num_layers": [], "vocab_size": null}')
    assert "error: --model" in refused(load_all, copy)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "text_encoder_3"])
def test_an_index_leads_to_no_file_outside(copy, part):
    """A sharded checkpoint whose index names a shard in another folder, by a relative or an absolute path."""
    (file,) = (copy / part).glob("*.safetensors")
    outside = copy.parent / "outside.safetensors"
    file.rename(outside)
    for name in ("../../outside.safetensors", str(outside)):
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(load_file(outside), name)}
        (copy / part / f"{file.name}.index.json").write_text(json.dumps(index))
        assert "outside" in refused(load_all, copy)


def test_a_tokenizer_config_leads_to_no_file_outside(copy):
    outside = copy.parent / "outside.json"
    vocabulary = json.loads((copy / "tokenizer_3/tokenizer.json").read_text())
    outside.write_text(json.dumps(vocabulary).replace("circle", "square"))
    rewrite(copy / "tokenizer_3/tokenizer_config.json", tokenizer_file=str(outside), vocab_file=str(outside))
    torch.testing.assert_close(load_all(copy)["embeds"], load_all("toy")["embeds"], rtol=0, atol=0)


@fuzz(150, index=AS_JSON | st.dictionaries(st.sampled_from(["_class_name", "vae"]), JSON).map(json.dumps))
def test_any_model_index_is_refused(index):
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "model_index.json").write_bytes(index.encode("utf-8", "surrogatepass"))
        assert "--model" in refused(files.check_model, place)


@fuzz(30, changes=st.dictionaries(st.sampled_from(["transformer", "vae", "scheduler", "image_encoder", "x"]), JSON, min_size=1))
def test_any_component_is_loaded_or_refused(changes):
    with tempfile.TemporaryDirectory() as place:
        for part in Path("toy").iterdir():
            (Path(place) / part.name).symlink_to(part.absolute())
        (Path(place) / "model_index.json").unlink()
        shutil.copy("toy/model_index.json", place)
        rewrite(Path(place) / "model_index.json", **changes)
        loaded(model.load_pipeline, place, CPU)


@fuzz(150, recorded=st.fixed_dictionaries({"flags": JSON, "results": st.dictionaries(TEXT, JSON) | JSON}) | JSON)
def test_recorded_results_of_a_stranger_are_shown_or_left_out(recorded):
    """MODEL/results.json comes up at the end of a run, when an exception would be worst."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "results.json").write_text(json.dumps(recorded))
        flags, results = evaluate.read_recorded(place)
        evaluate.table(results)
        assert isinstance(flags, dict)


def test_the_miniatures_own_results_are_read():
    flags, results = evaluate.read_recorded("toy")
    assert flags["steps"] == 16 and {"base", "oracle", "grpo_mix"} <= results.keys()
    assert results["ocr"]["ocr"]["mean"] > 0.5 and results["oracle"]["average"]["se"] > 0


# ---- Flags and names


@fuzz(300, items=st.lists(TEXT | st.tuples(TEXT, st.sampled_from(["nan", "inf", "-1e999", "1_0", "٣", "2"])).map("=".join)))
def test_pairs_are_finite_numbers_or_refused(items):
    numbers = loaded(cli.pairs, items, "--task_mix", True)
    if numbers is not None:
        assert all(math.isfinite(value) for value in numbers.values()) and len(numbers) == len(items)


@fuzz(200, data=st.binary(max_size=60) | ENCODED | st.sampled_from([b"--steps 3 # three", b"@SELF", b"--steps\n@SELF\n"]))
def test_files_of_flags_are_read_or_refused(data):
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "recipe.args"
        file.write_bytes(data.replace(b"SELF", str(file).encode()))
        parser = cli.make_parser("")
        parser.add_argument("--steps", type=cli.positive)
        before = snapshot(place)
        loaded(parser.parse_args, [f"@{file}"])
        loaded(parser.parse_args, [f"@{place}"])
        assert snapshot(place) == before


@fuzz(300, path=TEXT | st.from_regex(r"[\w.-]{1,9}/[\w.-]{1,9}(@[\w./-]{1,9})?", fullmatch=True))
def test_any_path_is_a_folder_a_hub_id_or_refused(path):
    """No hub is reached: its ids are refused in one line, without a revision that leads out of its cache."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        folder = loaded(files.fetch, path, "--model", files.PIPELINE)
        assert folder in (None, path) and not (files.hub_id(path) and ".." in path)
        for check in (files.check_adapter, files.check_model):
            loaded(check, path, "--init")
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before
        files.fetch.cache_clear()


# ---- Scorers


PLACE = st.tuples(st.sampled_from(geneval.RELATIONS), st.integers(-1, 2) | JSON).map(list)
REQUEST = st.fixed_dictionaries(
    {"class": st.sampled_from(["cat", "dog"]) | JSON, "count": st.integers(1, 3) | JSON},
    optional={"color": st.just("red") | JSON, "position": PLACE | JSON},
)
REQUESTS = st.lists(REQUEST, max_size=3) | JSON


@fuzz(300, line=st.fixed_dictionaries({"tag": st.just("position"), "include": REQUESTS}, optional={"exclude": REQUESTS}) | JSON)
def test_geneval_judges_metadata_or_says_why_not(line):
    """One line as a ValueError, which the scripts print; else both rules end in a number."""
    try:
        geneval.check_metadata(line, 0)
    except ValueError as error:
        assert str(error).startswith("geneval: metadata 0")
        return
    cat = {"box": (0, 0, 9, 9), "colour": "red"}
    for objects in ({}, {"cat": [cat], "dog": [cat, cat]}):
        score, strict = geneval.softened(objects, line)
        assert math.isfinite(score) and isinstance(strict, bool) and isinstance(geneval.official(objects, line), bool)


def test_deqas_index_leads_to_no_file_outside(tmp_path):
    (tmp_path / "in").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "outside.bin")
    for name in ("../outside.bin", str(tmp_path / "outside.bin")):
        (tmp_path / "in/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match="no shard"):
            deqa.read_checkpoint(tmp_path / "in")
