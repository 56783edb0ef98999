"""Reports of runs: their models over their test images, one page each, and one that compares several."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaternet import files
from gaternet.analysis import analyze
from gaternet.data import ImageSet, check_source
from gaternet.evaluate import batch_size_for
from gaternet.findings import GateAnalysis
from gaternet.forcing import force_gates
from gaternet.loader import make_batches
from gaternet.machine import accelerate_restored, make_accelerator
from gaternet.method import GaterNet
from gaternet.modes import channels_last_
from gaternet.recipe import Runtime, data_name
from gaternet.report.comparison import write_comparison
from gaternet.report.page import write_report
from gaternet.trained import Trained, Which


def report_runs(
    runs: Sequence[Path],
    which: Which = "last",
    data: str | None = None,
    out: Path | None = None,
    runtime: Runtime | None = None,
    *,
    samples: int = 2000,
    forced: int = 300,
) -> list[Path]:
    """Write the report of each run, and with several one that compares them; the pages' paths, that one last.

    Args:
        runs: run directories or saved models, of gated networks.
        which: model of a run.
        data: in place of the sets that they were trained on.
        out: folder of the page; of several runs' with one folder each in it. Default: `report` in the run's directory,
            `report-best` for its best model, of several `report` in the current one.
        runtime: device, and where the data lie.
        samples: number of images on the map.
        forced: number of images to force gates on; 0 leaves that part out.

    Raises:
        ValueError: a run has no gates, or its data cannot be had.
        OSError: a page cannot be written.
    """
    runtime = runtime or Runtime()
    found: dict[str, GateAnalysis] = {}
    pages = []
    models = [Trained.open_gated(run, which, data) for run in runs]
    sources = [model.named_source() for model in models]
    for source in sources:  # what is wrong is to be found before the work on others is done
        check_source(source)
    for run, model in zip(runs, models, strict=True):
        name = str(run) if str(run) not in found else f"{run} ({len(found)})"
        if out is None and len(runs) == 1:
            directory = run / ("report-best" if which == "best" else "report")
        else:
            directory = (out or Path("report")) / (f"run{len(found) + 1}" if len(runs) > 1 else "")
        title = f"Gates of {run.resolve().name}"
        found[name], page = _report_run(model, directory, title=title, runtime=runtime, samples=samples, forced=forced)
        pages.append(page)
    if len(runs) > 1:
        pages.append(write_comparison(found, out or Path("report"), [page.parent.name for page in pages], sources))
    return pages


@accelerate_restored()
def _report_run(
    model: Trained[GaterNet],
    directory: Path,
    *,
    title: str,
    runtime: Runtime,
    samples: int,
    forced: int,
) -> tuple[GateAnalysis, Path]:
    accelerator = make_accelerator(runtime)
    network, preprocessing = model.network, model.preprocessing
    channels_last_(network.to(accelerator.device))
    _, images = model.load_sets(runtime.data_root)
    options: dict[str, Any] = {"preprocessing": preprocessing}
    batches = make_batches(images, batch_size_for(preprocessing, accelerator), runtime, accelerator)
    files.make_folder(directory)  # an error now, not after the work
    analysis = analyze(network, batches.epoch(), classes=model.classes, samples=samples, **options)
    tried = force_gates(network, _shuffled(images, forced), analysis, images=forced, **options) if forced else None
    about = [f"{network.num_gates:,} gates", f"test images of {data_name(model.named_source())} in full precision"]
    about += training_of(model.metadata.get("trained") or {})
    page = write_report(analysis, directory, forced=tried, title=title, subtitle=", ".join(about))
    return analysis, page


def training_of(trained: dict[str, Any]) -> list[str]:
    """What is known of the training: saved models need not say it."""
    found = [f"{name} {trained[name]}" for name in ("recipe", "seed") if name in trained]
    return [*found, f"after epoch {trained['epochs']}"] if "epochs" in trained else found


def _shuffled(images: ImageSet, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images in random order: folders are sorted by class."""
    order = random.Random(0).sample(range(len(images)), min(number, len(images)))
    for start in range(0, len(order), 100):
        part = order[start : start + 100]
        yield images.take(part), torch.from_numpy(images.labels[part])
