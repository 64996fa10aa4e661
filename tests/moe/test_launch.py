"""How a compiled Triton kernel is found again, with a kernel and tensors that only look like real ones."""

from types import SimpleNamespace

import pytest
import torch

from fairseq_evomoe.moe.dispatch.kernels import launch as module


class Kernel:
    """Compiles and runs nothing, but tells what it was asked for."""

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        def run(*args):
            self.log.append(("compile", grid))
            return {(*grid, 1): lambda *args: self.log.append(("found", grid))}

        return run


def tensor(address=64, dtype=torch.float32):
    return SimpleNamespace(
        is_cuda=True, device=SimpleNamespace(index=0), dtype=dtype, data_ptr=lambda: address
    )


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_compiled", {})
    log = []
    kernel = Kernel(log)

    def run(*tensors, size=32, constant="relu"):
        module.launch(kernel, (2, 3), tensors, (size,), (constant,))
        return log[-1][0]

    return run


def test_what_is_compiled_depends_on_kinds_and_not_on_values(launch, monkeypatch):
    monkeypatch.setattr(module, "look_up", True)
    assert launch(tensor(), None) == "compile"
    assert launch(tensor(128), None, size=48) == "found"
    others = [
        ((tensor(4), None), {}),
        ((tensor(dtype=torch.bfloat16), None), {}),
        ((tensor(), tensor()), {}),
        ((tensor(), None), {"size": 33}),
        ((tensor(), None), {"size": 1}),
        ((tensor(), None), {"size": 2**31}),
        ((tensor(), None), {"constant": "gelu"}),
    ]
    assert [launch(*tensors, **more) for tensors, more in others] == ["compile"] * len(others)
    assert [launch(*tensors, **more) for tensors, more in others] == ["found"] * len(others)


def test_triton_finds_it_unless_told_otherwise(launch):
    assert [launch(tensor()) for _ in range(2)] == ["compile"] * 2
