"""Locks on folders end with the process that holds them."""

import os
import subprocess
import sys

import pytest

from gaternet.locks import lock_folder, unlock_folder

FORKS = """
import os, sys
from pathlib import Path
from gaternet.locks import lock_folder, unlock_folder
handle = lock_folder(Path(sys.argv[1]), wait=False)
if os.fork() == 0:
    unlock_folder(handle)  # which is not its own to let go of
    print("forked", flush=True)
    sys.stdin.read()  # until the test ends
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_killed_process_holds_no_lock_in_those_that_it_forked(tmp_path):
    command = [sys.executable, "-c", FORKS, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "forked\n"
            with pytest.raises(BlockingIOError):
                lock_folder(tmp_path, wait=False)
        finally:
            process.kill()
            process.wait()
        handle = lock_folder(tmp_path, wait=False)  # while what it forked is still there
    assert handle is not None
    unlock_folder(handle)
