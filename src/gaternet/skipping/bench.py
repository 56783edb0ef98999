"""Timing: plain dense engines, the masked and the skipping model beside each other, with MACs beside milliseconds."""

import copy
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gaternet.cost import CostModel, count_dense_macs
from gaternet.errors import first_line
from gaternet.method import GaterNet
from gaternet.skipping.dense import ENGINES, build_dense
from gaternet.skipping.skip import skip


@dataclass(frozen=True)
class Timing:
    """Of one way to run a batch.

    Attributes:
        name: the engine.
        batch: images in the batch.
        density: share of open gates, in [0, 1]; None for plain networks and for the gater alone.
        macs: multiply-accumulates of an image, in the mean over the batch; as `count_macs` counts them.
        median, p10, p90: milliseconds for the batch.
        over_dense: the time over that of the fastest dense engine, within the same turn: the median of all turns; None
            where there is no dense engine.
    """

    name: str
    batch: int
    density: float | None
    macs: float
    median: float
    p10: float
    p90: float
    over_dense: float | None

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch / self.median


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]], rounds: int = 5, seconds: float = 0.3
) -> dict[str, list[list[float]]]:
    """Seconds of single calls of each function, a list for each turn: taking turns, all see the same machine.

    In a turn a function first runs untimed for a while, since threads of the one before may still be spinning.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name in order:
            times[name].append([])
            for part, share in (([], 0.4), (times[name][-1], 0.6)):
                began = time.perf_counter()
                while True:
                    start = time.perf_counter()
                    runs[name]()
                    _wait()
                    part.append(time.perf_counter() - start)
                    if time.perf_counter() - began > share * seconds:
                        break
    return times


def spread(turns: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Of the seconds that `time_interleaved` gives for a function: median, p10 and p90, in milliseconds."""
    found = [1000 * seconds for turn in turns for seconds in turn]
    tenths = statistics.quantiles(found, n=10, method="inclusive") if len(found) > 1 else found * 9
    return statistics.median(found), tenths[0], tenths[-1]


def over(turns: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    """The time of one function over that of another: of the medians of each turn, in the median of the turns."""
    pairs = zip(turns, others, strict=True)
    return statistics.median(statistics.median(turn) / statistics.median(other) for turn, other in pairs)


@torch.no_grad()
def bench(
    model: GaterNet,
    images: Tensor,
    densities: Sequence[float] = (),
    engines: Sequence[str] = ENGINES,
    calibration: Tensor | None = None,
    rounds: int = 5,
    seconds: float = 0.3,
    note: Callable[[str], None] = lambda text: None,
) -> list[Timing]:
    """Time a batch in all ways, in turns.

    Args:
        model: a GaterNet; it is put in evaluation mode.
        images: the batch (B, channels, H, W), on the model's device.
        densities: shares of open gates, drawn anew for each gate and image (seed 0); none: the model's own gates.
        engines: dense engines to compare with; those that are not installed or cannot run here are left out.
        calibration: gates (N, C) that images really have, to time "specialise" as well, see `skip`.
        rounds, seconds: how often each takes its turn, and for how long.
        note: told what is left out, and why.

    Returns:
        "dense: ENGINE" for the plain backbone; "masked", "skipped" and "specialised" for the backbone under gates;
        "gater"; and, under the model's own gates, "gater and skipped" and "gater and specialised".

    Raises:
        ValueError: a dense engine that does not exist, or a backbone that cannot be exported.
    """
    if unknown := [name for name in engines if name not in ENGINES]:
        raise ValueError(f"there is no dense engine {unknown[0]!r}: choose of {', '.join(ENGINES)}")
    model.eval()
    fast = skip(model, images, "slice")
    ways = {"skipped": fast}
    if calibration is not None:
        ways["specialised"] = skip(model, images, "specialise", calibration=calibration)
    plain = copy.deepcopy(model).ungate()
    cost = CostModel.of(model, images)
    found: list[_Way] = []
    for name in engines:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dense = build_dense(plain, images, name)
                dense(images)
        except Exception as error:  # engines have errors of their own
            note(str(error) if isinstance(error, ValueError) else f"{name} cannot run here: {first_line(error)}")
            continue
        found.append(_Way(f"dense: {name}", None, cost.dense, lambda d=dense: d(images)))
    own = fast.gates(images)
    generator = torch.Generator().manual_seed(0)
    drawn = [(torch.rand(own.shape, generator=generator) < d).to(own) for d in densities] or [own]
    for gates in drawn:
        density, mean = gates.mean().item(), cost(gates).mean().item()
        for name, engine in (("masked", model), *ways.items()):
            found.append(_Way(name, density, mean, lambda e=engine, g=gates: e.forward_gated(images, g)))
    gater_macs = count_dense_macs(model.gater, images)
    found.append(_Way("gater", None, gater_macs, lambda: fast.gates(images)))
    if not densities:
        density, mean = own.mean().item(), gater_macs + cost(own).mean().item()
        for name, engine in ways.items():
            found.append(_Way(f"gater and {name}", density, mean, lambda e=engine: e(images)))
    times = time_interleaved({str(number): way.run for number, way in enumerate(found)}, rounds, seconds)
    turns = list(times.values())
    dense = [seen for way, seen in zip(found, turns, strict=True) if way.name.startswith("dense: ")]
    fastest = min(dense, key=lambda seen: statistics.median(chain(*seen)), default=None)
    return [way.timing(len(images), seen, fastest) for way, seen in zip(found, turns, strict=True)]


@dataclass(frozen=True)
class _Way:
    """One way to run a batch, to be timed; see `Timing`."""

    name: str
    density: float | None
    macs: int | float
    run: Callable[[], Any]

    def timing(self, batch: int, turns: list[list[float]], dense: list[list[float]] | None) -> Timing:
        ratio = None if dense is None else over(turns, dense)
        return Timing(self.name, batch, self.density, float(self.macs), *spread(turns), ratio)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
