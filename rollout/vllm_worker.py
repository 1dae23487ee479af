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


def pack_tied_heads_again(model: nn.Module) -> None:
    """Give a head that shares its weight with the embedding what a reload gave the embedding.

    On the CPU, vLLM 0.32 multiplies by a packed copy of the head's weight, made once the head's own weights are loaded;
    a tied head has none, and would go on with the copy of the old embedding.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if (weight := module._parameters.get("weight")) is not None:
            owners.setdefault(id(weight), []).append(module)
    for module in (module for sharing in owners.values() if len(sharing) > 1 for module in sharing):
        method: Any = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)


class WeightUpdateExtension:
    """Mixed into vLLM's worker class by `worker_extension_cls`; its methods are called through `collective_rpc`."""

    model_runner: Any
    reload_weights: Any

    def replace_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        """Replace the model's weights by `weights` (Hugging Face names, one entry per expert)."""
        from vllm.platforms import current_platform

        # On a GPU the kernels read the parameters in place, and captured graphs hold their addresses.
        on_cpu, model = current_platform.is_cpu(), self.model_runner.get_model()
        if on_cpu:
            forget_packed_experts(model)
        self.reload_weights(weights_iterator=iter(weights))
        if on_cpu:
            pack_tied_heads_again(model)
