"""settings.ini: what is refused, and that the refusal says where."""
import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cxrvlm.data import load_studies
from cxrvlm.sampler import sample_studies
from cxrvlm.settings import (
    Settings,
    SettingsError,
    digest,
    from_root,
    in_arm,
    load_arm,
    load_settings,
    preset_names,
    read_ini,
    replace,
    stage_digest,
)
from cxrvlm.studies import fingerprint

KEYS = sorted(load_settings("paper").model_dump().keys() - {"preset"})
REQUIRED = [key for key in KEYS if Settings.model_fields[key].is_required()]
KEPT = json.loads(Path(__file__).with_name("digests.json").read_text())  # demo and data as at 07c8bb8, when results/demo was made


def write(path, change):
    "A copy of settings.ini, changed."
    _, parser = read_ini()
    change(parser)
    with path.open("w") as file:
        parser.write(file)
    return path


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_and_arm_loads(preset):
    settings = load_settings(preset)
    assert settings.preset == preset
    assert [load_arm(arm).name for arm in settings.arms] == list(settings.arms)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(tmp_path, key):
    path = write(tmp_path / "settings.ini", lambda parser: parser["DEFAULT"].pop(key))
    with pytest.raises(SettingsError, match=f"{key} is missing"):
        load_settings("paper", path)


@example(name="preset")
@given(name=st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1).filter(lambda name: name not in KEYS))
def test_an_unknown_key_is_named(tmp_path_factory, name):
    path = write(tmp_path_factory.mktemp("x") / "settings.ini", lambda parser: parser["demo"].update({name: "1"}))
    with pytest.raises(SettingsError) as caught:
        load_settings("demo", path)
    assert f"[demo] {name} is no setting" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("lr", "nan", "finite"),
        ("lr", "inf", "finite"),
        ("tau", "-0.5", "greater than 0"),
        ("batch_size", "1", "greater than or equal to 2"),
        ("batch_size", "20.5", "integer"),
        ("image_size", "16", "greater than or equal to 32"),
        ("betas", "0.9", "one more value"),
        ("betas", "0.9 1.5", "less than or equal to 1"),
        ("fractions", "", "at least 1"),
        ("fractions", "0 1", "greater than 0"),
        ("fractions", "0.5 0.5", "must rise"),
        ("seeds", "-1", "greater than or equal to 0"),
        ("source", "padchest", "'openi', 'phantom', 'mimic', 'table' or 'medpix'"),
        ("precision", "fp16", "'auto', 'float32' or 'bf16'"),
        ("vlm_noise_p", "1.5", "less than or equal to 1"),
        ("simclr_blur_sigma", "1 -3", "greater than 0"),
        ("pairs", "64", "0 for every other source"),
        ("split", "folder", "patient or folds for source = openi"),
        ("source", "table", "needs the path of its file"),
        ("restricted", "maybe", "'auto', 'yes' or 'no'"),
        ("prompts_positive", "remains visible", "pattern"),
        ("prompts_positive", "", "pattern"),
        ("bootstrap", "0", "greater than or equal to 1"),
        ("text_heads", "3", "no multiple"),
        ("image_encoder", "", "at least 1 character"),
        ("unpaired", "5", "0 for source = openi"),
        ("split_sizes", "8 1", "three numbers"),
        ("split_sizes", "8 0 3", "greater than or equal to 1"),
        ("pair_text", "findings", "'impression' or 'findings_impression'"),
        ("measure", "auroc_dedup", "'auroc' or 'auroc_masked'"),
    ],
)
def test_an_impossible_value_is_refused(tmp_path, key, value, allowed):
    path = write(tmp_path / "settings.ini", lambda parser: parser["demo"].update({key: value}))
    with pytest.raises(SettingsError) as caught:
        load_settings("demo", path)
    message = str(caught.value)
    assert key in message and allowed in message and "settings.ini" in message


def test_sampled_pairs_are_split_into_as_many(tmp_path):
    smoke = load_settings("smoke")
    with pytest.raises(SettingsError, match="split_sizes: they add up to 12, and pairs = 64"):
        replace(smoke, split_sizes="8 1 3")
    assert replace(smoke, split_sizes="40 12 12").split_sizes == (40, 12, 12)


def test_what_figures_show_is_in_no_digest():
    demo, arm = load_settings("demo"), load_arm("ours")
    assert digest(replace(demo, measure="auroc_masked"), arm) == digest(demo, arm)
    for change in ({"pair_text": "findings_impression"}, {"split_sizes": "3000 400 420"}):
        assert digest(replace(demo, **change), arm) != digest(demo, arm)


