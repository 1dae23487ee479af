"""Dense policies against transformers' own models, which compute one document at a time with plain attention."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from policy import dense_config
from policy.checkpoint import hf_state_dict, save_policy
from policy.checkpoint_read import CheckpointError
from policy.config import PolicyConfigError
from policy.dense import DensePolicy, load_dense
from policy.dense_config import DenseConfig
from policy.logprobs import token_logprobs
from tests.policy.builders import pack, random_sequences
from tests.policy.dense_builders import SHAPES, VOCAB, dense_policy, reference

pytest.importorskip("transformers")

LENGTHS = (17, 1, 9, 30, 5)


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DensePolicy, Any]:
    """The policy that reads what transformers has saved, and transformers' model."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = reference(request.param, folder)
    return load_dense(folder).eval(), theirs


def sequences(seed: int = 0) -> list[list[int]]:
    return random_sequences(LENGTHS, seed, VOCAB)


def logprobs_one_by_one(model: Any, documents: Sequence[Sequence[int]], temperature: float) -> Tensor:
    """Log-probabilities [T] of each token given its prefix, without packing; 0 for the first of a document."""
    parts = []
    for ids in map(torch.tensor, documents):
        logprobs = (model(ids[None], use_cache=False).logits[0] / temperature).log_softmax(-1)
        parts += [logprobs.new_zeros(1), logprobs[:-1].gather(1, ids[1:, None]).squeeze(1)]
    return torch.cat(parts)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_logprobs_are_those_of_transformers_one_by_one(
    pair: tuple[DensePolicy, Any], temperature: float
) -> None:
    ours, theirs = pair
    with torch.no_grad():
        packed = token_logprobs(ours, *pack(sequences()), temperature=temperature).logprobs
        single = logprobs_one_by_one(theirs, sequences(), temperature)
    assert single.std() > 1  # far from uniform, so that a wrong layer would show
    assert (packed - single).abs().max() < 1e-5


def test_gradients_of_every_parameter_are_those_of_transformers(pair: tuple[DensePolicy, Any]) -> None:
    ours, theirs = pair
    upstream = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(2))
    ours.zero_grad()
    theirs.zero_grad()
    (token_logprobs(ours, *pack(sequences(1))).logprobs * upstream).sum().backward()
    (logprobs_one_by_one(theirs, sequences(1), 1.0) * upstream).sum().backward()
    wanted = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == wanted.keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        expected = wanted[name].grad
        # A key bias moves all scores of a query alike: its gradient is 0 but for rounding.
        scale = max(float(expected.abs().max()), 1e-2)
        assert (parameter.grad - expected).abs().max() < 2e-5 * scale, name


def test_a_document_is_computed_as_if_it_were_alone(pair: tuple[DensePolicy, Any]) -> None:
    ours, _ = pair
    documents, others = sequences(), sequences(7)
    with torch.no_grad():
        whole = ours(*pack(documents)).hidden.split(LENGTHS)
        for changed in range(len(documents)):
            mixed = [others[i] if i == changed else document for i, document in enumerate(documents)]
            for i, part in enumerate(ours(*pack(mixed)).hidden.split(LENGTHS)):
                assert torch.equal(part, whole[i]) == (i != changed)
        for i, document in enumerate(documents):
            assert (ours(*pack([document])).hidden - whole[i]).abs().max() < 1e-5


@torch.no_grad()
def decoded(model: DensePolicy, documents: list[list[int]], sizes: Sequence[int]) -> Tensor:
    """Hidden states [B, n, D] of the last sum(sizes) tokens of each document, decoded in steps of these sizes."""
    ahead = sum(sizes)
    prompts = [document[:-ahead] for document in documents]
    cache = model.new_cache(len(prompts), max(map(len, prompts)), torch.float32, torch.device("cpu"))
    prefilled = model.prefill(*pack(prompts), cache)
    assert torch.equal(prefilled, model(*pack(prompts)).hidden)
    assert cache.lengths.tolist() == [len(prompt) for prompt in prompts]
    cache = cache.select(torch.arange(len(prompts)), cache.capacity + ahead)
    rest = torch.tensor([document[-ahead:] for document in documents])
    parts = []
    for tokens in rest.split(list(sizes), 1):
        parts.append(model.decode(tokens, cache))
        cache.lengths = cache.lengths + tokens.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1, 1, 1), (3, 1, 4), (8,)])
def test_decoding_is_the_full_forward(pair: tuple[DensePolicy, Any], sizes: Sequence[int]) -> None:
    ours, _ = pair
    documents = random_sequences([20, 9, 31], 3, VOCAB)
    with torch.no_grad():
        whole = ours(*pack(documents)).hidden.split([20, 9, 31])
    expected = torch.stack([part[-8:] for part in whole])
    assert (decoded(ours, documents, sizes) - expected).abs().max() < 1e-5


