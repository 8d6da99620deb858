"Every line of the benchmarks, at tiny shapes: ours agrees with its reference, and a line whose two sides differ says so. No clock."
import dataclasses
import json
from importlib import import_module

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.__main__ import GROUPS, main, measure
from benchmarks.cases import LINES, Case, Line, Options, line, same, same_direction, same_gradients, take_turns
from benchmarks.report import table_rows, verdict, warn_if_busy
from benchmarks.versions import OURS, ReferenceMissing, reference

for group in GROUPS:
    import_module(f"benchmarks.{group}")
QUICK = Options(quick=True)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    "What a benchmark changes for the process: the device, the threads, and accelerate's precision."
    for key in ("ACCELERATE_USE_CPU", "TQDM_DISABLE"):
        monkeypatch.setenv(key, "true")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def old():
    try:
        return reference()
    except ReferenceMissing as error:  # an archive without git's history
        pytest.skip(str(error))


@pytest.mark.parametrize("name", LINES)  # those of the GPU too: their code runs on a CPU
def test_ours_agrees_with_the_reference(name, old):
    rows = measure(LINES[name], QUICK)
    if name == "step-lightly" and rows[0].get("skipped"):
        pytest.skip(rows[0]["fault"])
    for row in rows:
        assert "fault" not in row, row["fault"]
        assert row["checked"] and row["ratio"] > 0 and row["target"] is None


def changed(result):
    "A little more of it."
    match result:
        case list() | tuple():
            return type(result)(map(changed, result))
        case dict():
            return {key: changed(value) for key, value in result.items()}
        case str():
            return result + " again"
    if hasattr(result, "columns"):  # a table
        return result.iloc[:-1] if "auroc" not in result else result.assign(auroc=result.auroc + 0.01)
    if getattr(result, "dtype", None) == "uint8":
        return result ^ 1
    return result * (1 + torch.rand(result.shape, generator=torch.Generator().manual_seed(0)) / 10) if torch.is_tensor(result) else result + 1e-9


