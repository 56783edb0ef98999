"""Gate every family of CNNs of timm and torchvision, check what gating promises, and write docs/coverage.md.

python benchmarks/families.py             # check all, minutes; then write docs/results/coverage.json and the page
python benchmarks/families.py NAME...     # check these alone, and bring their rows up to date
python benchmarks/families.py --choose    # choose the models anew: the smallest of each family of timm, minutes

A family is a module of timm. Of each, the smallest model is taken that has at least 10 convolutions, which hold at
least 40 % of its parameters; of torchvision, every classification network of which this is true, or that has no
attention.
"""

import argparse
import copy
import json
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from tables import DOCS, RESULTS
from torch import Tensor, nn

import gaternet
from gaternet.channels import ALIVE
from gaternet.cost import CostModel
from gaternet.graph import read_graph
from gaternet.method import Gater, GaterNet
from gaternet.models.create import create_backbone
from gaternet.sites import examine
from gaternet.skipping.skip import Engine

MODELS, PAGE = RESULTS / "coverage.json", DOCS / "coverage.md"


def choose() -> list[str]:
    """The smallest model of each family that has enough convolutions."""
    import timm
    from torchvision import models

    names = {}
    for module in timm.list_modules():
        names[module] = [f"timm:{name}" for name in timm.list_models(module=module) if not name.startswith("test_")]
    for name in models.list_models(models):
        names[f"torchvision:{name}"] = [f"torchvision:{name}"]
    chosen = []
    for family in names.values():
        sizes = []
        for name in family:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    with torch.device("meta"):
                        network = create_backbone(name, 1000)
                except NotImplementedError:  # its initialisation wants real numbers
                    network = create_backbone(name, 1000)
            convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
            total = sum(p.numel() for p in network.parameters())
            held = sum(p.numel() for conv in convs for p in conv.parameters())
            enough = len(convs) >= 10 and held >= 0.4 * total
            attention = any("attention" in type(module).__name__.lower() for module in network.modules())
            if enough or (name.startswith("torchvision:") and convs and not attention):
                sizes.append((total, name))
        chosen += [min(sizes)[1]] if sizes else []
    return chosen


def example_for(network: nn.Module) -> Tensor:
    """Two small images that the network takes."""
    config = getattr(network, "pretrained_cfg", None) or {}
    default = (config.get("input_size") or (3, 224, 224))[-1]
    sizes = [default] if config.get("fixed_input_size") else [64, 96, 128, default]
    for size in sizes:
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                network(images)
        except (RuntimeError, ValueError, AssertionError):  # too small for it
            continue
        return images
    raise RuntimeError(f"{type(network).__name__} takes none of the sizes {sizes}")


def check(name: str) -> dict[str, Any]:
    """Gate a model both ways and check every promise; its row of the table."""
    began = time.perf_counter()
    torch.manual_seed(0)
    backbone = create_backbone(name, 10).eval()
    unsettle_(backbone)
    images = example_for(backbone)
    graph = read_graph(backbone, images)
    row: dict[str, Any] = {"model": name, "pixels": images.shape[-1]}
    for selection in ("residual", "all"):
        try:
            report = examine(graph, selection)
        except ValueError:  # residual units, but none that can be gated
            assert selection == "residual"
            row[selection] = {"gates": 0, "roles": {}, "gateable": 0.0}
            continue
        model = small_gater_net(backbone, report.sites)
        check_gates(model, images, report.left_out)
        cost = CostModel(graph, report.sites)
        check_dead_channels(model, cost, images)
        row[selection] = {
            "gates": model.num_gates,
            "roles": Counter(site.role for site in report.sites),
            "gateable": cost.gateable(),
        }
        if selection == "all":
            row["left_out"] = Counter(report.left_out.values())
            row["macs"] = cost.dense
            check_copies(model, name, images)
            check_skipping(model, images)
        model.ungate()
    row["seconds"] = time.perf_counter() - began
    return row


