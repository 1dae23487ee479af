"""torch.compile for the parts of a policy's blocks that it can follow."""

from __future__ import annotations

import torch

from policy.deepseek import MLP, DeepseekPolicy, MixtureOfExperts


def compile_blocks(model: DeepseekPolicy, backend: str = "inductor") -> None:
    """Compile attention and the dense and shared feed-forward of every layer in place, also of a parallelized policy.

    A block as a whole is not compiled, because of its routed experts: their grouped products have no traceable form in
    fp32, and how many tokens each gets, or a rank sends, is known only as they run. That cuts the block into graphs for
    each kind of layer, more than torch keeps, and recomputing activations then picks other graphs than the forward.
    The parts take any lengths; one token or one sequence are graphs of their own, and all layers share them. A model of
    transformers is a TypeError: its attention gets its documents as an object that torch.compile can't follow.
    """
    if not isinstance(model, DeepseekPolicy):
        raise TypeError(f"{type(model).__name__} can't be compiled by block: compile_blocks is for DeepseekPolicy")
    for layer in [*model.main_layers, *model.mtp_layers]:
        feed_forward = layer.mlp.shared_experts if isinstance(layer.mlp, MixtureOfExperts) else layer.mlp
        assert isinstance(feed_forward, MLP)
        for part in (layer.self_attn, feed_forward):
            part.forward = torch.compile(part.forward, dynamic=True, backend=backend)
