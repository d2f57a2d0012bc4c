"""Word pieces for the published BLIP models: statements to ids. Start with :class:`StatementTokenizer`.

The vocabulary is the ``vocab.txt`` of bert-base-uncased (30,522 lines), which the user supplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from madtp.errors import DataError
from madtp.files.json_text import read_text

PAD, UNKNOWN, END = "[PAD]", "[UNK]", "[SEP]"
# BLIP appends these two to the vocabulary; [ENC] takes the place of BERT's [CLS] in front of a statement.
DECODE, ENCODE = "[DEC]", "[ENC]"


class StatementTokenizer:
    """Turns statements into "[ENC] pieces [SEP]", lower-cased, padded to the longest of the call."""

    def __init__(self, vocabulary: str | Path, positions: int = 512) -> None:
        """Read a BERT vocabulary.

        Args:
            vocabulary: a ``vocab.txt``, one word piece a line.
            positions: longest id sequence; longer statements are cut before [SEP].

        Raises:
            DataError: the file is missing or lacks a special token, or [PAD] does not come first.
        """
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

        pieces = _read_vocabulary(Path(vocabulary))
        tokenizer = Tokenizer(models.WordPiece(pieces, unk_token=UNKNOWN, max_input_chars_per_word=100))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.add_special_tokens([PAD, UNKNOWN, END, DECODE, ENCODE])
        special = [(token, tokenizer.token_to_id(token)) for token in (ENCODE, END)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{ENCODE} $A {END}", special_tokens=special)
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.enable_truncation(positions)
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PAD), pad_token=PAD)
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        """Size of the vocabulary, [DEC] and [ENC] included."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, statements: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids ``[B, T]`` and attention mask ``[B, T]`` (1: token), both long."""
        encoded = self._tokenizer.encode_batch(list(statements))
        ids = torch.tensor([item.ids for item in encoded], dtype=torch.long)
        mask = torch.tensor([item.attention_mask for item in encoded], dtype=torch.long)
        return ids, mask

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens; an apostrophe between words joins them, as in "man's"."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).replace(" ' ", "'")


def _read_vocabulary(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise DataError(f"There is no vocabulary file {path}; supply the vocab.txt of bert-base-uncased.")
    # Not splitlines(): it would also split at rarer separators that may be word pieces themselves.
    try:
        lines = read_text(path).removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); supply the vocab.txt of bert-base-uncased.") from error
    pieces: dict[str, int] = {}
    for index, line in enumerate(lines):
        if not line or pieces.setdefault(line, index) != index:
            fault = f"repeats line {pieces[line] + 1}" if line else "is empty"
            raise DataError(f"{path}, line {index + 1}, {fault}; supply the vocab.txt of bert-base-uncased.")
    absent = [token for token in (PAD, UNKNOWN, END) if token not in pieces]
    if absent:
        raise DataError(f"{path} lacks {', '.join(absent)}; supply the vocab.txt of bert-base-uncased.")
    if pieces[PAD] != 0:
        raise DataError(f"{path} has {PAD} on line {pieces[PAD] + 1}; BLIP needs it on the first.")
    return pieces
