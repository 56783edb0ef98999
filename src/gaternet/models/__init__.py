"""The networks of the paper's tables."""

from gaternet.models.cifar_resnet import CifarResNet
from gaternet.models.create import create_model, model_names

__all__ = ["CifarResNet", "create_model", "model_names"]
