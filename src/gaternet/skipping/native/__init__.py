"""Skipping on CPUs, in C++."""

from gaternet.skipping.native.library import NativeUnavailableError
from gaternet.skipping.native.program import NativeProgram

__all__ = ["NativeProgram", "NativeUnavailableError"]
