"""The pocket reasoner's tokenizer: a character is a token, and so are a few words and marks."""

from __future__ import annotations

import re
import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>")
WORDS = ("<think>", "</think>", "\\boxed{", "resolve", "search", "ledger", "recall")
CHARACTERS = string.digits + string.ascii_letters + "+-=:;,.?|<>} \n"
VOCABULARY = {token: index for index, token in enumerate((*SPECIAL, *WORDS, *CHARACTERS))}
PATTERN = "|".join(re.escape(token) for token in (*SPECIAL, *WORDS)) + r"|[\s\S]"

TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] }}"
    "{% else %}{{ '<assistant>' + message['content'] + '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant><think>' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '</think>' }}{% endif %}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template; ``enable_thinking=False`` closes the think block at once."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def encode(text: str) -> list[int]:
    """Token ids of trusted text made of the vocabulary's own tokens (fast path for pretraining)."""
    return [VOCABULARY[token] for token in re.findall(PATTERN, text)]
