"""The text tokenizer and the numbering of the shared vocabulary: text, special tokens, ``<boi>``, ``<eoi>``, codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nextflow_ar.storage import StorageError, read_checked

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
BOI, EOI = "<boi>", "<eoi>"
SPECIAL_TOKENS: tuple[str, ...] = (END_OF_TEXT, TURN_START, TURN_END, BOI, EOI)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<boi><eoi>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, as Qwen uses it; an image part stands as ``<boi><eoi>``, and the layout puts its scales between the two."""


def fast_tokenizer(core: Tokenizer) -> PreTrainedTokenizerFast:
    """The fast tokenizer around a trained core, with its special tokens and chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def train_text_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most ``vocab_size`` entries, special tokens included. Any text round-trips exactly."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    return fast_tokenizer(core)


def load_text_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A saved text tokenizer. Raises StorageError when it is missing, damaged or lacks a special token."""
    name = "tokenizer.json"
    text = read_checked(folder, name).decode()
    try:
        core = Tokenizer.from_str(text)
    except Exception as error:
        raise StorageError(f"{folder}: {name} is not a text tokenizer: {str(error)[:100]}") from None
    missing = [token for token in SPECIAL_TOKENS if core.token_to_id(token) is None]
    if missing:
        raise StorageError(f"{folder}: the text tokenizer lacks {', '.join(missing)}")
    return fast_tokenizer(core)


_SHORT, _HELD = 16, 4096
"""Texts of so many letters are kept with their ids, so many of them: roles and short answers come again and again."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids of the shared vocabulary. Text entries are 0..text_size-1 (a table may be padded beyond the tokenizer's
    entries), code c is ``text_size + c``.
    """

    tokenizer: PreTrainedTokenizerFast
    text_size: int
    codes: int
    _known: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)
    _marks: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.tokenizer) > self.text_size:
            raise ValueError(
                f"the text tokenizer has {len(self.tokenizer)} entries, the model {self.text_size}"
            )

    def special(self, token: str) -> int:
        """Id of a special token. Raises ValueError for a token that is not special."""
        if token not in self._marks:
            if token not in SPECIAL_TOKENS:
                raise ValueError(f"{token!r} is no special token: one of {', '.join(SPECIAL_TOKENS)}")
            self._marks[token] = int(self.tokenizer.convert_tokens_to_ids(token))  # pyright: ignore[reportArgumentType]
        return self._marks[token]

    @property
    def boi(self) -> int:
        """Begin of image."""
        return self.special(BOI)

    @property
    def eoi(self) -> int:
        """End of image."""
        return self.special(EOI)

    @property
    def end(self) -> int:
        """End of a response."""
        return self.special(END_OF_TEXT)

    @property
    def never(self) -> list[int]:
        """Entries that text generation must not choose: image marks, turn marks, and ids without a token."""
        marks = [self.special(t) for t in (BOI, EOI, TURN_START, TURN_END)]
        return marks + list(range(len(self.tokenizer), self.text_size))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Special tokens inside it are spelled out as text, so a prompt cannot forge them."""
        known = self._known.get(text)
        if known is None:
            known = tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
            if len(text) <= _SHORT and len(self._known) < _HELD:
                self._known[text] = known
        return list(known)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
