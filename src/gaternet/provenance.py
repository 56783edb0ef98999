"""Where a result comes from: the command, versions, commit and machine, as they are recorded with it."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gaternet import __version__

_PACKAGES = ("torchvision", "accelerate", "numpy")


def describe_machine() -> dict[str, Any]:
    """Versions, commit, processor, GPUs and command line, as plain data."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with the kind of build, unlike the package's metadata
            "gaternet": __version__,  # it need not be installed
            **{name: version(name) for name in _PACKAGES},
        },
        "commit": _commit(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
    }


def _program() -> str:
    """What was called: ours by its name, however it was started."""
    name = Path(sys.argv[0]).name
    return "gaternet" if name in ("", "__main__.py") else name


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def processor() -> str:
    """The processor's name, such as "AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit of the checkout that this code is a part of, marked if code was changed; None where there is none.

    Pages and records under docs/ may change: a ledger there, say, grows with each run.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # what is installed in a folder of somebody's checkout
            return None
        changed = git("diff", "--name-only", "HEAD", "--", ":/", ":(top,exclude)docs", ":(top,exclude)*.md")
        return git("describe", "--always", "--abbrev=12") + ("-dirty" if changed else "")
    except OSError:  # no git
        return None
