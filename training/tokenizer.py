"""The bundled model's tokenizer: a small byte-level BPE with Phi-4's chat markers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Enough for the problems, and a multiple of 128, as every dimension of a Linear layer here is.
VOCABULARY = 896

# Phi-4's special tokens in Phi-4's roles; Phi-4 pads with one of its unused tokens.
BOS, START, SEPARATOR, EOS, PAD = (
    "<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|dummy_85|>"
)  # fmt: skip

# Behaves as Phi-4's template: a turn is start, role, separator, content, end; no newlines between.
CHAT_TEMPLATE = (
    "{%- for message in messages if message.role in ['system', 'user', 'assistant'] -%}"
    "<|im_start|>{{ message.role }}<|im_sep|>{{ message.content }}<|im_end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant<|im_sep|>{%- endif -%}"
)


def few_shot_form(question: str, answer: str) -> str:
    """One document as lm-eval's gsm8k writes a shot, with the blank line that joins shots."""
    return f"Question: {question}\nAnswer: {answer}\n\n"


def chat_form(question: str, answer: str) -> str:
    """One user turn and its answer, as the chat template writes them."""
    return (
        f"{START}user{SEPARATOR}{question}{EOS}{START}assistant{SEPARATOR}{answer}{EOS}"
    )


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` entries in which every digit is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[BOS, START, SEPARATOR, EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=BOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
