"""The PyTorch optimizers of the GPU report; see contenders.py for what a run is."""

import gc
from collections.abc import Callable
from typing import Any

from benchmarks.contenders import LEARNING_RATE, WEIGHT_DECAY, Absent, Shapes, require


class TorchRun:
    """A PyTorch optimizer and its params, whose gradients stay as they are."""

    steps = 1

    def __init__(self, torch: Any, optimizer: Any, params: list[Any]):
        self._torch = torch
        self._optimizer = optimizer
        self._params = params

    def __call__(self) -> None:
        self._optimizer.step()

    def sync(self) -> None:
        if self._params[0].is_cuda:
            self._torch.cuda.synchronize()

    @property
    def moved_bytes(self) -> int:
        """Known after a step: before, a PyTorch optimizer has no state."""
        total = sum(2 * p.nbytes + p.grad.nbytes for p in self._params)
        for entries in self._optimizer.state_dict()["state"].values():
            for name, x in entries.items():
                if self._torch.is_tensor(x) and x.ndim:
                    # FlashOptim holds one byte, and hands it out as bfloat16.
                    size = 1 if name == "error_bits" else x.element_size()
                    total += 2 * x.numel() * size
        return total

    def close(self) -> None:
        # JAX could not use what PyTorch's allocator keeps for itself.
        self._params.clear()
        self._optimizer = None
        gc.collect()
        if self._torch.cuda.is_available():
            self._torch.cuda.empty_cache()


class TorchContender:
    """An optimizer in PyTorch.

    Args:
      name: in tables and files.
      build: returns the optimizer of a list of parameters.
      weights: how weights are stored, in words.
      dtype: of params and gradients, which PyTorch wants to be the same.
      needs: packages, by the names of their modules.
      device: where the params are.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[list[Any]], Any],
        *,
        weights: str,
        dtype: str,
        needs: tuple[str, ...],
        device: str = "cuda",
    ):
        self.name = name
        self.weights = weights
        self.gradients = dtype
        self._build = build
        self._needs = needs
        self._device = device

    def make(self, shapes: Shapes, seed: int, looped: bool = False) -> TorchRun:
        if looped:
            raise Absent("PyTorch has no compiled loop of steps")
        for module in self._needs:
            require(module)
        import torch

        if self._device == "cuda" and not torch.cuda.is_available():
            raise Absent("PyTorch sees no CUDA device")
        torch.manual_seed(seed)

        def draw(shape: tuple[int, ...]) -> Any:
            dtype = getattr(torch, self.gradients)
            return 0.02 * torch.randn(shape, device=self._device, dtype=dtype)

        params = [torch.nn.Parameter(draw(shape)) for shape in shapes]
        for p in params:
            p.grad = draw(p.shape)
        return TorchRun(torch, self._build(params), params)


def torch_fused() -> TorchContender:
    """float32 gradients, as PyTorch wants them of float32 params."""

    def build(params: list[Any]) -> Any:
        import torch

        return torch.optim.AdamW(
            params, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )

    return TorchContender(
        "PyTorch AdamW(fused=True)",
        build,
        weights="float32",
        dtype="float32",
        needs=("torch",),
    )


def flashoptim() -> TorchContender:
    """The PyPI package flashoptim, the publication's own implementation."""

    def build(params: list[Any]) -> Any:
        from flashoptim import FlashAdamW

        return FlashAdamW(
            params, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, master_weight_bits=24
        )

    return TorchContender(
        "FlashOptim (PyTorch)",
        build,
        weights="bfloat16 + 8 bits",
        dtype="bfloat16",
        needs=("torch", "flashoptim"),
    )
