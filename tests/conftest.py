"""Shared by all tests: the repository root on sys.path, threads, and `pytest --slow` for the tests marked slow."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported; the scripts that tests start inherit it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; skipped unless --slow is given")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow to run it"))


def process_ends():
    """What the end of a process does for a run that an error has stopped: its lock and its signal handlers go."""
    saver = getattr(sys.excepthook, "__self__", None)
    if hasattr(saver, "lock"):
        saver.close()
        saver.lock.close()


@pytest.fixture(autouse=True)
def clean_process():
    yield
    process_ends()
