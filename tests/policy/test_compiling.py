"""Compiled blocks against plain ones: the same numbers, and no new graph for every length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from policy.compiling import compile_blocks
from policy.deepseek import DeepseekPolicy
from policy.logprobs import token_logprobs
from tests.policy.builders import TINY, pack, random_sequences, tiny_policy


def logprobs_with_backward(model: DeepseekPolicy, lengths: list[int]) -> Tensor:
    said = token_logprobs(model, *pack(random_sequences(lengths)), mtp=True, return_balance_loss=True)
    assert said.balance_loss is not None
    (said.logprobs.sum() + said.mtp_logprobs[0].sum() + said.balance_loss.sum()).backward()
    return said.logprobs.detach()


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_are_equal_and_share_graphs_over_layers_and_lengths(recompute: bool):
    config = replace(TINY, num_nextn_predict_layers=1, num_hidden_layers=4)
    plain, model = tiny_policy(config).train(), tiny_policy(config).train()
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward  # aot_eager takes longer and adds nothing here

    compile_blocks(model, cast(Any, backend))
    model.enable_activation_checkpointing(recompute)
    counts = []
    for lengths in ([9, 4, 7], [12, 3], [5, 5, 5, 6], [1], [17], [33, 2], [11]):
        expected = logprobs_with_backward(plain, lengths)
        torch.testing.assert_close(logprobs_with_backward(model, lengths), expected, atol=1e-5, rtol=1e-5)
        counts.append(len(graphs))
    for (name, theirs), ours in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)
    # Attention, dense and shared feed-forward; then once more for one token, and attention for one sequence.
    assert counts == [3, 3, 3, 6, 7, 7, 7]


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="Linear can't be compiled"):
        compile_blocks(cast(Any, torch.nn.Linear(2, 2)))
