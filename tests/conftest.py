"""Shared by all tests: where they run, their random numbers, and how they start a script.

`python -m pytest` leaves out the tests marked slow; `python -m pytest --slow` runs all.
"""

import argparse
import contextlib
import functools
import importlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch is imported. The scripts that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from support import model  # noqa: E402
from support.flags import model_flags  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_runtest_setup(item):
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("slow: run it with --slow")


# ---- Every test starts in the same state: any working directory and any order will do


@contextlib.contextmanager
def clean_state():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with contextlib.chdir(ROOT):
        yield


@pytest.fixture(scope="module", autouse=True)
def clean_module():
    """For the fixtures of a module, which are set up before those of a test."""
    with clean_state():
        yield


@pytest.fixture(autouse=True)
def clean_test():
    with clean_state():
        yield
    process_ends()


def process_ends():
    """Release what a run holds that an error has stopped: its signal handlers and its lock."""
    saver = getattr(sys.excepthook, "__self__", None)
    if hasattr(saver, "lock"):
        saver.close()
        saver.lock.close()


@functools.cache
def randn(*shape, seed=0):
    """Normal numbers in float64, the same at every call. Do not change them in place."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def raises(message, call, *given, **named):
    """`call` fails with a ValueError of one line that holds `message`, a regular expression."""
    with pytest.raises(ValueError, match=message) as error:
        call(*given, **named)
    assert "\n" not in str(error.value)


# ---- Running scripts, and reading what they leave


def call(monkeypatch, script, *flags, curves=False):
    """`python SCRIPT.py FLAGS` in this process. Drawing curves.png takes longer than a tiny run."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    module = importlib.import_module(script)
    if hasattr(module, "draw_curves") and not curves:
        monkeypatch.setattr(module, "draw_curves", lambda *given: None)
    module.main(module.parse_args())


def shell(*words):
    """The same in a fresh process."""
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork(world, log, function, *given, **named):
    """The ids of `world` processes that call the function, and print into the file `log`. They find
    each other as under torchrun. They start at once: all imports are done."""
    port, pids = free_port(), []
    for rank in range(world):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            sys.stdout = sys.stderr = open(log, "a")
            torch.cuda.is_available = lambda: False  # CUDA does not survive a fork
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ.update({name: str(number) for name, number in numbers.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            function(*given, **named)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pids


def codes_of(pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def weights(run):
    """{name: tensor} of the adapter that a run has published."""
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """{name: a scorer of rewards/ with tiny random weights; it takes the scorer's options}."""
    from experiments.tiny_scorers import save  # here: it takes seconds

    return save(tmp_path_factory.mktemp("tiny"))


# ---- The miniature

PROMPTS = ["red circle", "sign reads K T in red"]


def model_args(**flags):
    """The flags of model_flags, with these values in place of the defaults."""
    parser = argparse.ArgumentParser()
    model_flags(parser)
    args = parser.parse_args(["--text_length", "8"])
    vars(args).update(flags)
    return args


def load(**flags):
    return model.load_pipeline(model_args(**flags), torch.device("cpu"))


def embed(pipe, prompts=PROMPTS, **flags):
    return model.embed_prompts(pipe, prompts, model_args(**flags))


def predict(transformer, text, guidance=1.0):
    """Velocities of the active LoRA, at fixed states of two prompts: (2, 8, 8, 8)."""
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    return model.velocity(transformer, x, 0.5, text, torch.tensor([1, 2]), guidance)


@pytest.fixture
def pipe():
    return load()


@pytest.fixture
def text(pipe):
    return embed(pipe)
