"""Run by test_train.py, on one machine and on two: a run whose gradient depends on the global batch alone.

BatchNorm keeps its first statistics, for each process normalises with its own images; the gates' noise is off, for each
draws its own.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from training_runs import CPU, small

import gaternet.preparation
import gaternet.train

build = gaternet.preparation.build_network


def build_with_fixed_norms(*args, **options):
    network = build(*args, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.7)  # for sums of many residual units not to grow
            module.eval()
            module.train = lambda mode=True, module=module: module
    return network


gaternet.preparation.build_network = build_with_fixed_norms
torch.set_num_threads(1)
recipe = small(batch_norm=False, noise_std=0.0, hard_probability=0.0, sparsity_start=0.0, sparsity_ramp=1.0, lr=0.01)
gaternet.train.train(recipe, Path(sys.argv[1]), replace(CPU, cpu=torch.accelerator.is_available()))
