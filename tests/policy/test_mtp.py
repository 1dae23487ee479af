"""Multi-token prediction: against transformers' own, its loss by hand, and its decoding path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from policy.checkpoint import save_policy
from policy.deepseek import DeepseekPolicy
from policy.logprobs import token_logprobs
from tests.policy.builders import TINY, pack, random_sequences, tiny_policy

DEEP = replace(TINY, num_nextn_predict_layers=2)
CPU = torch.device("cpu")
LENGTHS = (9, 1, 2, 14)


def by_transformers(model: DeepseekPolicy, folder: Path, sequence: list[int]) -> list[Tensor]:
    """Hidden states [length - depth, D] of each depth for one sequence, layer by layer, by transformers' modules."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_layers import MtpModel

    save_policy(model, folder)
    main = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[34].*"]  # it knows of layer 61 only
    ahead: Any = MtpModel.from_pretrained(main).eval()
    ids = torch.tensor([sequence])
    hidden = main.eval().model(ids, use_cache=False).last_hidden_state
    depths = []
    for depth, layer in enumerate(ahead.layers, 1):
        hidden = hidden[:, : len(sequence) - depth]
        places = torch.arange(hidden.shape[1])[None]
        causal = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        angles = ahead.rotary_emb(hidden, position_ids=places)
        embeds = ahead.embed_tokens(ids[:, depth:])
        hidden = layer(embeds, hidden, angles, causal, places, None)
        depths.append(hidden[0])
    return depths


@torch.no_grad()
def test_every_depth_is_that_of_transformers(tmp_path: Path) -> None:
    model = tiny_policy(replace(DEEP, initializer_range=0.2))
    (sequence,) = random_sequences([13])
    ours = model(*pack([sequence]), mtp=True).mtp
    for depth, (got, expected) in enumerate(zip(ours, by_transformers(model, tmp_path, sequence), strict=True), 1):
        assert expected.std() > 0.2
        assert (got[: len(sequence) - depth] - expected).abs().max() < 1e-5 * float(expected.abs().max())


def test_the_loss_is_of_the_token_after_the_next() -> None:
    model = tiny_policy(DEEP)
    sequences = random_sequences(LENGTHS)
    said = token_logprobs(model, *pack(sequences), mtp=True)
    start = 0
    for sequence in sequences:
        for depth, logprobs in enumerate(said.mtp_logprobs, 1):
            hidden = model(*pack([sequence]), mtp=True).mtp[depth - 1]
            table = model.lm_head(hidden).log_softmax(-1)
            own = logprobs[start : start + len(sequence)]
            assert (own[: depth + 1] == 0).all()
            for place in range(depth + 1, len(sequence)):
                expected = table[place - 1 - depth, sequence[place]]
                assert float(own[place].detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
        start += len(sequence)


def test_its_loss_trains_the_layers_and_without_it_they_get_nothing() -> None:
    model = tiny_policy(DEEP)
    packed = pack(random_sequences(LENGTHS))
    said = token_logprobs(model, *packed)
    assert said.mtp_logprobs == ()
    (-said.logprobs.sum()).backward()
    assert all(p.grad is None for layer in model.mtp_layers for p in layer.parameters())
    said = token_logprobs(model, *packed, mtp=True)
    sum(-logprobs.sum() for logprobs in said.mtp_logprobs).backward()
    for layer in model.mtp_layers:
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_a_sequence_does_not_look_ahead_into_the_next() -> None:
    model = tiny_policy(DEEP)
    sequences = random_sequences(LENGTHS)
    other = [*sequences[:-1], random_sequences([LENGTHS[-1]], seed=9)[0]]
    ours, theirs = (token_logprobs(model, *pack(s), mtp=True).mtp_logprobs for s in (sequences, other))
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(got[: sum(LENGTHS[:-1])], expected[: sum(LENGTHS[:-1])], atol=1e-6)


@torch.no_grad()
def test_the_balance_loss_of_its_layers_does_not_depend_on_the_packing() -> None:
    model = tiny_policy(DEEP)
    sequences = random_sequences(LENGTHS)
    together = model(*pack(sequences), mtp=True, return_balance_loss=True).balance_loss
    alone = [model(*pack([s]), mtp=True, return_balance_loss=True).balance_loss for s in sequences]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


@torch.no_grad()
def test_the_main_model_is_the_same_with_and_without_the_layers() -> None:
    model = tiny_policy(DEEP)
    plain = DeepseekPolicy(TINY)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    packed = pack(random_sequences(LENGTHS))
    assert torch.equal(model(*packed, mtp=True).hidden, plain.eval()(*packed).hidden)


@torch.no_grad()
def test_looking_ahead_over_the_cache_is_the_full_forward() -> None:
    model = tiny_policy(DEEP)
    sequences = random_sequences([8, 12])
    full = [model(*pack([sequence]), mtp=True) for sequence in sequences]
    cache = model.new_cache(2, 20, torch.float32, CPU, mtp=True)
    model.prefill(*pack([sequence[:4] for sequence in sequences]), cache)
    hidden = model.decode(torch.tensor([sequence[4:6] for sequence in sequences]), cache)
    # Depth 1 was filled up to position 2 and depth 2 up to position 1, as far as tokens ahead were known.
    positions = torch.tensor([[2, 3, 4, 5]] * 2)
    window = torch.cat((torch.stack([out.hidden[2:4] for out in full]), hidden), 1)
    for depth in (1, 2):
        ahead = torch.tensor([sequence[2 + depth : 6 + depth] for sequence in sequences])
        window = model.look_ahead(window, ahead, positions, cache, depth)
        expected = torch.stack([out.mtp[depth - 1][2:6] for out in full])
        assert (window - expected).abs().max() < 1e-5
