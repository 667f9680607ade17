"""Trimmed vocabularies: the corpus' sentences keep their pieces, the model its logits, for every kind of tokenizer."""

import json

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import marian, pad
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PegasusTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    set_seed,
)

from hfcompress.corpora import cldr
from hfcompress.errors import ConfigError
from hfcompress.schema import TranslationData, Vocabulary
from hfcompress.tokenizer import train_tokenizer
from hfcompress.trimming import trim_model, trim_tokenizer

PAIRS = cldr("de", "en")["train"].select(range(3000))
SEEN = set("".join([*PAIRS["source"][:200], *PAIRS["target"][:200]]))
NEW = [text for text in PAIRS["source"][200:] if set(text) <= SEEN and text not in PAIRS["source"][:200]]
"""Sentences that the first 200 pairs do not have, of letters that they have."""
LANGUAGES = 100
"""M2M100 numbers them after what it calls its vocabulary."""


def sentencepiece_model(path, **settings):
    text = [*PAIRS["source"], *PAIRS["target"]]
    given = {"vocab_size": 700, "character_coverage": 1.0, "minloglevel": 2, "num_threads": 1, **settings}
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=file, **given)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def make_marian(folder, model="unigram"):
    data = TranslationData(embedded="cldr", source="de", target="en", max_length=64)
    return train_tokenizer(PAIRS, data, Vocabulary(size=700, model=model), folder)


def opus(folder):
    """Two SentencePiece models and one vocabulary, as opus-mt has them; a language token too."""
    sides = [sentencepiece_model(folder / f"{s}.spm", unk_id=1, eos_id=0, bos_id=-1) for s in ("source", "target")]
    tokens = dict.fromkeys(["</s>", "<unk>", *sides[0], ">>eng<<", *sides[1][5:600:2], "<pad>"])
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    from transformers import MarianTokenizer

    files = {"source_spm": folder / "source.spm", "target_spm": folder / "target.spm", "vocab": folder / "vocab.json"}
    return MarianTokenizer(**{name: str(path) for name, path in files.items()}, source_lang="de", target_lang="en")


def m2m(folder):
    pieces = sentencepiece_model(folder / "sentencepiece.bpe.model", model_type="bpe")
    tokens = dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", *pieces])
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    files = {"vocab_file": folder / "vocab.json", "spm_file": folder / "sentencepiece.bpe.model"}
    return M2M100Tokenizer(**{name: str(path) for name, path in files.items()}, src_lang="de", tgt_lang="en")


def unigram(specials):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=specials, unk_token="<unk>", show_progress=False, n_sub_iterations=1
    )
    tokenizer.train_from_iterator([*PAIRS["source"], *PAIRS["target"]], trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["vocab"]]


def t5(folder):
    return T5Tokenizer(vocab=unigram(["<pad>", "</s>", "<unk>"]))


def mbart(folder):
    return MBartTokenizer(vocab=unigram(["<s>", "<pad>", "</s>", "<unk>"]), src_lang="de_DE", tgt_lang="en_XX")


def pegasus(folder):
    return PegasusTokenizer(vocab=unigram(["<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk>"]))