def test_an_arm_is_checked_too(tmp_path):
    for key, value, complaint in [("loss", "mse", "infonce"), ("alpha", "1.2", "less than or equal to 1"), ("views", "all", "is no setting")]:
        path = write(tmp_path / "settings.ini", lambda p, k=key, v=value: p["arm baseline"].update({k: v}))
        with pytest.raises(SettingsError, match=complaint):
            load_arm("baseline", path)


@pytest.mark.parametrize("text", ["[demo", "key = 1", "[demo]\nlr = 1\nlr = 2", "[demo]\n[demo]", "\udcff"])
def test_a_broken_file_is_refused(tmp_path, text):
    path = tmp_path / "settings.ini"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SettingsError, match="settings.ini"):
        load_settings("demo", path)


def test_settings_survive_json():
    settings = load_settings("demo")
    assert type(settings).model_validate_json(settings.model_dump_json()) == settings
    assert replace(settings, **settings.model_dump(exclude={"preset"})) == settings


def test_mimic_is_restricted_whatever_somebody_writes():
    with pytest.raises(SettingsError, match="the licence of MIMIC-CXR forbids"):
        replace(load_settings("paper"), restricted="no")


def test_what_only_mimic_knows_makes_no_other_run_stale():
    demo, paper, arm = load_settings("demo"), load_settings("paper"), load_arm("baseline")
    assert digest(replace(demo, views="all"), arm) == digest(demo, arm)
    assert digest(replace(paper, views="all"), arm) != digest(paper, arm)
    assert stage_digest(replace(paper, views="all"), "simclr") != stage_digest(paper, "simclr")


@pytest.mark.parametrize("preset", KEPT["digest"])
def test_digests_are_those_of_the_committed_results(preset):
    settings = load_settings(preset)
    assert {arm: digest(settings, load_arm(arm)) for arm in KEPT["digest"][preset]} == KEPT["digest"][preset]
    assert {stage: stage_digest(settings, stage) for stage in KEPT["stage"][preset]} == KEPT["stage"][preset]


def test_data_are_those_of_the_committed_results():
    tables = {"smoke": sample_studies(64, seed=0), "1000": sample_studies(1000, seed=0)}
    tables |= {f"{preset} studies": load_studies(load_settings(preset))[0] for preset in ("smoke", "demo")}
    assert {name: fingerprint(table) for name, table in tables.items()} == KEPT["data"]


FIRST = {"baseline": "cac61b6132a3", "ours": "162e57b42715"}  # of [paper], when the first results were committed


def without_new_keys(parser):
    "As a file from before there was any key with a default."
    for section in ("DEFAULT", *preset_names()):
        for key in set(KEYS) - set(REQUIRED):
            parser[section].pop(key, None)


@pytest.mark.parametrize("key", sorted(set(KEYS) - set(REQUIRED)))
def test_a_new_key_may_be_left_out_and_changes_no_digest_at_its_default(tmp_path, key):
    default = Settings.model_fields[key].default
    bare = load_settings("paper", write(tmp_path / "bare.ini", without_new_keys))
    said = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    there = load_settings("paper", write(tmp_path / "there.ini", lambda parser: (without_new_keys(parser), parser["DEFAULT"].update({key: said}))))
    assert getattr(bare, key) == getattr(there, key) == default
    assert {arm: digest(bare, load_arm(arm)) for arm in FIRST} == {arm: digest(there, load_arm(arm)) for arm in FIRST} == FIRST


@pytest.mark.parametrize("section", ["2024", "1e5", "nan", "None", "True", "my data", "data", "evaluate", "a:q", "{x}", "../x", "-p", "arm a b", "arm data", "arm stage1", "arm 1", "arm {x}", "mine.", "nul", "arm AUX.1"])
def test_a_name_that_the_workflow_takes_for_something_else_is_refused(tmp_path, section):
    path = write(tmp_path / "settings.ini", lambda parser: parser.add_section(section))
    with pytest.raises(SettingsError) as caught:
        load_settings("demo", path)
    assert f"[{section}]: " in str(caught.value) and "Choose another name" in str(caught.value)


@pytest.mark.parametrize("section", ["Smoke", "DEMO", "arm Baseline"])
def test_names_that_are_one_folder_on_a_mac_are_refused(tmp_path, section):
    path = write(tmp_path / "settings.ini", lambda parser: parser.add_section(section))
    with pytest.raises(SettingsError, match=rf"\[{section}\]: another name differs from it in capitals only"):
        load_settings("demo", path)


@pytest.mark.parametrize("section", ["null", "mine", "ct-2024", "v1.5b", "arm evaluate", "arm x_1"])
def test_other_names_are_fine(tmp_path, section):
    assert load_settings("demo", write(tmp_path / "settings.ini", lambda parser: parser.add_section(section))).preset == "demo"


