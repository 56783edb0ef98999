"""Evaluation: accuracy, and what the gates do, over a whole set."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gaternet.cost import CostModel, count_dense_macs
from gaternet.data import Preprocessing, ToInput
from gaternet.findings import gate_shares
from gaternet.loader import Batches, make_batches
from gaternet.machine import accelerate_restored, make_accelerator
from gaternet.method import GaterNet
from gaternet.modes import channels_last_, evaluation_mode
from gaternet.recipe import Runtime
from gaternet.trained import Trained, Which, as_trained

BATCH = 500  # images a step, over all processes together
_PIXELS = BATCH * 64**2  # of a step, in each process


def batch_size_for(preprocessing: Preprocessing, accelerator: Accelerator) -> int:
    """Images a step, over all processes together: `BATCH`, or as many as need no more memory than small ones do."""
    fit = max(1, _PIXELS // (preprocessing.height * preprocessing.width))
    return min(BATCH, fit * accelerator.num_processes)


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Batches,
    to_input: ToInput,
    accelerator: Accelerator,
    cost: CostModel | None = None,
) -> dict[str, Any]:
    """Evaluate a network in its evaluation mode; it is left as it was.

    Args:
        network: a GaterNet, or a plain network; not wrapped for several processes.
        batches: of all images, each in one process.
        to_input: images -> inputs of the network.
        accelerator: for mixed precision, and for summing up what several processes found.
        cost: of a GaterNet's backbone; then its mean MACs under each image's own gates are among the metrics.

    Returns:
        loss, accuracy and top5_accuracy in [0, 1], images; for a GaterNet also density (mean share of open gates),
        entropy (of each gate over the images, in bits, the mean over gates), the shares of gates that are always_on,
        always_off and dependent on the input, and site_density, one number a site; with `cost` also gated_macs.
    """
    num_gates = network.num_gates if isinstance(network, GaterNet) else 0
    # Loss, right, right among five, images, MACs as shares of the open backbone's: nothing waits for them
    sums = torch.zeros(5, device=accelerator.device)
    opened = torch.zeros(num_gates, device=accelerator.device)
    macs = torch.zeros((), device=accelerator.device)
    with evaluation_mode(network):
        for images, labels in batches.epoch():
            with accelerator.autocast():
                if isinstance(network, GaterNet):
                    logits, gates = network(to_input(images), return_gates=True)
                else:
                    logits, gates = network(to_input(images)), None
            if gates is not None:
                opened += gates.float().sum(0)
                macs = macs if cost is None else (cost(gates) / cost.dense).sum()
            logits = logits.float()
            ranks = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            count = torch.full_like(loss, len(labels))
            sums += torch.stack([loss, ranks[:, 0].sum(), ranks.any(1).sum(), count, macs.to(loss)])
    totals = accelerator.reduce(torch.cat([sums, opened]), "sum")
    assert isinstance(totals, Tensor)
    loss, right, right5, count, macs_share = totals[:5].tolist()
    if not count:
        raise ValueError("there are no images to evaluate on")
    metrics = {"loss": loss / count, "accuracy": right / count, "top5_accuracy": right5 / count, "images": int(count)}
    if isinstance(network, GaterNet):
        metrics |= gate_metrics(network, totals[5:].cpu().double() / count)
    if cost is not None:
        metrics["gated_macs"] = cost.dense * macs_share / count
    return metrics


def gate_metrics(network: GaterNet, rates: Float[Tensor, " gates"]) -> dict[str, Any]:
    """What the gates' opening rates over a set, each in [0, 1], say."""
    entropy = torch.special.entr(rates) + torch.special.entr(1 - rates)  # in nats
    return {
        **gate_shares(rates.numpy()),
        "entropy": entropy.mean().item() / math.log(2),
        "site_density": [round(rates[site.start : site.stop].mean().item(), 4) for site in network.sites],
    }


@accelerate_restored()
def evaluate_saved(
    path: str | Path,
    which: Which = "last",
    data: str | None = None,
    runtime: Runtime | None = None,
) -> dict[str, Any]:
    """Evaluate a run's model, or a saved one, on the test images of `data` or of the set it was trained on.

    A run is evaluated in the precision that it was trained in, if `runtime` does not name another.

    Returns:
        What `evaluate` gives, the number of parameters, the precision ("no": full), and MACs of one image:
        backbone_macs, and for a GaterNet gater_macs and gated_macs.

    Raises:
        ValueError: there is no such model or data, or the two do not go together.
    """
    model = Trained.open(path, which, data)
    network, preprocessing = model.network, model.preprocessing
    runtime = as_trained(model.path, runtime or Runtime())
    accelerator = make_accelerator(runtime)
    _, images = model.load_sets(runtime.data_root)
    batches = make_batches(images, batch_size_for(preprocessing, accelerator), runtime, accelerator)
    to_input = ToInput(preprocessing)
    example = to_input(images.take([0]))
    if isinstance(network, GaterNet):
        cost = CostModel.of(network, example)
        counts = {"backbone_macs": cost.dense, "gater_macs": count_dense_macs(network.gater, example)}
    else:
        cost, counts = None, {"backbone_macs": count_dense_macs(network, example)}
    parameters = sum(p.numel() for p in network.parameters())
    channels_last_(network.to(accelerator.device))
    metrics = evaluate(network, batches, to_input, accelerator, cost)
    if not math.isfinite(metrics["loss"]):
        raise ValueError(
            f"the model in {path} gives logits that are no finite numbers: its weights are damaged, or "
            f"{accelerator.mixed_precision} is too coarse for them (--precision no)"
        )
    return {**metrics, **counts, "parameters": parameters, "precision": accelerator.mixed_precision}
