"""When training stops, by what its best weights are chosen, how long DeCLIP's queue is, and which runs had too few steps."""
import json

import pytest
import torch
from torch import nn

from cxrvlm import training
from cxrvlm.declip import build_objective, queue_size, training_set
from cxrvlm.results import find_results, read_runs, result_row, write_result
from cxrvlm.settings import in_stage, load_arm, load_settings, replace
from cxrvlm.training import Progress, start_device, train, validate
from prepared import prepare

SMOKE = load_settings("smoke")
SETTINGS = replace(SMOKE, batch_size=4, train_iterations=10, patience=3, max_iterations=400)
GENERIC = {"image_init": "generic", "text_init": "generic"}


class Plateau(nn.Module):
    "A loss that stands at chance for a hundred steps, slightly rising, and then falls: what audit A4 saw."

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, batch):
        if self.training:
            self.steps += 1
        fallen = (self.steps - 100).clamp(min=0) / 100
        return {"infonce": 3 + self.steps * 1e-4 - fallen * 1.5 + 0 * self.weight.sum()}


class Numbers:
    "As many samples as wanted, each its number."

    def __init__(self, count):
        self.count, self.seen = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        return key[1]

    def collate(self, samples):
        self.seen.append(samples)
        return {"study_id": [str(sample) for sample in samples], "x": torch.tensor(samples)}


def test_a_first_plateau_is_no_end(tmp_path):
    "Without the rule the run stops on it (the control); with it the run goes on and its best weights are from behind it."
    early = train(Plateau(), Numbers(40), Numbers(8), SETTINGS, 0, tmp_path / "early")
    late = train(Plateau(), Numbers(40), Numbers(8), replace(SETTINGS, min_iterations=120), 0, tmp_path / "late")
    assert early.step == 40 and early.best_step == 10
    assert late.step == 400 and late.best_step == 400


def test_patience_begins_at_min_iterations_and_is_whole_then():
    "Three validations after it, not one: what was waited before does not count."
    progress, settings = Progress(), replace(SETTINGS, min_iterations=50)
    ends = []
    for step in range(10, 110, 10):
        progress.step = step
        progress.record({"a": 1.0}, {"a": 2.0 + step}, settings.min_iterations)
        ends.append(progress.finished(settings))
    assert ends.index(True) == 7  # steps 60, 70, 80 were waited for
    assert Progress(step=400).finished(settings)  # the end in any case


def test_a_resumed_run_waits_as_one_that_was_left_alone(tmp_path):
    settings = replace(SETTINGS, min_iterations=60)
    whole = train(Plateau(), Numbers(40), Numbers(8), settings, 0, tmp_path / "whole")
    train(Plateau(), Numbers(40), Numbers(8), replace(settings, max_iterations=50), 0, tmp_path / "parts")
    resumed = train(Plateau(), Numbers(40), Numbers(8), settings, 0, tmp_path / "parts")
    assert (resumed.step, resumed.waited, resumed.history) == (whole.step, whole.waited, whole.history) and whole.step == 90


@pytest.mark.parametrize(("count", "iterations", "batches"), [(43, 0, 10), (43, 3, 3), (43, 100, 10), (4, 0, 1)])
def test_no_number_of_batches_is_the_whole_split(count, iterations, batches):
    data = Numbers(count)
    validate(Plateau(), data, replace(SETTINGS, valid_iterations=iterations), start_device(SETTINGS))
    seen = [sample for batch in data.seen[:batches] for sample in batch]
    assert len(set(seen)) == len(seen) == batches * 4
    with pytest.raises(ValueError, match="3 samples, less than one batch of 4"):
        validate(Plateau(), Numbers(3), replace(SETTINGS, valid_iterations=iterations), start_device(SETTINGS))


def test_validation_takes_no_more_batches_than_it_says():
    "Whatever the loader has prepared."
    counted = []
    objective = Plateau()
    objective.register_forward_pre_hook(lambda module, given: counted.append(given[0]["x"].tolist()))
    validate(objective, Numbers(43), replace(SETTINGS, valid_iterations=0), start_device(SETTINGS))
    assert len(counted) == 10 and len({x for batch in counted for x in batch}) == 40


