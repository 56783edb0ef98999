"""Training: what a run directory holds, what its options do, and its evaluation."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from training_runs import CPU, assert_same_weights, exit_codes, free_port, records, small, weights

import gaternet.step
from gaternet import files
from gaternet.checkpoint import load_model, save_model
from gaternet.cost import count_macs
from gaternet.data import DataError, Preprocessing, load_data
from gaternet.evaluate import evaluate_saved, gate_metrics
from gaternet.gating import gate
from gaternet.ledger import describe_run
from gaternet.machine import collect_signals, make_accelerator, tensorboard
from gaternet.method import GaterNet
from gaternet.models import create_model
from gaternet.network import build_network, load_teacher
from gaternet.recipe import Runtime
from gaternet.run import RunDirectory
from gaternet.train import train
from gaternet.trained import find_model


def test_run_directory_holds_everything(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["recipe"]["optimizer"]["ema_decay"] == 0.9
    assert config["versions"]["torch"] == torch.__version__
    assert config["runtime"]["log_every"] == 1
    steps, epochs = records(finished, "step"), records(finished, "epoch")
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert {"loss", "penalty", "accuracy", "density", "gater_gradient_norm"} <= steps[0].keys()
    assert {"train_loss", "test_accuracy", "test_density", "test_site_density", "lr"} <= epochs[0].keys()
    assert np.isclose(epochs[0]["train_loss"], np.mean([line["loss"] for line in steps[:5]]))
    assert (finished / "best" / "model.safetensors").exists()
    _, metadata = load_model(finished / "last")
    assert metadata["trained"]["test_accuracy"] == epochs[-1]["test_accuracy"]
    assert not list(finished.rglob("*.tmp"))


def test_seed_decides_the_run(finished, tmp_path):
    train(small(ema_decay=0.9), tmp_path / "same", CPU)
    assert_same_weights(finished, tmp_path / "same")
    assert records(finished, "step") == records(tmp_path / "same", "step")
    train(small(ema_decay=0.9, epochs=1), tmp_path / "other", CPU, seed=1)
    assert records(tmp_path / "other", "step")[0]["loss"] != records(finished, "step")[0]["loss"]


def test_two_machines_give_the_loss_curve_of_one(tmp_path):
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    script = Path(__file__).parent / "train_without_batchnorm.py"
    launches = [["-m", "torch.distributed.run", "--node-rank", str(rank), *meet] for rank in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, *launch, script, tmp_path / name], env=environment)
        for name, launch in (("one", []), ("two", launches[0]), ("two", launches[1]))
    ]
    assert exit_codes(running) == [0, 0, 0]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert [config["processes"] for config in configs] == [1, 2]
    one, two = ([line["loss"] for line in records(tmp_path / name, "step")] for name in ("one", "two"))
    assert len(one) == 10
    np.testing.assert_allclose(two, one, rtol=2e-4)
    for name in ("density", "penalty", "accuracy"):
        one, two = ([line[name] for line in records(tmp_path / run, "step")] for run in ("one", "two"))
        np.testing.assert_allclose(two, one, rtol=2e-3, atol=1e-5)
    last = [records(tmp_path / run, "epoch")[-1] for run in ("one", "two")]
    assert last[0]["test_images"] == last[1]["test_images"] == 360
    np.testing.assert_allclose(last[1]["test_loss"], last[0]["test_loss"], rtol=1e-3)


def test_saved_model_evaluates_as_in_training(finished, monkeypatch):
    monkeypatch.setattr(gaternet.machine, "_has_fast_bf16", lambda cpu: False)  # the run was in float32
    record = records(finished, "epoch")[-1]
    metrics = evaluate_saved(finished, runtime=Runtime(cpu=True))
    assert metrics["images"] == 360
    assert metrics["accuracy"] == record["test_accuracy"]
    network, metadata = load_model(finished / "last")
    assert isinstance(network, GaterNet)
    test = load_data("digits").test
    inputs = Preprocessing.from_metadata(metadata).normalize(test.take(range(360)))
    macs = count_macs(network.eval(), inputs)
    assert (metrics["backbone_macs"], metrics["gater_macs"]) == (macs.backbone, macs.gater)
    assert np.isclose(metrics["gated_macs"], macs.gated.mean())


def test_evaluation_refuses_data_of_another_kind(finished, tmp_path):
    x, y = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "rgb.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(ValueError, match="3 channels, but the model was trained on 1"):
        evaluate_saved(finished, data=str(tmp_path / "rgb.npz"), runtime=Runtime(cpu=True))
    np.savez(tmp_path / "few.npz", x_train=x[..., 0], y_train=y % 3, x_test=x[..., 0], y_test=y % 3)
    with pytest.raises(ValueError, match="has 3 classes, not those that the model knows"):
        evaluate_saved(finished, data=str(tmp_path / "few.npz"), runtime=Runtime(cpu=True))


def test_evaluation_refuses_images_of_another_size(finished, tmp_path):
    """Squares are resized; of others no size is the right one."""
    narrow = Path(shutil.copytree(finished / "last", tmp_path / "narrow"))
    config = json.loads((narrow / "config.json").read_text())
    config["metadata"]["preprocessing"]["width"] = 6
    (narrow / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="digits has images of 8 x 8 pixels, but the model was trained on 8 x 6"):
        evaluate_saved(narrow, runtime=Runtime(cpu=True))


def test_numbers_stand_for_the_names_of_classes(finished, tmp_path, monkeypatch):
    """CIFAR-10 has names for its classes in torchvision's files, and none in a .npz file."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    named = Path(shutil.copytree(finished / "last", tmp_path / "named"))
    config = json.loads((named / "config.json").read_text())
    config["metadata"]["classes"] = names
    (named / "config.json").write_text(json.dumps(config))
    metrics = evaluate_saved(finished, runtime=CPU)
    with pytest.warns(UserWarning, match="classes of digits are taken to be the model's in their order: 0 is zero"):
        assert evaluate_saved(named, runtime=CPU) == metrics  # on digits, whose classes are numbers
    with pytest.warns(UserWarning, match="classes of digits are taken to be the model's in their order: 0 is zero"):
        train(small("resnet20", teacher=str(named), epochs=1), tmp_path / "taught", CPU)
    data = load_data("digits")
    monkeypatch.setattr("gaternet.trained.load_data", lambda *_, **__: replace(data, classes=tuple(names)))
    with pytest.warns(UserWarning, match="classes of digits are taken to be the model's in their order: zero is 0"):
        assert evaluate_saved(finished, runtime=Runtime(cpu=True)) == metrics
    monkeypatch.setattr("gaternet.trained.load_data", lambda *_, **__: replace(data, classes=tuple(sorted(names))))
    with pytest.raises(ValueError, match="not those that the model knows"):
        evaluate_saved(named, runtime=Runtime(cpu=True))


