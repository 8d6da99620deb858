"""Published weights: where they are looked for, and the true shapes of CXR-BERT read without its authors' code."""
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM

from cxrvlm import weights
from cxrvlm.cxrbert import RSMHead
from cxrvlm.initialisation import build_model, load_masked_lm, missing_weights, read_config, tokenizer_source
from cxrvlm.settings import arm_names, load_arm, load_settings, replace
from cxrvlm.text import load_tokenizer, tokenize
from cxrvlm.weights import PUBLISHED, WeightsError, fetch, locate, reachable

VOCABULARY = Path(__file__).resolve().parents[2] / "shared/data/vocab/BiomedVLP-CXR-BERT-specialized"


@pytest.fixture(scope="module")
def cxrbert(tmp_path_factory) -> Path:
    "A folder of weights with a checkpoint of CXR-BERT's true shape, class names and key names, and random values."
    if not VOCABULARY.is_dir():
        pytest.skip(f"{VOCABULARY} is not on this machine")
    folder = tmp_path_factory.mktemp("weights")
    home = folder / "BiomedVLP-CXR-BERT-general"
    shutil.copytree(VOCABULARY, home, copy_function=shutil.copyfile)
    torch.manual_seed(0)
    state = BertForMaskedLM(read_config(home)).state_dict()
    head = {"dense_to_hidden": torch.nn.Linear(768, 128), "LayerNorm": torch.nn.LayerNorm(128), "dense_to_output": torch.nn.Linear(128, 128)}
    state |= {f"cls_projection_head.{name}.{key}": value for name, part in head.items() for key, value in part.state_dict().items()}
    torch.save(state | {"bert.embeddings.position_ids": torch.arange(512)[None]}, home / "pytorch_model.bin")
    return folder


def test_cxrbert_is_read_whole_and_its_code_is_not_run(cxrbert):
    settings = replace(load_settings("paper"), weights=str(cxrbert))
    tokenizer = load_tokenizer("cxrbert-general", cxrbert)
    model, projection = load_masked_lm(settings, "cxrbert-general", tokenizer, seed=0)
    stored = torch.load(cxrbert / "BiomedVLP-CXR-BERT-general/pytorch_model.bin", weights_only=True)
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
    head = RSMHead(768, 128)
    head.load_state_dict(projection)
    assert torch.equal(head.dense_to_hidden.weight, stored["cls_projection_head.dense_to_hidden.weight"])


def test_an_arm_starts_from_it(cxrbert):
    settings = replace(load_settings("smoke"), weights=str(cxrbert))
    arm = load_arm("text-cxrbert-general").model_copy(update={"image_init": "generic"})
    assert tokenizer_source(settings, arm) == "cxrbert-general" and not missing_weights(settings, arm)
    tokenizer = load_tokenizer("cxrbert-general", cxrbert)
    model = build_model(settings, arm, tokenizer, seed=0).eval()
    assert model.text_encoder.bert.config.num_hidden_layers == 12
    with torch.no_grad():
        assert model.embed_texts(tokenize(tokenizer, ["No pneumothorax."], 32)).pooled.shape == (1, settings.embed_dim)


def test_every_arm_of_settings_ini_can_be_asked_for():
    settings = load_settings("paper")
    for name in arm_names():
        for sentence in missing_weights(settings, load_arm(name)):
            assert "hf download" in sentence or "download.pytorch.org" in sentence


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_in_weights_is_taken_first(tmp_path, name):
    place = tmp_path / Path(PUBLISHED[name].repo).name
    place.mkdir()
    assert locate(name, tmp_path) == str(place) and fetch(name, tmp_path) == place


@pytest.mark.parametrize("name", ["nobody/nothing", "no/such/directory", "/no/such/directory", "../elsewhere"])
def test_what_is_nowhere_is_said_with_a_way_out(tmp_path, name):
    with pytest.raises(WeightsError, match="hf download .* --local-dir"):
        locate(name, tmp_path)


def test_reachable_asks_for_a_status_and_nothing_else(monkeypatch):
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(200 if self.path == "/there" else 404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(weights, "HF_HUB_OFFLINE", False)
    assert reachable(f"{url}/there") and not reachable(f"{url}/not") and asked == ["/there", "/not"]
    server.shutdown()
    server.server_close()
    assert not reachable(f"{url}/there")
    monkeypatch.setattr(weights, "HF_HUB_OFFLINE", True)
    assert not reachable("https://huggingface.co")
