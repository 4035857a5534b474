import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "4")                   # of tiny tensors, more threads only wait for one another
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))           # so that plain `pytest` finds the scripts too
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")              # read when triton is imported: the kernels' tests need it


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
