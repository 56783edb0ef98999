"""A gated network against plain ones, and the promises of its one side channel."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from toy_network import SITES, Toy, extractor, gater

from gaternet.method import Gater, GaterNet, GateSite


@pytest.fixture
def model() -> GaterNet:
    torch.manual_seed(0)
    return GaterNet(Toy(), gater(), SITES).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 8, 8, generator=seeded(1))


@pytest.fixture
def gates() -> Tensor:
    return torch.randint(2, (6, 12), generator=seeded(2)).float()


def as_plain(model: GaterNet) -> nn.Module:
    """A separate, never gated network with the backbone's weights."""
    toy = Toy().train(model.training)
    toy.load_state_dict(model.backbone.state_dict())
    return toy


def captured(module: nn.Module) -> list[Tensor]:
    """Outputs of the module from now on, as the next module sees them."""
    outputs: list[Tensor] = []

    def capture(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append(output)

    module.register_forward_hook(capture)
    return outputs


def test_under_autocast_gates_stay_float32_and_the_backbone_does_not(model, images):
    plain = as_plain(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.gater.logits(images).dtype == torch.float32
        assert model(images).dtype == torch.bfloat16
        assert torch.equal(model.forward_gated(images, torch.ones(6, 12)), plain(images))
    model.backbone.bfloat16()  # weights in half precision, gates not: products keep the backbone's precision
    outputs = captured(model.backbone.bn1)
    model.forward_gated(images.bfloat16(), torch.ones(6, 12))
    assert outputs[0].dtype == torch.bfloat16


def test_the_last_layer_may_be_wrapped(model, images):
    before = model.gater.logits(images)
    model.gater.fc2 = torch.nn.Sequential(model.gater.fc2)  # as adapters do: it has no `weight` of its own
    assert torch.equal(model.gater.logits(images), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.gater.logits(images).dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_all_gates_open_is_the_plain_backbone_bit_for_bit(model, images, training):
    model.train(training)
    plain = as_plain(model)
    assert torch.equal(model.forward_gated(images, torch.ones(6, 12)), plain(images))
    ours, theirs = model.backbone.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)  # running statistics, too


def test_closed_gates_give_exact_zeros_and_open_ones_change_nothing(model, images, gates):
    backbone = model.backbone
    first, second = captured(backbone.bn1), captured(backbone.bn2)
    model.forward_gated(images, gates)
    for output, mask in ((first[0], gates[:, :5]), (second[0], gates[:, 5:])):
        assert not output[mask == 0].any()
        assert output[mask == 1].any()
    unmasked = backbone.bn1.forward(backbone.conv1(images))
    assert torch.equal(first[0][gates[:, :5] == 1], unmasked[gates[:, :5] == 1])


def test_gates_scale_each_filter_after_its_batchnorm(model, images):
    soft = torch.rand(6, 12, generator=seeded(9))
    net = as_plain(model)
    assert isinstance(net, Toy)
    x = F.relu(net.bn1(net.conv1(images)) * soft[:, :5].reshape(6, 5, 1, 1))
    x = F.relu(net.bn2(net.conv2(x)) * soft[:, 5:].reshape(6, 7, 1, 1))
    torch.testing.assert_close(model.forward_gated(images, soft), net.fc(x.mean((2, 3))))


@pytest.mark.parametrize("row", [0, 5])
def test_gates_of_one_sample_never_touch_another(model, images, gates, row):
    before = model.forward_gated(images, gates)
    gates[row] = 1 - gates[row]
    changed = (model.forward_gated(images, gates) != before).any(1)
    assert changed.tolist() == [index == row for index in range(6)]


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("hard_probability", [0.0, 1.0])
def test_gradient_reaches_every_parameter(images, batch_norm, hard_probability):
    model = GaterNet(Toy(), gater(batch_norm=batch_norm, hard_probability=hard_probability), SITES).train()
    F.cross_entropy(model(images), torch.arange(6) % 4).backward()
    for name, parameter in model.named_parameters():
        if batch_norm and name == "gater.fc1.bias":  # BatchNorm takes any shift away again
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-7, name


@pytest.mark.parametrize("training", [True, False])
def test_returned_gates_are_those_that_made_the_logits(model, images, training):
    model.train(training)
    logits, gates = model(images, return_gates=True)
    assert gates.shape == (6, model.num_gates)
    assert torch.equal(model.forward_gated(images, gates), logits)
    assert torch.equal(model(images), logits) != training  # noise in training, none in evaluation
    assert torch.equal(model.gates(images), gates) != training


def test_gates_of_another_shape_are_refused(model, images, unchecked_types):
    for shape in [(6, 11), (5, 12), (6, 12, 1)]:
        with pytest.raises(ValueError, match=r"gates must be \(6, 12\), a row per image .* but are \("):
            model.forward_gated(images, torch.ones(shape))


def test_pretrained_weights_fit_before_and_after_gating(images):
    pretrained = Toy().eval()
    early = Toy().eval()
    early.load_state_dict(pretrained.state_dict())
    early = GaterNet(early, gater(), SITES).eval()
    late = GaterNet(Toy(), gater(), SITES).eval()
    assert late.backbone.state_dict().keys() == pretrained.state_dict().keys()
    late.backbone.load_state_dict(pretrained.state_dict())
    for model in (early, late):
        assert torch.equal(model.forward_gated(images, torch.ones(6, 12)), pretrained(images))
        assert torch.equal(as_plain(model)(images), pretrained(images))


def test_backbone_by_itself_is_the_plain_network(model, images, gates):
    expected = as_plain(model)(images)
    assert torch.equal(model.backbone(images), expected)
    assert not torch.equal(model.forward_gated(images, gates), expected)
    assert torch.equal(model.backbone(images), expected)


def test_no_gates_are_left_behind_by_an_exception(model, images, gates):
    plain = as_plain(model)(images)

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    for module in (model.backbone.conv1, model.backbone.conv2, model.backbone.fc):
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model.forward_gated(images, gates)
        handle.remove()
        assert torch.equal(model.backbone(images), plain)
        assert torch.equal(model.forward_gated(images, torch.ones(6, 12)), plain)


def by_pickle(model: GaterNet, tmp_path) -> GaterNet:
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)  # our own file, written a line above


def twice(model: GaterNet, tmp_path) -> GaterNet:
    return copy.deepcopy(copy.deepcopy(model))


@pytest.mark.parametrize("duplicate", [lambda model, tmp_path: copy.deepcopy(model), twice, by_pickle])
def test_copies_are_independent(model, images, gates, tmp_path, duplicate: Callable[[GaterNet, Any], GaterNet]):
    other = duplicate(model, tmp_path)
    plain, gated = as_plain(model)(images), model.forward_gated(images, gates)
    assert torch.equal(other.forward_gated(images, gates), gated)
    for one, another in ((model, other), (other, model)):  # gates of one, while they act, are not the other's
        seen = []

        def look(module: nn.Module, args: Any, seen: list[Tensor] = seen, another: GaterNet = another) -> None:
            seen.append(another.backbone(images))

        handle = one.backbone.get_submodule("fc").register_forward_pre_hook(look)
        one.forward_gated(images, gates)
        handle.remove()
        assert torch.equal(seen[0], plain)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model.forward_gated(images, gates), gated)


