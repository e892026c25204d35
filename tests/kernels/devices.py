"""Where the Triton forms are tested: in Triton's interpreter on CPU, and on a GPU (marked gpu)."""

from __future__ import annotations

import os

import pytest

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
