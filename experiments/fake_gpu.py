"""A GPU that is not there: real scripts compute on the CPU with tensors that claim to be on cuda:0.

    python experiments/fake_gpu.py train_opd.py --iterations 1 --eval_prompts 0 --overwrite

Every call of torch is looked at. What is moved to or made on "cuda" is marked; what is computed
from marked tensors is marked. An operation on marked and unmarked tensors fails as it does on a
GPU, except where CUDA allows it (numbers without dimensions, indices on the CPU, copies). So a
forgotten .to(device), .cpu() or dtype is found without a GPU. What kernels compute, what they cost
and what memory holds is not. --dry_run, which has fake tensors of its own, does not run in here.
"""

import contextlib
import importlib
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CUDA, CPU, Tensor = torch.device("cuda", 0), torch.device("cpu"), torch.Tensor
# Between devices these work: copies, and what sets or asks without computing.
BETWEEN = (Tensor.to, Tensor.copy_, Tensor.cpu, Tensor.cuda, Tensor.data.__set__, Tensor.type)
BETWEEN += (Tensor.grad.__set__, torch.as_tensor, torch._has_compatible_shallow_copy_type)
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


class Marked(Tensor):
    """Claims to be on the GPU; results of operations on it are marked, too."""


class FakeGPU(TorchFunctionMode):
    """Inside, "cuda" is a device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return CUDA if isinstance(args[0], Marked) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return isinstance(args[0], Marked)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is Tensor.numpy and isinstance(args[0], Marked):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func in INDEXING:
            tensors = [args[0], *args[2:]]
            if any(isinstance(index, Marked) for index in tree_leaves(args[1])):
                tensors.append(args[1])  # an index on the GPU needs a tensor there
        self.check(func, [t for t in tensors if isinstance(t, Tensor)])
        leaves = tree_leaves((args, kwargs))
        wanted = [torch.device(leaf).type for leaf in leaves if is_device(leaf)]
        args, kwargs = tree_map(here, (args, kwargs))
        out = func(*args, **kwargs)
        if func is Tensor.cpu or wanted == ["cpu"]:
            return tree_map(unmark, out)
        if (
            "cuda" in wanted
            or func is Tensor.cuda
            or (func == Tensor.grad.__get__ and isinstance(args[0], Marked))
        ):
            return tree_map(mark, out)
        return out

    @staticmethod
    def check(func, tensors):
        kinds = {isinstance(tensor, Marked) for tensor in tensors if tensor.dim()}
        if len(kinds) > 1 and func not in BETWEEN:
            shapes = [(tuple(t.shape), "cuda" if isinstance(t, Marked) else "cpu") for t in tensors]
            raise RuntimeError(f"{func} expected all tensors to be on the same device: {shapes}")


def is_device(leaf):
    known = isinstance(leaf, str) and leaf in ("cuda", "cuda:0", "cpu")
    return known or isinstance(leaf, torch.device)


def here(leaf):
    """A GPU's name becomes the CPU's."""
    return CPU if is_device(leaf) and torch.device(leaf).type == "cuda" else leaf


def mark(value):
    return value.as_subclass(Marked) if isinstance(value, Tensor) else value


def unmark(value):
    return value.as_subclass(Tensor) if isinstance(value, Marked) else value


@contextlib.contextmanager
def fake_gpu():
    """Inside, torch.cuda is there, and modules that move keep the marks."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, value in {"is_available": True, "max_memory_allocated": 0}.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, value=value: value))
        for name in ("set_device", "synchronize"):
            stack.enter_context(patch.object(torch.cuda, name, lambda *_: None))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with FakeGPU():
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)


if __name__ == "__main__":
    module = importlib.import_module(Path(sys.argv[1]).stem)
    sys.argv = sys.argv[1:]
    with fake_gpu():
        module.main(module.parse_args())
