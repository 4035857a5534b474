import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))           # so that plain `pytest` finds the scripts too
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")              # read when triton is imported: the kernels' tests need it


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
