"""What is shown runs, and is there: commands, flags, files and Python of the README, the scripts' own openings and the
recipes; and what the two training scripts repeat on purpose is the same in both. python -m pytest tests/test_readme.py"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SCRIPTS = ["toy.py", "train_teacher.py", "merge.py", "train_opd.py", "evaluate.py"]
SCRIPTS += sorted(map(str, [p for folder in ("examples", "experiments", "rewards") for p in Path(folder).glob("*.py")]))
SCRIPTS += ["tests/benchmark.py", "tests/benchmark_rewards.py"]
README = Path("README.md").read_text()
# Files that are written by a run, fetched by the reader, or the reader's own.
OUTSIDE = ("runs/", "data/", "OUT/", "DIR/", "dataset/", "prompts/", "FILE", "http")
WRITTEN = "args.json metrics.jsonl curves.png table.md results.json grid.png differences.png metadata.jsonl 00000.png".split()
WRITTEN += "adapter_config.json adapter_model.safetensors pytorch_lora_weights.safetensors model_index.json config.json".split()
WRITTEN += "train.txt test.txt train_metadata.jsonl test_metadata.jsonl evaluation_metadata.jsonl my_rewards.py".split()


def commands(text):
    """[words, …] of all `python FILE.py …` and torchrun lines in a text: in code blocks, indented, or between backticks."""
    text = re.sub(r"\\\n\s*", " ", text)  # a command on several lines
    lines = re.findall(r"^ *((?:python3?|torchrun|srun) .*)$", text, re.M)
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`((?:python|torchrun) [^`]+)`(?!`)", text)]
    parts = [part.strip() for line in lines for part in re.split(r"  +(?:#|->)", line)[0].split("&&")]
    return [
        shlex.split(part.replace("…", "")) for part in parts if re.match(r"(python3?|torchrun|srun) (.* )?[\w/]+\.py\b", part)
    ]


def shown():
    """[(where, words), …] of the README, the openings of all scripts, and the comments of the recipes."""
    texts = {"README.md": README} | {script: ast.get_docstring(ast.parse(Path(script).read_text())) or "" for script in SCRIPTS}
    texts |= {str(p): re.sub("(?m)^# *", "", p.read_text()) for p in sorted(Path("recipes").glob("*.args"))}
    return [(where, words) for where, text in texts.items() for words in commands(text)]


@cache
def help_of(script):
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def flags_of(script):
    """What a script takes: from its own text and that of cli.py, where it takes flags from there."""
    text = Path(script).read_text()
    text += Path("train_opd.py").read_text() if "import train_opd" in text else ""  # the benchmark hands on what is not its own
    text += Path("cli.py").read_text() if "import cli" in text or "from cli" in text else ""
    return set(re.findall(r'"(--[\w-]+)"', text)) | {"--help"}


def test_commands_name_scripts_and_flags_that_exist():
    found = shown()
    assert len(found) > 20 and {where for where, _ in found} >= {"README.md", "train_opd.py", "examples/flow2d.py"}
    for where, words in found:
        script = next(word for word in words if word.endswith(".py"))
        assert Path(script).is_file(), f"{where}: no file {script}"
        for flag in words[words.index(script) + 1 :] if "pytest" not in words else []:
            if flag.startswith("--"):
                assert flag.split("=")[0] in flags_of(script), f"{where}: {script} has no {flag}"
            if flag.startswith("@") and "NAME" not in flag:
                assert Path(flag[1:]).is_file(), f"{where}: no file {flag}"


@pytest.mark.parametrize("script", ["train_teacher.py", "merge.py", "train_opd.py", "evaluate.py", "toy.py"])
def test_help_has_every_flag_of_its_commands(script):
    flags = {word.split("=")[0] for _, words in shown() if script in words for word in words[words.index(script) :]}
    missing = [flag for flag in flags if flag.startswith("--") and not re.search(rf"{flag}\b", help_of(script))]
    assert not missing


def test_flags_that_the_readme_speaks_of_exist():
    """`--flag` between backticks, outside commands: one of the scripts', or torchrun's, pytest's and Slurm's own."""
    known = {flag for script in SCRIPTS for flag in flags_of(script)}
    known |= {"--slow", "--max-restarts", "--signal", "--nproc_per_node", "--signals-to-handle", "--node_rank"}
    words = [word for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README) for word in code.split()]
    assert not [word for word in words if word.startswith("--") and word.split("=")[0] not in known]


def test_files_that_the_readme_names_are_there():
    kinds = r"(?:py|png|svg|md|json|jsonl|args|txt|ini|safetensors)"
    names = set(re.findall(rf"[\w.{{}}/,-]*\w\.{kinds}\b", README))
    names |= set(re.findall(r"!?\[[^\]]*\]\(([^)#]+)\)", README))  # links and pictures
    for name in sorted(names):
        inside = not name.startswith(OUTSIDE) and Path(name).name not in WRITTEN and "{" not in name and "NAME" not in name
        assert not inside or Path(name).exists() or any(Path(".").glob(f"*/{name}")), f"README.md names {name}"
    for name in re.findall(r"^([a-z_]+(?:\.py|/))\s{2,}", README, re.M):  # the annotated tree
        assert Path(name).exists(), f"the file tree names {name}"


def python_blocks():
    texts = [README, *(p.read_text() for p in sorted(Path("examples").glob("*.md")))]
    return [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.S)]


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.splitlines()[0][:40])
def test_python_of_the_readme_runs(block, monkeypatch):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def figures(text):
    """All numbers with a fraction or thousands in a text, without sign and leading zero: 0.9236 and .9236 are one."""
    text = re.sub(r"`[^`]*`|```.*?```", " ", text, flags=re.S)  # not those in commands
    numbers = re.findall(r"(?<![\w.])\d*\.\d+(?![\w.]*\d)|(?<![\w.])\d{1,3}(?:,\d{3})+", text)
    return {number.lstrip("0") for number in numbers}


def test_numbers_of_the_results_stand_in_results_md():
    """Each one, as it is written: no figure by hand, no rounding of its own."""
    section = re.search(r"^## Results.*?\n(.*?)(?=^## )", README, re.M | re.S)[1]
    known = figures(Path("experiments/RESULTS.md").read_text())
    assert len(figures(section)) > 20
    assert not sorted(figures(section) - known)


TINY = {
    "train_teacher.py": "--prompts_per_iteration 5 --group_size 2 --steps 3 --iterations 1 --window 0 --window_end 0"
    " --eval_steps 2 --eval_prompts 2 --overwrite",
    "train_opd.py": "--prompts_per_iteration 4 --group_size 2 --steps 3 --iterations 1 --eval_steps 2 --eval_prompts 2"
    " --sft_images 8 --overwrite",
    "merge.py": "--overwrite",
    "evaluate.py": "--num_prompts 2 --steps 2 --overwrite",
}


@pytest.mark.slow
def test_the_readmes_commands_run_one_after_the_other(tmp_path):
    """In a copy of the repository, in the order of the README, those of the miniature, with tiny settings behind."""
    here = tmp_path / "copy"
    shutil.copytree(".", here, ignore=shutil.ignore_patterns("runs", ".git", "__pycache__", ".pytest_cache"))
    environment, ran = os.environ | {"OMP_NUM_THREADS": "1"}, 0
    (here / "my_rewards.py").write_text(next(block for block in python_blocks() if "REWARDS = " in block))
    for line in re.findall(r"^(?:mkdir|grep) .*$", README, re.M):
        subprocess.run(line, shell=True, cwd=here, check=True)
    for words in commands(README):
        script = next(word for word in words if word.endswith(".py"))
        tied = [
            w for w in words if w.startswith(("@", "--nnodes", "data/", "ORG")) or "DIR" in w or w == "rewards" or "sd35" in w
        ]
        if script not in TINY or tied or words[0] == "srun":
            continue
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"] if words[0] == "torchrun" else [sys.executable]
        words = [*start, *words[1:], *TINY[script].split()]
        done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 6


# ---- What train_opd.py and train_teacher.py repeat on purpose

REPEATED = [  # (its first line begins so, its last line begins so)
    ("    rank, world, device = common.start_processes()",) * 2,
    ('    layers = None if args.init == "base"', "    student, ema = adapters.add_student("),
    ("    optimizer = torch.optim.AdamW(",) * 2,
    ("    # Every derived number, once.", "    grid = time_grid("),
    ("    if samples < world:", "    mine = common.share("),
    ("    # Prompts are embedded once",) * 2,
    ("    # --resume refuses other flags",) * 2,
    ("    updates_done, bad_steps, began = ", "    bar = tqdm("),
    ("        chosen = common.choose(",) * 2,
    ("        loss_scale = ",) * 2,
    ("            norm = torch.nn.utils.clip_grad_norm_(", '        watch.lap("update")'),
    ("        log = common.sum_logs(log)",) * 2,
    ("        # 7. Checkpoint", "            saver.give_up("),
    ("    common.stop_processes()", "    main(ARGS)"),
]


@pytest.mark.parametrize("first, last", REPEATED, ids=lambda line: line.strip()[:30])
def test_what_the_training_scripts_repeat_is_the_same(first, last):
    blocks = []
    for script in ("train_opd.py", "train_teacher.py"):
        lines = Path(script).read_text().splitlines()
        start = next((n for n, line in enumerate(lines) if line.startswith(first)), None)
        assert start is not None, f"{script} has no line {first!r}"
        end = next((n for n, line in enumerate(lines[start:], start) if line.startswith(last)), None)
        assert end is not None, f"{script} has no line {last!r} behind {first!r}"
        blocks.append(lines[start : end + 1])
    assert blocks[0] == blocks[1]


def test_the_training_scripts_have_the_same_seven_phases():
    for script in ("train_opd.py", "train_teacher.py"):
        phases = re.findall(r"^        # (\d)\. ([A-Z]\w+)", Path(script).read_text(), re.M)
        assert [n for n, _ in phases] == list("1234567"), script
        assert [name for _, name in phases if name not in ("Labels", "Rewards")] == (
            "Prompts Rollout Update Log Samples Checkpoint".split()
        )


# Whose meaning, default or value in the paper is not the same in both.
DIFFERENT = "init rank alpha clip_range prompts_per_iteration noise guidance iterations lr micro_batch out eval_prompts rewards"


def test_flags_of_both_training_scripts_are_explained_in_the_same_words():
    """A flag of one name is one thing: its line is the same in both, or it is among those that differ."""
    lines = {}
    for script in ("train_opd.py", "train_teacher.py"):
        for name, rest in re.findall(r'^    flag\("--(\w+)",(.*)\)$', Path(script).read_text(), re.M):
            lines.setdefault(name, []).append(rest)
    both = {name: pair for name, pair in lines.items() if len(pair) == 2}
    assert len(both) > 8
    assert not [name for name, (one, other) in both.items() if one != other and name not in DIFFERENT.split()]


# ---- Type hints

HINTED = "sde losses model adapters common checkpoint checks memory tables cli evaluate merge".split()
HINTED = [f"{name}.py" for name in HINTED] + [str(p) for d in ("rewards", "examples") for p in sorted(Path(d).glob("*.py"))]


@pytest.mark.parametrize("file", HINTED)
def test_public_functions_have_type_hints(file):
    """On every parameter and for what comes back: functions and methods without a leading underscore, __init__, __call__."""
    body = ast.parse(Path(file).read_text()).body
    body += [node for kind in body if isinstance(kind, ast.ClassDef) for node in kind.body]
    for node in (node for node in body if isinstance(node, ast.FunctionDef) and node.name != "main"):
        if not node.name.startswith("_") or node.name in ("__init__", "__call__"):
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [p.arg for p in parameters if p.annotation is None and p.arg != "self"]
            assert not bare and node.returns, f"{file}: {node.name} lacks the hint of {bare or 'what it returns'}"
