"""Augmentation: of whole batches of images in memory, on their device; or of single images from files.

What becomes of an image is a function of (seed, epoch, its index), so a run that is cut and resumed, or spread over
several processes, sees the very same pixels. A policy is the exception: in memory it treats eight neighbours of a batch
alike, and is a function of (seed, epoch, step, process).
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from gaternet.recipe import Augmentation

DRAWS = 5  # numbers in [0, 1) that decide an image's crop, flip and cutout
GREY = 128
_GROUP = 8


def augment_batch(
    images: UInt8[Tensor, "batch chans h w"], options: Augmentation, draws: Float[Tensor, "batch draws"], seed: int
) -> UInt8[Tensor, "batch chans h w"]:
    """Augment images that lie in memory.

    Args:
        images: on any device.
        options: what to do; policies are those of CIFAR.
        draws: (B, DRAWS) numbers in [0, 1), on the same device; they decide all but the policy.
        seed: decides what the policy does.
    """
    if options.crop or options.flip:
        images = _move(images, options, draws)
    if options.policy != "none":
        policy = _policy(options, v2.AutoAugmentPolicy.CIFAR10)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            images = torch.cat([policy(part) for part in images.split(_GROUP)])
    return _cut_out(images, options.cutout, draws) if options.cutout else images


def file_transform(options: Augmentation, side: int) -> Callable[[Tensor], Tensor]:
    """For single images (C, H, W); draws from PyTorch's generator. Policies are those of ImageNet.

    Crops are of random size and become `side` x `side`; without them images are to have that size already.
    """
    steps: list[Callable[[Tensor], Tensor]] = [v2.RandomResizedCrop(side) if options.crop else v2.Identity()]
    steps += [v2.RandomHorizontalFlip()] if options.flip else []
    steps += [_policy(options, v2.AutoAugmentPolicy.IMAGENET)] if options.policy != "none" else []
    steps += [partial(_cut_out_one, size=options.cutout)] if options.cutout else []
    return v2.Compose(steps)


def _policy(options: Augmentation, policy: v2.AutoAugmentPolicy) -> Callable[[Tensor], Tensor]:
    if options.policy == "autoaugment":
        return v2.AutoAugment(policy)
    return v2.RandAugment() if options.policy == "randaugment" else v2.TrivialAugmentWide()


def _move(images: Tensor, options: Augmentation, draws: Tensor) -> Tensor:
    """Crop and flip in one gathering of pixels."""
    count, _, height, width = images.shape
    down, right = (max(1, round(side / 8)) if options.crop else 0 for side in (height, width))  # 4 at 32 pixels
    padded = F.pad(images, (right, right, down, down))
    rows = (draws[:, 0] * (2 * down + 1)).long()[:, None] + torch.arange(height, device=images.device)
    columns = (draws[:, 1] * (2 * right + 1)).long()[:, None] + torch.arange(width, device=images.device)
    if options.flip:
        columns = torch.where(draws[:, 2:3] < 0.5, columns.flip(1), columns)
    numbers = torch.arange(count, device=images.device)
    moved = padded[numbers[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2)


def _cut_out_one(image: Tensor, size: int) -> Tensor:
    return _cut_out(image[None], size, torch.rand(1, DRAWS))[0]


def _cut_out(images: Tensor, size: int, draws: Tensor) -> Tensor:
    """Paint a square grey whose centre lies anywhere (DeVries & Taylor, 2017)."""
    inside = []
    for side, draw in zip(images.shape[2:], draws[:, 3:5].unbind(1), strict=True):
        first = (draw * side).long() - size // 2
        places = torch.arange(side, device=images.device) - first[:, None]
        inside.append((places >= 0) & (places < size))
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], GREY)
