"""The joint vocabulary (Marian's ids; the same bytes and ids in a fresh process) and encoded pairs."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq

from hfcompress.corpora import cldr
from hfcompress.errors import ConfigError, DataError
from hfcompress.schema import TranslationData, Vocabulary
from hfcompress.tokenizer import encode_pairs, train_tokenizer

SIZE = 600
DATA = TranslationData(embedded="cldr", source="de", target="en", max_length=64)
AWKWARD = ["<pad> x", "</s>", "a\r\nb\u2028c\x00d", "日本 🙂", "", " ", "\ufeffe", "<unk>", "▁▁", "a" * 3000]


@pytest.fixture(scope="module")
def pairs():
    return cldr("de", "en")["train"].select(range(3000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(pairs, folder):
    return train_tokenizer(pairs, DATA, Vocabulary(size=SIZE), folder)


def texts(*rows):
    return Dataset.from_dict({"source": [s for s, _ in rows], "target": [t for _, t in rows]})


def digest(folder):
    whole = b"".join(path.name.encode() + path.read_bytes() for path in sorted(folder.iterdir()))
    return hashlib.sha256(whole).hexdigest()


def python(code, *arguments, **environment):
    """Runs `code` in a fresh Python; returns what it printed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("model", ["unigram", "bpe"])
@pytest.mark.parametrize("size", [128, 1000])
def test_ids_are_marians(model, size, pairs, tmp_path):
    tokenizer = train_tokenizer(pairs, DATA, Vocabulary(size=size, model=model), tmp_path)
    assert len(tokenizer) == tokenizer.vocab_size == size
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (0, 1, size - 1)
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))
    assert (tmp_path / "source.spm").read_bytes() == (tmp_path / "target.spm").read_bytes()


def test_no_id_of_text_is_padding_or_out_of_range(tokenizer, pairs):
    for side in ("source", "target"):
        for ids in tokenizer(list(pairs[side]))["input_ids"]:
            assert ids[-1] == 0 and all(1 < i < SIZE - 1 for i in ids[:-1])  # every character is covered


def test_decoding_gives_the_text_back(tokenizer, pairs):
    """Up to Unicode's compatibility forms: SentencePiece writes a narrow space as a space."""
    import unicodedata

    for text in pairs["target"][:500]:
        normal = " ".join(unicodedata.normalize("NFKC", text).split())
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == normal


def test_a_fresh_process_gives_the_same_bytes_and_ids(tokenizer, folder, pairs, tmp_path):
    code = f"""
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
from hfcompress.corpora import cldr
from hfcompress.schema import TranslationData, Vocabulary
from hfcompress.tokenizer import train_tokenizer
data = TranslationData(embedded="cldr", source="de", target="en", max_length=64)
train_tokenizer(cldr("de", "en")["train"].select(range(3000)), data, Vocabulary(size={SIZE}), Path(sys.argv[2]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
sentences = json.loads(sys.argv[3])
print(json.dumps([type(tokenizer).__name__, len(tokenizer), tokenizer.model_max_length,
    tokenizer(sentences)["input_ids"], tokenizer(text_target=sentences)["input_ids"]]))
"""
    sentences = [*pairs["source"][:50], *pairs["target"][:50], *AWKWARD]
    ids = tokenizer(sentences)["input_ids"]
    environment = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    answer = json.loads(python(code, folder, tmp_path, json.dumps(sentences), **environment).splitlines()[-1])
    assert answer == ["MarianTokenizer", SIZE, DATA.max_length, ids, ids]
    assert digest(tmp_path) == digest(folder)


def test_nothing_names_the_folder_it_was_made_in(tokenizer, folder):
    assert not [path.name for path in folder.iterdir() if str(folder).encode() in path.read_bytes()]


# ----------------------------------------------------------------------------------------- impossible sizes


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_impossible_sizes_name_the_possible_ones(model, tmp_path):
    pairs = cldr("de", "en")["train"].select(range(300))

    def train(size):
        return len(train_tokenizer(pairs, DATA, Vocabulary(size=size, model=model), tmp_path))

    for size, word in ((16, "at least"), (10**6, "at most")):
        with pytest.raises(ConfigError, match=rf"vocabulary\.size {size} is too .*{word} (\d+)") as refusal:
            train(size)
        allowed = int(str(refusal.value).rstrip(".").split()[-1])
        assert train(allowed) == allowed


