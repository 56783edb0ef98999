"""`skip`: a GaterNet becomes a module with the same outputs that computes its open filters only."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from gaternet.files import read_json, staged, write_json
from gaternet.graph import read_graph
from gaternet.method import GaterNet
from gaternet.modes import evaluation_mode, full_copy, without_autocast
from gaternet.skipping.engines import Backbone, KernelName, make_program, time_engines
from gaternet.skipping.native import NativeProgram
from gaternet.skipping.plan import Plan
from gaternet.skipping.planner import make_plan
from gaternet.skipping.program import Program
from gaternet.skipping.saved import load_plan, save_plan
from gaternet.skipping.specialise import Specialised, choose_kept
from gaternet.wrapping import require_gated, require_whole

Engine = Literal["auto", "slice", "specialise", "mask"]
_TRIED = 4  # images on which a plan is compared with its model


class Skipper(nn.Module):
    """A GaterNet in evaluation mode that does not compute closed filters; made by `skip`, or loaded.

    It stays on the device and in the precision that it was made for, and takes images of one size, any number of them.

    Attributes:
        plan: what of the backbone is skipped and what is not; print it.
        engine: what runs the backbone: "slice", "specialise" or "mask".
        program: what runs the backbone: a `Specialised` for "specialise", the model's `forward_gated` for "mask".
        gater: what gives the gates: a program that runs a plan, or a copy of the model's gater where no plan equals it.
        timings: where the engine was chosen by measurement, the median seconds of each for the example.
    """

    def __init__(
        self, plan: Plan, gater: Callable[[Tensor], Tensor], backbone: Backbone, engine: str, hard: bool
    ) -> None:
        super().__init__()
        self.plan, self.engine = plan, engine
        self._hard = hard  # whether the gater's gates are 0 or 1 however its weights are
        self.timings: Mapping[str, float] = {}
        self.gater, self.program = gater, backbone
        self.eval()

    def train(self, mode: bool = True) -> "Skipper":
        """It stays in evaluation mode, whatever it is a part of: a gater that learns makes noise."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "batch channels height width"], *, return_gates: bool = False
    ) -> Float[Tensor, "batch classes"] | tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch gates"]]:
        """Logits (B, K), those of the model up to rounding, and with `return_gates` also the gates (B, C).

        A gate whose logit is NaN is closed, so images that hold NaN may give logits that look ordinary.

        Raises:
            ValueError: a gater of yours gives soft gates; or images of another size, precision or device than planned
                for.
        """
        gates = self.gates(images)
        logits = self._run(images, gates, self._hard)
        return (logits, gates) if return_gates else logits

    @torch.no_grad()
    def gates(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch gates"]:
        """The gater alone: gates (B, C), each 0 or 1, but for a gater of yours with soft ones, which `forward` refuses.

        They are those of the model, but where a gate's logit lies within rounding (about 1e-6) of the threshold.
        """
        _refuse_tracing(images)
        self._check_images(images)
        with without_autocast(images.device.type):
            return self.gater(images) if len(images) else images.new_zeros(0, self.plan.num_gates)

    @torch.no_grad()
    def forward_gated(
        self, images: Float[Tensor, "batch channels height width"], gates: Float[Tensor, "batch gates"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits (B, K) under given gates (B, C), each 0 or 1.

        Raises:
            ValueError: gates of another shape or with other values, or images of another size than planned for.
        """
        _refuse_tracing(images)
        self._check_images(images)
        return self._run(images, gates, hard=False)

    def _run(self, images: Tensor, gates: Tensor, hard: bool) -> Tensor:
        if gates.shape != (images.shape[0], self.plan.num_gates):
            raise ValueError(
                f"gates must be ({images.shape[0]}, {self.plan.num_gates}), a row per image and a column per gate, "
                f"but are {tuple(gates.shape)}"
            )
        if gates.device != images.device:
            raise ValueError(f"gates must be on {images.device}, as the images are, but are on {gates.device}")
        if not hard and not ((gates == 0) | (gates == 1)).all():
            raise ValueError("gates must be 0 or 1 for filters to be skipped: use the model itself for others")
        with without_autocast(images.device.type):
            if len(images) == 0:
                return self.program(images.new_zeros(1, *self.plan.input_shape), gates.new_zeros(1, gates.shape[1]))[:0]
            return self.program(images, gates)

    def save(self, directory: str | Path) -> None:
        """Write the plans of the gater and the backbone with their weights, for `Skipper.load`.

        Raises:
            ValueError: the engine is "mask", or a part cannot be saved.
            OSError: the files cannot be written; the folder is as it was.
        """
        gater, backbone = self.gater, self.program
        config: dict[str, Any] = {"engine": self.engine, "hard": self._hard}
        if isinstance(backbone, Specialised):
            config["kept"] = [kept.nonzero()[:, 0].tolist() for kept in backbone.kept]
            backbone = backbone.fallback
        if not isinstance(gater, Program | NativeProgram) or not isinstance(backbone, Program | NativeProgram):
            what = "the engine mask runs the model itself" if self.engine == "mask" else "its gater cannot be exported"
            raise ValueError(f"this Skipper cannot be saved, for {what}: save the model with save_pretrained")
        with staged(Path(directory)) as staging:
            save_plan(gater.whole_plan(), staging / "gater.safetensors")
            save_plan(backbone.whole_plan(), staging / "backbone.safetensors")
            write_json(staging / "config.json", config)

    @classmethod
    def load(cls, directory: str | Path, kernels: KernelName = "auto", device: str | torch.device = "cpu") -> "Skipper":
        """The Skipper that `save` wrote; neither the model nor its code is needed, and nothing is planned anew.

        Args:
            directory: where it is.
            kernels: as in `skip`.
            device: where it is to run, "cuda" say.

        Raises:
            OSError: there are no such files.
            ValueError: they are something else.
            NativeUnavailableError: as in `skip`.
        """
        root = Path(directory)
        config = read_json(root / "config.json")
        gater, plan = (load_plan(root / f"{name}.safetensors", device) for name in ("gater", "backbone"))
        if gater.shapes.get(gater.output) != (plan.num_gates,) or gater.input_shape != plan.input_shape:
            raise ValueError(f"{root} holds a gater for another backbone: save both anew with skip(...).save")
        if "kept" in config:
            numbers = config["kept"]
            known = isinstance(numbers, list) and all(isinstance(gates, list) for gates in numbers)
            every = [gate for gates in numbers for gate in gates] if known else [-1]
            if not all(type(gate) is int and 0 <= gate < plan.num_gates for gate in every):
                raise ValueError(f"{root} keeps gates that there are not: save it anew with skip(...).save")
            kept = [torch.isin(torch.arange(plan.num_gates), torch.tensor(gates)) for gates in numbers]
            backbone = Specialised(plan, kept, kernels)
        else:
            backbone = make_program(plan, kernels)
        return cls(
            backbone.plan, make_program(gater, kernels), backbone, str(config.get("engine")), config.get("hard") is True
        )

    def _check_images(self, images: Tensor) -> None:
        if images.shape[1:] != self.plan.input_shape:
            raise ValueError(
                f"images must be (B, {', '.join(map(str, self.plan.input_shape))}), as the example that was planned "
                f"for, but are {tuple(images.shape)}: call skip again with one of their size"
            )
        if images.dtype != self.plan.dtype or images.device != self.plan.device:
            raise ValueError(
                f"images must be {self.plan.dtype} on {self.plan.device}, as the weights are, but are "
                f"{images.dtype} on {images.device}"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> "Skipper":
        here = torch.empty(0, dtype=self.plan.dtype, device=self.plan.device)
        moved = fn(here)
        if (moved.dtype, moved.device) == (here.dtype, here.device):  # Accelerate, say, moves all to where they are
            return self
        raise RuntimeError("a Skipper stays where it was made: move the model, and call skip again")


def _refuse_tracing(images: Tensor) -> None:
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if tracing or torch.compiler.is_exporting() or isinstance(images, FakeTensor):
        raise ValueError(
            "a Skipper's code cannot be traced: export its model by gaternet.export_onnx, with form='skipping'"
        )


def skip(
    model: GaterNet,
    example_input: Tensor,
    engine: Engine = "auto",
    *,
    calibration: Float[Tensor, "images gates"] | None = None,
    subnetworks: int = 4,
    kernels: KernelName = "auto",
) -> Skipper:
    """A module with the model's outputs that computes its open filters only.

    `Skipper.plan` says what is computed. On GPUs, and without a compiler, convolutions in groups are computed whole,
    unless they are depthwise.

    Args:
        model: a GaterNet, in any mode. The Skipper has a copy, in evaluation mode: after a change, call `skip` again.
        example_input: images (B, channels, H, W) of the size it will run with; for "auto" also typical and as many.
        engine: "slice" gathers the open rows and columns of the weights, image by image; "specialise" makes smaller
            dense networks for the gates in `calibration`, and slices where none of them fits; "mask" is the model
            itself, which computes all filters. "auto" takes the fastest for the example under the model's own gates, of
            "slice", "mask" and, where there is a calibration, "specialise".
        calibration: gates that images really have, such as those of the training images, each 0 or 1.
        subnetworks: how many "specialise" makes at most; each holds the weights that it keeps.
        kernels: what "slice" and "specialise" compute with: "native", compiled C++ for float32 on CPUs; "triton" for
            CUDA; "torch", on any device, slowly. "auto" takes the fast ones where they run, and warns where they should
            and do not.

    Raises:
        ValueError: the backbone cannot be exported, or gives other than one tensor (B, ...), or lets images change each
            other's results, or computes something else than its plan, which is tried; or "specialise" has no
            calibration, or one of another shape or with other numbers; or the model cannot be copied, or does more than
            run its backbone under its gates. A gater that has no plan, or differs from it, runs as it is.
        TypeError: the model is no GaterNet.
        NativeUnavailableError: `kernels` is "native", and there is no C++ compiler, or it is not for these weights.
    """
    model = require_gated(model)
    if engine not in get_args(Engine):
        raise ValueError(f"there is no engine {engine!r}: choose of {', '.join(get_args(Engine))}")
    if engine == "specialise" and calibration is None:
        raise ValueError("specialise needs gates to fit: pass calibration=model.gates(images) of many images")
    if calibration is not None and (calibration.shape[1:] != (model.num_gates,) or not len(calibration)):
        raise ValueError(
            f"calibration must be gates (images, {model.num_gates}) of at least one image, but is "
            f"{tuple(calibration.shape)}: pass model.gates(images)"
        )
    if calibration is not None and not ((calibration == 0) | (calibration == 1)).all():
        raise ValueError("calibration must be gates that are 0 or 1: pass model.gates(images) in evaluation mode")
    if subnetworks < 1:
        raise ValueError(f"subnetworks must be at least 1, not {subnetworks}")
    with evaluation_mode(model):
        plan = make_plan(read_graph(model.backbone, example_input[:1]), model.sites)
        require_whole(model, example_input)
        hard = model.plain_gater is not None  # others may be soft
        if engine == "mask":
            own: Any = full_copy(model)
            return Skipper(plan, own.gates, own.forward_gated, engine, hard)
        gater = _plan_gater(model, example_input, kernels)
        engines: dict[str, Backbone] = {}
        if calibration is not None and engine != "slice":
            specialised = Specialised(plan, choose_kept(calibration, subnetworks), kernels)
            sliced, engines["specialise"] = specialised.fallback, specialised
            for program, kept in zip(specialised.subnetworks, specialised.kept, strict=True):
                _try(program, model, example_input, kept)
        else:
            sliced = make_program(plan, kernels)
        engines["slice"] = sliced
        _try(sliced, model, example_input)
        if engine != "auto":
            return Skipper(sliced.plan, gater, engines[engine], engine, hard)
        engines["mask"] = model.forward_gated
        with torch.no_grad(), without_autocast(example_input.device.type):  # as they will run
            timings = time_engines(engines, example_input, gater(example_input))
        best = min(timings, key=timings.__getitem__)
        if best == "mask":
            own = full_copy(model)
            engines["mask"] = own.forward_gated
        skipper = Skipper(sliced.plan, gater, engines[best], best, hard)
        skipper.timings = timings
        return skipper


@torch.no_grad()
def _plan_gater(model: GaterNet, example_input: Tensor, kernels: KernelName) -> Callable[[Tensor], Tensor]:
    """Images -> the model's gates: by a plan, or by what the model has where that has no plan, or one that differs."""
    images = _random_images(2 * _TRIED, example_input)
    with suppress(RuntimeError, ValueError), without_autocast(images.device.type):  # there may be no plan, or no gates
        program = make_program(make_plan(read_graph(model.gater, example_input[:1])), kernels)
        found, wanted = _outputs(program, images), _outputs(model.gates, images)
        differs = (found - wanted).abs() > _tolerance(images)
        if (gater := model.plain_gater) is not None:  # rounding may put logits on either side of the threshold
            margins = (_outputs(gater.logits, images) - gater.threshold).abs()
            differs &= ~(margins <= _tolerance(images) * margins[margins.isfinite()].median())
        if found.shape == wanted.shape and not differs.any():
            return program
    own: Any = full_copy(model.gater if type(model).gates is GaterNet.gates else model)
    return own if type(model).gates is GaterNet.gates else own.gates


@torch.no_grad()
def _try(program: Backbone, model: GaterNet, example_input: Tensor, kept: Tensor | None = None) -> None:
    """Compare a program with the model, on random images under random gates; ValueError where they differ.

    Gates that are not in `kept` (C,) are closed, for a subnetwork.

    A plan knows what a run of one image without gates shows. Code that decides by the number of images, and hooks that
    act behind the gates, are not seen there.
    """
    images = _random_images(_TRIED, example_input)
    drawn = torch.rand(_TRIED // 2, model.num_gates, generator=torch.Generator().manual_seed(1), device="cpu") < 0.5
    gates = torch.cat([drawn, ~drawn]).to(example_input)  # each is open for some image, and closed for another
    if kept is not None:
        gates *= kept.to(gates)
    with without_autocast(images.device.type):
        expected, found = _outputs(model.forward_gated, images, gates), _outputs(program, images, gates)
    tolerance = _tolerance(images)
    scale = expected.nan_to_num(0, 0, 0).abs().max().item()
    if found.shape != expected.shape or not torch.allclose(found, expected, tolerance, tolerance * scale, True):
        raise ValueError(
            "the backbone computes something else than its plan: it may decide something by the number of images, "
            "exchange them, or have a hook behind its gates; use the model itself, engine='mask'"
        )


def _outputs(run: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """What a function gives for batches; image by image where it takes single ones alone, or not so many."""
    try:
        return run(*batches).double()
    except (RuntimeError, ValueError):
        singles = zip(*(batch.split(1) for batch in batches), strict=True)
        return torch.cat([run(*single).double() for single in singles])


def _random_images(count: int, example_input: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *example_input.shape[1:], generator=generator, device="cpu").to(example_input)


def _tolerance(images: Tensor) -> float:
    """Relative, and far above rounding."""
    return 0.02 if images.dtype in (torch.float32, torch.float64) else 0.2
