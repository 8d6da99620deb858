"""A user's table: what comes back is what was written, in every format, and each advice helps."""
import hashlib
import io
import warnings
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cxrvlm.cxrbert import ReportSections
from cxrvlm.downstream import read_labels
from cxrvlm.openi import load_openi
from cxrvlm.reports import READ_AS, split_sections
from cxrvlm.settings import load_settings
from cxrvlm.studies import COLUMNS, StudiesError, cut_report, fingerprint, load_table, read_own, read_table
from cxrvlm.text import train_tokenizer

quick = settings(deadline=None, max_examples=60)
LONG = 10_000_000_000_000_000


def rows(ids: list) -> pd.DataFrame:
    "A good table with these patients."
    n = len(ids)
    return pd.DataFrame({"image": [f"{i}.png" for i in range(n)], "study_id": [f"s{i}" for i in range(n)], "patient_id": ids,
                         "findings": "", "impression": [f"Small effusion, number {i}." for i in range(n)]})


def load(path: Path, **options) -> pd.DataFrame:
    with warnings.catch_warnings(action="ignore"):
        return load_table(path, **options)[0]


# What pandas writes, we read


WRITERS = {
    "csv": lambda t, p: t.to_csv(p, index=False),
    "csv, quoted, semicolons": lambda t, p: t.to_csv(p, index=False, sep=";", quoting=1),
    "tsv with BOM and CRLF": lambda t, p: t.to_csv(p, index=False, sep="\t", encoding="utf-8-sig", lineterminator="\r\n"),
    "csv with its index": lambda t, p: t.to_csv(p),
    "parquet": lambda t, p: t.to_parquet(p, index=False),
    "parquet, patients in the index": lambda t, p: t.set_index("patient_id").to_parquet(p),
    "parquet, two ids in the index": lambda t, p: t.set_index(["patient_id", "study_id"]).to_parquet(p),
    "parquet, categories": lambda t, p: t.astype({"patient_id": "category"}).to_parquet(p, index=False),
    "parquet, bytes": lambda t, p: t.assign(patient_id=t.patient_id.str.encode("utf-8")).to_parquet(p, index=False),
    "excel's csv": lambda t, p: p.write_text("\ufeff" + t.to_csv(index=False, sep=";")),
    "json": lambda t, p: t.to_json(p, orient="records"),
    "json lines": lambda t, p: t.to_json(p, orient="records", lines=True),
    "feather": lambda t, p: t.to_feather(p),
    "html": lambda t, p: t.to_html(p),
    "pickle": lambda t, p: t.to_pickle(p),
    "gzip": lambda t, p: t.to_csv(p, index=False, compression="gzip"),
}
REFUSED = {"json", "json lines", "feather", "html", "pickle", "gzip"}
word = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)
name = st.one_of(word, st.integers(0, 10**18).map(str), st.sampled_from(["007", "NA", "nan", "4e074085", "1.0", "p 1", "1e5"]))


@quick
@given(st.lists(name, min_size=2, max_size=8), st.sampled_from(sorted(WRITERS)))
@example(["NA", "p1"], "csv")
@example(["10000000000000001", "10000000000000002"], "parquet, patients in the index")
def test_what_was_written_is_read_or_refused(tmp_path_factory, ids, writer):
    path, table = tmp_path_factory.mktemp("t") / ("t.parquet" if "parquet" in writer else "t.csv"), rows(ids)
    WRITERS[writer](table, path)
    if writer in REFUSED:
        with pytest.raises(StudiesError, match="no table that is read here"):
            load(path)
        return
    try:
        found = load(path)
    except StudiesError as error:
        assert "lost digits" in str(error) or "cells hold" in str(error)
        return
    plain = [each.strip() for each in ids]
    if all(each.removesuffix(".0").isdecimal() for each in plain):
        plain = [each.removesuffix(".0") for each in plain]
    assert found.patient_id.tolist() == plain
    assert found[["study_id", "findings", "impression"]].equals(table[["study_id", "findings", "impression"]])


TYPES = [pa.int64(), pa.uint64(), pa.string(), pa.large_string(), pa.decimal128(38, 0), pa.dictionary(pa.int32(), pa.string()), pa.float64(), pa.float32(), pa.binary()]


