"""Seconds and peak memory of the phases of a process: what experiments/full_size.py measures with.

Memory is what the system counts as resident, mapped files included, above what Python and the
libraries take. Linux alone.
"""

import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import checkpoint, metrics, model
from support.files import save_json

# A tensor above 128 kB gets memory of its own, which goes back to the system at once. From a heap
# that grows and has holes, a phase's peak would stay in all later ones: 1.6 GB with SD3.5.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


class Watch:
    """Seconds and peak memory of a process's phases, kept in a file."""

    def __init__(self, file):
        self.file, self.phases = file, {}
        self.start = self.peak = resident()
        self.since = time.perf_counter()
        threading.Thread(target=self.sample, daemon=True).start()

    def sample(self):
        while True:
            self.peak = max(self.peak, resident())
            time.sleep(0.01)

    def mark(self, phase):
        """What was used since the last mark belongs to this phase."""
        now, peak = time.perf_counter(), max(self.peak, resident()) - self.start
        entry = self.phases.setdefault(phase, {"seconds": 0.0, "peak": 0})
        entry["seconds"] += now - self.since
        entry["peak"] = max(entry["peak"], peak)
        self.since, self.peak = now, 0
        save_json(self.file, self.phases)

    def around(self, owner, name, phase):
        """Calls of owner.name belong to this phase."""
        real = getattr(owner, name)

        def call(*given, **named):
            self.mark("the rest")
            out = real(*given, **named)
            self.mark(phase)
            return out

        setattr(owner, name, call)

    def laps(self):
        """Those of a training script, by its own stopwatch."""
        real = metrics.Stopwatch.lap

        def lap(stopwatch, phase):
            real(stopwatch, phase)
            self.mark(phase)

        metrics.Stopwatch.lap = lap
        self.around(model, "load_pipeline", "loading")
        self.around(model, "embed_prompts", "text")
        self.around(checkpoint.Saver, "iteration_done", "saving")


def resident():
    """Bytes of this process in memory, files that are mapped into it included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