@pytest.mark.parametrize("first", ["original", "copy"])
def test_ungating_a_copy_or_its_original_leaves_the_other_gated(model, images, gates, first):
    gated, duplicate = model.forward_gated(images, gates), copy.deepcopy(model)
    one, other = (model, duplicate) if first == "original" else (duplicate, model)
    assert torch.equal(one.ungate()(images), as_plain(other)(images))
    assert torch.equal(other.forward_gated(images, gates), gated)
    other.ungate()
    GaterNet(other.backbone, gater(), SITES)  # its hooks are gone, so it may be gated anew
    GaterNet(one.backbone, gater(), SITES)


def test_threads_do_not_see_each_others_gates(model, images):
    threads = 4
    gates = [torch.randint(2, (6, 12), generator=seeded(20 + i)).float() for i in range(threads)]
    serial = [model.forward_gated(images, g) for g in gates]
    parallel: list[Tensor | None] = [None] * threads
    # All threads stand within the backbone, their gates set, before any of them reads its own.
    barrier = threading.Barrier(threads, timeout=30)

    def meet(module: nn.Module, args: Any, output: Tensor) -> None:
        barrier.wait()

    model.backbone.conv1.register_forward_hook(meet)

    def work(index: int) -> None:
        parallel[index] = model.forward_gated(images, gates[index])

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for one, other in zip(serial, parallel, strict=True):
        assert other is not None
        assert torch.equal(one, other)


