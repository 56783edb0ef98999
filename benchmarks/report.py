"""How long does an analysis take beside an evaluation, and how heavy is its page?

python benchmarks/report.py --data cifar10.npz [--model resnet164_gated] [--rounds 3] [--out docs/results/report.json]

A network that is not trained, but whose BatchNorms have seen images, so that its gates depend on them. `evaluate` and
`analyze` go over the same test images in turns, in float32; then the page is written, and opened in Chromium.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright
from torch import Tensor

import gaternet
from gaternet.analysis import analyze
from gaternet.data import ToInput, load_data
from gaternet.evaluate import BATCH, evaluate
from gaternet.files import write_json
from gaternet.findings import GateAnalysis
from gaternet.loader import make_batches
from gaternet.machine import make_accelerator
from gaternet.modes import channels_last_
from gaternet.provenance import describe_machine
from gaternet.recipe import Runtime
from gaternet.report import write_report


def settled_model(name: str, images: Tensor) -> gaternet.GaterNet:
    """The model by name, its BatchNorms' statistics taken from images (N, channels, H, W)."""
    torch.manual_seed(0)
    model = gaternet.create_model(name)
    assert isinstance(model, gaternet.GaterNet)
    model.train()
    with torch.no_grad():
        for batch in images.split(100):
            model(batch)
    return model.eval()


def opening_seconds(page: Path, rounds: int) -> list[float]:
    """Seconds from asking a browser for the page to its last figure, each time in a browser of its own."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    seconds = []
    with sync_playwright() as playwright:
        for _ in range(rounds):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            tab = browser.new_context(offline=True).new_page()
            start = time.perf_counter()
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-drawn]", state="attached")
            seconds.append(time.perf_counter() - start)
            browser.close()
    return seconds


def main() -> None:
    """Measure, and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", default="resnet164_gated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results/report.json"))
    args = parser.parse_args()
    runtime = Runtime(precision="no")
    accelerator = make_accelerator(runtime)
    data = load_data(args.data)
    pixels, to_input = data.preprocessing, ToInput(data.preprocessing)
    first = data.train.take(range(500))
    model = settled_model(args.model, to_input(first)).to(accelerator.device)
    channels_last_(model)
    batches = make_batches(data.test, BATCH, runtime, accelerator)
    seconds: dict[str, list[float]] = {"evaluate": [], "analyze": []}
    analysis: GateAnalysis | None = None
    for _ in range(args.rounds):
        start = time.perf_counter()
        evaluate(model, batches, to_input, accelerator)
        middle = time.perf_counter()
        analysis = analyze(model, batches.epoch(), classes=data.classes, preprocessing=pixels)
        seconds["evaluate"].append(middle - start)
        seconds["analyze"].append(time.perf_counter() - middle)
    assert analysis is not None
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        page = write_report(analysis, Path(folder), title=args.model)
        writing = time.perf_counter() - start
        opening, size = opening_seconds(page, args.rounds), page.stat().st_size
    ratios = [b / a for a, b in zip(seconds["evaluate"], seconds["analyze"], strict=True)]
    result = {
        "model": args.model,
        "images": analysis.images,
        "gates": analysis.num_gates,
        "dependent": float(analysis.dependent.mean()),
        "rounds": args.rounds,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "writing_seconds": writing,
        "opening_seconds": statistics.median(opening),
        "page_bytes": size,
        **describe_machine(),
        "command": f"python benchmarks/report.py --data {Path(args.data).name} --model {args.model} "
        f"--rounds {args.rounds}",
    }
    write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
