"""Show a run's metrics.jsonl in TensorBoard.

    pip install tensorboard
    python examples/to_tensorboard.py runs/opd && tensorboard --logdir runs

Run it again for what a run has logged since: it converts the whole log anew. (This file may not be
called tensorboard.py: Python would import it in place of the package.)
"""

import json
import shutil
import sys
from pathlib import Path

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    print("error: the package is missing: pip install tensorboard", file=sys.stderr)
    raise SystemExit(2) from None

for run in sys.argv[1:]:
    shutil.rmtree(Path(run, "tensorboard"), ignore_errors=True)
    with SummaryWriter(Path(run, "tensorboard")) as board:
        for line in Path(run, "metrics.jsonl").read_text().splitlines():
            values = json.loads(line)
            step = values.pop("iteration")
            for name, value in values.items():
                if isinstance(value, int | float):
                    board.add_scalar(name, value, step)
