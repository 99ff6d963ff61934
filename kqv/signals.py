"""Requests to stop: Ctrl-C, SIGTERM, a closed terminal, max_minutes. Imports no torch, so it works from the start."""

import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import Any

STOPPED_EARLY = 75  # exit code of a run that was asked to stop and can go on: EX_TEMPFAIL, "try again"


def exit_code_if_stopped() -> int:
    """STOPPED_EARLY; but 0 under a torchrun with restarts, which treats any other code as a failure."""
    return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) else STOPPED_EARLY


class StopRequests:
    """Signals that ask a run to stop, and its time limit. Before `begin`, with nothing to save, a signal ends it."""

    def __init__(self):
        self.received, self.began, self.max_minutes, self.running = [], time.monotonic(), None, False
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows lacks SIGHUP; under nohup it stays ignored
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.receive)

    def receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and (self.received or not self.running):  # a second Ctrl-C stops at once
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        self.received.append(name)
        advice = (
            "saving after this micro-batch; Ctrl-C stops at once" if self.running else "stopped before the first step"
        )
        with suppress(OSError):  # Ctrl-C has ended `| tee` as well, or the terminal is closed
            print(f"{name}: {advice}", file=sys.stderr)
        if not self.running:
            sys.exit(exit_code_if_stopped())

    def begin(self, max_minutes: float | None) -> None:
        """From here on a signal lets the run save first. The time limit counts from the start of the program."""
        self.running, self.max_minutes = True, max_minutes

    def too_long(self) -> bool:
        return self.max_minutes is not None and time.monotonic() - self.began > 60 * self.max_minutes

    def requested(self, processes: Any) -> bool:
        """Whether any process was asked to stop; every process must call it. `processes`: distributed.Processes."""
        return processes.any(bool(self.received) or self.too_long())

    def reason(self) -> str:
        limit = f"max_minutes={self.max_minutes}" if self.too_long() else "another process was asked to stop"
        return ", ".join(self.received) or limit
