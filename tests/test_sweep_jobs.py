"""Jobs of a sweep: what it shows of them, and what it finds out before the first begins."""

import json

from gaternet.recipes import find_recipe
from gaternet.run import RunDirectory
from gaternet.sweep import Job

PLAIN, GATED = find_recipe("digits_resnet20"), find_recipe("digits_resnet20_gated")


def test_metrics_are_read_when_they_have_changed(tmp_path, monkeypatch):
    job, read, epochs = Job(PLAIN, 0, tmp_path), [], RunDirectory.epochs
    monkeypatch.setattr(RunDirectory, "epochs", lambda run: read.append(run.path) or epochs(run))
    assert job.row()[2:] == ["0/20", ""]
    line = {"kind": "epoch", "step": 5, "test_loss": 1.0, "test_accuracy": 0.5}
    for finished in (1, 2):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        for _ in range(3):
            assert job.row()[2:] == [f"{finished}/20", "loss 1.0000 acc 50.00%"]
        assert len(read) == finished
    (tmp_path / "metrics.jsonl").unlink()  # a run that was removed, and is begun anew
    assert job.row()[2:] == ["0/20", ""]
