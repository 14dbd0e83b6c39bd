"""The embedded default: a miniature of Stable Diffusion 3.5, four tasks, four scorers.

This folder is a pipeline that diffusers loads, and a Python package:

    world.py      what an image can show: prompts, drawings
    scorers.py    the four scorers, for `--rewards toy`
    build.py      `python -m toy.build` rebuilds everything here; nobody has to, it is committed
"""

from toy.scorers import REWARDS

__all__ = ["REWARDS"]
