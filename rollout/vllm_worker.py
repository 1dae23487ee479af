"""What vLLM's worker learns from us: replacing all weights of the running model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def forget_packed_experts(model: nn.Module) -> None:
    """Make the next reload pack the expert weights anew.

    On the CPU, vLLM 0.32 packs expert weights for its grouped matrix product when it builds the expert kernel, and
    builds that only while `moe_kernel` is None: otherwise a reload leaves unpacked numbers in the packed layout.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class WeightUpdateExtension:
    """Mixed into vLLM's worker class by `worker_extension_cls`; its methods are called through `collective_rpc`."""

    model_runner: Any
    reload_weights: Any

    def replace_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        """Replace the model's weights by `weights` (Hugging Face names, one entry per expert)."""
        from vllm.platforms import current_platform

        # On a GPU the kernels read the parameters in place, and captured graphs hold their addresses.
        if current_platform.is_cpu():
            forget_packed_experts(self.model_runner.get_model())
        self.reload_weights(weights_iterator=iter(weights))
