"""Properties of the section splitter that hold for every report, and a table of what real ones do."""

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cxrvlm.reports import HEADERS, SECTIONS, is_blank, split_sections

quick = settings(deadline=None, max_examples=150)

NAMES = sorted((name, section) for section, names in SECTIONS.items() for name in names)
WORDS = ["clear", "lungs", "no", "change.", "finding:", "(stable)", "1.", "2.", "___", "10:45", "AM", "ap/pa", "XXXX", "impression:"]
sentence = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
body = st.lists(sentence, max_size=3)
letters = st.sampled_from([str.upper, str.title, str.capitalize])
mark = st.sampled_from([":", " :", ": ", "\t:\t"])
margin = st.sampled_from(["", " ", "   ", "\t", "\xa0"])
line_end = st.sampled_from(["\n", "\r\n", "\r", "\n\n", " \n \n"])


@st.composite
def reports(draw):
    """A report built from known parts, and the sections it was built from."""
    lines, expected, section = [], {}, "report"
    for block in range(draw(st.integers(0, 5))):
        if block or draw(st.booleans()):
            name, section = draw(st.sampled_from(NAMES))
            expected.setdefault(section, [])
            on_its_line = draw(st.sampled_from(["", *WORDS]))
            lines.append(draw(letters)(name) + draw(mark) + on_its_line)
            expected[section] += on_its_line.split()
        for line in draw(body):
            lines.append(line)
            expected.setdefault(section, []).extend(line.split())
    text = "".join(draw(margin) + line + draw(margin) + draw(line_end) for line in lines)
    return text, {s: " ".join(words) for s, words in expected.items() if words or s != "report"}


@quick
@given(reports())
def test_a_report_comes_apart_into_what_it_was_built_from(built):
    text, expected = built
    assert split_sections(text) == expected
    assert list(split_sections(text)) == list(expected)


@quick
@given(st.text(st.sampled_from("AaFINDGSimpreso: \n\r\t\0\xa0_1.()/&,-\u2028\x0c"), max_size=80))
@example("FINDINGS:FINDINGS:FINDINGS")
@example("CHEST:\nFINDINGS:")
@example("CHEST: ___\nCHEST: ___")
def test_only_names_of_sections_can_disappear(text):
    def characters(s):
        return Counter("".join(s.replace("\0", " ").split()))

    sections = split_sections(text)
    before, after = characters(text), characters("".join(sections.values()))
    assert not after - before
    lost = "".join((before - after).elements()).lower()
    assert set(lost) <= set("".join(HEADERS)) | set("s:()/&")
    assert set(sections) <= set(SECTIONS)
    for section in sections.values():
        assert section == " ".join(section.split())


@quick
@given(st.text(max_size=200))
def test_any_text_is_read_and_text_without_a_header_stays_whole(text):
    sections = split_sections(text)
    words = " ".join(text.replace("\0", " ").replace("\ufeff", " ").split())
    if not any(name in words.lower() for name in HEADERS) and ":" not in words:
        assert sections == ({"report": words} if words else {})


@quick
@given(reports())
def test_the_kind_of_line_end_does_not_matter(built):
    text = built[0].replace("\r\n", "\n").replace("\r", "\n")
    assert split_sections(text) == split_sections(text.replace("\n", "\r\n"))
    assert split_sections(text) == split_sections("\ufeff" + text)


ODD = {
    "IMPRESSION: Clear.": {"impression": "Clear."},
    "Impression:Clear.": {"impression": "Clear."},
    "impression: Clear.": {"report": "impression: Clear."},
    "  CONCLUSIONS :  Clear. ": {"impression": "Clear."},
    "FINDINGS\n\nClear.\n\nIMPRESSION\n\nNormal.": {"findings": "Clear.", "impression": "Normal."},
    "FINDINGS:\nIMPRESSION: Clear.": {"findings": "", "impression": "Clear."},
    "FINDINGS:IMPRESSION:": {"findings": "IMPRESSION:"},
    "FINDINGS AND IMPRESSION: Clear.": {"impression": "Clear."},
    "Findings/Impressions:\nClear.": {"impression": "Clear."},
    "IMPRESSION:\n 1. Clear.\n 2. Rib fracture.": {"impression": "1. Clear. 2. Rib fracture."},
    "IMPRESSION: A.\nFINAL REPORT\nIMPRESSION: B.": {"impression": "A. B."},
    "IMPRESSION: A.\nFINAL REPORT\nSee above.\nIMPRESSION: B.": {"impression": "A. B.", "report": "See above."},
    "IMPRESSION: ___": {"impression": "___"},
    "WET READ: ___ 10:45 PM\n Clear.": {"wet_read": "___ 10:45 PM Clear."},
    "PROVISIONAL FINDINGS IMPRESSION (PFI): Clear.\nIMPRESSION: Effusion.": {"wet_read": "Clear.", "impression": "Effusion."},
    "RECOMMENDATION(S):\nCT.\nNOTIFICATION:  By phone at 10:45 AM.": {"recommendation": "CT.", "notification": "By phone at 10:45 AM."},
    "REASON FOR EXAM: cough": {"indication": "cough"},
    "FINDINGS:\nLUNGS: Clear.\nHEART: Normal.": {"findings": "LUNGS: Clear. HEART: Normal."},
    "TECHNIQUE: AP.\nPORTABLE CHEST:  Clear.": {"technique": "AP.", "examination": "PORTABLE CHEST", "findings": "Clear."},
    "COMPARISON: None.\nSINGLE AP VIEW OF THE CHEST:\nClear.": {
        "comparison": "None.", "examination": "SINGLE AP VIEW OF THE CHEST", "findings": "Clear."},
    "HISTORY: ___.\nCLINIC: 4\nA.": {"history": "___.", "report": "CLINIC: 4 A."},
    "INDICATION: Fever.\n10:45 AM": {"indication": "Fever. 10:45 AM"},
    "INDICATION: Fever.\nAT 10:45": {"indication": "Fever. AT 10:45"},
    "COMPARISON: None. IMPRESSION: Clear.": {"comparison": "None. IMPRESSION: Clear."},
    "FINDINGS: There is\none finding: a nodule": {"findings": "There is one finding: a nodule"},
    "IMPRESSION.\nClear.": {"report": "IMPRESSION. Clear."},
    "The lungs are clear.\n\nNormal chest.": {"report": "The lungs are clear. Normal chest."},
    "IMPRESSION:\r\n\tClear.\r\nFINDINGS:\rNormal.": {"impression": "Clear.", "findings": "Normal."},
    "\ufeffIMPRESSION:\xa0No\0change": {"impression": "No change"},
    "": {},
    " \n\0\t\r\n": {},
    "FINAL REPORT": {},
}


@pytest.mark.parametrize("text", ODD)
def test_oddities(text):
    assert split_sections(text) == ODD[text]


def test_a_long_line_takes_no_long_time():
    line = "IMPRESSION (" * 20_000
    assert split_sections(line) == {"report": line.strip()}


@pytest.mark.parametrize("value", [None, float("nan"), 3, b"IMPRESSION: Clear."])
def test_what_is_not_text_is_refused(value):
    with pytest.raises(ValueError, match="must be text"):
        split_sections(value)


@quick
@given(st.lists(st.sampled_from(["_", "___", "X" * 2, "XXXX", "1.", "-", " ", "\n", "42", "/"])).map(" ".join), st.sampled_from("aéZß"))
def test_blank_means_no_letter_besides_the_marks(marks, letter):
    assert is_blank(marks)
    assert not is_blank(f"{marks} {letter} {marks}")
