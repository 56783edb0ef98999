"""What gates.json holds: the numbers behind the page, as plain data."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from gaternet.findings import GateAnalysis, gate_shares
from gaternet.forcing import CLOSED, OPEN, Effect, Forced


def numbers(analysis: GateAnalysis, forced: Forced | None = None) -> dict[str, Any]:
    """The summary, figures of each site, gate and class, and what forcing gates did.

    Without labels, classes are predicted ones, and there is no accuracy and no number of right predictions.
    """
    lows = np.flatnonzero(analysis.histogram)
    summary = {
        "images": analysis.images,
        "labeled": analysis.labeled,
        "accuracy": analysis.accuracy,
        "gates": analysis.num_gates,
        **gate_shares(analysis.rates),
        "open_gates": {
            "least": int(lows[0]),
            "mean": float(analysis.open_counts.sum() / analysis.images),
            "most": int(lows[-1]),
        },
        "backbone_macs": analysis.backbone_macs,
        "gater_macs": analysis.gater_macs,
        "gated_macs": analysis.gated_macs,
    }
    off, on, dependent = analysis.site_shares.tolist()
    per_site = zip(analysis.sites, off, on, dependent, strict=True)
    sites = [{**site, "always_off": a, "always_on": b, "dependent": c} for site, a, b, c in per_site]
    gates = {
        "open_images": analysis.open_counts.tolist(),
        "information_bits": _rounded(analysis.information()),
        "information_bits_by_chance": _rounded(analysis.information_by_chance().mean(0)),
        "selectivity": _rounded(analysis.selectivity()),
        "selectivity_by_chance": _rounded(analysis.selectivity_by_chance().mean(0)),
    }
    right = analysis.class_right.tolist() if analysis.labeled else [None] * len(analysis.classes)
    means = (_rounded(analysis.class_densities), _rounded(analysis.class_macs))
    names = ("class", "images", "right", "density", "macs")
    rows = zip(analysis.classes, analysis.counts.tolist(), right, *means, strict=True)
    classes = [dict(zip(names, row, strict=True)) for row in rows]
    histogram = {str(n): int(analysis.histogram[n]) for n in lows}
    found = {"summary": summary, "sites": sites, "gates": gates, "classes": classes, "open_gates_histogram": histogram}
    return found | {"forced": None if forced is None else _forced_numbers(forced)}


def _forced_numbers(forced: Forced) -> dict[str, Any]:
    def effect(of: Effect) -> dict[str, Any]:
        told: dict[str, Any] = {}
        for name, value in (("closed", CLOSED), ("open", OPEN)):
            told[name] = _rounded(forced.overall(of.forced[value]))
            told[f"{name}_by_chance"] = _rounded(forced.overall(of.by_chance[value]))
            told[f"{name}_by_class"] = [_rounded(row) for row in of.forced[value]]
            told[f"{name}_by_class_by_chance"] = [_rounded(row) for row in of.by_chance[value]]
        return told

    exchanged = asdict(forced.exchanged)
    return {
        "images": forced.images,
        "accuracy": forced.accuracy,
        "accuracy_by_class": _rounded(forced.before),
        "sites": effect(forced.sites),
        "gates": {"gate": forced.gates.tolist(), **effect(forced.single)},
        "classes": {"class": forced.classes.tolist(), "gates_taken": forced.taken, **effect(forced.own)},
        "exchanged": dict(zip(exchanged, _rounded(list(exchanged.values())), strict=True)),
    }


def _rounded(values: Any) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 6) for value in np.asarray(values, dtype=float).tolist()]
