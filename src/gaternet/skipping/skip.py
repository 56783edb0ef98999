"""`skip`: a GaterNet becomes a module with the same outputs that computes its open filters only."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gaternet.method import GaterNet
from gaternet.skipping.engine import SliceEngine
from gaternet.skipping.plan import Plan, plan_for

Engine = Literal["slice", "mask"]


class Skipper(nn.Module):
    """A GaterNet in evaluation mode that does not compute closed filters; made by `skip`.

    Attributes:
        model: the GaterNet. Its weights were copied when the plan was made: after a change, call `skip` again.
        plan: what is skipped and what is not; print it.
    """

    def __init__(self, model: GaterNet, plan: Plan, engine: Engine) -> None:
        super().__init__()
        self.model, self.plan, self.engine = model, plan, engine
        self._slices = SliceEngine(plan)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits (B, K), those of the model up to rounding."""
        return self.forward_gated(images, self.model.gates(images))

    @torch.no_grad()
    def forward_gated(
        self, images: Float[Tensor, "batch channels height width"], gates: Float[Tensor, "batch gates"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits (B, K) under given gates (B, C), each 0 or 1."""
        if gates.shape != (images.shape[0], self.model.num_gates):
            raise ValueError(
                f"gates must be ({images.shape[0]}, {self.model.num_gates}), a row per image and a column per gated "
                f"filter, but are {tuple(gates.shape)}"
            )
        if not ((gates == 0) | (gates == 1)).all():
            raise ValueError("gates must be 0 or 1 for filters to be skipped: use the model itself for others")
        if self.engine == "mask":
            return self.model.forward_gated(images, gates)
        if (gates == 1).all():
            return self.model.backbone(images)
        return torch.cat([self._slices(image[None], row) for image, row in zip(images, gates, strict=True)])


def skip(model: GaterNet, example_input: Tensor, engine: Engine = "slice") -> Skipper:
    """A module with the model's outputs that computes its open filters only.

    Args:
        model: a GaterNet; it is put in evaluation mode.
        example_input: images (B, channels, H, W) of the size that it is to run with.
        engine: "slice" gathers the open rows and columns of the weights, image by image; "mask" computes all filters.

    Raises:
        ValueError: the backbone cannot be exported.
    """
    model.eval()
    return Skipper(model, plan_for(model.backbone, model.sites, example_input), engine)
