"""What makes a step fast, guarded without a clock: passes, places, calls and waits are counted."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cxrvlm import training
from cxrvlm.augment import augmentation
from cxrvlm.declip import build_objective, training_set
from cxrvlm.packing import pack, share_rows
from cxrvlm.settings import load_arm, load_settings, replace
from cxrvlm.simclr import ImageViews
from cxrvlm.training import build_optimizer, load_batches, start_device, train_step
from prepared import prepare

SETTINGS = replace(load_settings("smoke"), source="openi", pairs=0, batch_size=20, max_tokens=64, vocab_size=2000, declip_queue=20)
GENERIC = {"image_init": "generic", "text_init": "generic"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Real reports, whose lengths are those that padding suffers from, with phantoms of 32 px."
    return prepare(SETTINGS, tmp_path_factory.mktemp("data"), count=200)


def stepper(data, arm, precision="float32", accumulate=1):
    "A function that makes the next step, and the objective that it trains."
    studies, store, tokenizer = data
    settings, arm = replace(SETTINGS, precision=precision), load_arm(arm).model_copy(update=GENERIC)
    objective = build_objective(settings, arm, tokenizer, 0, len(studies)).train()
    optimizer, accelerator = build_optimizer(objective, settings), start_device(settings)
    batches = enumerate(load_batches(training_set(studies, store, tokenizer, settings, arm), settings, 0))

    def step():
        number, batch = next(batches)
        return train_step(objective, batch, optimizer, accelerator, 0, number, accumulate)

    return step, objective


class Count(TorchDispatchMode):
    "How often each operation runs."

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **kwargs or {})


def test_bert_reads_hardly_any_padding(data):
    "At most a third more places than there are tokens; padded to the longest it would be three times as many."
    step, objective = stepper(data, "baseline")
    read, there, padded = [], [], []
    text = objective.model.text_encoder

    def note(module, args):
        there.append(int(args[0]["attention_mask"].sum()))
        padded.append(args[0]["attention_mask"].numel())

    text.register_forward_pre_hook(note)
    text.bert.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True)
    for _ in range(10):
        step()
    assert sum(read) < 1.35 * sum(there) and sum(padded) > 2 * sum(there)


@pytest.mark.parametrize("arm", ["baseline", "combined", "ours"])
def test_a_step_reads_no_number(data, arm):
    "To read a number from a GPU is to wait for it. A step reads none, also while it looks for neighbours; only masks go to the CPU (`pack`, `local_similarity`)."
    step, objective = stepper(data, arm)
    for _ in range(3):
        step()
    with Count() as count:
        terms = step()
    assert not hasattr(objective, "queue") or "nn_infonce" in terms
    assert "_local_scalar_dense" not in count.calls  # what item(), float() and bool() come down to
    with Count() as control:
        sum(terms.values()).item()
    assert control.calls["_local_scalar_dense"] == 1


def test_terms_are_read_together(data, tmp_path, monkeypatch):
    "Ten steps, one reading."
    studies, store, tokenizer = data
    settings = replace(SETTINGS, train_iterations=20, max_iterations=20, valid_iterations=1)
    sets = [training_set(studies, store, tokenizer, settings, load_arm("baseline"))] * 2
    sizes, read = [], training.read_terms
    monkeypatch.setattr(training, "read_terms", lambda steps: sizes.append(len(steps)) or read(steps))
    training.train(build_objective(settings, load_arm("baseline"), tokenizer, 0, 200), *sets, settings, 0, tmp_path)
    assert sizes == [10, 10]


def test_a_batch_is_augmented_as_one(data, monkeypatch):
    "One interpolation for a batch of pairs, one more for DeCLIP's crops, and one for each of SimCLR's views."
    studies, store, tokenizer = data
    calls, sample = [], F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda images, *args, **kwargs: calls.append(len(images)) or sample(images, *args, **kwargs))
    for arm, expected in (("baseline", [20]), ("ours", [20, 20])):
        calls.clear()
        next(load_batches(training_set(studies, store, tokenizer, SETTINGS, load_arm(arm)), SETTINGS, 0))
        assert calls == expected
    calls.clear()
    next(load_batches(ImageViews(studies, store, augmentation(SETTINGS, "simclr")), SETTINGS, 0))
    assert calls == [20, 20]


def test_a_report_is_tokenised_once(data, monkeypatch):
    studies, store, tokenizer = data
    pairs = training_set(studies, store, tokenizer, SETTINGS, load_arm("baseline"))
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *args, **kwargs: pytest.fail("tokenised again"))
    batches = load_batches(pairs, SETTINGS, 0)
    assert [next(batches)["tokens"]["input_ids"].shape[0] for _ in range(3)] == [20, 20, 20]


def test_packing_wastes_little_at_any_lengths():
    "First fit fills all rows but the last by more than half, whatever the lengths."
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(1, 65, (20,), generator=generator)
        rows = share_rows(lengths.tolist())
        assert sorted(i for row in rows for i in row) == list(range(20))
        sums = [int(lengths[row].sum()) for row in rows]
        assert max(sums) <= lengths.max() and len(rows) < 2 * lengths.sum() / lengths.max() + 1
        mask = (torch.arange(64) < lengths[:, None]).long()
        assert pack(mask).shape == (len(rows), lengths.max())
