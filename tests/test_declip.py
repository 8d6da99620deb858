"""DeCLIP: the queue against a list, equation 5 against six losses written out, and what a weight of 0 costs."""
from collections import deque
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrvlm import thesaurus
from cxrvlm.declip import DeCLIPPairs, ReportQueue, build_objective, training_set
from cxrvlm.encoders import Embedding
from cxrvlm.initialisation import missing_weights
from cxrvlm.losses import contrastive_loss, global_similarity, local_similarity, nt_xent
from cxrvlm.settings import SettingsError, load_arm, load_settings, replace
from cxrvlm.training import load_batches
from cxrvlm.vlm import ContrastiveObjective, ImageTextPairs
from prepared import prepare

SETTINGS = replace(load_settings("smoke"), declip_queue=8)


def make_arm(loss="combined", alpha=0.2, beta=0.2, gamma=0.2):
    "An arm that needs no stage 1."
    changes = {"image_init": "generic", "text_init": "generic", "loss": loss, "alpha": alpha, "beta": beta, "gamma": gamma}
    return load_arm("ours").model_copy(update=changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Training studies, pixels and tokenizer of the smoke preset."
    return prepare(SETTINGS, tmp_path_factory.mktemp("data"))


def build(data, arm):
    "An objective, and the batches that it trains on."
    studies, store, tokenizer = data
    torch.manual_seed(0)
    objective = build_objective(SETTINGS, arm, tokenizer, 0, len(studies))
    for module in objective.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in objective.model.text_encoder.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    return objective, load_batches(training_set(studies, store, tokenizer, SETTINGS, arm), SETTINGS, 0)


def push(queue, ids, keys, lengths, generator):
    "Reports with words, the first of which is no word; returns the words that count."
    words, width = torch.randn(len(ids), 5, 4, generator=generator), torch.arange(5)
    mask = (width > 0) & (width <= torch.tensor(lengths)[:, None])
    queue.push(torch.tensor(ids), keys, words, mask)
    return [row[which] for row, which in zip(words, mask, strict=True)]


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 6), batches=st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=2), max_size=8), seed=st.integers(0, 99))
def test_the_queue_is_first_in_first_out_and_finds_what_a_loop_finds(size, batches, seed):
    generator = torch.Generator().manual_seed(seed)
    queue, model = ReportQueue(size, 4, width=6, studies=7), deque(maxlen=size)
    for batch in batches:
        keys = F.normalize(torch.randn(len(batch), 4, generator=generator), dim=1)
        ids, lengths = map(list, zip(*batch, strict=True))
        model.extend(zip(ids, keys, push(queue, ids, keys, lengths, generator), strict=True))
        assert queue.full == (len(model) == size)
    others = [entry for entry in model if entry[0] != 0]
    if queue.full and others:
        query = F.normalize(torch.randn(1, 4, generator=generator), dim=1)
        study, key, words = max(others, key=lambda entry: float(entry[1] @ query[0]))
        found = queue.nearest(torch.tensor([0]), query)
        assert queue.neighbour[0] == study and queue.similarity[0] == pytest.approx(float(key @ query[0]), abs=1e-6)
        assert torch.equal(found.pooled[0], key) and torch.equal(found.local[0][found.mask[0]], words)


def test_the_queue_survives_in_a_file(tmp_path):
    queue, copy = ReportQueue(3, 4, 6, 5), ReportQueue(3, 4, 6, 5)
    generator = torch.Generator().manual_seed(0)
    for ids in ([0, 1], [2], [3, 0]):
        push(queue, ids, torch.randn(len(ids), 4, generator=generator), [i + 1 for i in ids], generator)
    queue.nearest(torch.tensor([1]), torch.ones(1, 4))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    assert torch.load(tmp_path / "queue.pt", weights_only=True)["_extra_state"]["words"].shape == (3 + 4 + 1, 4)  # no padding
    copy.load_state_dict(torch.load(tmp_path / "queue.pt", weights_only=True))
    assert copy.pushed == queue.pushed == 5 and copy.full
    assert all(torch.equal(a[queue.mask] if name == "words" else a, b[queue.mask] if name == "words" else b)
               for (name, a), b in zip(queue.named_buffers(), copy.buffers(), strict=True))
    query = torch.tensor([0, 4]), torch.ones(2, 4)
    before, after = queue.nearest(*query), copy.nearest(*query)
    assert torch.equal(before.pooled, after.pooled) and torch.equal(before.mask, after.mask)
    assert torch.equal(before.local[before.mask], after.local[after.mask])