def unsettle_(network: nn.Module) -> None:
    """Random BatchNorms and biases, and no zero scales: fresh ones hide what a wrong gate would change."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, mean in ((module.weight, 1.0), (module.bias, 0.0), (module.running_mean, 0.0)):
                if tensor is not None:
                    nn.init.normal_(tensor, mean, 0.2, generator=generator)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, 0.0, 0.2, generator=generator)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, 0.0, 0.2, generator=generator)


def small_gater_net(backbone: nn.Module, sites: Any) -> GaterNet:
    """The backbone under a tiny gater: what is checked does not depend on the gater."""
    extractor = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    gater = Gater(extractor, 48, max(site.stop for site in sites), batch_norm=False)
    return GaterNet(backbone, gater, sites).eval()


def check_gates(model: GaterNet, images: Tensor, left_out: dict[str, str]) -> None:
    """Open gates change nothing, closed ones leave zeros and need no filter, and gradients reach the gater."""
    backbone = model.backbone
    convs = {name for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d)}
    assert {site.conv for site in model.sites} <= convs
    assert not {site.conv for site in model.sites} & left_out.keys()
    with torch.no_grad():
        plain = backbone(images)
        assert torch.equal(model.forward_gated(images, torch.ones(2, model.num_gates)), plain), "open gates change it"
        gates = torch.randint(2, (1, model.num_gates), generator=torch.Generator().manual_seed(2)).float().expand(2, -1)
        outputs: dict[str, Tensor] = {}

        def keep(module: nn.Module, args: Any, output: Tensor, name: str) -> None:
            outputs[name] = output.clone()

        places = [(backbone.get_submodule(site.name), site.name) for site in model.sites]
        handles = [module.register_forward_hook(partial(keep, name=site)) for module, site in places]
        gated = model.forward_gated(images, gates)
        for handle in handles:
            handle.remove()
        for site in model.sites:
            assert not outputs[site.name][gates[:, site.start : site.stop] == 0].any(), f"{site.name} leaks"
        assert not torch.equal(gated, plain), "gates change nothing"
        assert torch.equal(without_closed_filters(model, images, gates), gated), "a closed filter still matters"
    model.gater.train()
    nn.functional.cross_entropy(model(images), torch.tensor([1, 2])).backward()
    for name, parameter in model.gater.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    model.zero_grad()
    model.eval()


def without_closed_filters(model: GaterNet, images: Tensor, gates: Tensor) -> Tensor:
    """The logits, with noise in the weights of all closed filters: they must not matter."""
    model = copy.deepcopy(model)
    for site in model.sites:
        conv = model.backbone.get_submodule(site.conv)
        closed = gates[0, site.start : site.stop] == 0
        for parameter in conv.parameters(recurse=False):
            if parameter.ndim and len(parameter) == len(closed):
                parameter[closed] = torch.randn_like(parameter[closed])
    return model.forward_gated(images, gates)


@torch.no_grad()
def check_dead_channels(model: GaterNet, cost: CostModel, images: Tensor) -> None:
    """Channels that the cost model says are dead are zeros where convolutions read them."""
    gates = torch.randint(2, (2, model.num_gates), generator=torch.Generator().manual_seed(3)).float()
    runs = Counter(entry.conv.name for entry in cost.convs)
    reads = {entry.conv.name: entry.reads for entry in cost.convs if runs[entry.conv.name] == 1 and entry.conv.name}
    reads = {name: columns for name, columns in reads.items() if (columns != ALIVE).any()}
    handles = []
    for name, columns in reads.items():

        def look(module: nn.Module, args: tuple[Tensor], name: str = name, columns: Tensor = columns) -> None:
            dead = (columns != ALIVE) & (gates[:, columns] == 0)
            assert not args[0][dead].any(), f"{name} reads what is said to be dead"

        handles.append(model.backbone.get_submodule(name).register_forward_pre_hook(look))
    model.forward_gated(images, gates)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def check_skipping(model: GaterNet, images: Tensor) -> None:
    """Both engines give what masking gives, for one image and three: slice under gates at random and with all, one or
    none open, specialise under those at random.

    Within 1e-4 of the largest logit, or four times masking's own rounding, which is more where attention follows.
    """
    images = torch.cat([images, images[:1].flip(3)])
    drawn = torch.randint(2, (3, model.num_gates), generator=torch.Generator().manual_seed(4)).float()
    extreme = torch.zeros(3, model.num_gates)
    extreme[0], extreme[1, model.num_gates // 2] = 1, 1
    exact = copy.deepcopy(model).double()
    wanted: list[tuple[Tensor, tuple[Engine, ...], Tensor, Tensor]] = []
    tried: list[tuple[Tensor, tuple[Engine, ...]]] = [(drawn, ("slice", "specialise")), (extreme, ("slice",))]
    for gates, engines in tried:
        expected = model.forward_gated(images, gates)
        rounding = (expected - exact.forward_gated(images.double(), gates.double())).abs().max()
        wanted.append((gates, engines, expected, max(1e-4 * expected.abs().max(), 4 * rounding)))
    del exact  # the largest network has gigabytes of weights, and engines have their own
    for gates, engines, expected, allowed in wanted:
        for engine in engines:
            fast = gaternet.skip(model, images, engine, calibration=gates, subnetworks=2)
            for count in (1, 3):
                difference = (fast.forward_gated(images[:count], gates[:count]) - expected[:count]).abs().max()
                assert difference <= allowed, f"{engine} of {count} differs by {difference}, over {allowed}"
            del fast  # before the next one is made


@torch.no_grad()
def check_copies(model: GaterNet, name: str, images: Tensor) -> None:
    """A deep copy, and a fresh model with the state_dict, compute the same."""
    expected = model(images)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    fresh = small_gater_net(create_backbone(name, 10), model.sites)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images), expected)


def table(rows: list[dict[str, Any]]) -> str:
    """The page's rows."""
    text = "| model | pixels | MMACs | gates: residual | gateable | gates: all | gateable | sites by role (all) |"
    text += " left out |\n|---|---:|---:|---:|---:|---:|---:|---|---|\n"
    for row in rows:
        roles = ", ".join(f"{count} {role}" for role, count in sorted(row["all"]["roles"].items()))
        left = "; ".join(f"{count}: {reason}" for reason, count in row["left_out"].items())
        cells = [f"`{row['model']}`", row["pixels"], f"{row['macs'] / 1e6:,.0f}"]
        for selection in ("residual", "all"):
            cells += [f"{row[selection]['gates']:,}", f"{100 * row[selection]['gateable']:.0f} %"]
        text += "| " + " | ".join(map(str, [*cells, roles, left])) + " |\n"
    return text


