"""What was trained, for those who use it: a run's model or a saved one, its data, and the precision that it had."""

import dataclasses
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torchvision import datasets

from gaternet import checkpoint, files
from gaternet.data import DataError, ImageSet, Preprocessing, classes_of, load_data
from gaternet.errors import some
from gaternet.method import GaterNet
from gaternet.recipe import Runtime, data_name
from gaternet.run import CONFIG

Network = TypeVar("Network", bound=nn.Module, covariant=True)
Which = Literal["last", "best"]  # model of a run: of the last epoch, or of the one with the highest test accuracy
_NAMES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "fashion_mnist": tuple(datasets.FashionMNIST.classes),
}


def find_model(path: str | Path, which: Which = "last") -> Path:
    """The folder of the saved model that `path` means: a saved model itself, or a run's `last` or `best`.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no run or saved model {path}: gaternet train makes runs, by default under runs/")
    if (path / checkpoint.WEIGHTS).is_file():
        if which != "last":
            raise ValueError(f"{path} is one saved model, not a run with a {which} one: name the run")
        return path
    if (path / which / checkpoint.WEIGHTS).is_file():
        return path / which
    if (path / CONFIG).exists():
        command = f"gaternet train --resume --out {shlex.quote(str(path))}"
        raise ValueError(f"the run {path} has no finished epoch yet: continue it with {command}")
    raise ValueError(f"{path} is neither a run nor a saved model: name a folder that gaternet train made")


@dataclass(frozen=True)
class Trained(Generic[Network]):
    """A run's model or a saved one, and the images that go with it.

    Attributes:
        path: the run, or the saved model.
        network: in evaluation mode and in float32, as its inputs are, in whatever precision it was saved.
        metadata: what was saved with it.
        source: the data that it was trained on, of a run where they lay when it went on last, or others in their place;
            None if that is not known.
    """

    path: Path
    network: Network
    metadata: dict[str, Any]
    source: str | None

    @staticmethod
    def open(path: str | Path, which: Which = "last", data: str | None = None) -> "Trained[nn.Module]":
        """The model that `path` means, see `find_model`, with `data` in place of what it was trained on."""
        network, metadata = checkpoint.load_model(find_model(path, which))
        trained = _run_config(Path(path)).get("recipe") or metadata.get("trained") or {}
        return Trained(Path(path), network.float(), metadata, data or trained.get("data"))

    @staticmethod
    def open_gated(path: str | Path, which: Which = "last", data: str | None = None) -> "Trained[GaterNet]":
        """`open` of a gated network; ValueError for a plain one."""
        model = Trained.open(path, which, data)
        if not isinstance(model.network, GaterNet):
            raise ValueError(f"{path} is a plain network without gates: name a gated run")
        return Trained(model.path, model.network, model.metadata, model.source)

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes its input; DataError if its metadata do not say."""
        return Preprocessing.from_metadata(self.metadata)

    @property
    def classes(self) -> list[str]:
        """Names of its classes; DataError if its metadata have none."""
        return class_names(self.source or "", classes_of(self.metadata))

    def named_source(self) -> str:
        """`source`; ValueError if it is not known."""
        if self.source is None:
            raise ValueError(f"{self.path} does not say what it was trained on: name the data with --data")
        return self.source

    def load_sets(self, root: str | None = None) -> tuple[ImageSet, ImageSet]:
        """Training and test images of `source`, without augmentation, as the model knows them.

        They have the sizes, channels and class numbers that it was trained on. `root` is where torchvision's sets lie.

        Raises:
            DataError: there are none, or they do not go with the model.
            ValueError: it is not known which.
        """
        source, preprocessing = self.named_source(), self.preprocessing
        square = preprocessing.height == preprocessing.width
        data = load_data(source, image_size=preprocessing.height if square else None, root=root)
        if data.preprocessing.channels != preprocessing.channels:
            has, wants = data.preprocessing.channels, preprocessing.channels
            raise DataError(
                f"{source} has images of {has} channels, but the model was trained on {wants}: use its own data"
            )
        size, wanted = ((p.height, p.width) for p in (data.preprocessing, preprocessing))
        if isinstance(data.test.images, Tensor) and size != wanted:
            raise DataError(
                f"{source} has images of {size[0]} x {size[1]} pixels, but the model was trained on {wanted[0]} x "
                f"{wanted[1]}: use its own data"
            )
        if not match_classes(source, data.classes, self.metadata):
            known = some(classes_of(self.metadata))
            raise DataError(f"{source} has {len(data.classes)} classes, not those that the model knows: {known}")
        for images in (data.train, data.test):
            if not isinstance(images.images, Tensor):
                images.transform = preprocessing.fit
        return data.train, data.test


def as_trained(path: Path, runtime: Runtime) -> Runtime:
    """`runtime`, with the precision in which the run in `path` ended where it is "auto", and that can be had here."""
    config = _run_config(path)
    precision = {**config, **(config.get("resumed") or [{}])[-1]}.get("precision")
    possible = precision in ("no", "bf16") or (precision == "fp16" and torch.cuda.is_available() and not runtime.cpu)
    return dataclasses.replace(runtime, precision=precision) if runtime.precision == "auto" and possible else runtime


def _run_config(path: Path) -> dict[str, Any]:
    """The config of the run that `path` is, or whose last or best model it is; {} where there is none."""
    folders = [path, path.resolve().parent] if path.resolve().name in get_args(Which) else [path]
    found = [files.read_json(folder / CONFIG) for folder in folders if (folder / CONFIG).is_file()]
    return next((config for config in found if "recipe" in config), {})


def match_classes(source: str, classes: Sequence[str], metadata: Mapping[str, Any]) -> bool:
    """Whether the classes of the images in `source` may be those that the model of `metadata` knows.

    A .npz file does not name them, so "0", "1", ... stand for any others, in their order; a warning says for which.
    """
    known, numbers = classes_of(metadata), [str(label) for label in range(len(classes))]
    if list(classes) != known and (len(classes) != len(known) or numbers not in (list(classes), known)):
        return False
    names = class_names(source, classes)
    known = class_names((metadata.get("trained") or {}).get("data") or "", known)
    if names != known:
        pairs = some([f"{name} is {other}" for name, other in zip(names, known, strict=True)])
        warnings.warn(f"classes of {source} are taken to be the model's in their order: {pairs}", stacklevel=2)
    return True


def class_names(source: str, classes: Sequence[str]) -> list[str]:
    """The classes' names; a file's have none, but it may be called after a set whose classes are known."""
    known = _NAMES.get(data_name(source), ())
    return list(
        known if len(known) == len(classes) and list(classes) == list(map(str, range(len(classes)))) else classes
    )