def test_neighbours_that_were_found_later_stay(tmp_path):
    "At the end of training the weights go back to their best; what was found since then is not forgotten."
    generator = torch.Generator().manual_seed(0)
    queue = ReportQueue(2, 4, 6, 3)
    push(queue, [0, 1], torch.eye(4)[:2], [1, 1], generator)
    queue.nearest(torch.tensor([0]), torch.eye(4)[1:2])
    best = {name: value.clone() if torch.is_tensor(value) else dict(value) for name, value in queue.state_dict().items()}
    queue.nearest(torch.tensor([2]), torch.eye(4)[:1])
    queue.load_state_dict(best)
    assert queue.neighbour.tolist() == [1, -1, 0]


@pytest.mark.parametrize("loss", ["infonce", "gloria", "combined"])
def test_the_terms_are_those_of_equation_5(data, loss):
    "Everything computed once more, by the six pairs."
    arm = make_arm(loss, 0.3, 0.25, 0.15)
    objective, batches = build(data, arm)
    while not objective.queue.full:
        objective(next(batches))
    batch, queue = next(batches), objective.queue
    entries = [(queue.ids[i].item(), queue.keys[i].clone(), queue.words[i][queue.mask[i]].clone()) for i in range(8)]
    terms = objective(batch)

    image, text = objective.model.image_encoder, objective.model.text_encoder
    views = [image.features(batch[key]) for key in ("images", "crops")]
    images = [image.project(regions) for regions in views]
    texts = [text(batch[key]) for key in ("tokens", "reworded")]

    def original(images, texts):
        whole = loss != "gloria" and contrastive_loss(global_similarity(images.pooled, texts.pooled), SETTINGS.tau)
        parts = loss != "infonce" and contrastive_loss(local_similarity(images.local, texts.local, texts.mask), SETTINGS.tau)
        return whole + parts

    if loss == "gloria":
        whole = torch.stack([F.normalize(w[m], dim=1).mean(0) for w, m in zip(texts[0].local, texts[0].mask, strict=True)])
    else:
        whole = texts[0].pooled
    near = []
    for study, query in zip(batch["study"].tolist(), whole, strict=True):
        near.append(max((e for e in entries if e[0] != study), key=lambda e: F.cosine_similarity(e[1], query, dim=0)))
    width = max(1, *(len(entry[2]) for entry in near))
    words = torch.stack([F.pad(entry[2], (0, 0, 0, width - len(entry[2]))) for entry in near])
    mask = torch.arange(width) < torch.tensor([len(entry[2]) for entry in near])[:, None]
    neighbours = Embedding(torch.stack([entry[1] for entry in near]), words, mask)

    iss = nt_xent(*(objective.image_head(regions.mean(1)) for regions in views), SETTINGS.declip_tau)
    scores = objective.word_head(text.features(batch["tokens"]))
    tss = F.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten())
    mvs = (original(images[0], texts[1]) + original(images[1], texts[0]) + original(images[1], texts[1])) / 3
    nn = (original(images[0], neighbours) + original(images[1], neighbours)) / 2
    total = 0.3 * original(images[0], texts[0]) + 0.15 * (tss + iss) + 0.25 * mvs + 0.15 * nn
    assert sum(terms.values()).item() == pytest.approx(total.item(), rel=1e-5)
    assert queue.neighbour[batch["study"]].tolist() == [entry[0] for entry in near]
    named = [f"{prefix}{name}" for prefix in ("", "mvs_", "nn_") for name in (("infonce", "gloria") if loss == "combined" else (loss,))]
    assert sorted(terms) == sorted([*named, "iss", "tss"])


def test_a_weight_of_0_costs_no_pass_and_no_work(data, monkeypatch):
    worded = []
    monkeypatch.setattr("cxrvlm.declip.eda", lambda text, *_: worded.append(text) or text)
    for alpha, beta, gamma in product((0.0, 0.2), repeat=3):
        worded.clear()
        arm = make_arm("infonce", alpha, beta, gamma)
        objective, batches = build(data, arm)
        calls = {"image": 0, "text": 0}
        hooks = {"image": objective.model.image_encoder.backbone, "text": objective.model.text_encoder.bert}
        for name, module in hooks.items():
            module.register_forward_hook(lambda *_, calls=calls, name=name: calls.update({name: calls[name] + 1}))
        batch = next(batches)
        terms = objective(batch)
        assert calls == {"image": 1 + arm.declip, "text": 1 + bool(beta)}
        assert ("labels" in batch, "reworded" in batch, bool(worded)) == (bool(alpha), bool(beta), bool(beta))
        assert ("tss" in terms, "mvs_infonce" in terms) == (bool(alpha), bool(beta))
        assert (hasattr(objective, "word_head"), hasattr(objective, "queue")) == (bool(alpha), bool(gamma))
        assert torch.isfinite(sum(terms.values()))


def test_no_share_is_left_for_the_original_loss(data):
    objective, batches = build(data, make_arm("infonce", 0.5, 0.3, 0.2))
    assert "infonce" not in objective(next(batches))