@quick
@given(st.lists(st.one_of(st.none(), st.integers(0, 2**62)), min_size=2, max_size=8), st.sampled_from(TYPES))
@example([None, LONG + 1, LONG + 2], pa.int64())
@example([None, LONG + 1, LONG + 2], pa.float64())
@example([16777217, 16777216], pa.float32())
def test_no_digit_of_an_id_is_lost(tmp_path_factory, ids, kind):
    "Whatever the type: the right patients, or an error where the type has rounded."
    path = tmp_path_factory.mktemp("t") / "t.parquet"
    make = {pa.decimal128(38, 0): Decimal, pa.binary(): lambda i: str(i).encode()}.get(kind, str if "string" in str(kind) else float if kind in (pa.float64(), pa.float32()) else int)
    cells = pa.array([None if i is None else make(i) for i in ids], kind)
    table = pa.Table.from_pandas(rows(ids).drop(columns="patient_id"), preserve_index=False).append_column("patient_id", cells)
    pq.write_table(table.replace_schema_metadata(None), path)
    exact = {"float": 2**24, "double": 2**53}.get(str(kind), 2**63)
    if any(i is not None and i >= exact for i in ids):
        with pytest.raises(StudiesError, match="lost digits"):
            load(path)
    elif not any(i is not None and i >= 10**15 for i in ids):
        assert load(path).patient_id.tolist() == [f"s{row}" if i is None else str(i) for row, i in enumerate(ids)]


def test_ids_that_count_in_the_index(tmp_path):
    rows(["x"] * 5).drop(columns="patient_id").rename_axis("patient_id").to_parquet(tmp_path / "t.parquet")
    assert load(tmp_path / "t.parquet").patient_id.tolist() == list("01234")


@quick
@given(st.lists(name, min_size=1, max_size=6), st.lists(name, min_size=1, max_size=6))
def test_our_own_tables_are_literal(tmp_path_factory, patients, arms):
    own = pd.DataFrame([(a, p, 0.5, None) for a in arms for p in patients], columns=["arm", "patient_id", "value", "auroc"]).astype({"auroc": float})
    own.to_csv(path := tmp_path_factory.mktemp("t") / "own.csv.gz", index=False)
    pd.testing.assert_frame_equal(read_own(path), own, check_dtype=False)


def test_a_labels_file_keeps_its_patients(tmp_path):
    (tmp_path / "l.csv").write_text(f"image,patient,Edema\na.png,{LONG + 1},1\nb.png,{LONG + 3},None\nc.png,007,-1\n")
    labels = read_labels(tmp_path / "l.csv")
    assert labels.patient_id.tolist() == [str(LONG + 1), str(LONG + 3), "007"] and labels.Edema.tolist()[::2] == [1, -1]
    (tmp_path / "l.csv").write_text("image,patient,Edema\na.png,NA,1\nb.png,1,0\n")
    with pytest.raises(ValueError, match="1 cells hold 'NA'"):
        read_labels(tmp_path / "l.csv")


# Reports


def test_openi_comes_out_as_before():
    "By its own loader, and as a table of somebody's, where HTML that Open-i left is all that changes."
    studies, _ = load_openi()
    assert len(studies) == 3820 and fingerprint(studies) == "2d49e6e521fdd12a"


SPELLINGS = {
    "lines": lambda text: text,
    "one line": lambda text: " ".join(text.split()),
    "lower case": lambda text: text.replace("FINDINGS", "findings").replace("IMPRESSION", "impression").replace("EXAMINATION", "examination"),
    "Markdown": lambda text: "".join(f"**{line}**" if line.isupper() else line for line in text.splitlines(True)).replace("**FINDINGS:\n**", "**FINDINGS:**\n").replace("**IMPRESSION:\n**", "**IMPRESSION:**\n"),
    "hashes": lambda text: text.replace("FINDINGS:", "## Findings").replace("IMPRESSION:", "## Impression"),
    "numbers": lambda text: text.replace("FINDINGS", "1. FINDINGS").replace("IMPRESSION", "2. IMPRESSION"),
    "brackets": lambda text: text.replace("FINDINGS:", "[FINDINGS]").replace("IMPRESSION:", "[IMPRESSION]"),
    "full-width colons": lambda text: text.replace(":\n", "：\n"),
    "dashes": lambda text: text.replace("FINDINGS:\n", "FINDINGS - ").replace("IMPRESSION:\n", "IMPRESSION - "),
    "escaped breaks": lambda text: text.replace("\n", "\\n"),
    "HTML": lambda text: text.replace("\n", "<br/>").replace("FINDINGS:", "<b>Findings:</b>").replace("IMPRESSION:", "<b>Impression:</b>"),
}


