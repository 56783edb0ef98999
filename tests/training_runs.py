"""Short trainings, and what tests read of them."""

import json
import os
import random
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import gaternet.step
from gaternet.checkpoint import load_model
from gaternet.recipe import Recipe, Runtime, override
from gaternet.recipes import find_recipe
from gaternet.step import training_step
from gaternet.trained import find_model

CPU = Runtime(cpu=True, precision="no", log_every=1)


def small(model: str = "resnet20_gated", **changes: object) -> Recipe:
    """Five steps an epoch, two epochs; the gater is not guided."""
    recipe = find_recipe("digits_resnet20_gated" if model.endswith("_gated") else "digits_resnet20")
    plain = {"auxiliary_weight": 0.0, "initial_bias": 0.0, "anneal_noise": False}
    return override(
        recipe,
        {
            "model": None if "backbone" in changes else model,
            "batch_size": 256,
            "epochs": 2,
            "warmup_epochs": 0.0,
            **plain,
            **changes,
        },
    )


def free_port() -> int:
    """A port that nothing listens on, below those that a system gives to whoever asks for any.

    One of these could be given away again, say to a test beside this one, before the process that is to listen starts.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 50):
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")


def exit_codes(running: Sequence[subprocess.Popen]) -> list[int]:
    """Of processes that end within two minutes; none is left running."""
    try:
        return [process.wait(120) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(find_model(run))[0].state_dict()


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def records(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    volatile = ("seconds", "train_images_per_second")
    return [{k: v for k, v in line.items() if k not in volatile} for line in lines if line["kind"] == kind]


def send_signal_after(monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
    calls = []

    def counted(*args, **kwargs):
        calls.append(0)
        if len(calls) == step:
            os.kill(os.getpid(), signum)
        return training_step(*args, **kwargs)

    monkeypatch.setattr(gaternet.step, "training_step", counted)
