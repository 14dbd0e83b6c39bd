"""What ends a run early: Ctrl-C, SIGTERM, SIGUSR1 and uncaught errors. They save first."""

import os
import signal
import sys
import threading

SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGUSR1")]


class Interrupts:
    """Calls saver.stop() on a signal or an uncaught error, then lets the process end as usual.

    A thread waits for signals, because the main thread may be waiting for a process that is gone.
    It saves at once: the 30 seconds that launchers grant suffice for iterations of any length."""

    def __init__(self, saver) -> None:
        self.saver = saver
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        self.wakeup = signal.set_wakeup_fd(self.write)  # a signal's number arrives here at once
        self.handlers = {number: signal.signal(number, second_ctrl_c) for number in SIGNALS}
        self.thread = threading.Thread(target=self.wait, daemon=True)
        self.thread.start()
        sys.excepthook = saver.report_error  # after the thread, which would keep it for good

    def wait(self) -> None:
        """The thread. The exit code is the signal's usual one."""
        while received := os.read(self.read, 1):
            if received[0] in SIGNALS:
                try:
                    self.saver.stop()
                finally:
                    os._exit(128 + received[0])
        os.close(self.read)

    def release(self) -> None:
        """Give signals and errors their usual effect again."""
        sys.excepthook = sys.__excepthook__
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        os.close(self.write)  # the thread reads the end and stops
        self.thread.join()
        self.saver = None  # its lock ends with it


def second_ctrl_c(number: int, _frame) -> None:
    """The first one is saving; let the second one end the process at once."""
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