def test_compiled_in_one_graph_it_is_the_same(model, images, gates, unchecked_types):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), model(images))
    gated = torch.compile(model.forward_gated, fullgraph=True, backend="eager")
    assert torch.equal(gated(images, gates), model.forward_gated(images, gates))
    assert torch.equal(model.backbone(images), as_plain(model)(images))  # nothing is left behind


def test_compiled_it_learns_from_batches_of_any_size(model, unchecked_types):
    """Compiled anew for any number of images, it draws noise for as many."""
    compiled = torch.compile(model.train(), backend="eager")
    for count in (4, 3, 2, 4):
        logits, gates = compiled(torch.randn(count, 3, 8, 8), return_gates=True)
        assert logits.shape[0] == gates.shape[0] == count
        gates.sum().backward()


def test_exported_it_is_the_same(model, images):
    program = torch.export.export(model, (images,), {"return_gates": True})
    for ours, theirs in zip(program.module()(images, return_gates=True), model(images, return_gates=True), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_exported_it_takes_any_batch(model, images, unchecked_types):
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = torch.rand(9, 3, 8, 8, generator=seeded(10))
    torch.testing.assert_close(program.module()(more), model(more))


def test_distributed_data_parallel_wraps_it(model, images, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert torch.equal(wrapped(images), model(images))
        wrapped.train()(images).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_ungate_gives_the_very_backbone_back(images):
    backbone = Toy().eval()
    model = GaterNet(backbone, gater(), SITES).eval()
    assert model.ungate() is backbone
    assert not any(module._forward_hooks for module in backbone.modules())
    for call in (lambda: model(images), lambda: model.forward_gated(images, torch.ones(6, 12))):
        with pytest.raises(RuntimeError, match="gave its backbone back with ungate"):
            call()
    again = GaterNet(backbone, gater(), SITES)
    assert torch.equal(again.forward_gated(images, torch.ones(6, 12)), backbone(images))


def test_gating_twice_is_refused_and_changes_nothing(model, images, gates):
    before = model.forward_gated(images, gates)
    with pytest.raises(ValueError, match="gated already: call ungate"):
        GaterNet(model.backbone, gater(), SITES)
    with pytest.raises(ValueError, match="or on a deep copy of that"):
        GaterNet(copy.deepcopy(model.backbone), gater(), SITES)
    assert torch.equal(model.forward_gated(images, gates), before)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([], "there must be sites"),
        ([SITES[0], GateSite("bn1", "conv1", 5, 10)], "no two at one module"),
        ([SITES[0], GateSite("bn2", "conv2", 6, 13)], "site bn2 has columns 6 to 13, but those before it stop at 5"),
        ([SITES[0], GateSite("bn2", "conv2", 4, 11)], "site bn2 has columns 4 to 11, but"),  # new and old ones
        ([SITES[1]], "site bn2 has columns 5 to 12, but those before it stop at 0"),
        ([SITES[0], GateSite("bn2", "conv2", 5, 5)], "site bn2 has columns 5 to 5"),  # empty
        ([SITES[0], GateSite("bn3", "conv2", 5, 12)], "no module 'bn3'"),
        ([SITES[0], GateSite("bn2", "conv3", 5, 12)], "no module 'conv3'"),
        ([GateSite("bn1", "conv1", 0, 4)], "site bn1 gates 4 filters, but conv1 has 5"),
    ],
)
def test_sites_that_do_not_fit_the_backbone_are_refused(sites, message):
    with pytest.raises(ValueError, match=message):
        GaterNet(Toy(), gater(), sites)


