"""The method against slow, plainly written references, and the promises of its one side channel."""

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gaternet.method import Gater, GaterNet, GateSite, gate_sparsity, improved_semhash

SITES = (GateSite("bn1", "conv1", 0, 5), GateSite("bn2", "conv2", 5, 12))


class Toy(nn.Module):
    """Two convolutions with BatchNorm, 5 and 7 filters, all gated; 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.fc = nn.Linear(7, 4)
        for norm in (self.bn1, self.bn2):  # a shift, that leaks if a gate sits before it
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                assert tensor is not None
                nn.init.normal_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def extractor() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def gater(**options: Any) -> Gater:
    return Gater(extractor(), 6, 12, bottleneck=3, **options)


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


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


# --- improved_semhash


def semhash_by_hand(logits: Tensor, noise_std: float, hard_probability: float, threshold: float, seed: int) -> Tensor:
    """Equations 4 to 7, gate by gate: noise is drawn first, then one number per sample."""
    generator = seeded(seed)
    noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype).tolist()
    coins = torch.rand(len(logits), 1, generator=generator).tolist()
    gates = []
    for row, noise_row, (coin,) in zip(logits.tolist(), noise, coins, strict=True):
        noisy = [g + noise_std * e for g, e in zip(row, noise_row, strict=True)]
        if coin < hard_probability:
            gates.append([1.0 if g > threshold else 0.0 for g in noisy])
        else:
            gates.append([max(0.0, min(1.0, 1.2 / (1 + math.exp(-g)) - 0.1)) for g in noisy])
    return torch.tensor(gates, dtype=logits.dtype)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    noise_std=st.floats(0, 3),
    hard_probability=st.floats(0, 1),
    threshold=st.floats(-1, 1),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=50, deadline=None)
def test_training_gates_are_those_of_the_plain_reference(shape, noise_std, hard_probability, threshold, seed):
    logits = 3 * torch.randn(shape, generator=seeded(seed + 1), dtype=torch.float64)
    options = {"noise_std": noise_std, "hard_probability": hard_probability, "threshold": threshold}
    gates = improved_semhash(logits, training=True, **options, generator=seeded(seed))
    torch.testing.assert_close(gates, semhash_by_hand(logits, **options, seed=seed), rtol=0, atol=1e-12)


@given(rows=st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_evaluation_gates_are_hard_noiseless_and_draw_nothing(rows):
    logits, generator = torch.tensor(rows), seeded(0)
    before = generator.get_state()
    for threshold in (0.0, 0.7):
        gates = improved_semhash(logits, training=False, threshold=threshold, generator=generator)
        assert gates.tolist() == [[float(g > threshold) for g in row] for row in logits.tolist()]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gates_have_the_dtype_of_their_logits(dtype, training):
    assert improved_semhash(torch.zeros(2, 3, dtype=dtype), training=training).dtype == dtype


def hard_soft_and_mixed(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under the same noise: all samples hard, all soft, and the paper's mixture."""
    hard, soft, mixed = (
        improved_semhash(logits, training=True, hard_probability=p, generator=seeded(3)) for p in (1.0, 0.0, 0.5)
    )
    return hard, soft, mixed


def test_each_sample_is_all_hard_or_all_soft():
    hard, soft, mixed = hard_soft_and_mixed(3 * torch.randn(200, 20, generator=seeded(4)))
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert soft.min() == 0  # clamped
    assert soft.max() == 1
    assert ((soft > 0) & (soft < 1)).float().mean() > 0.3
    is_hard, is_soft = (mixed == hard).all(1), (mixed == soft).all(1)
    assert torch.all(is_hard ^ is_soft)
    assert is_hard.any()
    assert is_soft.any()