@pytest.mark.parametrize("pairs", [80, 400, 1600, 8000, 150_000])
@pytest.mark.parametrize(("iterations", "batch"), [(1500, 20), (240, 20), (30, 4), (7, 4)])
def test_the_queue_is_full_within_the_first_tenth_of_the_steps(pairs, iterations, batch):
    settings = replace(SMOKE, declip_queue=4096, batch_size=batch, max_iterations=iterations, declip_queue_within=0.1)
    size = queue_size(settings, pairs)
    assert size <= min(4096, pairs) and -(-size // batch) <= max(1, iterations * 0.1)
    assert queue_size(replace(settings, declip_queue_within=0), pairs) == queue_size(replace(settings, max_iterations=0), pairs) == min(4096, pairs)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare(SMOKE, tmp_path_factory.mktemp("data"))


def test_neighbours_are_found_from_then_on(data, tmp_path, monkeypatch):
    "In a whole run: the term is there after a tenth of the steps, and without the rule only at its end."
    studies, store, tokenizer = data
    arm = load_arm("ours").model_copy(update=GENERIC)
    for within, first in ((0.1, 2), (0, 12)):
        settings = replace(SMOKE, declip_queue=48, max_iterations=20, train_iterations=20, declip_queue_within=within, batchnorm_images=0)
        objective = build_objective(settings, arm, tokenizer, 0, len(studies))
        steps = []
        monkeypatch.setattr(training, "read_terms", lambda rows, steps=steps: steps.extend(rows) or [{k: v.item() for k, v in terms.items()} for _, _, terms in rows])
        pairs = training_set(studies, store, tokenizer, settings, arm)
        train(objective, pairs, training_set(studies, store, tokenizer, settings, load_arm("baseline")), settings, 0, tmp_path / str(within))
        assert [number for number, _, terms in steps if "nn_infonce" in terms][0] == first


def run(train_terms, valid_terms, step=400) -> Progress:
    "A run with one validation."
    progress = Progress(step=step)
    progress.record(train_terms, valid_terms)
    return progress


@pytest.mark.parametrize(("train_terms", "share", "step", "limited"), [
    ({"infonce": 2.5}, 1, 400, True), ({"infonce": 1.5}, 1, 400, False), ({"infonce": 2.5}, 1, 390, False), ({"infonce": 2.0}, 1, 400, True),
    ({"infonce": 1.0, "iss": 3.0, "mvs_infonce": 2.0}, 0.4, 400, True), ({"infonce": 0.7, "iss": 3.0}, 0.4, 400, False), ({"mvs_infonce": 2.0}, 0, 400, None),
])  # fmt: skip
def test_a_run_is_limited_by_steps(train_terms, share, step, limited):
    assert run(train_terms, {"infonce": 2.0}, step).limited_by_steps(SETTINGS, share) is limited


def test_both_matchings_count():
    valid = {"infonce": 2.0, "gloria": 2.0}
    assert run({"infonce": 2.5, "gloria": 1.6}, valid).limited_by_steps(SETTINGS) and not run({"infonce": 2.3, "gloria": 1.6}, valid).limited_by_steps(SETTINGS)
    assert Progress().limited_by_steps(SETTINGS) is None and run({"infonce": 2.5}, {"infonce": 2.0}).limited_by_steps(replace(SETTINGS, max_iterations=0)) is False


def test_it_stands_in_the_record_and_in_the_table(tmp_path):
    "Of three arms, DeCLIP's by its share; and a table from before has a blank."
    counts = {"train": 40, "validation": 8, "test": 8}
    runs = {"baseline": run({"infonce": 2.5}, {"infonce": 2.0}), "adapted": run({"infonce": 1.5}, {"infonce": 2.0}), "ours": run({"infonce": 0.7, "gloria": 0.7, "iss": 1.0}, {"infonce": 2.0, "gloria": 2.0})}
    for arm, progress in runs.items():
        path = write_result(tmp_path / arm, SETTINGS, load_arm(arm), 1, 0, {"auroc": 0.6}, counts, "f" * 16, progress)
        assert json.loads(path.read_text())["training"]["limited_by_steps"] is result_row(path)["limited_by_steps"]
    table = find_results(tmp_path).set_index("arm")
    assert table.limited_by_steps.to_dict() == {"baseline": True, "adapted": False, "ours": False}
    table.drop(columns="limited_by_steps").to_csv(tmp_path / "runs.csv")
    assert read_runs(tmp_path / "runs.csv").limited_by_steps.isna().all()


def test_each_stage_has_its_own(tmp_path):
    settings = replace(SMOKE, min_iterations=7, simclr_min_iterations=5, cxrbert_min_iterations=6, simclr_valid_iterations=0)
    assert [in_stage(settings, stage).min_iterations for stage in ("simclr", "cxrbert")] == [5, 6] and in_stage(settings, "simclr").valid_iterations == 0