def test_sites_may_share_columns(images):
    class Depthwise(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.conv2, self.bn2 = nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.BatchNorm2d(5)
            self.fc = nn.Linear(5, 4)

    torch.manual_seed(0)
    backbone = Depthwise().eval()
    shared = [SITES[0], GateSite("bn2", "conv2", 0, 5, "depthwise")]
    model = GaterNet(backbone, Gater(extractor(), 6, 5), shared).eval()
    assert model.num_gates == 5
    first, second = captured(backbone.bn1), captured(backbone.bn2)
    model.forward_gated(images, gates := torch.randint(2, (6, 5), generator=seeded(11)).float())
    for output in (first[0], second[0]):
        assert not output[gates == 0].any()
        assert output[gates == 1].any()


@pytest.mark.usefixtures("unchecked_types")
def test_a_site_of_another_width_says_its_name_and_both_shapes(images):
    model = GaterNet(Toy(), gater(), [GateSite("bn1", "fc", 0, 4), GateSite("fc", "fc", 4, 8)])
    with pytest.raises(ValueError, match=r"site bn1 gates 4 filters, but its output is \(6, 5, 8, 8\)"):
        model.forward_gated(images, torch.ones(6, 8))
    model = GaterNet(Toy(), gater(), [GateSite("fc", "fc", 0, 4)])
    with pytest.raises(ValueError, match=r"site fc gates 4 filters, but its output is \(6, 4\), not \(B, 4, H, W\)"):
        model.forward_gated(images, torch.ones(6, 4))
    model.backbone.get_submodule("fc").register_forward_hook(lambda module, args, output: (output, None), prepend=True)
    with pytest.raises(ValueError, match="site fc gates 4 filters, but its output is a tuple"):
        model.forward_gated(images, torch.ones(6, 4))


def test_a_site_that_does_not_run_exactly_once_is_an_error(model, images, gates):
    repeated = copy.deepcopy(model)
    repeated.backbone.bn1 = nn.Sequential(repeated.backbone.bn1, repeated.backbone.bn1)
    with pytest.raises(RuntimeError, match=r"site bn1 ran 2 times in one call .* instead of once"):
        repeated.forward_gated(images, gates)
    repeated.backbone.bn2 = nn.Identity()  # as many modules ran as there are sites
    with pytest.raises(RuntimeError, match="site bn1 ran 2 times"):
        repeated.forward_gated(images, gates)
    model.backbone.bn1 = nn.BatchNorm2d(5).eval()  # without the hook: its gates would be ignored in silence
    with pytest.raises(RuntimeError, match=r"site bn1 ran 0 times .* change the backbone first"):
        model(images)


def test_a_call_within_a_call_leaves_the_outer_ones_gates_alone(model, images, gates):
    expected = model.forward_gated(images, gates)

    def ask_again(*_: Any) -> None:
        inner.remove()
        model.forward_gated(images, torch.ones_like(gates))

    inner = model.backbone.get_submodule("conv2").register_forward_pre_hook(ask_again)
    assert torch.equal(model.forward_gated(images, gates), expected)


class Checkpointed(Toy):
    """Its convolutions are computed again in the backward pass, to save memory."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            x = checkpoint(lambda x, c=conv, n=norm: F.relu(n(c(x))), x, use_reentrant=self.use_reentrant)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_within_the_backbone_is_an_error(images, use_reentrant):
    model = GaterNet(Checkpointed(use_reentrant), gater(), SITES)
    with pytest.raises(RuntimeError, match=r"bn\d is computed again in the backward pass, when the gates are gone"):
        model(images.requires_grad_()).sum().backward()
