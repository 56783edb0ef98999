"""The sections of docs/results.md on time: skipping, exported files, reports, training steps, startup."""

from typing import Any

from tables import RESULTS, error_of, machine_of, read_finetuned, table

from gaternet.files import read_json

# Batch and density -> the target for the time over that of the best dense engine
TARGETS = {(1, 1.0): 1.05, (1, 0.75): 0.95, (1, 0.5): 0.7, (1, 0.25): 0.45}
TARGETS |= {(16, 1.0): 1.05, (16, 0.75): 1.0, (16, 0.5): 0.75, (16, 0.25): 0.5}
GPU_PRECISIONS = ("bfloat16", "float32, convolutions in TF32")


def skipping() -> str:
    """What skipping saves on the clock."""
    path = RESULTS / "skipping.json"
    if not path.exists():
        return "Not measured.\n"
    found = read_json(path)
    rounds = found["rounds"]
    text = f"`{found['command']}`, {machine_of(found)}, {found['machine']['threads']} threads, float32. Medians of "
    text += f"{rounds} turns (one image at a time: {3 * rounds}) of all engines in one process. *x dense* is the time "
    text += "over that of the fastest dense engine within the same turn, its median over the turns.\n\n"
    text += "### ResNet-50, 224 pixels, all sites, random gates for each image\n\n"
    text += timing_table(found["resnet50"], TARGETS)
    planning = found["planning"]
    text += (
        f"\nPlanning takes {planning['plan_seconds']:.2f} s, loading a saved plan {planning['load_seconds']:.2f} s. "
    )
    share = (planning["weight_bytes"] + planning["arena_bytes"]) / planning["dense_bytes"]
    text += f"The engine holds {planning['weight_bytes'] / 2**20:.1f} MiB of weights and "
    text += f"{planning['arena_bytes'] / 2**20:.1f} MiB to work in, together {share:.2f} x the dense weights "
    text += (
        "(target: at most 1.3).\n\nNeighbours that share a gate: ResNet-50, batch 1, half of the gates open; beside it "
    )
    text += (
        "the error of CIFAR-10's ResNet-20, fine-tuned for two epochs to half of its filters. Its first stage has 16 "
    )
    text += "filters, so 16 is a whole layer there. *x dense* is over OpenVINO alone.\n\n"
    wanted = {"model": "resnet20", "half": "filters", "epochs": 2, "final_slope": 1}
    tuned = [line for line in read_finetuned() if wanted.items() <= line.items()]
    rows = []
    for size, timings in found["groups"].items():
        (row,) = [row for row in timings if row["name"] == "skipped"]
        lines = [line for line in tuned if line["group_size"] == int(size)]
        cells = [size, f"{row['macs'] / 1e6:,.0f}", f"{row['median']:.1f}", f"{row['over_dense']:.2f}"]
        rows.append([*cells, error_of(lines) if lines else "not measured"])
    text += table(["group_size", "MMACs", "ms", "x dense", "ResNet-20's error %"], rows)
    text += "\nWhere the time goes, one image at a time, as shares of the time under open gates: *alone* is a network "
    text += "of the open filters only, with no weights to be copied together. *Skipped* above *alone* is that copying; "
    text += "*alone* above *MACs* is what smaller convolutions and the dense residual stream lose.\n\n"
    columns = ("macs", "alone", "skipped")
    shares = [[f"{100 * row['density']:.0f} %", *(f"{row[name]:.2f}" for name in columns)] for row in found["bounds"]]
    text += table(["open", "MACs", "alone", "skipped"], shares)
    text += "\n### Other networks, one image of 224 pixels, all sites, random gates\n\n"
    text += other_networks(found["others"])
    for model in found.get("trained", []):
        images, right = model["images"], model["right"]
        text += f"\n### {model['model']} on {model['data']}, trained, under its own gates\n\n"
        kept = ", ".join(f"{100 * share:.0f}" for share in model["kept"])
        text += f"{100 * model['density']:.1f} % of the gates are open. Of {images:,} test images "
        ways = ("plain", "masked", "skipped", "specialised")
        text += ", ".join(f"{right[way]:,} ({100 * right[way] / images:.2f} %) are right {way}" for way in ways) + ". "
        text += f"{len(model['kept'])} subnetworks keep {kept} % of the "
        text += f"filters; for {100 * model['fitting']:.0f} % of the test images at least one of them keeps every open "
        text += f"filter.\n\n`{model['command']}` at commit {model['commit']}, {machine_of(model)}, medians of "
        other = "" if model["commit"] == found["commit"] else ", by earlier code than the tables above"
        other += _one_word(model)
        text += f"{model['rounds']} turns{other}:\n\n"
        text += timing_table(model["timings"], {})
    return text + "\n### On a GPU\n\n" + skipping_on_gpu()


