"""Data for training: text becomes tokens in a folder, once, and training draws windows from it.

With the tokenizer ``"bytes"`` the tokens are the bytes of the files, unchanged, with no header and no separator between them:
every byte that a model is scored on is a byte of the data, and compressors can be compared on exactly the same bytes.
"""

from longnet.training.data.corpus import (
    Corpus,
    check_documents,
    check_lengths,
    is_prepared,
    open_corpus,
    read_corpus,
    remove_prepared,
)
from longnet.training.data.listing import check_outside, list_files
from longnet.training.data.preparation import check_free
from longnet.training.data.sources import check_no_row_options, find_source
from longnet.training.data.stream import (
    Stream,
    TokensOnDisk,
    cut_windows,
    draw_starts,
    draw_windows,
    pack_windows,
)
from longnet.training.data.tokenizer import BYTES, TOKENIZER_FILES, Tokenizer, read_tokenizer, train_tokenizer

__all__ = [
    "BYTES",
    "TOKENIZER_FILES",
    "Corpus",
    "Stream",
    "Tokenizer",
    "TokensOnDisk",
    "check_documents",
    "check_free",
    "check_lengths",
    "check_no_row_options",
    "check_outside",
    "cut_windows",
    "draw_starts",
    "draw_windows",
    "find_source",
    "is_prepared",
    "list_files",
    "open_corpus",
    "pack_windows",
    "read_corpus",
    "read_tokenizer",
    "remove_prepared",
    "train_tokenizer",
]
