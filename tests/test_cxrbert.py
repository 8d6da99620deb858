"Text adaptation: what is masked, what a switched-off loss costs, who is read in training, and what is left behind."

import json
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoModel

from cxrvlm import data, settings, training
from cxrvlm.cxrbert import (
    ReportSections,
    RSMHead,
    TextAdaptationObjective,
    build_head,
    embed_sections,
    fill_mask,
    has_both_sections,
    mask_tokens,
    masked_accuracy,
    masked_batches,
    match_sections,
    sections,
    text_chance,
    text_metrics,
    token_frequencies,
)
from cxrvlm.data import make_tokenizer
from cxrvlm.initialisation import load_masked_lm
from cxrvlm.sampler import sample_studies
from cxrvlm.settings import in_stage, load_settings, replace
from cxrvlm.studies import split_by_patient
from cxrvlm.text import load_tokenizer, tokenize
from cxrvlm.training import load_batches, train
from cxrvlm.weights import WeightsError

NOTEBOOK = Path(__file__).parents[1] / "nbs" / "experiments" / "adapt_text.ipynb"
SETTINGS = in_stage(load_settings("smoke"), "cxrbert")
NO_MLM, NO_RSM = replace(SETTINGS, cxrbert_mlm=0), replace(SETTINGS, cxrbert_rsm=0)


@pytest.fixture(scope="module")
def studies():
    return split_by_patient(sample_studies(64, seed=0), seed=0)


@pytest.fixture(scope="module")
def tokenizer(studies):
    return make_tokenizer(SETTINGS, studies)


@pytest.fixture
def masked_lm(tokenizer):
    return load_masked_lm(SETTINGS, "random", tokenizer, seed=0)[0]


def objective_for(s, masked_lm):
    head = build_head(masked_lm.config.hidden_size, s.cxrbert_head, seed=0) if s.cxrbert_rsm else None
    return TextAdaptationObjective(masked_lm, head, s)


def unmasked(batch) -> torch.Tensor:
    "The input ids as they were before the mask."
    ids = batch["tokens"]["input_ids"]
    return torch.where(batch["labels"] >= 0, batch["labels"], ids) if "labels" in batch else ids


words = st.sampled_from(["effusion", "No", "[MASK]", "[SEP]", "XXXX", "1.", "é", "日本", "___"])


@hypothesis_settings(deadline=None, max_examples=30, derandomize=True)
@given(st.lists(st.lists(words, min_size=1, max_size=20).map(" ".join), min_size=1, max_size=5),
       st.floats(0.01, 0.99), st.integers(0, 2**62))
def test_the_mask_is_a_function_of_its_seed_and_spares_special_tokens(tokenizer, texts, share, seed):
    tokens = tokenize(tokenizer, texts, 24)
    ids = tokens["input_ids"].clone()
    torch.manual_seed(seed % 7)
    state = torch.get_rng_state()
    (masked, labels), (again, _) = (mask_tokens(tokens, tokenizer, share, seed) for _ in "ab")
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers change
    assert torch.equal(masked["input_ids"], again["input_ids"]) and torch.equal(tokens["input_ids"], ids)
    asked, special = labels != -100, torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert not (asked & special).any()
    assert torch.equal(labels[asked], ids[asked]) and torch.equal(masked["input_ids"][~asked], ids[~asked])
    assert torch.equal(masked["attention_mask"], tokens["attention_mask"])