@pytest.mark.parametrize("rows", [[], [("", " ")], [("\u3000", "")]])
def test_a_corpus_of_nothing(rows, tmp_path):
    with pytest.raises(ConfigError, match=r"vocabulary\.size 64 does not fit this corpus"):
        train_tokenizer(texts(*rows), DATA, Vocabulary(size=64), tmp_path)


def test_a_corpus_that_spells_padding(tmp_path):
    corpus = texts(("x<pad>y z<pad>", "<pad><pad> a<pad>b"), ("see the b<pad>ear", "cat dog<pad>ma"))
    tokenizer = train_tokenizer(corpus, DATA, Vocabulary(size=40, model="bpe"), tmp_path)
    assert (len(tokenizer), tokenizer.pad_token_id) == (40, 39)


# --------------------------------------------------------------------------------------------- encoded pairs


def test_encoded_pairs_are_the_tokenizers(tokenizer, pairs):
    encoded = encode_pairs(pairs, tokenizer, DATA, truncate=False)
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"] and len(encoded) == len(pairs)
    for row in (0, 1, 999, 2999):
        assert encoded[row]["input_ids"] == tokenizer(pairs[row]["source"])["input_ids"]
        assert encoded[row]["labels"] == tokenizer(text_target=pairs[row]["target"])["input_ids"]
        assert encoded[row]["attention_mask"] == [1] * len(encoded[row]["input_ids"])
    batch = DataCollatorForSeq2Seq(tokenizer)([encoded[0], encoded[1]])
    assert batch["input_ids"].shape[0] == batch["labels"].shape[0] == 2


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.lists(st.integers(0, 2999), min_size=1, max_size=40))
def test_long_pairs_are_left_out_of_training_and_cut_for_evaluation(tokenizer, pairs, longest, rows):
    data = TranslationData(embedded="cldr", source="de", target="en", max_length=longest)
    some = pairs.select(rows)
    whole = [tuple(tokenizer(row[side])["input_ids"] for side in ("source", "target")) for row in some]
    cut = encode_pairs(some, tokenizer, data, truncate=True)
    assert list(cut["input_ids"]) == [(s if len(s) <= longest else [*s[: longest - 1], 0]) for s, _ in whole]
    assert list(cut["labels"]) == [(t if len(t) <= longest else [*t[: longest - 1], 0]) for _, t in whole]
    fitting = [pair for pair in whole if max(map(len, pair)) <= longest]
    if not fitting:
        with pytest.raises(DataError, match=f"None of {len(rows)} pairs has at most {longest} tokens"):
            encode_pairs(some, tokenizer, data, truncate=False)
        return
    kept = encode_pairs(some, tokenizer, data, truncate=False)
    assert list(zip(kept["input_ids"], kept["labels"])) == fitting


def test_what_is_left_out_is_logged(tokenizer, caplog):
    rows = texts(("drei", "three"), ("eins, " * 50, "one"), ("zwei", "two, " * 50))
    with caplog.at_level(logging.WARNING):
        assert len(encode_pairs(rows, tokenizer, DATA, truncate=False)) == 1
    assert "Left out 2 of 3 pairs: longer than 64 tokens" in caplog.text


def test_awkward_text_is_encoded(tokenizer):
    rows = texts(*((text, text) for text in AWKWARD))
    encoded = encode_pairs(rows, tokenizer, DATA, truncate=True)
    assert len(encoded) == len(AWKWARD)
    assert all(0 < len(ids) <= 64 and ids[-1] == 0 for name in ("input_ids", "labels") for ids in encoded[name])


def test_encoding_is_silent_and_leaves_nothing_behind(tokenizer, pairs, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded = encode_pairs(pairs, tokenizer, DATA, truncate=False)
    assert capfd.readouterr() == ("", "")
    assert not encoded.cache_files


def test_training_is_silent(pairs, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_tokenizer(pairs, DATA, Vocabulary(size=SIZE), tmp_path)
    assert capfd.readouterr() == ("", "")
