"""What is shown runs and exists: commands, flags, files and Python of the README, the scripts'
docstrings and the recipes; and the phases of the two training loops are the same."""

import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

TRAINING = ["train_teacher.py", "train_sft.py", "train_opd.py"]
READING_ORDER = "sde.py losses.py train_teacher.py merge.py train_sft.py train_opd.py evaluate.py"
READING_ORDER = READING_ORDER.split()
PARSERS = [*TRAINING, "merge.py", "evaluate.py", "toy/build.py", "experiments/miniature.py"]
PARSERS += ["experiments/gradients.py", "experiments/profiler.py"]  # their parse_args knows --help
FOLDERS = ("support", "rewards", "toy", "recipes", "examples", "experiments", "tests")
SCRIPTS = [*READING_ORDER]
for folder in ("examples", "experiments", "rewards", "toy"):
    SCRIPTS += sorted(f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py"))
read = lambda name: (ROOT / name).read_text()
README = read("README.md")
# Files that a run writes, the reader fetches, or the reader makes.
OUTSIDE = ("runs/", "data/", "OUT/", "DIR/", "dataset/", "prompts/", "FILE", "http")
WRITTEN = "args.json metrics.jsonl curves.png table.md results.json grid.png differences.png"
WRITTEN += " metadata.jsonl 00000.png adapter_config.json adapter_model.safetensors config.json"
WRITTEN += " pytorch_lora_weights.safetensors model_index.json train.txt test.txt my_rewards.py"
WRITTEN += " train_metadata.jsonl test_metadata.jsonl evaluation_metadata.jsonl"
START = r"(?:python3?|torchrun|srun) "
SCRIPT = re.compile(r"([\w/]+)\.py|toy\.build")


def commands(text):
    """The words of every `python FILE.py ...`, `python -m toy.build` and torchrun line in a text:
    in code blocks, indented, or between backticks."""
    text = re.sub(r"\\\n\s*", " ", text)  # a command on several lines
    lines = re.findall(rf"^ *({START}.*)$", text, re.M)
    lines += [" ".join(code.split()) for code in re.findall(rf"(?<!`)`({START}[^`]+)`(?!`)", text)]
    found = []
    for line in lines:
        for part in re.split(r"  +(?:#|->)", line)[0].split("&&"):
            if not SCRIPT.search(part):  # python -c, pip, ...
                continue
            words = shlex.split(part.replace("…", "").replace("...", ""), comments=True)
            if any(SCRIPT.fullmatch(word) for word in words):
                found.append(words)
    return found


def script_of(words):
    """(script, the words behind it)."""
    n = next(n for n, word in enumerate(words) if SCRIPT.fullmatch(word))
    return words[n].replace("toy.build", "toy/build.py"), words[n + 1 :]


def shown():
    """[(where, words), ...] of the README, all docstrings, and the comments of the recipes."""
    names = ("README.md", "recipes/README.md", "rewards/README.md", "toy/README.md")
    texts = {name: read(name) for name in names}
    for script in SCRIPTS:
        texts[script] = ast.get_docstring(ast.parse(read(script))) or ""
    for path in sorted((ROOT / "recipes").glob("*.args")):
        texts[path.name] = re.sub("(?m)^# *", "", path.read_text())
    return [(where, words) for where, text in texts.items() for words in commands(text)]


def test_the_drawing_of_an_iteration_is_the_one_in_train_opd():
    drawing = re.search(r"^PROMPTS .*?(?=^```)", README, re.M | re.S)[0]
    assert drawing in read("train_opd.py").replace("\n    ", "\n")


@cache
def flags_of(script):
    """The flags of a script: from its --help, or from its text."""
    if script in PARSERS:
        module, text = importlib.import_module(script[:-3].replace("/", ".")), io.StringIO()
        given, sys.argv = sys.argv, [script, "--help"]
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            module.parse_args()
        sys.argv = given
        return set(re.findall(r"--[\w-]+", text.getvalue()))
    names = ("benchmark", "cost", "fake_gpu", "variants")
    handing_on = [f"experiments/{name}.py" for name in names]
    more = flags_of("train_opd.py") if script in handing_on else set()
    return more | set(re.findall(r'"(--[\w-]+)"', read(script))) | {"--help"}


def test_commands_name_scripts_and_flags_that_exist():
    found = shown()
    places = {where for where, _ in found}
    assert len(found) > 40 and places >= {"README.md", *TRAINING, "examples/flow2d.py"}
    for where, words in found:
        script, rest = script_of(words)
        assert (ROOT / script).is_file(), f"{where}: no file {script}"
        for word in rest if "pytest" not in words else []:
            if word.startswith("--"):
                assert word.split("=")[0] in flags_of(script), f"{where}: {script} has no {word}"
            if word.startswith("@") and "NAME" not in word:
                assert (ROOT / word[1:]).is_file(), f"{where}: no file {word}"


def test_flags_that_the_readme_mentions_exist():
    """`--flag` between backticks, outside commands: ours, or torchrun's, pytest's and Slurm's."""
    known = {"--slow", "--max-restarts", "--signal", "--nproc_per_node", "--signals-to-handle"}
    known |= {"--node_rank", *(flag for script in SCRIPTS for flag in flags_of(script))}
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README):
        for word in code.split():
            assert not word.startswith("--") or word.split("=")[0] in known, word