def test_masks_belong_to_seed_and_step_whoever_loads_them(studies, tokenizer):
    def labels(seed, workers=0, start=0):
        batches = load_batches(ReportSections(studies, tokenizer, SETTINGS, seed), replace(SETTINGS, workers=workers), 0, start)
        return [next(batches)["labels"] for _ in range(3 - start)]

    first = labels(seed=1)
    for other in (labels(seed=1), labels(seed=1, workers=2)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(labels(seed=1, start=2)[0], first[2])  # no need to draw steps 0 and 1 first
    assert not all(torch.equal(a, b) for a, b in zip(first, labels(seed=2), strict=True))
    sample = [ReportSections(studies, tokenizer, SETTINGS)[step, 0] for step in (0, 1)]
    one, other = (ReportSections(studies, tokenizer, SETTINGS).collate([s] * 4)["labels"] for s in sample)
    assert not torch.equal(one, other)


def test_no_mlm_means_no_mask_and_no_word_scores(studies, tokenizer, masked_lm, monkeypatch):
    batch = next(load_batches(ReportSections(studies, tokenizer, NO_MLM), NO_MLM, seed=0))
    assert "labels" not in batch and not (batch["tokens"]["input_ids"] == tokenizer.mask_token_id).any()
    monkeypatch.setattr(masked_lm.cls, "forward", lambda *_: pytest.fail("the word scores were computed"))
    terms = objective_for(NO_MLM, masked_lm)(batch)
    terms["rsm"].backward()
    assert list(terms) == ["rsm"] and masked_lm.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_no_rsm_means_no_head_and_no_need_for_findings(studies, tokenizer, masked_lm):
    alone = studies.assign(findings=["  " if row % 2 else "" for row in range(len(studies))])
    sections_set = ReportSections(alone, tokenizer, NO_RSM)
    batch = next(load_batches(sections_set, NO_RSM, seed=0))
    assert len(sections_set) == len(studies) and len(batch["labels"]) == NO_RSM.batch_size
    objective = objective_for(NO_RSM, masked_lm)
    assert list(objective(batch)) == ["mlm"] and all(name.startswith("masked_lm.") for name, _ in objective.named_parameters())
    some = studies.assign(findings=studies.findings.where(studies.index % 2 == 0, ""))
    mixed = ReportSections(some, tokenizer, NO_RSM)
    samples = [mixed[0, i] for i in range(4)]
    assert len(mixed.collate(samples)["labels"]) == 4 + sum(s["findings"] != "" for s in samples) < 8


def test_without_findings_matching_is_refused_and_the_way_out_is_named(studies, tokenizer):
    with pytest.raises(ValueError, match="none of the 64 studies has both.*set cxrbert_rsm = 0 in settings.ini"):
        ReportSections(studies.assign(findings=" "), tokenizer, SETTINGS)


def test_matching_leaves_out_studies_without_findings_and_pairs_the_rest(studies, tokenizer):
    some = studies.assign(findings=studies.findings.where(studies.index % 3 > 0, ""))
    pairs = ReportSections(some, tokenizer, NO_MLM)
    assert len(pairs) == has_both_sections(some).sum() < len(some)
    batch = next(load_batches(pairs, NO_MLM, seed=0))
    rows = some.set_index("study_id").loc[batch["study_id"]]
    expected = tokenize(tokenizer, [*rows.findings, *rows.impression], NO_MLM.cxrbert_max_tokens)
    assert torch.equal(batch["tokens"]["input_ids"], expected["input_ids"])


def test_a_study_with_two_images_is_one_report(studies, tokenizer):
    twice = studies.loc[studies.index.repeat(2)]
    assert ReportSections(twice, tokenizer, SETTINGS).rows == ReportSections(studies, tokenizer, SETTINGS).rows


def test_both_terms_have_their_weights(studies, tokenizer, masked_lm):
    batch = next(load_batches(ReportSections(studies, tokenizer, SETTINGS), SETTINGS, seed=0))
    plain = objective_for(SETTINGS, masked_lm).eval()(batch)
    weighted = objective_for(replace(SETTINGS, cxrbert_mlm=3, cxrbert_rsm=0.5), masked_lm).eval()(batch)
    assert weighted["mlm"].item() == pytest.approx(3 * plain["mlm"].item())
    assert weighted["rsm"].item() == pytest.approx(0.5 * plain["rsm"].item())


def test_the_head_takes_published_weights_and_names_what_does_not_fit():
    published = {name: torch.randn_like(weight) for name, weight in RSMHead(48, 16).state_dict().items()}
    assert set(published) == {f"{layer}.{kind}" for layer in ("dense_to_hidden", "LayerNorm", "dense_to_output")
                              for kind in ("weight", "bias")}
    head = build_head(48, 16, seed=0, state=published)
    assert all(torch.equal(head.state_dict()[name], weight) for name, weight in published.items())
    renamed = {name.replace("dense_to_output", "out"): weight for name, weight in published.items()}
    with pytest.raises(WeightsError, match='(?s)"dense_to_output.weight".*"out.weight"'):
        build_head(48, 16, seed=0, state=renamed)
    with pytest.raises(WeightsError, match="cxrbert_head = 8 .*(?s:.*)dense_to_hidden.weight"):
        build_head(48, 8, seed=0, state=published)
    same, other = build_head(48, 16, seed=0), build_head(48, 16, seed=1)
    assert torch.equal(same.dense_to_hidden.weight, build_head(48, 16, seed=0).dense_to_hidden.weight)
    assert not torch.equal(same.dense_to_hidden.weight, other.dense_to_hidden.weight)


def test_masked_accuracy_is_a_count_over_single_tokens(studies, tokenizer, masked_lm):
    texts = sections(studies)
    right, losses = [], []
    for tokens, labels in masked_batches(tokenizer, texts, SETTINGS):
        scores = masked_lm.eval()(**tokens).logits.detach()
        for row, place in (labels >= 0).nonzero().tolist():
            right.append(scores[row, place].argmax() == labels[row, place])
            losses.append(-scores[row, place].log_softmax(0)[labels[row, place]])
    found = masked_accuracy(masked_lm, tokenizer, texts, SETTINGS)
    assert found["mlm_accuracy"] == pytest.approx(sum(right).item() / len(right))
    assert found["mlm_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_equal_texts_are_embedded_equally_and_in_order(studies, tokenizer, masked_lm):
    texts = ["Normal.", studies.findings[0], "Normal.", studies.impression[0], studies.findings[0]]
    vectors = embed_sections(masked_lm, tokenizer, texts, 32, batch_size=2)
    assert torch.equal(vectors[0], vectors[2]) and torch.equal(vectors[1], vectors[4])
    alone = torch.cat([embed_sections(masked_lm, tokenizer, [text], 32) for text in texts])
    assert torch.allclose(vectors, alone, atol=1e-5)


def test_matching_a_text_with_itself_is_perfect(studies, tokenizer, masked_lm):
    different = studies.drop_duplicates("impression")
    itself = match_sections(masked_lm, tokenizer, different.assign(findings=different.impression), 32)
    assert itself["auroc"] > 0.99 and itself["recall@1"] > 0.9 and itself["median_rank"] == 1


def test_metrics_without_findings_are_those_of_the_words_alone(studies, tokenizer, masked_lm):
    alone = studies.assign(findings="")
    frequencies = token_frequencies(tokenizer, sections(alone), 32)
    found = text_metrics(masked_lm, tokenizer, alone, SETTINGS), text_chance(frequencies, tokenizer, alone, SETTINGS)
    assert found[0].keys() == found[1].keys() == {"mlm_accuracy", "mlm_loss"}
    full = text_metrics(masked_lm, tokenizer, studies, SETTINGS), text_chance(frequencies, tokenizer, studies, SETTINGS)
    assert full[0].keys() == full[1].keys()
    assert frequencies.sum().item() == pytest.approx(1) and (frequencies[tokenizer.all_special_ids] == 0).all()


@pytest.mark.parametrize("sentence", ["no mask", "[MASK] and [MASK]"])
def test_a_sentence_has_one_mask(tokenizer, masked_lm, sentence):
    with pytest.raises(ValueError, match=r"must have one \[MASK\], not [02]"):
        fill_mask(masked_lm, tokenizer, sentence)


def test_a_run_that_is_stopped_and_started_again_is_the_run(studies, tokenizer, tmp_path):
    short = replace(SETTINGS, train_iterations=2, max_iterations=6, patience=9)
    sets = [ReportSections(studies[studies.split == split], tokenizer, short) for split in ("train", "validation")]

    def run(name, steps):
        objective = objective_for(short, load_masked_lm(short, "random", tokenizer, seed=0)[0])
        progress = train(objective, *sets, replace(short, max_iterations=steps), 0, tmp_path / name)
        return objective.state_dict(), progress.history

    weights, history = run("whole", 6)
    run("parts", 2)
    resumed, resumed_history = run("parts", 6)
    assert history == resumed_history and len(history) == 3
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.fixture
def adapt(tmp_path):
    "Run adapt_text.ipynb's cells in this process; returns its variables."
    matplotlib.use("Agg")

    def run(**parameters):
        variables = {"In": [], "display": lambda shown: None}
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, "adapt_text", "exec"), variables)
            if "parameters" in cell.metadata.get("tags", []):
                variables |= {"runs": str(tmp_path)} | parameters
        return variables

    return run