def test_a_cache_keeps_what_was_decoded_when_rows_are_chosen_and_repeated() -> None:
    model = dense_policy("qwen3")
    documents = random_sequences([12, 7], 4, VOCAB)
    with torch.no_grad():
        whole = model(*pack(documents)).hidden.split([12, 7])
        cache = model.new_cache(2, 12, torch.float32, torch.device("cpu"))
        model.prefill(*pack([document[:-2] for document in documents]), cache)
        tokens = torch.tensor([document[-2:] for document in documents])
        model.decode(tokens[:, :1], cache)  # behind the lengths, which stay
        cache = cache.select(torch.tensor([1, 0, 1]), 20)
        cache.lengths = cache.lengths + 1
        last = model.decode(tokens[[1, 0, 1], 1:], cache)
    assert (cache.capacity, cache.lengths.tolist()) == (20, [6, 11, 6])
    expected = torch.stack([whole[1][-1:], whole[0][-1:], whole[1][-1:]])
    assert (last - expected).abs().max() < 1e-5


def kept_for_backward(model: DensePolicy, gradients: dict[str, Tensor]) -> int:
    """Bytes that one training step holds on to; its gradients are added to `gradients`."""
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = token_logprobs(model, *pack(sequences())).logprobs.sum()
    loss.backward()
    gradients |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return sum(held.values())


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_activation_checkpointing_gives_the_same_gradients_and_keeps_less(name: str) -> None:
    model = dense_policy(name).train()
    plain: dict[str, Tensor] = {}
    recomputed: dict[str, Tensor] = {}
    everything = kept_for_backward(model, plain)
    model.enable_activation_checkpointing()
    assert kept_for_backward(model, recomputed) < 0.5 * everything
    assert plain.keys() == recomputed.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(recomputed[key], gradient) for key, gradient in plain.items())
    model.enable_activation_checkpointing(False)
    assert kept_for_backward(model, {}) == everything


def test_half_precision_keeps_the_rotary_frequencies(tmp_path: Path) -> None:
    reference("llama", tmp_path)
    exact, half, cast = load_dense(tmp_path), load_dense(tmp_path, torch.bfloat16), dense_policy("llama")
    cast = cast.to(torch.bfloat16)
    for model in (half, cast):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, exact.get_buffer(name)), name
    with torch.no_grad():
        gaps = [
            (
                token_logprobs(model, *pack(sequences())).logprobs - token_logprobs(exact, *pack(sequences())).logprobs
            ).abs()
            for model in (half, cast)
        ]
    assert torch.equal(*gaps)
    assert 1e-4 < gaps[0].mean() < 0.03


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_a_policy_of_the_meta_device_becomes_a_real_one(name: str) -> None:
    expected = dense_policy(name)
    with torch.device("meta"):
        model = DensePolicy(expected.config)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "qwen2")
    model.load_state_dict(expected.state_dict())
    model.reset_buffers()
    with torch.no_grad():
        assert torch.equal(model.eval()(*pack(sequences())).hidden, expected(*pack(sequences())).hidden)


def test_the_head_is_called_inside_with_its_weight() -> None:
    model = dense_policy("qwen2")
    seen: list[tuple[Tensor, Tensor, int]] = []

    def head(hidden: Tensor, weight: Tensor, depth: int) -> str:
        seen.append((hidden, weight, depth))
        return "made of it"

    output = model(*pack(sequences()), head=head)
    assert output == ("made of it", (), None, None)
    [(hidden, weight, depth)] = seen
    assert torch.equal(hidden, model(*pack(sequences())).hidden)
    assert weight is model.lm_head.weight is model.model.embed_tokens.weight
    assert depth == 0


@pytest.mark.parametrize(
    "asked",
    [
        {"mtp": True},
        {"routed_experts": torch.zeros(sum(LENGTHS), 1, 1)},
        {"return_routed_experts": True},
        {"return_balance_loss": True},
    ],
)
def test_what_needs_experts_or_prediction_layers_is_refused(asked: dict[str, Any]) -> None:
    [name] = asked
    with pytest.raises(ValueError, match=rf"a dense qwen2 has no experts .* can't serve {name}\."):
        dense_policy("qwen2")(*pack(sequences()), **asked)