def bpe(tokenizer, specials, alphabet=()):
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=specials, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([*PAIRS["source"], *PAIRS["target"]], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def bart(folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    return BartTokenizer(**bpe(tokenizer, specials, pre_tokenizers.ByteLevel.alphabet()))


def nllb(folder):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    found = bpe(tokenizer, ["<s>", "<pad>", "</s>", "<unk>"])
    return NllbTokenizer(**found, src_lang="deu_Latn", tgt_lang="eng_Latn")


KINDS = {
    "marian": make_marian,
    "marian of BPE": lambda folder: make_marian(folder, "bpe"),
    "opus": opus,
    "m2m": m2m,
    "t5": t5,
    "mbart": mbart,
    "pegasus": pegasus,
    "bart": bart,
    "nllb": nllb,
}


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """(kind, tokenizer as it comes from files)"""
    folder = tmp_path_factory.mktemp("whole")
    KINDS[request.param](folder).save_pretrained(folder / "saved")
    return request.param, AutoTokenizer.from_pretrained(folder / "saved")


def ids_of(tokenizer, sentences, as_target=False):
    return tokenizer(text_target=sentences)["input_ids"] if as_target else tokenizer(sentences)["input_ids"]


def corpus(rows):
    return [PAIRS["source"][i] for i in rows], [PAIRS["target"][i] for i in rows]


def check(old, rows, folder):
    sources, targets = corpus(rows)
    new, kept = trim_tokenizer(old, sources, targets, folder)
    assert (
        kept == sorted(set(kept))
        and len(kept) < len(old) + LANGUAGES
        and len(new) in (len(kept), len(kept) - LANGUAGES)
    )
    for side, sentences in enumerate((sources, targets)):
        for before, after in zip(ids_of(old, sentences, bool(side)), ids_of(new, sentences, bool(side))):
            assert [kept[i] for i in after] == before
    assert [new.tokenize(s) for s in sources] == [old.tokenize(s) for s in sources]
    vocabulary = new.get_vocab()
    assert all(old.convert_ids_to_tokens(kept[i]) == token for token, i in vocabulary.items())
    assert {t: new.convert_tokens_to_ids(t) for t in old.all_special_tokens}.items() <= vocabulary.items()
    return new, kept


def test_sentences_keep_their_pieces(whole, tmp_path):
    _, old = whole
    new, _ = check(old, range(200), tmp_path)
    assert len(NEW) > 300
    for sentence in NEW[:300]:
        assert new.unk_token_id not in new(sentence)["input_ids"] or old.unk_token_id in old(sentence)["input_ids"]


def test_any_part_of_a_corpus(whole, tmp_path_factory):
    _, old = whole

    @given(st.lists(st.integers(0, 2999), min_size=1, max_size=30, unique=True))
    def rows(numbers):
        check(old, numbers, tmp_path_factory.mktemp("trimmed"))

    from hypothesis import settings

    settings(max_examples=6)(rows)()


def test_what_is_decoded_is_what_was_encoded(whole, tmp_path):
    _, old = whole
    _, targets = corpus(range(100))
    new, kept = check(old, range(100), tmp_path)
    for ids in ids_of(new, targets, True):
        whole_ids = [kept[i] for i in ids]
        assert new.decode(ids, skip_special_tokens=True) == old.decode(whole_ids, skip_special_tokens=True)


SIZES = {"d_model": 16, **{f"{s}_{n}": 2 for s in ("encoder", "decoder") for n in ("layers", "attention_heads")}}
SIZES |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64}
T5_SIZES = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1}
MODELS = {
    "marian": (MarianMTModel, MarianConfig, SIZES),
    "opus": (MarianMTModel, MarianConfig, SIZES),
    "m2m": (M2M100ForConditionalGeneration, M2M100Config, SIZES),
    "nllb": (M2M100ForConditionalGeneration, M2M100Config, SIZES),
    "t5": (T5ForConditionalGeneration, T5Config, T5_SIZES),
    "mbart": (MBartForConditionalGeneration, MBartConfig, SIZES),
    "pegasus": (PegasusForConditionalGeneration, PegasusConfig, SIZES),
    "bart": (BartForConditionalGeneration, BartConfig, SIZES),
}


def test_logits_of_kept_tokens_stay(whole, tmp_path):
    kind, old = whole
    if kind not in MODELS:
        pytest.skip("no other network than Marian's")
    network, config, sizes = MODELS[kind]
    ids = {"pad_token_id": old.pad_token_id, "eos_token_id": old.eos_token_id, "bos_token_id": old.bos_token_id}
    ids |= {"decoder_start_token_id": old.pad_token_id, "forced_eos_token_id": old.eos_token_id}
    set_seed(0)
    model = network(config(**sizes, **ids, vocab_size=len(old) + LANGUAGES + 5)).eval()  # some have rows to spare
    model.generation_config.bad_words_ids = [[old.pad_token_id]]
    new, kept = check(old, range(100), tmp_path)
    trimmed = trim_model(model, kept)
    sources, targets = corpus(range(4))
    logits = []
    for network, tokenizer in ((model, old), (trimmed, new)):
        batch = tokenizer(sources, text_target=targets, padding=True, return_tensors="pt")
        batch["labels"][batch["labels"] == tokenizer.pad_token_id] = -100
        with torch.no_grad():
            logits.append(network(**batch.data).logits)
    assert torch.allclose(logits[0][..., kept], logits[1], atol=1e-6, rtol=0)
    assert trimmed.config.vocab_size == len(kept)
    assert trimmed.config.pad_token_id == new.pad_token_id
    assert trimmed.generation_config.bad_words_ids == [[new.pad_token_id]]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (trimmed.get_output_embeddings().weight is trimmed.get_input_embeddings().weight)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "<pad>", "a"])}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    with pytest.raises(ConfigError, match="model WordLevel cannot be trimmed safely"):
        trim_tokenizer(other, ["a"], ["a"], tmp_path)


def test_a_model_whose_special_token_is_gone_is_refused():
    with pytest.raises(ConfigError, match=rf"needs id {pad()}, which is no special token"):
        trim_model(marian(), [0, 1, 2])
    with pytest.raises(ConfigError, match="vocabularies of their own"):
        trim_model(marian(share_encoder_decoder_embeddings=False, tie_word_embeddings=False), [0, pad()])
