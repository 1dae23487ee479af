"""Tokenizers in Hugging Face form: one trained on a corpus for the built-in tasks, or a checkpoint's own."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END, PAD = "<|end|>", "<|pad|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def train_tokenizer(texts: Iterable[str], vocab_size: int, chat_template: str) -> PreTrainedTokenizerBase:
    """A byte-level BPE for any text: numbers in pairs of digits from the right, the R1 tags as single tokens.

    Merges may cross words, so that a prompt template that every text repeats costs a token or two.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]{1,2}(?=(?:[0-9]{2})*(?![0-9]))"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD, *TAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The trainer does not know the tags yet and would learn merges across them that are never used.
    between_tags = re.compile("|".join(map(re.escape, TAGS)))
    pieces = (piece for text in texts for piece in between_tags.split(text))
    every_pair = (f"{pair:02d}" for pair in range(100) for _ in range(100))
    tokenizer.train_from_iterator(itertools.chain(every_pair, pieces), trainer)
    # The tags are ordinary text to a verifier: kept when decoding without special tokens, unlike end and pad.
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] not in TAGS
    tokenizer = Tokenizer.from_str(json.dumps(state))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.chat_template = chat_template
    return fast


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a completion: the end-of-sequence token; a tokenizer without one is a UserError."""
    token = tokenizer.eos_token_id
    if not isinstance(token, int):
        raise UserError(f"the tokenizer's eos_token_id is {token!r}: set its eos_token, or no completion would end.")
    return (token,)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a checkpoint; a folder without one is a UserError."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json: save the tokenizer beside the weights (tokenizer.save_pretrained)."
        )
    described = folder / "tokenizer_config.json"
    if not described.is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    if json.loads(described.read_text()).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        # Not a matter of model_type: AutoTokenizer would make qwen2's own of it, with other ids.
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