def test_target_density_is_steered_to(tmp_path):
    options = {"sparsity_start": 0.0, "sparsity_ramp": 0.0, "density_weight": 100.0, "epochs": 4, "lr": 0.2}
    densities = []
    for target in (0.2, 0.8):
        train(small(target_density=target, **options), tmp_path / str(target), CPU)
        densities.append(records(tmp_path / str(target), "step")[-1]["density"])
    assert densities[0] < 0.4 < 0.6 < densities[1]


def test_training_starts_from_trained_parts(finished, tmp_path):
    data = load_data("digits")
    trained, _ = load_model(finished / "last")
    assert isinstance(trained, GaterNet)
    network = build_network(small(backbone_from=str(finished)), data, seed=5)
    assert isinstance(network, GaterNet)
    assert_equal(network.backbone, trained.backbone)
    plain = tmp_path / "plain"
    train(small("resnet20", epochs=1), plain, CPU)
    network = build_network(small(extractor_from=str(plain), backbone_from=str(plain)), data, seed=5)
    assert isinstance(network, GaterNet)
    classifier, _ = load_model(plain / "last")
    assert_equal(network.backbone, classifier)
    without_classifier = {k: v for k, v in classifier.state_dict().items() if not k.startswith("fc.")}
    assert_equal(network.gater.get_submodule("extractor"), without_classifier)
    with pytest.raises(ValueError, match="another model than the backbone"):
        build_network(small("resnet56_gated", backbone_from=str(plain)), data, seed=5)
    assert_equal(build_network(small("resnet20", backbone_from=str(plain)), data, seed=5), classifier)
    with pytest.raises(ValueError, match="resnet20 has no gater"):
        build_network(small("resnet20", extractor_from=str(plain)), data, seed=5)


def assert_equal(part: nn.Module, expected: nn.Module | dict[str, torch.Tensor]) -> None:
    state = expected.state_dict() if isinstance(expected, nn.Module) else expected
    assert part.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())


def test_a_folder_is_free_again_where_a_run_could_not_be_started(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "write_json", Mock(side_effect=OSError("no space left")))
    refused = RunDirectory(tmp_path)
    with pytest.raises(OSError, match="no space left"):
        refused.start({})
    monkeypatch.undo()
    RunDirectory(tmp_path).start({})
    refused.close()


def test_a_seed_below_0_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="seed must be at least 0, not -1"):
        train(small("resnet8"), tmp_path / "run", CPU, seed=-1)
    assert not (tmp_path / "run").exists()


