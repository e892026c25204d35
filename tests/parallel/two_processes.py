"""Started by torchrun: the smoke recipe's stages on several processes, one thread each."""

from __future__ import annotations

import sys

import torch

from rorqual.cli import main

torch.set_num_threads(1)
sys.exit(main(sys.argv[1:]))
