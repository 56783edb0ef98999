"""What all tests share."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

pytest.register_assert_rewrite("gated_models", "site_checks", "skipped_networks", "training_runs")

# Tiny tensors, and often several test processes on few cores: more threads would only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # the same in processes that tests start, whose sums must come in the same order

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def random_numbers() -> None:
    """Each test's weights and images are the same in every run and any order, so that a failure can be repeated."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and reference outputs that lies beside some checkouts; the test skips without it."""
    if not (SHARED / "PAPER.md").is_file():  # another folder may be called so
        pytest.skip("needs the reference data that lies beside the developers' checkouts, in shared/")
    return SHARED


@pytest.fixture(scope="session")
def gaternet_command() -> list[str]:
    """How to start the command line in a process of its own."""
    return [sys.executable, "-m", "gaternet"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """An uninterrupted run, with averaged weights, to compare others with."""
    from training_runs import CPU, small

    from gaternet.train import train

    run = tmp_path_factory.mktemp("runs") / "finished"
    train(small(ema_decay=0.9), run, CPU)
    return run


@pytest.fixture(scope="session")
def analysis() -> Any:
    """What the gates of `analyzed_model` do on its images."""
    from analyzed_model import MODEL, PIXELS, batches

    from gaternet import analyze

    return analyze(MODEL, batches(), preprocessing=PIXELS, samples=40, extremes=3)


@pytest.fixture(scope="session")
def truth() -> Any:
    """The same, image by image."""
    from analyzed_model import recount

    return recount()


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Switches the run-time check of annotations off: torch.compile cannot trace through it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright; the test skips without it."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed, say Debian's package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()