WORDS = {
    "IMP": "FINDINGS: Clear. IMP: Normal.", "Imp., and a list": "Findings:\n1. Liver     : Clear.\nImp.:\nNormal.", "A/P": "Findings: Clear.\nA/P: Normal.",
    "assessment": "Findings: Clear.\nAssessment and Plan:\nNormal.", "interpretation": "FINDINGS: Clear.\nINTERPRETATION\nNormal.", "a number": "FINDINGS: Clear.\nIMPRESSION (1): Normal.",
    "no colon": "FINDINGS Clear. IMPRESSION Normal.", "German": "Befund: Clear. Beurteilung: Normal.", "Spanish": "HALLAZGOS: Clear.\nImpresio\u0301n diagnóstica: Normal.",
    "French, as French is printed": "Résultats\u00a0: Clear.\nConclusion\u00a0: Normal.", "Chinese": "所见：Clear.\n印象：Normal.", "a narrow blank": "FINDINGS\u202f: Clear.\nIMPRESSION\u2009: Normal.",
    "a tab": "FINDINGS\t: Clear.\nIMPRESSION\t:\tNormal.", "signs that nobody sees": "FINDINGS\u200b: Clear.\n\ufeffIMPRESSION\u200e: Normal.", "HTML's blank": "FINDINGS&nbsp;: Clear.<br>IMPRESSION&nbsp;: Normal.",
}


@pytest.mark.parametrize("words", WORDS)
def test_headings_of_other_hospitals_are_understood(words):
    findings, impression, _, missed = cut_report(WORDS[words])
    assert findings.endswith("Clear.") and impression == "Normal." and not missed
    assert split_sections("ASSESSMENT: Normal.\nIMP: Clear.") == {"report": "ASSESSMENT: Normal. IMP: Clear."}  # MIMIC's rule stays


@pytest.mark.parametrize("text", ["FINDINGS: Clear. Results: normal.", "Diagnosis\nNormal.", "Clear.\nFINDINGS AND IMPRESSION Normal.", "The diagnosis: normal."])
def test_headings_that_may_have_been_missed_are_counted(text):
    assert cut_report(text)[3] and not cut_report("There is one nodule: 3 mm. AP view: rotated.")[3]


def test_letters_that_were_lost_are_said(tmp_path):
    texts = ["Kein Erguß, à gauche, Ärztin; where? here", "Épanchement".encode().decode("cp1252"), "d\ufffdprim\ufffd", "mod?r?e"]
    rows([f"p{i}" for i in range(4)]).drop(columns=["findings", "impression"]).assign(report=texts).to_csv(tmp_path / "t.csv", index=False)
    with pytest.warns(UserWarning, match=r"3 look as if letters were lost, because the text was once read in another encoding \(row 3, row 4, row 5\)"):
        load_table(tmp_path / "t.csv")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_openis_reports_is_cut_as_its_xml_is(spelling):
    studies, _ = load_openi()
    odd = (studies.findings + studies.impression).str.contains("[<&]|IMPRESSION|FINDINGS", regex=True)  # HTML, or a report within the report
    plain = studies[~odd & (studies.findings != "")].sample(300, random_state=0)
    wrong = []
    for found, said in zip(plain.findings, plain.impression, strict=True):
        text = f"EXAMINATION: Chest.\n\nFINDINGS:\n{found}\n\nIMPRESSION:\n{said}\n"
        wrong += [said] * (cut_report(SPELLINGS[spelling](text))[:2] != (" ".join(found.split()), " ".join(said.split())))
    assert len(wrong) == 0


def test_it_is_said_how_reports_were_read(tmp_path):
    reports = ["FINDINGS:\nClear.\nIMPRESSION:\nNormal."] * 3 + ["Findings: Clear. Impression: Normal."] * 2 + ["Clear."] + ["HAVAINNOT: Ei nestettä."]
    rows([f"p{i}" for i in range(7)]).drop(columns=["findings", "impression"]).assign(report=reports).to_csv(tmp_path / "t.csv", index=False)
    read = read_table(tmp_path / "t.csv")
    assert all(f"{count} {way}" in read.reading for count, way in zip((3, 2, 2), READ_AS, strict=True)) and "1 look as if" in read.reading and "row 8" in read.reading