BROKEN = {
    "step-baseline": "vlm.contrastive_terms", "step-64px-ours": "declip.contrastive_loss", "step-open_clip": "vlm.contrastive_terms",
    "step-lightly": "simclr.nt_xent", "large-declip": "declip.nt_xent", "local-small": "losses.local_similarity",
    "local-large-bf16": "losses.local_similarity", "matching": "matching.local_matrix", "auroc": "retrieval.retrieval_auroc",
    "probe": "downstream.linear_probe", "eda-wordnet-256": "eda.eda", "phantom": "phantom.render_reference",
    "load_mimic": "mimic.load_mimic",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_line_fails_where_ours_gives_something_else(name, old, monkeypatch):
    module, function = BROKEN[name].split(".")
    right = getattr(getattr(OURS, module), function)
    monkeypatch.setattr(getattr(OURS, module), function, lambda *args, **options: changed(right(*args, **options)))
    (row,) = measure(LINES[name], QUICK)
    if row.get("skipped"):
        pytest.skip(row["fault"])
    assert row["fault"].startswith("AssertionError") and "ratio" not in row


@pytest.mark.parametrize("name", ["pipeline-vlm", "pipeline-simclr"])
def test_other_pixels_are_noticed(name, old, monkeypatch):
    from benchmarks import pipeline
    right = pipeline.inputs_of

    def wrong(version, *args):
        inputs = right(version, *args)
        if version == OURS:
            inputs.store.pixels = inputs.store.pixels // 2
        return inputs

    monkeypatch.setattr(pipeline, "inputs_of", wrong)
    assert measure(LINES[name], QUICK)[0]["fault"].startswith("AssertionError: images without augmentation")


def test_other_tokens_are_noticed(old, monkeypatch):
    right = OURS.text.tokenize
    monkeypatch.setattr(OURS.text, "tokenize", lambda tokenizer, texts, limit: right(tokenizer, texts[::-1], limit))
    assert measure(LINES["tokenize"], QUICK)[0]["fault"].startswith("AssertionError")


def test_the_reference_is_another_package(old):
    assert old.losses.contrastive_loss is not OURS.losses.contrastive_loss
    assert old.losses.__file__ != OURS.losses.__file__ and old.ini != OURS.ini


# How lines are timed and told


def test_all_take_turns_after_the_check():
    order = []
    case = Case("r", lambda: order.append("reference"), {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, warmup=1, rounds=2)
    seconds = take_turns(case, Options())
    assert order == ["reference", "a", "b"] * 3 and [len(part) for part in seconds.values()] == [2, 2, 2]
    assert take_turns(dataclasses.replace(case, reference=300.0), Options())[""] == [300.0]


@pytest.fixture
def three_lines(monkeypatch):
    "A line that fails its check, one that cannot be built, and one that is right."
    from benchmarks import __main__ as entry
    from benchmarks import cases
    monkeypatch.setattr(entry, "GROUPS", ())
    monkeypatch.setattr(cases, "LINES", {})

    def agree(ours, theirs):
        if ours != theirs:
            raise AssertionError(f"{ours} and {theirs}")  # pytest would add to the message of an assert
        return "a number"

    line("differs")(lambda options: Case("one", lambda: 1, {"ours": lambda: 2}, agree=agree))
    line("impossible")(lambda options: 1 / 0)
    line("right")(lambda options: Case("one", lambda: 1, {"ours": lambda: 1}, agree=agree, targets={"ours": 1e9}))
    return cases.LINES


def test_a_failed_line_is_loud_and_stops_nothing(three_lines, capsys, tmp_path):
    assert main(["--json", str(tmp_path / "sub" / "rows.json"), "--rounds", "3"]) == 2
    out, err = capsys.readouterr()
    assert "| differs | **FAILED** | AssertionError: 2 and 1 |" in out and "| impossible | **FAILED** | ZeroDivisionError" in out
    assert "3 lines in" in out and "2 failed: differs, impossible" in out and "[3/3] right" in err
    found = json.loads((tmp_path / "sub" / "rows.json").read_text())
    assert [row["line"] for row in found["rows"]] == ["differs", "impossible", "right"]
    assert found["rows"][2]["rounds"] == len(found["rows"][2]["all_ours"]) == 3
    assert {"cpu", "instructions", "versions", "commit", "load"} <= found["machine"].keys()
    assert main(["--only", "right", "--quick"]) == 0


def test_an_unknown_line_names_those_there_are(three_lines):
    with pytest.raises(SystemExit, match="there is no line wrong for cpu; there are: differs, impossible, right"):
        main(["--only", "wrong"])


def test_a_busy_machine_is_told(capsys):
    warn_if_busy(0.2)
    assert capsys.readouterr().err == ""
    warn_if_busy(1.7)
    assert "load average is 1.70" in capsys.readouterr().err


def test_a_verdict_is_that_of_the_printed_number():
    assert [verdict(ratio, 0.62) for ratio in (0.6, 0.6249, 0.626)] == ["yes", "yes", "**no**"]
    assert verdict(3, None) == ""
    row = {"line": "a", "variant": "ours", "against": "b", "precision": "float32", "threads": 1, "unit": "a batch", "ours": 0.0123,
           "reference": 0.02, "ratio": 0.615, "target": 0.62, "checked": "all", "load": 1, "MiB_ours": 1, "MiB_reference": 4,
           "memory_ratio": 0.25, "memory_target": 0.2}
    time, memory = table_rows(row)
    assert time == ["a", "ours", "b", "float32, 1", "12.3 ms a batch", "20 ms a batch", "0.61", "0.62", "yes", "all"]
    assert memory[4:9] == ["1 MiB", "4 MiB", "0.25", "0.2", "**no**"]
    assert "(busy)" in table_rows(row | {"load": 3})[0][6]


def test_checks_notice_small_differences():
    x = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1e-9])}
    same("x", x["a"] + 1e-6, x["a"], 1e-5)
    same_gradients({"a": x["a"], "b": x["b"] * 0}, x, 1e-3)  # zero by rights
    same_direction(x, x, 0.999)
    for check in (lambda: same("x", x["a"] + 1e-4, x["a"], 1e-5), lambda: same("x", x["a"][:1], x["a"], 1),
                  lambda: same_gradients({"a": x["a"] * 1.01, "b": x["b"]}, x, 1e-3), lambda: same_gradients({"a": x["a"]}, x, 1),
                  lambda: same_direction({"a": x["a"].flip(0), "b": x["b"]}, x, 0.95), lambda: same("x", x["a"] * torch.nan, x["a"], 1)):
        with pytest.raises(AssertionError):
            check()


def test_lines_of_a_device():
    assert Line("a", lambda options: None, ("cuda",)).devices == ("cuda",)
    cpu = [name for name, found in LINES.items() if "cpu" in found.devices]
    assert {"step-ours", "step-64px-ours", "local-large", "matching", "auroc", "load_mimic"} <= set(cpu) and "large-declip" not in cpu