def test_validation_is_the_loss_of_the_plain_pairs(data):
    studies, store, tokenizer = data
    objective, _ = build(data, make_arm())
    batch = next(load_batches(ImageTextPairs(studies, store, tokenizer, SETTINGS.max_tokens), SETTINGS, 0))
    objective.eval()
    plain = ContrastiveObjective(objective.model, SETTINGS, "combined").eval()
    assert objective(batch) == plain(batch)
    assert objective.queue.pushed == 0


def test_images_learn_from_neighbours_and_the_queue_does_not(data):
    objective, batches = build(data, make_arm("combined", 0, 0, 1))
    for _ in range(2):
        objective(next(batches))
    terms = objective(next(batches))
    assert list(terms) == ["nn_infonce", "nn_gloria"]
    sum(terms.values()).backward()
    assert objective.model.image_encoder.to_local.weight.grad.abs().sum() > 0
    assert objective.model.text_encoder.to_local.weight.grad is None and not objective.queue.keys.requires_grad


def test_the_word_head_shares_its_vectors_with_the_encoder(data):
    objective, _ = build(data, make_arm())
    names = [name for name, _ in objective.named_parameters()]
    assert "word_head.predictions.decoder.weight" not in names  # it is the encoder's parameter, with the encoder's rate
    objective.load_state_dict(objective.state_dict())
    bert = objective.model.text_encoder.bert
    assert objective.word_head.predictions.decoder.weight is bert.embeddings.word_embeddings.weight


def test_second_views_depend_on_seed_step_and_study_alone(data):
    studies, store, tokenizer = data
    arm = make_arm()
    whole, few = (DeCLIPPairs(part, store, tokenizer, SETTINGS, arm, seed=3) for part in (studies, studies.iloc[5:7]))
    one, other = whole[9, 6], few[9, 1]
    assert one["reworded"] == other["reworded"]

    def crop(pairs, step, index):
        return pairs.finish(pairs.collate([pairs[step, index]]))["crops"]

    assert torch.equal(crop(whole, 9, 6), crop(few, 9, 1))
    crops = [crop(whole, step, 6) for step in range(5)]
    assert not any(torch.equal(a, b) for a, b in zip(crops, crops[1:], strict=False))
    assert len({whole[step, 6]["reworded"] for step in range(12)}) > 1


def test_settings_and_arms_that_cannot_be(tmp_path, data):
    with pytest.raises(SettingsError, match="declip_queue = 3 must hold a batch of 4 at least"):
        build_objective(replace(SETTINGS, declip_queue=3), make_arm(), data[2], 0, 50)
    text = (Path(__file__).parents[1] / "settings.ini").read_text()
    for name, lines, complaint in [
        ("much", "alpha = 0.6\nbeta = 0.6", "alpha \\+ beta \\+ gamma = 1.2: they are shares of one loss"),
        ("web", "image_init = clip\ntext_init = clip\nalpha = 0.2", "must be 0 for CLIP"),
    ]:
        (tmp_path / "settings.ini").write_text(f"{text}\n[arm {name}]\n{lines}\n")
        with pytest.raises(SettingsError, match=complaint):
            load_arm(name, tmp_path / "settings.ini")


def test_wordnet_is_missed_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(thesaurus, "wordnet_files", lambda nltk: (_ for _ in ()).throw(LookupError()))
    thesaurus.open_wordnet.cache_clear()
    wordnet = replace(SETTINGS, declip_synonyms="wordnet")
    assert missing_weights(wordnet, make_arm(beta=0.0)) == missing_weights(SETTINGS, make_arm()) == []
    (sentence,) = missing_weights(wordnet, make_arm())
    assert "pip install nltk" in sentence and "declip_synonyms = radiology needs neither" in sentence


def test_wordnet_rewords_too(data):
    studies, store, tokenizer = data
    pytest.importorskip("nltk")
    wordnet = replace(SETTINGS, declip_synonyms="wordnet")
    pairs = training_set(studies, store, tokenizer, wordnet, make_arm())
    batch = pairs.collate([pairs[0, index] for index in range(8)])
    assert batch["reworded"]["attention_mask"].sum(1).min() >= 3
    assert np.mean([pairs[0, i]["reworded"] != pairs.texts[i] for i in range(8)]) > 0.5


@pytest.mark.parametrize("loss", ["infonce", "gloria", "combined"])
def test_bf16_trains_with_neighbours(data, loss):
    "The queue is kept in float32, whatever the encoders compute in."
    objective, batches = build(data, make_arm(loss))
    with torch.autocast("cpu", torch.bfloat16):
        while not objective.queue.full:
            objective(next(batches))
        terms = objective(next(batches))
    sum(terms.values()).backward()
    assert f"nn_{'infonce' if loss != 'gloria' else loss}" in terms and torch.isfinite(sum(terms.values()))
    assert objective.queue.keys.dtype == objective.queue.words.dtype == torch.float32