def test_gradient_of_hard_gates_is_that_of_soft_ones():
    generator = seeded(5)
    logits = 3 * torch.randn(200, 20, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    upstream = torch.randn(200, 20, generator=generator, dtype=torch.float64)
    noisy = logits.detach() + torch.randn(200, 20, generator=seeded(3), dtype=torch.float64)
    slope = noisy.sigmoid() * (1 - noisy.sigmoid())
    inside = (1.2 * noisy.sigmoid() - 0.1 > 0) & (1.2 * noisy.sigmoid() - 0.1 < 1)
    assert 0.2 < inside.double().mean() < 0.8  # both cases occur
    for gates in hard_soft_and_mixed(logits):
        (gradient,) = torch.autograd.grad(gates, logits, upstream)
        torch.testing.assert_close(gradient, torch.where(inside, 1.2 * slope * upstream, 0.0))


@pytest.mark.parametrize("logit", [-1.0, 0.0, 0.5, 2.0])
def test_noise_is_standard_normal_by_default(logit):
    gates = improved_semhash(torch.full((400, 100), logit), training=True, hard_probability=1.0, generator=seeded(6))
    expected = 0.5 * (1 + math.erf(logit / math.sqrt(2)))
    spread = math.sqrt(expected * (1 - expected) / gates.numel())
    assert abs(gates.mean().item() - expected) < 4.5 * spread


@pytest.mark.parametrize(("options", "probability"), [({}, 0.5), ({"hard_probability": 0.2}, 0.2)])
def test_share_of_hard_samples(options, probability):
    gates = improved_semhash(torch.zeros(10_000, 4), training=True, **options, generator=seeded(7))
    hard = ((gates == 0) | (gates == 1)).all(1).double().mean().item()
    assert abs(hard - probability) < 4.5 * math.sqrt(probability * (1 - probability) / 10_000)


def test_training_without_noise_and_all_hard_is_evaluation():
    logits = torch.randn(50, 10, generator=seeded(8))
    options: dict[str, Any] = {"noise_std": 0.0, "hard_probability": 1.0, "threshold": 0.3}
    assert torch.equal(
        improved_semhash(logits, training=True, **options), improved_semhash(logits, training=False, **options)
    )


@given(rows=st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_gate_sparsity_is_the_mean_over_samples_of_the_l1_norm_per_gate(rows):
    by_hand = sum(sum(abs(g) for g in row) / 4 for row in rows) / len(rows)
    assert gate_sparsity(torch.tensor(rows)).item() == pytest.approx(by_hand, abs=1e-6)


# --- Gater


@pytest.mark.parametrize("training", [True, False])
def test_gater_is_fc1_batchnorm_relu_fc2(images, training):
    g = gater().train(training)
    assert isinstance(g.norm, nn.BatchNorm1d)
    nn.init.normal_(g.norm.bias)
    middle = g.fc1(g.extractor(images))
    mean, var = (middle.mean(0), middle.var(0, correction=0)) if training else (0, 1)  # it has seen none
    normal = (middle - mean) / (var + g.norm.eps) ** 0.5 * g.norm.weight + g.norm.bias
    torch.testing.assert_close(g.logits(images), g.fc2(normal.clamp(min=0)))


def test_gater_without_batchnorm_is_fc1_relu_fc2(images):
    g = gater(batch_norm=False)
    torch.testing.assert_close(g.logits(images), g.fc2(g.fc1(g.extractor(images)).clamp(min=0)))


@pytest.mark.parametrize("batch_norm", [True, False])
def test_gater_holds_h_plus_c_times_b_weights(batch_norm):
    h, c, b = 64, 336, 8
    parameters = sum(p.numel() for p in Gater(nn.Flatten(), h, c, bottleneck=b, batch_norm=batch_norm).parameters())
    assert parameters == (h + c) * b + (b + c) + (2 * b if batch_norm else 0)


def test_gater_passes_its_options_on(images):
    g = gater(noise_std=0.0, hard_probability=1.0)
    for training in (True, False):
        logits = g.train(training).logits(images)
        for share in (0.2, 0.8):  # thresholds in midst of the logits, so that they decide
            g.threshold = logits.quantile(share).item()
            assert torch.equal(g(images), (logits > g.threshold).float())
    g.train().hard_probability = 0.0
    torch.testing.assert_close(g(images), (1.2 * g.logits(images).sigmoid() - 0.1).clamp(0, 1))
    g.noise_std = 2.0
    assert torch.equal(g(images, seeded(0)), g(images, seeded(0)))
    assert not torch.equal(g(images, seeded(0)), g(images, seeded(1)))


def test_initial_bias_decides_how_many_gates_start_open(images):
    def share(bias: float) -> float:
        torch.manual_seed(0)
        return gater(initial_bias=bias).eval()(images).mean().item()

    assert share(9.0) == 1
    assert share(-9.0) == 0
    assert not gater().fc2.bias.any()  # the paper's start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck": 0}, "bottleneck must be at least 1, not 0"),
        ({"noise_std": -0.1}, "noise_std must not be negative"),
        ({"hard_probability": 1.1}, r"hard_probability must lie in \[0, 1\], not 1.1"),
        ({"hard_probability": -0.1}, "hard_probability"),
    ],
)
def test_gater_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Gater(extractor(), 6, 12, **options)


@pytest.mark.parametrize("wrong", [nn.Conv2d(3, 6, 3), nn.Sequential(extractor(), nn.Linear(6, 10))])
def test_gater_says_when_its_extractor_gives_no_features(images, wrong):
    with pytest.raises(ValueError, match=r"must return features \(B, 6\), but returned \(6, .*remove its output layer"):
        Gater(wrong, 6, 12).logits(images)


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


# --- GaterNet


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


def test_exported_it_is_the_same(model, images):
    program = torch.export.export(model, (images, True))
    for ours, theirs in zip(program.module()(images, True), model(images, return_gates=True), strict=True):
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


def test_a_site_of_another_width_says_its_name_and_both_shapes(images):
    model = GaterNet(Toy(), gater(), [GateSite("bn1", "conv1", 0, 4), GateSite("fc", "fc", 4, 8)])
    with pytest.raises(ValueError, match=r"site bn1 gates 4 filters, but its output is \(6, 5, 8, 8\)"):
        model.forward_gated(images, torch.ones(6, 8))
    model = GaterNet(Toy(), gater(), [GateSite("fc", "fc", 0, 4)])
    with pytest.raises(ValueError, match=r"site fc gates 4 filters, but its output is \(6, 4\), not \(B, 4, H, W\)"):
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
