"""What a run notes of the machine and the code."""

import subprocess

import gaternet.run
from gaternet.run import describe_machine


def test_commit_is_marked_where_code_was_changed_but_not_by_the_ledger(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a", *words], check=True)

    names = ["src/run.py", "docs/results/runs.jsonl", "README.md"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    monkeypatch.setattr(gaternet.run, "__file__", str(tmp_path / "src" / "run.py"))
    git("init", "--quiet")
    assert describe_machine()["commit"] is None  # this code is no part of it
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    clean = describe_machine()["commit"]
    assert len(clean) == 12
    for name in reversed(names):
        assert describe_machine()["commit"] == clean
        (tmp_path / name).write_text("b")
    assert describe_machine()["commit"] == f"{clean}-dirty"


def test_code_that_runs_where_it_lies_is_not_installed(monkeypatch):
    def installed(name):
        assert name != "gaternet", "no package"
        return "1"

    monkeypatch.setattr(gaternet.run, "version", installed)
    assert describe_machine()["versions"]["gaternet"] == gaternet.__version__