def _one_word(found: dict[str, Any]) -> str:
    return " (`--trained` took one word with = in it there)" if "=" in found["command"] else ""


def other_networks(found: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each network: the fastest dense engine, and under open gates and fewer how long skipping takes."""
    rows = []
    for name, timings in found.items():
        dense = min((row for row in timings if row["name"].startswith("dense")), key=lambda row: row["median"])
        cells = [f"`{name}`", dense["name"].removeprefix("dense: "), f"{dense['median']:.1f}"]
        for row in sorted((row for row in timings if row["name"] == "skipped"), key=lambda row: -row["density"]):
            share = f"{row['macs'] / dense['macs']:.2f}, " if row["density"] < 1 else ""
            cells.append(f"{share}{row['over_dense']:.2f}")
        rows.append(cells)
    titles = ["network", "dense", "ms", "open: x dense", "half open: MACs, x dense", "a quarter: MACs, x dense"]
    return table(titles, rows)


def skipping_on_gpu() -> str:
    """What skipping saves on a GPU."""
    path = RESULTS / "skipping_gpu.json"
    if not path.exists():
        return "Not measured.\n"
    found = read_json(path)
    text = f"`{found['command']}` at commit {found['commit']}, {machine_of(found)}, {found['rounds']} turns, ResNet-50 "
    text += "at 224 pixels as above. Skipping includes the reading of the gates.\n"
    parts = {(part["precision"], part["timings"][0]["batch"]): part["timings"] for part in found["parts"]}
    for precision in GPU_PRECISIONS:
        for batch in (64, 1):
            text += f"\n#### {precision}, batch {batch}\n\n"
            text += timing_table(parts[precision, batch], {}) if (precision, batch) in parts else "Not measured.\n"
    return text


def timing_table(timings: list[dict[str, Any]], targets: dict[tuple[int, float], float]) -> str:
    """A row for each batch and engine."""
    rows = []
    for row in timings:
        density = row["density"]
        opened = "" if density is None else f"{100 * density:.0f} %"
        near = [t for (batch, d), t in targets.items() if batch == row["batch"] and abs(d - (density or 0)) < 0.02]
        target = f"{near[0]:.2f}" if near and row["name"] == "skipped" else ""
        cells = [row["name"], str(row["batch"]), opened, f"{row['macs'] / 1e6:,.1f}", f"{row['median']:.2f}"]
        cells += [f"{row['p10']:.2f} to {row['p90']:.2f}", f"{1000 * row['batch'] / row['median']:,.0f}"]
        rows.append([*cells, f"{row['over_dense']:.2f}", *([target] if targets else [])])
    titles = ["engine", "batch", "open", "MMACs an image", "ms", "p10 to p90", "images/s", "x dense"]
    return table([*titles, *(["target"] if targets else [])], rows)


def exported() -> str:
    """How fast exported models are, and what 8 bits change."""
    path = RESULTS / "export_speed.json"
    if not path.exists():
        return "Not measured.\n"
    found = read_json(path)
    titles = ["file", "batch", "open", "ms", "p10 to p90", "images/s", "x plain", "MB"]

    def rows(timings: list[dict[str, Any]]) -> list[list[str]]:
        made = []
        for row in timings:
            density = "" if row["density"] is None else f"{100 * row['density']:.0f} %"
            cells = [row["name"], str(row["batch"]), density, f"{row['median']:.2f}"]
            cells += [f"{row['p10']:.2f} to {row['p90']:.2f}", f"{1000 * row['batch'] / row['median']:,.0f}"]
            made.append([*cells, f"{row['over_plain']:.2f}", f"{row['bytes'] / 1e6:.1f}"])
        return made

    text = f"`{found['command']}` at commit {found['commit']}{_one_word(found)}, {machine_of(found)}, "
    text += "names of recipes as they were there; all in ONNX Runtime, gater included, medians of "
    text += f"{found['rounds']} turns; x plain: over the backbone's file without gates. [export.md](export.md) has "
    text += "which networks can be exported.\n\n### ResNet-50 at 224 pixels, gates at all sites, a fresh gater\n\n"
    text += table(titles, rows(found["resnet50"]))
    for name, each in found["trained"].items():
        text += f"\n### {name}, trained, under its own gates\n\n{table(titles, rows(each['timings']))}\n"
        effects = []
        for kind, effect in each["int8"].items():
            shares = (f"{100 * effect[key]:.2f} %" for key in ("accuracy", "int8_accuracy", "same_class"))
            effects.append([kind, f"{effect['images']:,}", *shares, f"{effect['flips']:.2f} of {effect['gates']:,}"])
        text += table(["file", "test images", "accuracy", "in 8 bits", "same class", "gates that flip"], effects)
    return text


def reports() -> str:
    """What an analysis takes, and its page."""
    path = RESULTS / "report.json"
    if not path.exists():
        return "Not measured.\n"
    found = read_json(path)
    seconds = found["seconds"]
    return (
        f"`{found['command']}` at commit {found['commit']}, {machine_of(found)}, medians of {found['rounds']} turns: "
        f"{found['images']:,} images, "
        f"{found['gates']:,} gates, {100 * found['dependent']:.0f} % of them dependent on the image.\n\n"
        f"`evaluate` takes {seconds['evaluate']:.0f} s, `analyze` {seconds['analyze']:.0f} s: {found['ratio']:.2f} "
        "times as long (target: below 1.2).\n"
        f"The page is written in {found['writing_seconds']:.0f} s, has {found['page_bytes'] / 1e6:.1f} MB (target: "
        f"below 15) and is drawn {found['opening_seconds']:.1f} s after it was asked for (target: below 3).\n"
    )


def speed() -> str:
    """The benchmarks' figures."""
    text = ""
    for title, name in (("Training", "training"), ("Training on a GPU", "training_gpu")):
        path = RESULTS / f"{name}.json"
        if path.exists():
            text += f"### {title}\n\n{training_speed(read_json(path))}\n"
    path = RESULTS / "startup.json"
    if path.exists():
        found = read_json(path)
        text += f"### Startup\n\n`{found['command']}` at commit {found['commit']}, {machine_of(found)}, "
        text += f"whole processes, medians of {found['runs']}:\n\n"
        text += table(["command", "seconds"], [[f"`{name}`", f"{s:.2f}"] for name, s in found["seconds"].items()])
    return text or "Not measured.\n"


def training_speed(found: dict[str, Any]) -> str:
    """Steps of the gated model, of its backbone and of its extractor."""
    rows = [
        [
            f"`{name}`" + {"compiled": ", compiled", "extractor": ", the gater's extractor"}.get(part, ""),
            f"{1e3 * found['seconds'][part]:{'.2f' if found['machine']['gpus'] else '.0f'}}",
            f"{found['images_per_second'][part]:.0f}",
            f"{100 * found['outside'][part]:.1f} %",
            f"{found['macs'][part] / 1e6:.1f}M",
        ]
        for part, name in found["models"].items()
    ]
    text = f"`{found['command']}` at commit {found['commit']}, {machine_of(found)}, {found['precision']} precision, "
    text += f"batch {found['batch']}, medians of {found['steps']} steps:\n\n"
    text += table(["model", "ms a step", "images/s", "outside of kernels", "MACs an image"], rows)
    text += f"\nGated over plain: {found['time_ratio']:.2f} in time, {found['mac_ratio']:.2f} in MACs, "
    text += f"quotient {found['time_ratio_over_mac_ratio']:.2f} (target: at most 1.10). Gates and bookkeeping, the "
    text += f"gated step over the sum of plain backbone and extractor: {found['overhead']:.3f}.\n"
    if "compiled" in found:
        text += f"Compiled, a gated step takes {found['compiled']:.2f} times as long, the median over turns.\n"
    if found["machine"]["gpus"]:
        text += "Outside of kernels it is at most that much: the profiler slows the processor, and not the GPU.\n"
    return text
