"""Gradient caching: the gradients of a batch that passes in parts are those of the whole batch."""
import pytest
import torch
from accelerate.utils import concatenate, slice_tensors

from cxrvlm.augment import augmentation
from cxrvlm.caching import backward_in_parts
from cxrvlm.cxrbert import ReportSections, TextAdaptationObjective, build_head
from cxrvlm.declip import build_objective, training_set
from cxrvlm.initialisation import load_masked_lm
from cxrvlm.settings import in_stage, load_arm, load_settings, replace
from cxrvlm.simclr import ImageViews
from cxrvlm.simclr import build_objective as build_simclr
from cxrvlm.training import load_batches, train
from prepared import prepare

SETTINGS = replace(load_settings("smoke"), batch_size=10, declip_queue=10)
GENERIC = {"image_init": "generic", "text_init": "generic"}
KINDS = ("baseline", "combined", "ours", "simclr", "text")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare(SETTINGS, tmp_path_factory.mktemp("data"))


def build(data, kind):
    "An objective in float64, whose batch normalisation is frozen, and a batch."
    studies, store, tokenizer = data
    if kind == "simclr":
        stage = in_stage(replace(SETTINGS, simclr_batch_size=10), "simclr")
        objective, dataset = build_simclr(stage, 0), ImageViews(studies, store, augmentation(stage, "simclr"))
    elif kind == "text":
        stage = in_stage(replace(SETTINGS, cxrbert_batch_size=10), "cxrbert")
        masked_lm, _ = load_masked_lm(stage, "random", tokenizer, seed=0)
        objective = TextAdaptationObjective(masked_lm, build_head(stage.text_hidden, stage.cxrbert_head, 0), stage)
        dataset = ReportSections(studies, tokenizer, stage)
    else:
        stage, arm = SETTINGS, load_arm(kind).model_copy(update=GENERIC)
        objective = build_objective(stage, arm, tokenizer, 0, len(studies))
        dataset = training_set(studies, store, tokenizer, stage, arm)
    batches = load_batches(dataset, stage, 0)
    objective.train().double()
    for layer in objective.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    first, second = ({k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in next(batches).items()} for _ in range(2))
    if kind == "ours":
        objective(first)  # fills the queue, so that neighbours are found
    return objective, second


def without_dropout(objective):
    for layer in objective.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
        if hasattr(layer, "dropout_prob"):
            layer.dropout_prob = 0.0
    return objective


def after(objective, way):
    "The gradients, and the terms."
    objective.zero_grad()
    torch.manual_seed(3)
    terms = way()
    return {name: weight.grad for name, weight in objective.named_parameters() if weight.grad is not None}, terms


def compare(objective, reference, way):
    "Both ways, from the same state; the queue is put back in between."
    state = {name: value.clone() if torch.is_tensor(value) else value for name, value in objective.state_dict().items()}
    expected, terms = after(objective, reference)
    expected = {name: grad.clone() for name, grad in expected.items()}
    objective.load_state_dict(state)
    found, again = after(objective, way)
    assert found.keys() == expected.keys() and terms.keys() == again.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(dict(again), dict(terms))


def whole(objective, batch):
    terms = objective(batch)
    sum(terms.values()).backward()
    return terms


def parts_in_memory(objective, batch, size):
    "The reference with dropout: the same parts in the same order, everything kept."
    inputs = objective.inputs(batch)
    rows = len(next(iter(inputs["tokens"].values())) if "tokens" in inputs else inputs["views"])
    found = [objective.embed(slice_tensors(inputs, slice(i, i + size))) for i in range(0, rows, size)]
    terms = objective.terms(concatenate(found), batch)
    sum(terms.values()).backward()
    return terms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [2, 3, 10])
def test_without_dropout_it_is_the_whole_batch(data, kind, parts):
    objective, batch = build(data, kind)
    without_dropout(objective)
    compare(objective, lambda: whole(objective, batch), lambda: backward_in_parts(objective, batch, parts))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_replayed(data, kind):
    objective, batch = build(data, kind)
    rows = {"simclr": 20, "text": 20}.get(kind, 10)
    compare(objective, lambda: parts_in_memory(objective, batch, rows // 5), lambda: backward_in_parts(objective, batch, 5))


def test_running_statistics_count_each_part_once_and_the_generator_goes_on_as_after_one_pass(data):
    objective, batch = build(data, "baseline")
    objective.train()
    norm = next(layer for layer in objective.modules() if isinstance(layer, torch.nn.BatchNorm2d))
    torch.manual_seed(0)
    backward_in_parts(objective, batch, 5)
    drawn = torch.rand(1)
    assert norm.num_batches_tracked == 5 and norm.track_running_stats
    torch.manual_seed(0)
    with torch.no_grad():
        inputs = objective.inputs(batch)
        for i in range(0, 10, 2):
            objective.embed(slice_tensors(inputs, slice(i, i + 2)))
    assert torch.equal(torch.rand(1), drawn)


def test_the_most_that_is_kept_is_a_part(data):
    "Guard without a clock: the activations that autograd keeps at one time shrink with the parts."
    def kept(parts):
        objective, batch = build(data, "baseline")
        weights = {weight.untyped_storage().data_ptr() for weight in objective.parameters()}
        alive, most = [0], [0]

        class Handle:
            def __init__(self, tensor):
                self.tensor = tensor
                self.size = 0 if tensor.untyped_storage().data_ptr() in weights else tensor.numel()
                alive[0] += self.size
                most[0] = max(most[0], alive[0])

            def __del__(self):
                alive[0] -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Handle, lambda handle: handle.tensor):
            backward_in_parts(objective, batch, parts) if parts > 1 else whole(objective, batch)
        return most[0]

    assert kept(5) < 0.45 * kept(1)


def test_a_run_in_parts_is_trained_resumed_and_has_a_digest_of_its_own(data, tmp_path):
    studies, store, tokenizer = data
    settings = replace(SETTINGS, accumulate=3, train_iterations=2, max_iterations=4, patience=9)
    arm = load_arm("ours").model_copy(update=GENERIC)
    sets = [training_set(studies, store, tokenizer, settings, a) for a in (arm, load_arm("baseline"))]
    run, first, second = (build_objective(settings, arm, tokenizer, 0, len(studies)) for _ in range(3))
    progress = train(run, *sets, settings, 0, tmp_path / "whole")
    train(first, *sets, replace(settings, max_iterations=2), 0, tmp_path / "parts")
    assert train(second, *sets, settings, 0, tmp_path / "parts").history == progress.history
    assert all(torch.equal(a, b) for a, b in zip(run.parameters(), second.parameters(), strict=True))
