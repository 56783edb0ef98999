"""Signals that end a run: the first with all saved, the second at once."""

import os
import signal
import subprocess
import sys

from gaternet.machine import collect_signals


def test_a_second_ctrl_c_ends_at_once():
    code = (
        "import os, signal\nfrom gaternet.machine import collect_signals\nwith collect_signals():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n    os._exit(0)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGINT


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with collect_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)
