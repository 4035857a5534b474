"""For all tests: where the scripts lie, how kernels run, the seed."""
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")                   # of the scripts that tests start
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # deterministic matrix products
import torch

torch.set_num_threads(1)                                        # threads on tiny tensors only wait
sys.path.insert(0, str(Path(__file__).parent.parent))           # plain `pytest` finds the scripts
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")              # read when triton is imported


def patch_once_a_launch():
    """Triton's interpreter patches triton.language anew at each call within a kernel, which takes
    as long as all else. Once a launch is enough, for each module of jitted functions.
    """
    try:
        from triton.runtime import interpreter
        patch = interpreter._patch_lang
        launch = interpreter.GridExecutor.__call__
    except (ImportError, AttributeError):
        return                                                  # another version: slow, but right
    patched = set()

    def patch_once(fn):
        module = id(fn.__globals__)
        if module not in patched:
            patched.add(module)
            return patch(fn)

    def launch_anew(*args, **constants):
        patched.clear()
        return launch(*args, **constants)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_once_a_launch()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def kernels_on(monkeypatch):
    """Kernels run whatever they can: on the GPU, or in Triton's interpreter. Gives the device."""
    import model
    if model.kernels is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(model.kernels, "ON_CPU", True)
    return "cpu"


@pytest.fixture(params=["plain", "kernels"])
def device(request):
    """The device of a test that runs twice: in plain PyTorch on a CPU, and by the kernels."""
    return "cpu" if request.param == "plain" else request.getfixturevalue("kernels_on")