def test_weights_come_from_the_seed_alone_and_are_counted() -> None:
    first, again, other = dense_policy("qwen2", 3), dense_policy("qwen2", 3), dense_policy("qwen2", 4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    key = first.get_parameter("model.layers.1.self_attn.k_proj.weight")
    assert not torch.equal(key, other.get_parameter("model.layers.1.self_attn.k_proj.weight"))
    assert float(key.detach().std()) == pytest.approx(0.12, rel=0.05)


# Checkpoints.


def test_a_saved_policy_is_read_by_transformers_and_by_us(pair: tuple[DensePolicy, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours, _ = pair
    save_policy(ours, tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    theirs, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = load_dense(tmp_path)
    assert again.config.to_hf_dict() == ours.config.to_hf_dict()
    for name, weight in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight), name
        assert torch.equal(again.state_dict()[name], weight), name


def test_names_on_disk_are_those_of_the_wire(pair: tuple[DensePolicy, Any], tmp_path: Path) -> None:
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert hf_state_dict(ours).keys() == ours.hf_state_dict().keys() == stored.keys()


def drop(weights: dict[str, Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]


def reshape(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(8, 128)


def extend(weights: dict[str, Tensor]) -> None:
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(96, 128)


def untie(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"missing model\.layers\.1\.mlp\.up_proj\.weight; missing model\.norm\.weight"),
        (reshape, r"model\.layers\.0\.self_attn\.k_proj\.weight is \[8, 128\], the config says \[64, 128\]"),
        (extend, r"unknown model\.layers\.2\.mlp\.up_proj\.weight"),
        (untie, r"lm_head\.weight differs from the weight it should share"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    reference("qwen2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_dense(tmp_path)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    reference("qwen3", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut off"):
        load_dense(tmp_path)


def test_a_repeated_tied_head_and_old_rotary_frequencies_are_read_over(tmp_path: Path) -> None:
    reference("qwen2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((16,), 9.0)
    save_file(weights, tmp_path / "model.safetensors")
    expected = dense_policy("qwen2").state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in load_dense(tmp_path).state_dict().items())


# Configs.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nonsense"}, "model_type='nonsense': transformers knows no such causal LM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures=.*not \['LlamaForCausalLM'\]"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type=dynamic"),
        ({"hidden_size": "wide"}, r"can't read this llama config\.json.*hidden_size"),
        ({"model_type": "mixtral"}, r"num_local_experts=8 \(a mixture of experts\)"),
        ({"model_type": "gemma2"}, r"attn_logit_softcapping=50\.0, final_logit_softcapping=30\.0"),
        ({"model_type": "granite", "logits_scaling": 8.0}, r"logits_scaling=8\.0"),
    ],
)
def test_a_config_that_can_not_be_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyConfigError, match=f"(?s){message}"):
        DenseConfig.from_hf_dict(SHAPES["llama"] | changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model_type": "stablelm"}, "StableLmForCausalLM has its attention written into it"),
        ({"model_type": "gpt_neox"}, "GPTNeoXForCausalLM is not a `model` and an `lm_head`"),
    ],
)
def test_an_architecture_of_another_build_is_refused(shape: dict[str, Any], message: str) -> None:
    shape = SHAPES["llama"] | shape | {"num_key_value_heads": 4, "head_dim": 16, "rope_parameters": None}
    with pytest.raises(PolicyConfigError, match=message):
        DensePolicy(DenseConfig.of_shape(shape))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model_type": "granite", "logits_scaling": 8.0}, "GraniteForCausalLM differs from transformers' own"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 5.0}, "Gemma2Attention asks attention for softcap"),
    ],
)
def test_what_the_config_does_not_tell_shows_in_the_logits(
    shape: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_config, "_NEUTRAL", {})
    model = DensePolicy(DenseConfig.of_shape(SHAPES["qwen3"] | shape))
    model.reset_parameters(0)
    with pytest.raises(PolicyConfigError, match=message):
        model.check_against_transformers()


def test_a_config_is_kept_as_it_was_read_and_a_new_one_is_complete() -> None:
    shape = {**SHAPES["qwen2"], "torch_dtype": "bfloat16", "architectures": ["Qwen2ForCausalLM"], "a_note": 7}
    config = DenseConfig.from_hf_dict(json.loads(json.dumps(shape)))
    expected = {k: v for k, v in shape.items() if k != "torch_dtype"} | {"dtype": "float16"}
    assert config.to_hf_dict("float16") == expected
    assert (config.vocab_size, config.max_position_embeddings, config.eos_token_id) == (VOCAB, 256, 2)
    assert config.tie_word_embeddings
    assert config.cache_shape == (2, 2, 32)
    assert DenseConfig.from_hf_dict(shape | {"eos_token_id": [5, 6]}).eos_token_id == 5
    complete = DenseConfig.of_shape(SHAPES["qwen2"]).to_hf_dict()
    assert complete["architectures"] == ["Qwen2ForCausalLM"]
    assert complete["rms_norm_eps"] == 1e-6
    json.dumps(complete)


def test_without_transformers_the_other_policies_work() -> None:
    import subprocess
    import sys

    code = "import sys, policy.interface; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_no_tokens_at_all_give_gradients_of_zero(name: str) -> None:
    model = dense_policy(name)
    nothing = torch.zeros(0, dtype=torch.long)
    said = token_logprobs(model, nothing, nothing, torch.zeros(1, dtype=torch.int32))
    assert said.logprobs.shape == said.entropy.shape == (0,)
    said.logprobs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
