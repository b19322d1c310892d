"""A working byte-level tokenizer of 512 tokens, made in code: no download, the same on every machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .spec import VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, START, END = "<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [PAD, BOS, EOS, START, END]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Enough English that the merges fill the vocabulary, so that a prompt takes about three characters a token.
_TEXT = """\
The quick brown fox jumps over the lazy dog. A mixture of experts sends every token to a few of its experts and leaves
the others alone, so that a large model costs as little as a small one. Each layer has a router, which looks at the
hidden state of the token and gives a score to each expert. The weights of the experts are most of the weights of the
model. When the model is shared between many devices, one way is to move the tokens to the experts, and another way is
to move the experts to the tokens. Please write a short story about a friendly robot that learns to cook. What is the
capital of France? The capital of France is Paris. Tell me how to make a good cup of coffee in the morning. Hello, my
name is Alice and I would like to know more about the history of the world. The president of the United States is the
head of the government. The future of computing will be different from what people think. Once upon a time there was a
king who lived in a castle by the sea. Count from one to ten: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10. In 2024 there were 366
days. Yes, no, maybe; true or false? You are a helpful assistant. User: question. Answer: because it should have been
said before.
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        # All 256 bytes: every text has tokens, and none is unknown.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    made = tokenizer.get_vocab_size()
    assert made == VOCAB_SIZE, f"the text gives {made} tokens only"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[START, END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1_000_000,
    )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {name: int(value) for name, value in ids.items()}


def unreadable_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that are not plain text by themselves: special ones, control characters, halves of characters."""
    return [i for i in range(VOCAB_SIZE) if not _is_plain(tokenizer.decode([i], skip_special_tokens=True))]


def _is_plain(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable()