@pytest.mark.parametrize(("key", "value"), [("data", "study #3/mine.csv"), ("data", "study ; new/mine.csv"), ("image_weights", "best #2.pt"),
                                            ("prompts_negative", "no {} # 2 | none of {}"), ("root", "there # 1")])
def test_a_path_is_not_cut_at_a_comment_in_silence(tmp_path, key, value):
    (tmp_path / "there # 1").mkdir()
    value = str(tmp_path / value) if key == "root" else value
    (tmp_path / "mine.ini").write_text(f"{from_root('settings.ini').read_text()}\n[mine]\n{key} = {value}\n")
    with pytest.raises(SettingsError, match=rf"(?s)mine\.ini is not right:.*\[mine\] {key} = .*: the rest of the line is cut off"):
        load_settings("mine", tmp_path / "mine.ini")


@pytest.mark.parametrize("line", ["data = a#b.csv", "data = a.csv  # study 3", "root =   # none", "lr = 1e-3 #fast", "tokenizer = train"])
def test_a_comment_may_follow_a_value(tmp_path, line):
    (tmp_path / "mine.ini").write_text(f"{from_root('settings.ini').read_text()}\n[mine]\n{line}\n")
    assert load_settings("mine", tmp_path / "mine.ini").data in ("data/mimic-cxr-jpg", "a#b.csv", "a.csv")


def test_root_and_encoding_count_where_they_are_used():
    demo, arm = load_settings("demo"), load_arm("baseline")
    table = replace(demo, source="table", data="x.csv")
    assert digest(replace(demo, root="a", encoding="latin-1"), arm) == digest(demo, arm)
    assert digest(replace(table, root="a"), arm) != digest(table, arm) == digest(replace(table, root="", encoding="utf-8-sig"), arm)


def add_sections(parser, **sections):
    "Sections of presets and of arms, whose names begin with `arm_`."
    for name, keys in sections.items():
        parser[name.replace("arm_", "arm ").replace("_", "-")] = keys


def test_a_preset_takes_over_what_its_base_says(tmp_path):
    path = write(tmp_path / "settings.ini", lambda parser: add_sections(parser, mine={"base": "demo", "tau": "0.3"}, yours={"base": "mine", "seeds": "7"}))
    demo, yours = load_settings("demo", path), load_settings("yours", path)
    assert yours == replace(demo, preset="yours", tau=0.3, seeds=(7,)) != demo


def test_an_arm_is_like_another_and_changes_settings_of_stage_2_only(tmp_path):
    path = write(tmp_path / "settings.ini", lambda parser: add_sections(parser, arm_crop={"like": "ours", "declip_crop": "0.7", "tau": "0.3"}))
    arm, ours, demo = load_arm("crop", path), load_arm("ours", path), load_settings("demo", path)
    assert in_arm(demo, arm) == replace(demo, declip_crop=0.7, tau=0.3) and in_arm(demo, ours) == demo
    assert arm.model_copy(update={"name": "ours", "changes": ()}) == ours
    assert digest(demo, arm) != digest(demo, arm.model_copy(update={"changes": ()}))


@pytest.mark.parametrize(
    "sections, complaint",
    [
        ({"mine": {"base": "nothing"}}, "[mine] base = nothing: there is no such section"),
        ({"mine": {"base": "yours"}, "yours": {"base": "mine"}}, "[yours] base = mine: that section builds on this one"),
        ({"mine": {"base": "demo", "tau": "-1"}}, "[mine] tau = -1: it should be greater than 0"),
        ({"yours": {"base": "demo", "tau": "-1"}, "mine": {"base": "yours"}}, "[yours] tau = -1: it should be greater than 0"),
        ({"arm_mine": {"like": "nobody"}}, "[arm mine] like = nobody: there is no such section"),
        ({"arm_mine": {"like": "ours", "image_size": "64"}}, "[arm mine] image_size is no setting of an arm"),
        ({"arm_mine": {"like": "ours", "tau": "-1"}}, "[arm mine] tau = -1: it should be greater than 0"),
        ({"arm_mine": {"like": "ours", "tua": "1"}}, "[arm mine] tua is no setting"),
    ],
)
def test_a_base_that_goes_wrong_is_named_with_its_section(tmp_path, sections, complaint):
    path = write(tmp_path / "settings.ini", lambda parser: add_sections(parser, **sections))
    with pytest.raises(SettingsError) as caught:
        if "mine" in sections:
            load_settings("mine", path)
        in_arm(load_settings("demo", path), load_arm("mine", path))
    assert complaint in str(caught.value)
