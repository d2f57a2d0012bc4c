"""The word-piece tokenizer of the published BLIP models, against transformers and by its own rules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from madtp.errors import DataError
from zoo.blip.tokenizer import StatementTokenizer

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "left", "image", "##s", "dog", "two", ".", ",", "cafe"]
DECODE, ENCODE, END = len(PIECES), len(PIECES) + 1, 3


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return path


def test_enc_stands_first_and_padding_is_masked(vocabulary: Path) -> None:
    tokenizer = StatementTokenizer(vocabulary)
    ids, mask = tokenizer(["The left images.", "Two dogs, zebra"])
    assert len(tokenizer) == len(PIECES) + 2
    assert ids.tolist() == [[ENCODE, 5, 6, 7, 8, 11, END], [ENCODE, 10, 9, 8, 12, 1, END]]
    ids, mask = tokenizer(["dog", "The left images."])
    assert ids[0].tolist() == [ENCODE, 9, END, 0, 0, 0, 0]
    assert mask[0].tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert ids.dtype == mask.dtype == torch.long


@given(
    words=st.lists(st.sampled_from(["dog", "images", "Café", "zebra", "."]), max_size=30), positions=st.integers(3, 9)
)
def test_statements_fit_the_positions(vocabulary: Path, words: list[str], positions: int) -> None:
    ids, mask = StatementTokenizer(vocabulary, positions)([" ".join(words)])
    assert ids.shape == mask.shape
    assert ids.shape[1] <= positions
    assert ids[0, 0] == ENCODE
    assert ids[0, -1] == END
    assert mask.all()


@given(st.lists(st.text(max_size=20), min_size=1, max_size=3))
def test_equals_transformers_with_enc_in_front(vocabulary: Path, statements: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer(vocab=str(vocabulary), do_lower_case=True)
    theirs.add_special_tokens({"bos_token": "[DEC]"})
    theirs.add_tokens(["[ENC]"], special_tokens=True)
    expected = theirs(statements, padding="longest", return_tensors="pt")
    expected.input_ids[:, 0] = theirs.convert_tokens_to_ids("[ENC]")
    ids, mask = StatementTokenizer(vocabulary)(statements)
    assert torch.equal(ids, expected.input_ids)
    assert torch.equal(mask, expected.attention_mask)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (["[PAD]", "[UNK]", "dog"], r"lacks \[SEP\]"),
        (["dog", "[PAD]", "[UNK]", "[SEP]"], r"has \[PAD\] on line 2"),
    ],
)
def test_vocabulary_of_another_model_is_refused(tmp_path: Path, pieces: list[str], message: str) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        StatementTokenizer(tmp_path / "vocab.txt")


def test_missing_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no vocabulary file"):
        StatementTokenizer(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n[UNK]\n[SEP]\ncaf\xe9\n", r"vocab\.txt cannot be read \(line 4 is not UTF-8"),
        ("[PAD]\n[UNK]\n[SEP]\n".encode("utf-16"), r"vocab\.txt cannot be read \(line 1 is not UTF-8"),
        (b"[PAD]\n[UNK]\n[SEP]\ndog\n[UNK]\n", r"vocab\.txt, line 5, repeats line 2"),
        (b"[PAD]\n[UNK]\n\n[SEP]\n", r"vocab\.txt, line 3, is empty"),
        (b"", r"vocab\.txt, line 1, is empty"),
    ],
)
def test_damaged_vocabularies_name_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        StatementTokenizer(tmp_path / "vocab.txt")
