"""Exporting a run's model with what was saved beside it, compared on its own test images."""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from gaternet.data import DataError, ImageSet
from gaternet.export import compare_int8, export_onnx, export_pt2, quantize_onnx
from gaternet.export.source import Form
from gaternet.method import GaterNet
from gaternet.trained import Trained, Which

FileFormat = Literal["onnx", "pt2"]
Int8 = Literal["backbone", "all"]
_HELD_OUT, _CALIBRATION, _BATCH = 64, 512, 64


def export_saved(
    path: Path,
    which: Which = "last",
    out: Path | None = None,
    *,
    file_format: FileFormat | None = None,
    form: Form = "masked",
    gates: bool = True,
    dynamic_size: bool = False,
    int8: Int8 | None = None,
    data: str | None = None,
    data_root: str | None = None,
    images: int = 2000,
) -> dict[str, Any]:
    """Write the model of a run, or a saved one, to a file that takes pixels and normalises them itself.

    Args:
        path, which: the model.
        out: the file; default: beside the model, "model.onnx" and the like; of a run's best one "model-best.onnx".
        file_format: ONNX, or a program of `torch.export`; default: what the file's name says, or else ONNX.
        form, gates, dynamic_size: see `export_onnx`; a plain network has no gates.
        int8: what to quantise, "backbone" or "all"; the gater stays exact with "backbone". Needs the data.
        data, data_root: images to compare on, and to calibrate with; default: the set it was trained on. Where there
            are none, the comparison takes noise.
        images: test images on which to measure what "int8" changes.

    Returns:
        "file"; "outputs", their names; "compared", the fields of `Parity`; "on", "test images" or "images of noise";
        with `int8` also "int8", the fields of `Int8Effect`.

    Raises:
        ValueError: options do not go together, or there is no such model or no data.
        ExportError: the model cannot be exported, or the file is not equal to it.
        OSError: the file cannot be written.
    """
    file_format = _file_format(out, file_format)
    if int8 and (file_format != "onnx" or form != "masked"):
        raise ValueError("int8 is for ONNX files of the masked form: leave the other format or form out")
    if file_format == "pt2" and form != "masked":
        raise ValueError("the skipping form is for ONNX files: leave the other format out")
    trained = Trained.open(path, which, data)
    model, preprocessing = trained.network, trained.preprocessing
    sets: tuple[ImageSet, ImageSet] | None = None
    try:
        sets = trained.load_sets(data_root) if trained.source else None
    except DataError:
        if data or int8:
            raise
    if int8 and sets is None:
        raise ValueError(f"{path} does not say what it was trained on: name images to calibrate with, --data")
    example = torch.zeros(1, preprocessing.channels, preprocessing.height, preprocessing.width, dtype=torch.uint8)
    held_out = None if sets is None else sets[1].take(_spread(sets[1], _HELD_OUT))
    if out is None:
        parts = {"best": which == "best", "skipping": form == "skipping", "int8": int8 is not None}
        name = "-".join(["model", *(part for part, named in parts.items() if named)])
        out = path / f"{name}.{file_format}"
    gates = gates and isinstance(model, GaterNet)
    options: dict[str, Any] = {"gates": gates, "dynamic_size": dynamic_size, "metadata": trained.metadata}
    options["held_out"] = held_out
    report: dict[str, Any] = {"file": str(out), "outputs": ["logits", *(["gates"] if gates else [])]}
    report["on"] = "images of noise" if held_out is None else "test images"
    if file_format == "pt2":
        return report | {"compared": asdict(export_pt2(model, example, out, **options))}
    if int8 is None or sets is None:
        return report | {"compared": asdict(export_onnx(model, example, out, form=form, **options))}
    train, test = sets
    with tempfile.TemporaryDirectory() as directory:
        exact = Path(directory) / "model.onnx"
        report["compared"] = asdict(export_onnx(model, example, exact, **options))
        calibration = [train.take(part) for part in _parts(_spread(train, _CALIBRATION))]
        quantize_onnx(exact, out, calibration, gater=int8 == "all")
        batches = ((test.take(part), torch.from_numpy(test.labels[part])) for part in _parts(_spread(test, images)))
        return report | {"int8": asdict(compare_int8(exact, out, batches))}


def _file_format(out: Path | None, wanted: FileFormat | None) -> FileFormat:
    suffix = "" if out is None else out.suffix.removeprefix(".").lower()
    named: FileFormat | None = next((kind for kind in get_args(FileFormat) if kind == suffix), None)
    if suffix and named is None:
        raise ValueError(f"{out} is neither .onnx nor .pt2: name such a file")
    if wanted and named and wanted != named:
        assert out is not None
        raise ValueError(f"{out} is to be a file of {wanted}: name it {out.with_suffix('.' + wanted)}")
    return wanted or named or "onnx"


def _spread(images: ImageSet, count: int) -> list[int]:
    """Which images to take: at equal distances over all of the set, for those of a folder are sorted by class."""
    count = min(count, len(images))
    return [number * len(images) // count for number in range(count)]


def _parts(indices: list[int]) -> Iterator[list[int]]:
    return (indices[start : start + _BATCH] for start in range(0, len(indices), _BATCH))