def test_files_that_the_readme_names_are_there():
    kinds = r"(?:py|png|svg|md|json|jsonl|args|txt|ini|safetensors)"
    names = set(re.findall(rf"[\w.{{}}/,-]*\w\.{kinds}\b", README))
    names |= set(re.findall(r"!?\[[^\]]*\]\(([^)#]+)\)", README))  # links and pictures
    for name in sorted(names):
        if name.startswith(OUTSIDE) or Path(name).name in WRITTEN.split():
            continue
        places = [ROOT / name, *(ROOT / folder / name for folder in FOLDERS)]
        own = "{" in name or "NAME" in name
        assert own or any(place.exists() for place in places), f"README.md names {name}"
    tree = re.findall(r"^([a-z_]+(?:\.py|/))\s{2,}", README, re.M)
    assert [name for name in tree if name in READING_ORDER] == READING_ORDER
    assert all((ROOT / name).exists() for name in tree)


PYTHON = re.findall(r"```python\n(.*?)```", README + read("toy/README.md"), re.S)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.splitlines()[0][:40])
def test_python_of_the_readme_runs(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def figures(text):
    """Numbers with a fraction or thousands, outside code, without sign and leading zero."""
    text = re.sub(r"`[^`]*`|```.*?```", " ", text, flags=re.S)
    numbers = r"(?<![\w.])\d*\.\d+(?![\w.]*\d)|(?<![\w.])\d{1,3}(?:,\d{3})+"
    return {number.lstrip("0") for number in re.findall(numbers, text)}


def test_numbers_of_the_readmes_tables_are_those_of_results_md():
    prose = re.sub(r"```.*?```", " ", README, flags=re.S)
    rows = "\n".join(line for line in prose.splitlines() if "±" in line)
    assert len(figures(rows)) > 40
    assert not sorted(figures(rows) - figures(read("experiments/RESULTS.md")))


TINY = "--iterations 1 --eval_steps 2 --eval_prompts 2 --overwrite"
ROLLOUT = "--prompts_per_iteration 5 --group_size 2 --steps 3"
SMALLER = {
    "train_teacher.py": f"{ROLLOUT} --window 0 --window_end 0 {TINY}",
    "train_sft.py": f"--sft_images 8 --batch 8 {TINY}",
    "train_opd.py": f"{ROLLOUT} {TINY}",
    "merge.py": "--overwrite",
    "evaluate.py": "--num_prompts 2 --steps 2 --overwrite",
}


@pytest.mark.slow
def test_the_readmes_commands_run_one_after_the_other(tmp_path):
    """Then those of toy/README.md: in a copy, in order, with tiny settings at the end."""
    ignored = shutil.ignore_patterns("runs", "data", ".*", "__pycache__")
    copy, ran = shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored), 0
    how = {"cwd": copy, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    rewards = [block for block in PYTHON if "REWARDS = " in block]
    (copy / "my_rewards.py").write_text(rewards[0])
    for line in re.findall(r"^(?:mkdir|grep) .*$", README, re.M):
        subprocess.run(line, shell=True, check=True, **how)
    other = re.compile(r"srun|@.*|--nnodes.*|data/.*|ORG.*|.*DIR.*|rewards|.*sd35.*")
    for words in commands(README + read("toy/README.md")):
        script, _ = script_of(words)
        if script not in SMALLER or any(map(other.fullmatch, words)):
            continue
        start = [sys.executable]
        if words[0] == "torchrun":
            start += ["-m", "torch.distributed.run", "--standalone"]
        words = [*start, *words[1:], *SMALLER[script].split()]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, **how)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 12


SHARED = """step_of = | sample_of = | t, t_next = | slots = | prompt = | prompt_of = | update_of =
generators = | noise = | policy = | x, x_next = | v = | mean, _ = | fraction = | norm = | if norm
optimizer. | bad_updates = | run.update_average | saver.iteration_done | metrics.log_line"""


def test_two_loops_have_the_same_phases_and_lines():
    loops = []
    for script in ("train_teacher.py", "train_opd.py"):
        loop = read(script).split("for iteration in bar:")[1].split("saver.finish()")[0]
        loops.append([line.strip() for line in loop.splitlines()])
        names = re.findall(r"^ *# \d\. ([A-Z]\w+)", loop, re.M)
        names = " ".join(names).replace("Rewards", "Labels")
        assert names == "Prompts Rollout Labels Update Log Samples Checkpoint"
    for start in re.split(r" \| |\n", SHARED):
        teacher, opd = ([line for line in loop if line.startswith(start)] for loop in loops)
        assert teacher and teacher == opd, start