def test_tensorboard_keeps_the_last_epoch_of_a_run_that_goes_on(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step, steps in ((0, (4, 8)), (8, (12,))):
        with tensorboard(tmp_path, step) as board:
            for each in steps:
                board.add_scalar("loss", 1.0, each)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    assert [event.step for event in events.Reload().Scalars("loss")] == [4, 8, 12]


@pytest.mark.usefixtures("unchecked_types")
def test_compile_bf16_and_tensorboard_options_work(tmp_path, monkeypatch):
    compiled = []
    original = nn.Module.compile
    # TorchInductor needs a C++ compiler and a minute; that the model compiles whole is what matters here.
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: (compiled.append(self), original(self, backend="eager", fullgraph=True))
    )
    runtime = replace(CPU, compile=True, precision="bf16", tensorboard=True, channels_last=False)
    record = train(small(epochs=1), tmp_path / "run", runtime)
    assert len(compiled) == 1
    assert np.isfinite(record["train_loss"])
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    plain = train(small(epochs=1), tmp_path / "plain", CPU)
    assert abs(plain["train_loss"] - record["train_loss"]) < 0.2


def test_a_teacher_sees_images_as_it_did_when_it_learned(finished):
    recipe = small("resnet20", teacher=str(finished))
    data = load_data(recipe.data)
    teacher = load_teacher(recipe, data, make_accelerator(CPU))
    assert teacher is not None
    pixels = data.test.take(range(8))
    known, _ = load_model(finished / "last")
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixels), known.eval()(data.preprocessing.normalize(pixels)))


def test_a_network_learns_from_its_teacher(finished, tmp_path):
    """With the teacher's share at 1 the labels do not matter; the teacher stays as it is."""
    before = weights(finished)
    options = {"teacher": str(finished), "teacher_weight": 1.0, "epochs": 1}
    runs = []
    for smoothing in (0.0, 0.5):  # of the labels
        runs.append(tmp_path / str(smoothing))
        train(small("resnet20", **options, label_smoothing=smoothing), runs[-1], CPU)
    assert_same_weights(*runs)
    train(small("resnet20", **{**options, "teacher_weight": 0.5}), tmp_path / "both", CPU)
    losses = [records(run, "step")[0]["loss"] for run in (runs[0], tmp_path / "both")]
    assert losses[0] != losses[1]
    after = weights(finished)
    assert all(torch.equal(after[name], before[name]) for name in before)
    x, y = np.zeros((512, 8, 8), np.uint8), np.arange(512) % 4
    np.savez(tmp_path / "four.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(ValueError, match=r"the teacher .* was trained on other classes"):
        train(small("resnet20", **options, data=str(tmp_path / "four.npz")), tmp_path / "bad", CPU)


def test_bad_sizes_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="batch_size 2000 is more than the 1437 training images"):
        train(small(batch_size=2000), tmp_path / "a", CPU)
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ValueError, match="batch_size 256 does not divide among 3 processes"):
        train(small(), tmp_path / "b", CPU)


def test_what_cannot_run_leaves_no_run_directory(tmp_path):
    with pytest.raises(ValueError, match=r"the network cannot take images \(1, 1, 8, 8\) \(.*\): .* shrink them less"):
        train(small(shrink=16), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def test_a_network_that_was_given_comes_back_without_mixed_precision(tmp_path, capsys):
    model = gate(create_model("resnet8", 10, 1), torch.zeros(2, 1, 8, 8), gater="resnet8")
    train(small("resnet8_gated", epochs=1), tmp_path / "run", replace(CPU, precision="bf16"), network=model)
    images = torch.rand(4, 1, 8, 8)
    logits = model.eval()(images)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, model.forward_gated(images, model.gates(images)))
    assert "CifarResNet (0.16M parameters, 112 gates)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="trained a CifarResNet that was given to it in Python: no command repeats"):
        describe_run(tmp_path / "run")


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_network_that_was_given_knows_what_it_was_trained_on(tmp_path, decay):
    model = gate(create_model("resnet8", 10, 1), torch.zeros(2, 1, 8, 8), gater="resnet8")
    recipe = small("resnet8_gated", epochs=1, ema_decay=decay)
    train(recipe, tmp_path / "run", CPU, network=model)
    model.save_pretrained(tmp_path / "mine")
    assert load_model(tmp_path / "mine")[1] == load_model(tmp_path / "run" / "last")[1]
    accuracy = evaluate_saved(tmp_path / "mine", runtime=CPU)["accuracy"]
    assert (accuracy == load_model(tmp_path / "mine")[1]["trained"]["test_accuracy"]) is (decay == 0)
    again = gate(create_model("resnet8", 10, 1), torch.zeros(2, 1, 8, 8), gater="resnet8")
    train(recipe, tmp_path / "run", CPU, resume=True, network=again)  # finished already
    assert again.metadata == load_model(tmp_path / "mine")[1]


