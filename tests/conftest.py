import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))           # so that plain `pytest` finds the scripts too


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
