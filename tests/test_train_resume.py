"""A run that is stopped, killed or fails loses nothing, and goes on to the same end."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import CPU, assert_same_weights, exit_codes, free_port, records, send_signal_after, small, weights

import gaternet.step
from gaternet.evaluate import evaluate_saved
from gaternet.export.saved import export_saved
from gaternet.ledger import describe_run, read_ledger
from gaternet.run import RunDirectory
from gaternet.step import TrainingStep, training_step
from gaternet.train import Stopped, TrainingError, train


@pytest.mark.parametrize(("step", "signum"), [(3, signal.SIGTERM), (5, signal.SIGINT), (7, signal.SIGINT)])
def test_stopped_run_resumes_to_the_same_weights(finished, tmp_path, monkeypatch, step, signum):
    run = tmp_path / "run"
    send_signal_after(monkeypatch, step, signum)
    with pytest.raises(Stopped, match=f"after step {step}, with all saved: gaternet train --resume --out") as stopped:
        train(small(ema_decay=0.9), run, CPU)
    assert stopped.value.signum == signum
    monkeypatch.undo()
    train(small(ema_decay=0.9), run, CPU, resume=True)
    assert_same_weights(finished, run)
    assert records(finished, "step") == records(run, "step")
    assert records(finished, "epoch") == records(run, "epoch")


def test_killed_run_resumes_from_its_last_checkpoint_to_the_same_weights(finished, tmp_path):
    run = tmp_path / "run"
    code = (
        "import sys, pathlib, training_runs as t; from dataclasses import replace; from gaternet.train import train;"
        "train(t.small(ema_decay=0.9), pathlib.Path(sys.argv[1]), replace(t.CPU, save_minutes=0.0))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, run], cwd=Path(__file__).parent, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and '"step": 7' in (run / "metrics.jsonl").read_text():
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')  # a line that the kill cut short
    assert (run / "training.pt").exists()
    train(small(ema_decay=0.9), run, CPU, resume=True)
    assert_same_weights(finished, run)
    assert records(finished, "step") == records(run, "step")


def test_what_a_kill_left_half_written_is_removed_and_nothing_else(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    left = [run / f"{name}.77.tmp" for name in (".training.pt", "last/.model.safetensors", "best/.config.json")]
    others = [run / ".notes.txt.77.tmp", run / "training.pt.tmp"]
    for path in (*left, *others):
        path.write_bytes(b"half")
    train(small(ema_decay=0.9), run, CPU, resume=True)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


def test_a_run_of_an_earlier_version_resumes_unless_an_option_that_came_later_is_set(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = json.loads((run / "config.json").read_text())
    del config["recipe"]["gating"]["auxiliary_weight"], config["recipe"]["distillation"]
    (run / "config.json").write_text(json.dumps(config))
    train(small(ema_decay=0.9), run, CPU, resume=True)
    with pytest.raises(ValueError, match=r"auxiliary_weight was 0.0, now it is 0.5"):
        train(small(ema_decay=0.9, auxiliary_weight=0.5), run, CPU, resume=True)


def test_a_run_that_goes_on_elsewhere_says_so(tmp_path, monkeypatch):
    run = tmp_path / "run"
    for _ in range(2):  # in the first epoch of five steps, then in the second
        with monkeypatch.context() as patched:
            send_signal_after(patched, 4, signal.SIGTERM)
            with pytest.raises(Stopped):
                train(small("resnet20"), run, CPU, resume=run.exists())
    config = json.loads((run / "config.json").read_text())
    assert config["precision"] == "no"
    assert "resumed" not in config  # it is the same machine
    config["machine"]["gpus"], config["precision"] = ["a GPU"], "bf16"
    (run / "config.json").write_text(json.dumps(config))
    train(small("resnet20"), run, CPU, resume=True)
    line = describe_run(run)
    assert (line["machine"]["gpus"], line["precision"]) == (["a GPU"], "bf16")
    (place,) = line["resumed"]
    assert (place["epoch"], place["precision"], place["processes"], place["machine"]["gpus"]) == (2, "no", 1, [])
    train(small("resnet20"), run, CPU, resume=True)  # does nothing
    assert describe_run(run)["resumed"] == [place]


def test_a_run_without_a_checkpoint_that_starts_again_elsewhere_says_so(finished, tmp_path):
    shutil.copytree(finished, run := tmp_path / "run")
    (run / "training.pt").unlink()
    (run / "metrics.jsonl").unlink()
    config = json.loads((run / "config.json").read_text())
    config["machine"]["threads"] += 1
    (run / "config.json").write_text(json.dumps(config))
    directory = RunDirectory(run)
    directory.note_place(1, 0, {"precision": "no", "processes": 1})
    assert "resumed" not in json.loads((run / "config.json").read_text())  # threads make no other machine
    config["commit"] = "another"
    (run / "config.json").write_text(json.dumps(config))
    directory.note_place(1, 0, {"precision": "bf16", "processes": 1})  # and came to nothing
    train(small(ema_decay=0.9), run, CPU, resume=True)
    (place,) = json.loads((run / "config.json").read_text())["resumed"]
    assert (place["epoch"], place["precision"]) == (1, "no")
    directory.note_place(1, 3, {"precision": "bf16", "processes": 1})  # within the same epoch, which it has a part in
    directory.note_place(1, 4, {"precision": "no", "processes": 1})
    places = json.loads((run / "config.json").read_text())["resumed"]
    assert [(place["step"], place["precision"]) for place in places] == [(0, "no"), (3, "bf16"), (4, "no")]


def test_a_run_goes_on_with_the_optimizer_that_is_fast_here(finished, tmp_path):
    shutil.copytree(finished, run := tmp_path / "run")
    state = torch.load(run / "training.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        assert group["fused"] is True
        group["fused"] = False
    state["epoch"], state["step"] = 1, 5
    torch.save(state, run / "training.pt")
    config = json.loads((run / "config.json").read_text())
    train(small(ema_decay=0.9), run, CPU, seed=config["seed"], resume=True)
    assert torch.load(run / "training.pt", weights_only=True)["optimizer"]["param_groups"][0]["fused"] is True


def test_run_killed_before_its_first_checkpoint_starts_again(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text((finished / "config.json").read_text())
    (run / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
    train(small(ema_decay=0.9), run, CPU, resume=True)
    assert_same_weights(finished, run)


def test_finished_run_resumes_to_its_result(finished):
    before = (finished / "metrics.jsonl").read_text()
    record = train(small(ema_decay=0.9), finished, CPU, resume=True)
    assert record["epoch"] == 2
    assert (finished / "metrics.jsonl").read_text() == before


def test_runs_are_never_overwritten_or_mixed(finished, tmp_path):
    with pytest.raises(ValueError, match="holds a run already: continue it with --resume"):
        train(small(), finished, CPU)
    with pytest.raises(ValueError, match=r"other options \(ema_decay was 0.9, now it is 0.0\)"):
        train(small(), finished, CPU, resume=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        train(small(), tmp_path / "none", CPU, resume=True)


def save_images(path: Path, images: int = 600, classes: int = 2, seed: int = 0) -> str:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255 - 9 * seed, (images, 8, 8), dtype=np.uint8)
    labels = np.arange(images, dtype=np.uint8) % classes
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels[:64], y_test=labels[:64])
    return str(path)


def test_a_run_goes_on_where_its_images_were_moved_and_is_found_there(tmp_path, monkeypatch):
    here, there = save_images(tmp_path / "here" / "own.npz"), save_images(tmp_path / "there" / "own.npz")
    train(small("resnet8", data=here), whole := tmp_path / "whole", CPU)
    run = tmp_path / "run"
    send_signal_after(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Stopped):
        train(small("resnet8", data=here), run, CPU)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "here")
    train(small("resnet8", data=there), run, CPU, resume=True)
    assert_same_weights(whole, run)
    for directory in (run, whole):  # one that is finished is told, too, and that is all
        config = json.loads((directory / "config.json").read_text()) | {"commit": "another"}
        (directory / "config.json").write_text(json.dumps(config))
        train(small("resnet8", data=there), directory, CPU, resume=True)
        assert "resumed" not in json.loads((directory / "config.json").read_text())
        assert describe_run(directory)["data"] == "own"
        assert evaluate_saved(directory, which="best", runtime=CPU)["images"] == 64
    assert export_saved(whole)["on"] == "test images"  # whose model knows the old place alone


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"images": 700}, r"other images \(training_images was 600, now it is 700\)"),  # as many steps an epoch
        ({"classes": 3}, r"other images \(classes was \['0', '1'\], now it is \['0', '1', '2'\]\)"),
        ({"seed": 1}, r"other images \(mean was "),
        ({"name": "others.npz"}, r"other options \(data was .*own.npz, now it is .*others.npz\)"),
    ],
)
def test_a_run_does_not_go_on_with_other_images(tmp_path, monkeypatch, other, message):
    run, recipe = tmp_path / "run", small("resnet8", data=save_images(tmp_path / "own.npz"))
    send_signal_after(monkeypatch, 1, signal.SIGTERM)
    with pytest.raises(Stopped):
        train(recipe, run, CPU)
    monkeypatch.undo()
    before = [(run / name).read_bytes() for name in ("metrics.jsonl", "config.json", "training.pt")]
    path = tmp_path / "there" / other.pop("name", "own.npz")
    with pytest.raises(ValueError, match=message):
        train(small("resnet8", data=save_images(path, **other)), run, CPU, resume=True)
    assert [(run / name).read_bytes() for name in ("metrics.jsonl", "config.json", "training.pt")] == before
    train(recipe, run, CPU, resume=True)


def test_a_run_of_an_older_version_goes_on_where_its_images_lay(finished, tmp_path):
    shutil.copytree(finished, run := tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    assert config.pop("images")["training_images"] == 1437
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"other options \(data was digits, now it is .*digits.npz\)"):
        train(small(ema_decay=0.9, data=save_images(tmp_path / "digits.npz")), run, CPU, resume=True)
    train(small(ema_decay=0.9), run, CPU, resume=True)


def test_what_cannot_be_loaded_leaves_the_run_free(finished, tmp_path):
    shutil.copytree(finished, run := tmp_path / "run")
    state = torch.load(run / "training.pt", weights_only=True)
    torch.save({**state, "optimizer": {}}, run / "training.pt")
    with pytest.raises(
        ValueError, match=r"training.pt does not fit this run \(.*\): it is damaged, or of another vers"
    ):
        train(small(ema_decay=0.9), run, CPU, resume=True)
    torch.save(state, run / "training.pt")
    train(small(ema_decay=0.9), run, CPU, resume=True)


def test_epochs_that_the_metrics_have_lost_are_missed(finished, tmp_path):
    """A machine that died may have written training.pt, and not what came before it."""
    shutil.copytree(finished, run := tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for kept in ([], [line for line in lines if '"epoch": 1' in line], ["[]\n", *lines]):
        (run / "metrics.jsonl").write_text("".join(kept))
        with pytest.raises(ValueError, match=r"metrics.jsonl has [01] of the 2 epochs that were finished: restore it"):
            train(small(ema_decay=0.9), run, CPU, resume=True)


def test_a_finished_run_is_described_as_things_are_today(finished, tmp_path):
    shutil.copytree(finished, run := tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["runtime"] |= {"precision": "fp16", "data_root": "gone"}  # of a GPU that there is no more
    (run / "config.json").write_text(json.dumps(config))
    assert describe_run(run) == describe_run(finished)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), r"memory is full \(CUDA out of memory\): go on with --resume"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory is full .* --batch-size"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error."), "reads images died .* --workers"),
        (RuntimeError("Connection closed by peer [::1]:1"), "another process of the run is gone .* --resume"),
        (torch.distributed.DistBackendError("NCCL timeout"), "another process of the run is gone .* --resume"),
        (RuntimeError("something else"), "^something else$"),
    ],
)
def test_what_a_machine_usually_fails_with_is_explained(tmp_path, monkeypatch, error, said):
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(TrainingStep, "__call__", fail)
    with pytest.raises(RuntimeError, match=said) as raised:
        train(small("resnet8"), tmp_path / "run", CPU)
    assert isinstance(raised.value, TrainingError) == (str(error) != "something else")
    assert RunDirectory(tmp_path / "run").epochs() == []


def test_two_processes_cannot_train_one_run(finished, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.start({"recipe": {}})
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ValueError, match="another process is training in"):
        RunDirectory(tmp_path / "run").resume({"recipe": {}})
    with pytest.raises(ValueError, match="another process is training in"):
        RunDirectory(tmp_path / "run").start({"seed": 1})
    assert (tmp_path / "run" / "config.json").read_text() == before
    run.close()
    with pytest.raises(ValueError, match="holds a run already"):
        RunDirectory(tmp_path / "run").start({"seed": 1})
    assert (tmp_path / "run" / "config.json").read_text() == before
    again = RunDirectory(tmp_path / "run")
    assert again.resume({"recipe": {}}) is None
    again.close()


def test_a_run_whose_training_state_was_removed_is_not_trained_over(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "training.pt").unlink()
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"training\.pt is missing, without which the run cannot go on"):
        train(small(ema_decay=0.9), run, CPU, resume=True)
    assert (run / "metrics.jsonl").read_text() == before


def test_a_folder_is_free_again_where_a_resume_failed_or_copies_of_its_lock_live_on(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    whole = (run / "training.pt").read_bytes()
    (run / "training.pt").write_bytes(whole[:100])
    directory = RunDirectory(run)
    with pytest.raises(ValueError, match=r"training\.pt"):
        directory.resume(config, True)
    (run / "training.pt").write_bytes(whole)
    again = RunDirectory(run)
    again.resume(config, True)
    handle = again._lock
    assert handle is not None
    copy = os.dup(handle)  # as a forked process has it
    again.close()
    last = RunDirectory(run)
    last.resume(config, True)
    last.close()
    os.close(copy)


def test_processes_that_are_stopped_together_save_and_agree_on_the_averages(tmp_path):
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    script, run = Path(__file__).parent / "train_with_averages.py", tmp_path / "run"
    for expected in ([143, 143], [0, 0]):
        running = [
            subprocess.Popen(
                [sys.executable, script, run],
                env={**os.environ, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        assert exit_codes(running) == expected
        assert (run / "training.pt").exists()
    (line,) = read_ledger(tmp_path / "ledger.jsonl")  # of the last model, though the main process was slow to save it
    found = describe_run(run, CPU)
    for name in ("test_error", "test_loss"):
        assert line[name] == pytest.approx(found[name], rel=1e-5)
    assert len(records(run, "step")) == 5
    (epoch,) = records(run, "epoch")
    assert evaluate_saved(run, runtime=CPU)["loss"] == pytest.approx(epoch["test_loss"], rel=1e-6)


@pytest.mark.parametrize("stopped", [False, True])
def test_weights_that_are_no_numbers_never_take_the_place_of_others(tmp_path, monkeypatch, stopped):
    """Between two lines of the log, where nobody looks at the loss."""
    calls = []

    def poisoned(model, inputs, *rest):
        calls.append(0)
        if stopped and len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(model, inputs * float("nan") if len(calls) == 7 else inputs, *rest)

    monkeypatch.setattr(gaternet.step, "training_step", poisoned)
    runtime = replace(CPU, log_every=20, save_minutes=99.0 if stopped else 0.0)
    with pytest.raises(TrainingError, match="the weights' norm is nan in epoch 2 by step 7: start again"):
        train(small("resnet20"), tmp_path / "run", runtime)
    state = torch.load(tmp_path / "run" / "training.pt", weights_only=True)
    assert state["step"] == (5 if stopped else 6)
    assert all(value.isfinite().all() for value in state["network"].values())


def test_non_finite_loss_stops_and_keeps_what_was_saved(tmp_path, monkeypatch):
    calls = []

    def poisoned(model, inputs, *rest):
        calls.append(0)
        return training_step(model, inputs * float("nan") if len(calls) == 7 else inputs, *rest)

    monkeypatch.setattr(gaternet.step, "training_step", poisoned)
    with pytest.raises(TrainingError, match="the loss is nan in epoch 2 by step 7: start again with a lower --lr"):
        train(small("resnet20"), tmp_path / "run", CPU)
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    state = torch.load(tmp_path / "run" / "training.pt", weights_only=True)
    assert state["step"] == 5


def test_full_disk_is_an_error_and_leaves_the_last_checkpoint_whole(finished, tmp_path, gaternet_command):
    run = tmp_path / "run"
    options = ["--epochs", "2", "--batch-size", "256", "--cpu", "--out", str(run)]
    # A file-size limit below the checkpoint's size, where a real full disk would say "no space left".
    limited = f"ulimit -f 1000; exec {shlex.join([*gaternet_command, 'train', 'digits_resnet20_gated', *options])}"
    failed = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert failed.stderr.startswith("error: ")
    assert "free some space" in failed.stderr
    assert not list(run.rglob("*.tmp"))
    assert not (run / "last" / "model.safetensors").exists()  # never half a file