def test_an_accelerator_of_the_callers_stays_as_it_was(tmp_path):
    own = make_accelerator(replace(CPU, precision="bf16"))
    for _ in range(2):
        train(
            small("resnet8", epochs=1),
            tmp_path / "run",
            replace(CPU, precision="no"),
            resume=(tmp_path / "run").exists(),
        )
        evaluate_saved(tmp_path / "run", runtime=CPU)
        describe_run(tmp_path / "run", CPU)
        assert own.mixed_precision == Accelerator().mixed_precision == "bf16"
        assert own.device == Accelerator().device


def test_a_second_sigterm_is_the_launchers():
    with collect_signals() as received:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM] * 2


def test_find_model_says_what_is_missing(finished, tmp_path):
    assert find_model(finished, "best") == finished / "best"
    assert find_model(finished / "last") == finished / "last"
    with pytest.raises(ValueError, match="no run or saved model"):
        find_model(tmp_path / "none")
    with pytest.raises(ValueError, match="neither a run nor a saved model"):
        find_model(tmp_path)
    RunDirectory(tmp_path / "new").start({})
    with pytest.raises(ValueError, match="has no finished epoch yet"):
        find_model(tmp_path / "new")


@pytest.mark.parametrize(
    ("processor", "avx512_bf16", "amx", "precision"),
    [
        ("AMD EPYC", True, False, "bf16"),
        ("AMD EPYC", False, False, "no"),
        ("Intel(R) Xeon(R) Processor", True, False, "no"),
        ("Intel(R) Xeon(R) Processor", True, True, "bf16"),
    ],
)
def test_precision_is_bf16_only_where_that_is_faster(processor, avx512_bf16, amx, precision, monkeypatch):
    monkeypatch.setattr(gaternet.machine, "processor", lambda: processor)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert make_accelerator(Runtime(cpu=True)).mixed_precision == precision


def test_shares_of_gates_that_never_change_by_hand():
    network = create_model("resnet8_gated", 10, 1, extractor="resnet8")
    assert isinstance(network, GaterNet)
    rates = torch.zeros(network.num_gates, dtype=torch.float64)
    rates[:3], rates[3] = 1, 0.5
    found = gate_metrics(network, rates)
    shares = [found[name] * network.num_gates for name in ("always_on", "always_off", "dependent", "entropy")]
    assert shares == pytest.approx([3, network.num_gates - 4, 1, 1])


def test_the_best_model_is_evaluated_where_that_is_asked_for(tmp_path):
    data = load_data("digits")
    for which in ("last", "best"):
        network: Any = create_model("resnet8", 10, 1)
        save_model(network, tmp_path / which, {"backbone": network.gaternet_source, **data.metadata()})
    alone = {which: evaluate_saved(tmp_path / which, data="digits", runtime=CPU) for which in ("last", "best")}
    assert alone["last"]["loss"] != alone["best"]["loss"]
    for which in ("last", "best"):
        assert evaluate_saved(tmp_path, which, data="digits", runtime=CPU) == alone[which]  # pyright: ignore[reportArgumentType]


def test_a_run_is_evaluated_in_the_precision_that_it_was_trained_in(tmp_path):
    saved = tmp_path / "run"
    train(small("resnet8", epochs=1), saved, replace(CPU, precision="no"))
    for precision, other in (("no", "bf16"), ("bf16", "no")):
        config = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps(config | {"precision": precision}))
        auto, same, unlike = (
            evaluate_saved(saved, runtime=replace(CPU, precision=chosen)) for chosen in ("auto", precision, other)
        )
        assert auto == same
        assert auto["precision"] == precision
        assert auto["loss"] != unlike["loss"]
    (saved / "config.json").write_text(json.dumps(config | {"precision": "fp16"}))  # which no CPU has
    assert evaluate_saved(saved, runtime=replace(CPU, precision="auto"))["images"] == 360


@pytest.mark.parametrize(
    ("network", "given"), [(create_model("resnet8", 5, 1), r"\(1, 5\)"), (nn.Identity(), r"\(1, 1, 8, 8\)")]
)
def test_a_network_of_other_classes_is_refused_before_anything_is_written(tmp_path, network, given):
    with pytest.raises(ValueError, match=f"the network gives {given} for an image, but must give logits of 10 classes"):
        train(small("resnet8"), tmp_path / "run", CPU, network=network)
    assert not (tmp_path / "run").exists()


def test_a_model_without_names_of_its_classes_says_so(tmp_path):
    model: Any = create_model("resnet8", 10, 1)
    metadata = load_data("digits").metadata()
    save_model(model, tmp_path, {"backbone": model.gaternet_source, "preprocessing": metadata["preprocessing"]})
    with pytest.raises(DataError, match=r"does not name its classes: set model\.metadata\['classes'\]"):
        evaluate_saved(tmp_path, data="digits", runtime=CPU)
    with pytest.raises(DataError, match="does not name its classes"):
        train(small("resnet8", teacher=str(tmp_path)), tmp_path / "run", CPU)