def page(rows: list[dict[str, Any]]) -> str:
    """docs/coverage.md."""
    return (
        "# Coverage\n\n"
        f"{len(rows)} networks, gated in one call and checked by `python benchmarks/families.py` with gaternet "
        f"{gaternet.__version__}, torch {torch.__version__}. Images are small, so that the sweep is fast: MACs are for "
        "that size.\n\n" + " ".join(str(__doc__).split("\n\n")[-1].split()) + "\n\n"
        "Checked for each: with all gates open the output is the plain network's bit for bit; closed gates leave exact "
        "zeros at every site; noise in the weights of closed filters changes no bit; channels that are said to be dead "
        "are zeros where convolutions read them; a gradient reaches every parameter of the gater; a deep copy, and a "
        "fresh model with the `state_dict`, compute the same; `gaternet.skip`, for one image and for three, with the "
        "engine slice under random gates and with all, one or none open, and with specialise under random gates, "
        "gives the same logits within 1e-4 of the largest, or within four times masking's own distance from float64 "
        "(HaloNet's attention rounds coarsely).\n\n"
        "*Gateable* is the share of MACs that goes if all gates close. *Left out*, for `all`, says why convolutions "
        "have no gates. In networks without residual units `residual` gates densely connected ones, or else every "
        "convolution; where none of the residual units can be gated, nothing. A depthwise convolution shares gates "
        "only where what it reads is gated, so that `residual` may have more gates than `all`.\n\n" + table(rows)
    )


def attempt(name: str) -> dict[str, Any] | str:
    """What `check` finds of a model, or why it failed."""
    try:
        return check(name)
    except Exception as error:
        return f"FAILED {type(error).__name__}: {str(error).splitlines()[0]}"


def main() -> None:
    """Check, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    names = args.models or (choose() if args.choose else [row["model"] for row in json.loads(MODELS.read_text())])
    rows, failed = [], []
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), partial(torch.set_num_threads, 1)) as pool:
        for name, found in zip(names, pool.map(attempt, names), strict=True):
            (failed if isinstance(found, str) else rows).append(found)
            print(f"{name}: {found if isinstance(found, str) else json.dumps(found)}", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(names)} failed")
    if args.models:
        before = {row["model"]: row for row in json.loads(MODELS.read_text())}
        rows = list((before | {row["model"]: row for row in rows}).values())
    MODELS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
