"""The README's code runs, and what it names exists."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from gaternet.cli import app
from gaternet.recipes import RECIPES
from gaternet.skipping.dense import ENGINES
from gaternet.trained import Trained

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_example_runs(capsys):
    code = blocks("python")[0]
    assert len(code.strip().splitlines()) == 5
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape == (8, 10)
    assert names["gates"].shape == (8, 336)
    assert set(names["gates"].unique().tolist()) <= {0, 1}
    assert capsys.readouterr().out.strip() == str(names["gates"].mean())
    for name in set(re.findall(r"`(?:model|GaterNet)\.(\w+)", README)):
        assert hasattr(names["model"], name), name
    for name in set(re.findall(r"gaternet\.(\w+)\(", README)):
        assert hasattr(names["gaternet"], name), name
    assert isinstance(names["logits"], torch.Tensor)


def test_modules_that_are_named_need_no_import_of_their_own():
    names = sorted(set(re.findall(r"`gaternet\.(\w+(?:\.\w+)+)", README)))
    assert "train.train" in names
    code = "import gaternet, operator\n" + "\n".join(f"operator.attrgetter({name!r})(gaternet)" for name in names)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_longer_python_examples_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(blocks("python")[1], names)
    assert names["model"].num_gates == 4800
    assert capsys.readouterr().out.startswith("Macs(backbone=1814073344, gater=")
    exec(blocks("python")[2], names)
    assert names["model"].backbone.fc.weight.grad is not None
    assert Trained.open(tmp_path / "tuned").preprocessing.height == 224
    exec(blocks("python")[3], names)
    assert capsys.readouterr().out.startswith("conv1: reads all of 3, writes open filters of 64")
    assert torch.equal(names["again"](names["images"]), names["fast"](names["images"]))
    exec(blocks("python")[4], names)
    assert names["found"].images == 2
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"index.html", "gates.json"}
    exec(blocks("python")[5], names)
    assert "gate patterns" in capsys.readouterr().out
    assert torch.equal(names["gates"], names["model"].gates(names["images"]))
    assert {path.name for path in tmp_path.iterdir()} >= {"model.onnx", "open.onnx", "model.pt2"}


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines() if "gaternet " in line])
def test_shell_commands_name_real_recipes_and_options(line):
    words = shlex.split(line.split("gaternet ", 1)[1], comments=True)
    commands = {c.name or c.callback.__name__: c for c in app.registered_commands if c.callback}
    assert words[0] in commands
    if words[0] == "train":
        assert words[1] in RECIPES
    command = get_command(app).commands[words[0]]  # pyright: ignore[reportAttributeAccessIssue]
    known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_help_of_bench_names_the_dense_engines():
    (option,) = [p for p in get_command(app).commands["bench"].params if p.name == "engine"]  # pyright: ignore[reportAttributeAccessIssue]
    assert f"{', '.join(ENGINES)};" in option.help


def test_table_lists_every_command():
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert set(re.findall(r"^\| `gaternet (\w+)", README, re.MULTILINE)) == commands


def test_as_many_networks_are_covered_as_it_says():
    covered = json.loads((ROOT / "docs" / "results" / "coverage.json").read_text())
    assert f"has {len(covered)} networks of timm and torchvision" in " ".join(README.split())


def test_links_and_make_targets_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        headings = {
            f"#{line.lstrip('# ').lower().replace(' ', '-')}" for line in README.splitlines() if line[:1] == "#"
        }
        assert target in headings or (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", "\n".join(blocks("sh")))) | {"check"}:
        assert f"\n{target}:" in makefile
