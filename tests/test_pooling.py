"""A report's vector: [CLS] or the mean of its tokens, as its weights want it, in stage 1, in stage 2, and after saving."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, BertModel

from cxrvlm.cxrbert import TextAdaptationObjective, build_head, embed_sections
from cxrvlm.declip import build_objective, training_set
from cxrvlm.encoders import CLIP_DIM, DualEncoder, ImageEncoder, TextEncoder, build_backbone, pool_tokens
from cxrvlm.initialisation import build_model, cxrbert_folder, load_masked_lm, text_pooling
from cxrvlm.losses import contrastive_loss, global_similarity
from cxrvlm.settings import USED, digest, load_arm, load_settings, replace, stage_digest
from cxrvlm.text import clip_tokenizer, tokenize, train_tokenizer
from cxrvlm.training import load_batches
from cxrvlm.weights import WeightsError, minilm_directory
from prepared import prepare

REPORTS = ["Small left effusion.", "No disease.", "Mild cardiomegaly without edema, and a small effusion on the left."]
TOKENIZER = train_tokenizer(2 * REPORTS, 300)
SPECIAL = [TOKENIZER.cls_token_id, TOKENIZER.sep_token_id, TOKENIZER.pad_token_id]
SHAPE = {"vocab_size": len(TOKENIZER), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SMOKE, PAPER = load_settings("smoke"), load_settings("paper")
GENERIC = {"image_init": "generic", "text_init": "generic"}


def dual(**more) -> DualEncoder:
    "A small model with the tokenizer of the reports."
    torch.manual_seed(0)
    model = DualEncoder("timm:test_resnet", SHAPE | more.pop("text", {}), 8, SPECIAL, 64, **more).eval()
    model.tokenizer = TOKENIZER
    return model


@pytest.mark.parametrize("together", [True, False], ids=["padded", "alone"])
def test_the_mean_is_that_of_sentence_transformers(together):
    "By its published formula, on BERT's own hidden states, which know nothing of our packing; also where rows cannot be shared."
    bert = BertModel(BertConfig(**SHAPE, text_pooling="mean"), add_pooling_layer=False).eval()
    encoder = TextEncoder(bert.config, 8, SPECIAL).eval()
    encoder.bert = bert
    for texts in [REPORTS, REPORTS[:2]] if together else [[report] for report in REPORTS]:
        tokens = tokenize(TOKENIZER, texts, 32)
        with torch.no_grad():
            hidden, attended = bert(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1).float()
            theirs = (hidden * attended).sum(1) / torch.clamp(attended.sum(1), min=1e-9)
            assert torch.allclose(encoder(tokens).pooled, encoder.to_pooled(theirs), atol=1e-6)
            assert not torch.allclose(theirs, hidden[:, 0], atol=1e-2)


def test_only_the_pooled_vector_depends_on_it():
    tokens = tokenize(TOKENIZER, REPORTS, 32)
    cls, mean = dual(), dual(text={"text_pooling": "mean"})
    with torch.no_grad():
        first, second = cls.embed_texts(tokens), mean.embed_texts(tokens)
        assert torch.equal(first.pooled, cls.text_encoder.to_pooled(cls.text_encoder.features(tokens)[:, 0]))
    assert torch.equal(first.local, second.local) and torch.equal(first.mask, second.mask) and not torch.allclose(first.pooled, second.pooled)


def test_a_saved_model_pools_and_looks_as_it_did_and_an_old_one_by_cls(tmp_path):
    model, image, tokens = dual(text={"text_pooling": "mean"}, output_stride=16), torch.rand(2, 1, 64, 64), tokenize(TOKENIZER, REPORTS, 32)
    model.save_pretrained(tmp_path)
    again = DualEncoder.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again.embed_texts(tokens).pooled, model.embed_texts(tokens).pooled)
        assert torch.equal(again.embed_images(image).local, model.embed_images(image).local) and again.embed_images(image).local.shape[1] == 16
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("output_stride") == 16 and config["text_config"].pop("text_pooling") == "mean"
    path.write_text(json.dumps(config))  # as before there was a choice
    old = DualEncoder.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(old.embed_texts(tokens).pooled, old.text_encoder.to_pooled(old.text_encoder.features(tokens)[:, 0]))
        assert old.embed_images(image).local.shape[1] == 4


def publish(folder: Path, pooling: dict | None) -> str:
    "A published BERT, with what it says about its pooling."
    BertForMaskedLM(BertConfig(**SHAPE)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    if pooling:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return str(folder)


@pytest.mark.parametrize(("said", "pooling"), [
    (None, "cls"), ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 16}, "cls"),
    ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"), ({"pooling_mode": "mean"}, "mean"), ({"pooling_mode": "cls"}, "cls"),
])  # fmt: skip
def test_a_published_model_pools_as_its_files_say(tmp_path, said, pooling):
    auto = replace(SMOKE, text_pooling="auto", text_encoder=publish(tmp_path, said))
    assert text_pooling(auto, auto.text_encoder) == load_masked_lm(auto, auto.text_encoder, TOKENIZER, 0)[0].config.text_pooling == pooling
    model = build_model(auto, load_arm("baseline"), TOKENIZER, 0)
    assert model.text_encoder.bert.config.text_pooling == pooling
    other = {"cls": "mean", "mean": "cls"}[pooling]
    assert build_model(replace(auto, text_pooling=other), load_arm("baseline"), TOKENIZER, 0).text_encoder.bert.config.text_pooling == other


@pytest.mark.parametrize("said", [{"pooling_mode_max_tokens": True}, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, {"pooling_mode": "lasttoken"}, {"x": 1}])
def test_another_way_to_pool_is_refused(tmp_path, said):
    with pytest.raises(WeightsError, match="pools by .*set text_pooling = cls or mean"):
        text_pooling(replace(SMOKE, text_pooling="auto"), publish(tmp_path, said))


def test_auto_knows_random_weights_and_minilm():
    auto = replace(SMOKE, text_pooling="auto")
    assert text_pooling(auto, "random") == "mean" == text_pooling(auto, str(minilm_directory()))
    assert text_pooling(PAPER, "random") == "cls"  # the paper's is not asked


def test_stage_1_pools_as_stage_2_will(tmp_path):
    "RSM's loss is that of the pooled vectors, and an encoder that stage 1 adapted says itself how it pools."
    auto = replace(SMOKE, text_pooling="auto", cxrbert_mlm=0, vocab_size=300)
    masked_lm, _ = load_masked_lm(auto, "random", TOKENIZER, 0)
    objective = TextAdaptationObjective(masked_lm, build_head(32, auto.cxrbert_head, 0), auto).eval()
    tokens = tokenize(TOKENIZER, [*REPORTS, "No edema.", *REPORTS[1:], REPORTS[0], "Edema."], 32)
    with torch.no_grad():
        hidden = masked_lm.bert(**tokens).last_hidden_state
        mean = torch.stack([row[mask.bool()].mean(0) for row, mask in zip(hidden, tokens["attention_mask"], strict=True)])
        expected = contrastive_loss(global_similarity(*objective.head(mean).chunk(2)), auto.cxrbert_tau)
        assert torch.allclose(objective({"tokens": tokens})["rsm"], expected, atol=1e-5)
        assert torch.allclose(embed_sections(masked_lm, TOKENIZER, REPORTS, 32), mean[:3], atol=1e-5)
    folder = cxrbert_folder(tmp_path, "random", 0)
    masked_lm.save_pretrained(folder / "model")
    (folder / "adaptation.json").write_text("{}")
    adapted = build_model(auto, load_arm("adapted-text"), TOKENIZER, 0, tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(adapted.embed_texts(tokens).pooled, adapted.text_encoder.to_pooled(mean), atol=1e-5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare(SMOKE, tmp_path_factory.mktemp("data"))


def test_declip_pools_every_wording_by_the_mean(data):
    "Also of masked and reworded reports, whose batches are packed; a report among others has the vector that it has alone."
    studies, store, tokenizer = data
    settings, arm = replace(SMOKE, text_pooling="mean"), load_arm("ours").model_copy(update=GENERIC)
    objective = build_objective(settings, arm, tokenizer, 0, len(studies)).train()
    for part in objective.modules():
        part.p = 0.0 if isinstance(part, torch.nn.Dropout) else getattr(part, "p", None)
    batch = next(load_batches(training_set(studies, store, tokenizer, settings, arm), settings, 0))
    encoder = objective.model.text_encoder
    with torch.no_grad():
        found = objective.embed(objective.inputs(batch))
        for name, tokens in (("texts", batch["tokens"]), ("reworded", batch["reworded"])):
            for row, mask in enumerate(tokens["attention_mask"].bool()):
                alone = encoder.bert(input_ids=tokens["input_ids"][row, mask][None]).last_hidden_state.mean(1)
                assert torch.allclose(found[name].pooled[row], encoder.to_pooled(alone)[0], atol=1e-5)


def test_clip_has_its_own():
    tokenizer = clip_tokenizer()
    torch.manual_seed(0)
    model = DualEncoder("clip", {}, CLIP_DIM, tokenizer.all_special_ids, 64, output_stride=16).eval()
    tokens = tokenize(tokenizer, REPORTS, 32)
    with torch.no_grad():
        words = model.embed_texts(tokens)
    ends = tokens["attention_mask"].sum(1) - 1
    assert torch.equal(words.pooled, words.local[torch.arange(3), ends]) and model.embed_images(torch.rand(1, 1, 64, 64)).local.shape[1] == 4


def test_a_mean_leaves_the_padding_out():
    hidden, config = torch.arange(12.0).view(1, 4, 3), BertConfig(**SHAPE, text_pooling="mean")
    for length in (1, 2, 4):
        mask = (torch.arange(4) < length)[None].long()
        assert torch.equal(pool_tokens(hidden, {"attention_mask": mask}, config), hidden[:, :length].mean(1))


@pytest.mark.parametrize(("name", "stride", "side"), [("test_resnet", 16, 4), ("test_resnet", 8, 8), ("tf_efficientnet_lite0", 16, 4), ("convnext_atto", 16, 4), ("test_resnet", 0, 2)])
def test_finer_regions_have_the_same_weights(name, stride, side):
    encoder, plain = ImageEncoder(f"timm:{name}", 8, 64, stride).eval(), ImageEncoder(f"timm:{name}", 8, 64)
    assert {key: value.shape for key, value in encoder.state_dict().items()} == {key: value.shape for key, value in plain.state_dict().items()}
    with torch.no_grad():
        assert encoder.features(torch.rand(1, 1, 64, 64)).shape[1] == side**2


def test_a_stride_that_is_not_to_be_had_is_refused():
    for name, stride, said in [("resnet18", 16, "use timm:resnet18"), ("timm:test_vit", 16, "output_stride = 16"), ("timm:test_resnet", 7, "output_stride = 7"), ("timm:test_resnet", 64, "output_stride = 64")]:
        with pytest.raises(ValueError, match=said):
            build_backbone(name, 64, stride)


def test_each_key_is_in_the_digests_that_it_concerns():
    "Stage 1 for images reads no report, and that for reports sees no image."
    assert "output_stride" in USED["simclr"] - USED["cxrbert"] and "text_pooling" in USED["cxrbert"] - USED["simclr"]
    arm = load_arm("baseline")
    for key, value, stage, other in [("output_stride", 16, "simclr", "cxrbert"), ("text_pooling", "mean", "cxrbert", "simclr")]:
        changed = replace(PAPER, **{key: value})
        assert stage_digest(changed, stage) != stage_digest(PAPER, stage) and digest(changed, arm) != digest(PAPER, arm)
        assert stage_digest(changed, other) == stage_digest(PAPER, other)


def test_reports_of_a_random_bert_differ_from_the_start_by_their_mean_only():
    "Why there is a choice: audit A4."
    likeness = {}
    for pooling in ("cls", "mean"):
        model = build_model(replace(SMOKE, text_pooling=pooling, text_layers=2, text_hidden=128), load_arm("baseline"), TOKENIZER, 0).eval()
        with torch.no_grad():
            texts = F.normalize(model.embed_texts(tokenize(TOKENIZER, REPORTS, 32)).pooled)
        likeness[pooling] = ((texts @ texts.T).sum().item() - 3) / 6
    assert likeness["cls"] > 0.995 and likeness["mean"] < 0.98