# Ids


def test_stage_1_learns_from_every_report_of_a_study():
    studies = rows(["a"] * 4).assign(study_id=["1", "1", "2", "2"], findings="Clear.")
    s = load_settings("smoke")
    assert len(ReportSections(studies, train_tokenizer([*studies.impression], 300), s)) == 4
    assert len(ReportSections(pd.concat([studies, studies.assign(image="other")]), train_tokenizer([*studies.impression], 300), s)) == 4


def test_hashes_are_ids(tmp_path):
    ids = [hashlib.sha256(str(i).encode()).hexdigest()[:8] for i in range(3000)]
    rows(ids).to_csv(tmp_path / "t.csv", index=False)
    assert load(tmp_path / "t.csv").patient_id.tolist() == ids


# Silence, and advice


SECRET = "Quokka zyzzyva."


@pytest.mark.parametrize("spoil", [
    lambda t: t.assign(image=SECRET + "\n" + SECRET), lambda t: t.assign(split=SECRET), lambda t: t.assign(Edema=[*"1" * 9, SECRET]),
    lambda t: t.set_axis([SECRET] * 5, axis=1), lambda t: t.assign(image="../x.png", findings=SECRET),
    lambda t: t.assign(study_id="1", impression=SECRET), lambda t: t.assign(image="a.png", study_id="1", patient_id="1"), lambda t: t.drop(columns="image").assign(impression=SECRET),
])  # fmt: skip
def test_no_error_shows_a_text(tmp_path, spoil):
    spoil(rows([f"p{i}" for i in range(10)]).assign(impression=[f"{SECRET} {i}" for i in range(10)])).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(StudiesError) as caught:
        load(tmp_path / "t.csv")
    assert "zyzzyva" not in str(caught.value)


def test_bytes_of_pictures_are_not_shown(tmp_path):
    rows(["a", "b"]).assign(image=[{"bytes": b"quokka", "path": "x.png"}] * 2).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(StudiesError, match="the column image holds lists, records or bytes") as caught:
        load(tmp_path / "t.parquet")
    assert "quokka" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252"])
def test_the_encoding_that_is_advised_helps(tmp_path, encoding):
    text = rows(["a", "b"]).assign(impression="Übersicht \u2019s" if encoding == "cp1252" else "Übersicht").to_csv(index=False)
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    with pytest.raises(StudiesError, match="may be ([a-z0-9-]+)") as caught:
        load(tmp_path / "t.csv")
    advised = str(caught.value).rsplit("may be ", 1)[1]
    assert load(tmp_path / "t.csv", encoding=advised).impression.tolist() == pd.read_csv(io.StringIO(text)).impression.tolist()


def test_the_advice_about_ids_helps(tmp_path):
    visits = rows(["a", "a", "b", "b"]).assign(study_id=["1", "2"] * 2)
    visits.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(StudiesError, match="patient and study in one, or leave study_id out"):
        load(tmp_path / "t.csv")
    for better in (visits.assign(study_id=visits.patient_id + "-" + visits.study_id), visits.drop(columns="study_id")):
        better.to_csv(tmp_path / "t.csv", index=False)
        assert load(tmp_path / "t.csv").study_id.nunique() == 4
    for words, patients in ((["nan", "p"], None), (["", "p"], ["s0", "p"]), (["id-nan", "p"], ["id-nan", "p"])):
        rows(words).to_csv(tmp_path / "t.csv", index=False)
        if patients is None:
            with pytest.raises(StudiesError, match="leave a cell empty that names nobody; if it is a name, write it longer, e.g. id-nan"):
                load(tmp_path / "t.csv")
        else:
            assert load(tmp_path / "t.csv").patient_id.tolist() == patients


def test_columns_that_nobody_needs_do_no_harm(tmp_path):
    table = rows(["a", "b"]).assign(boxes=[[1.0], [2.0]], ratio=np.inf)
    table.to_parquet(tmp_path / "t.parquet")
    with pytest.warns(UserWarning, match="boxes"):
        assert list(load_table(tmp_path / "t.parquet")[0]) == COLUMNS
