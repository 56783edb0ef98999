"""Run by test_train_resume.py, as one of two processes: a run with averaged weights that is stopped, and then goes on.

Every process gets SIGTERM, and then a second one, as from a job manager and from a launcher. The main one is slow to
write what it saves.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from training_runs import CPU, small

import gaternet.step
import gaternet.train
from gaternet import checkpoint, files
from gaternet.ledger import add_run

out, resume = Path(sys.argv[1]), (Path(sys.argv[1]) / "config.json").exists()
step, save, save_model = gaternet.step.training_step, files.save_state, checkpoint.save_model
steps = []


def stopping_step(*args, **kwargs):
    steps.append(0)
    if len(steps) == 3 and not resume:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*args, **kwargs)


def slow_save(*args):
    time.sleep(1)
    save(*args)


def slow_save_model(*args):
    time.sleep(1)
    save_model(*args)


gaternet.step.training_step, files.save_state, checkpoint.save_model = stopping_step, slow_save, slow_save_model
torch.set_num_threads(1)
try:
    gaternet.train.train(small("resnet20", ema_decay=0.9, epochs=1), out, CPU, resume=resume)
    add_run(out.parent / "ledger.jsonl", out, CPU)
    PartialState().destroy_process_group()
except gaternet.train.Stopped as stopped:
    saved = (out / "training.pt").exists()  # whichever ends first
    sys.exit(128 + stopped.signum if saved else "ended before all was saved")