def test_no_held_out_report_is_read_in_training(adapt, studies, monkeypatch):
    marks = {"train": "trainword", "validation": "validword", "test": "testword"}
    marked = studies.assign(**{section: studies.split.map(marks) + " " + studies[section] for section in ("findings", "impression")})
    monkeypatch.setattr(data, "load_studies", lambda s: (marked, None))
    forward, seen = TextAdaptationObjective.forward, {True: [], False: []}

    def listening(self, batch):
        seen[self.training].append(unmasked(batch))
        return forward(self, batch)

    monkeypatch.setattr(TextAdaptationObjective, "forward", listening)
    decode = adapt()["tokenizer"].decode
    texts = {learning: [decode(row) for ids in batches for row in ids] for learning, batches in seen.items()}
    assert len(texts[True]) == SETTINGS.max_iterations * 2 * SETTINGS.batch_size
    assert all("trainword" in text and "validword" not in text and "testword" not in text for text in texts[True])
    assert texts[False] and all("validword" in text and "testword" not in text for text in texts[False])


def test_the_record_and_the_model_beside_it(adapt, tmp_path):
    adapt()
    folder = tmp_path / "smoke" / "stage1" / "random-adapted" / "0"
    record = json.loads((folder / "adaptation.json").read_text())
    assert record["start"] == "random" and record["training"]["steps"] == SETTINGS.max_iterations
    assert record["digest"] == settings.stage_digest(load_settings("smoke"), "cxrbert", "random")
    assert set(record["metrics"]) == {"chance", "before", "after"} and record["metrics"]["before"] != record["metrics"]["after"]
    assert record["settings"]["batch_size"] == load_settings("smoke").cxrbert_batch_size
    assert {"commit", "packages"} <= set(record["provenance"]) and record["counts"]["train"]["both"] > 0
    assert not (folder / "checkpoint").exists()
    names = {path.name for path in (folder / "model").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    vocabulary, (studies, _) = load_tokenizer(folder / "model"), data.load_studies(SETTINGS)
    model, _ = load_masked_lm(SETTINGS, str(folder / "model"), vocabulary, seed=5)
    assert text_metrics(model, vocabulary, studies[studies.split == "validation"], SETTINGS) == record["metrics"]["after"]
    bert = AutoModel.from_pretrained(folder / "model", add_pooling_layer=False)
    assert torch.equal(bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


def test_never_trained_twice_unless_something_changed(adapt, tmp_path, monkeypatch):
    output = str(tmp_path / "here")
    adapt(output=output)
    record = tmp_path / "here" / "adaptation.json"
    first, after = record.read_bytes(), json.loads(record.read_text())["metrics"]["after"]

    def refuse(*_):
        raise RuntimeError("trained again")

    monkeypatch.setattr(training, "train", refuse)
    assert adapt(output=output)["after"] == after and record.read_bytes() == first
    with pytest.raises(RuntimeError, match="trained again"):
        adapt(output=output, seed=1)
    assert not record.exists()  # the old record says nothing about a new model


def test_both_losses_alone_run_through_the_notebook(adapt, tmp_path, monkeypatch):
    load = settings.load_settings
    for name, other in (("mlm", "rsm"), ("rsm", "mlm")):
        off = {f"cxrbert_{other}": 0}
        monkeypatch.setattr(settings, "load_settings", lambda preset, off=off: replace(load(preset), **off))
        assert set(adapt(output=str(tmp_path / name))["progress"].history[0]) >= {f"train_{name}", f"valid_{name}"}
        assert f"train_{other}" not in (tmp_path / name / "history.csv").read_text()
