"""A run that is killed, anywhere, and started again ends with the same weights and the same history, bit for bit."""
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from cxrvlm import training
from cxrvlm.data import load_studies, make_tokenizer, open_store
from cxrvlm.declip import build_objective, training_set
from cxrvlm.settings import load_arm, load_settings, replace
from cxrvlm.vlm import ImageTextPairs

SETTINGS = replace(load_settings("smoke"), train_iterations=3, max_iterations=12, patience=10, declip_queue=16)
# every term there is, and DeCLIP's queue; from generic weights, so that no stage 1 is needed
ARM = load_arm("ours").model_copy(update={"image_init": "generic", "text_init": "generic"})


def suicide() -> None:
    "What a power cut does: no handler runs."
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_step(step: int) -> None:
    "Make the training loop die in the middle of a step, after the backward pass."
    backward = torch.Tensor.backward
    count = iter(range(100))

    def deadly(self, *arguments, **options):
        backward(self, *arguments, **options)
        if next(count) == step:
            suicide()

    torch.Tensor.backward = deadly


def die_when_writing(number: int, after: bool) -> None:
    "Make the training loop die just before or just after it puts its n-th file in place."
    replace_file = os.replace
    count = iter(range(100))

    def deadly(source, target):
        if next(count) != number:
            return replace_file(source, target)
        if after:
            replace_file(source, target)
        suicide()

    training.os.replace = deadly


def run(folder: Path, data: Path, sabotage=None) -> None:
    "Train as train_vlm.ipynb does."
    torch.set_num_threads(1)
    studies, _ = load_studies(SETTINGS)
    store, tokenizer = open_store(SETTINGS, studies, data), make_tokenizer(SETTINGS, studies)
    train_studies, valid_studies = (studies[studies.split == split] for split in ("train", "validation"))
    objective = build_objective(SETTINGS, ARM, tokenizer, 0, len(train_studies))
    sets = training_set(train_studies, store, tokenizer, SETTINGS, ARM), ImageTextPairs(valid_studies, store, tokenizer, SETTINGS.max_tokens)
    if sabotage:
        sabotage[0](*sabotage[1:])
    training.train(objective, *sets, SETTINGS, 0, folder)
    torch.save(objective.state_dict(), folder / "final.pt")


def check_same(folder: Path, other: Path) -> None:
    "The same weights, and the same queue of reports."
    states = [torch.load(f / "final.pt", weights_only=True) for f in (folder, other)]
    queues = [state.pop("queue._extra_state") for state in states]
    assert states[0].keys() == states[1].keys() and (queues[0]["neighbour"] >= 0).any()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for key, value in queues[0].items():
        assert torch.equal(value, queues[1][key]) if torch.is_tensor(value) else value == queues[1][key], key


def in_a_process(*arguments) -> int:
    "Run in a process of its own; its exit code, -9 if it was killed."
    process = multiprocessing.get_context("spawn").Process(target=run, args=arguments)
    process.start()
    process.join(180)
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path]:
    "A run that nobody disturbs, and the data it shares with the others."
    folder, data = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("data")
    assert in_a_process(folder, data) == 0
    return folder, data


@pytest.mark.parametrize(
    "sabotage",
    [
        (die_in_step, 0),
        (die_in_step, 7),
        (die_when_writing, 0, False),  # the first best.pt
        (die_when_writing, 1, False),  # the first state.pt: best.pt is there, the checkpoint is not
        (die_when_writing, 1, True),  # the checkpoint is there, its history is not
        (die_when_writing, 5, False),
        (die_when_writing, 5, True),
    ],
    ids=lambda sabotage: "-".join([sabotage[0].__name__, *map(str, sabotage[1:])]),
)
@pytest.mark.timeout(1800)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, whole, sabotage):
    folder, data = whole
    assert in_a_process(tmp_path, data, sabotage) == -signal.SIGKILL
    assert not (tmp_path / "final.pt").exists()
    assert in_a_process(tmp_path, data) == 0
    check_same(tmp_path, folder)
    assert (tmp_path / "history.csv").read_bytes() == (folder / "history.csv").read_bytes()


def test_a_run_killed_after_its_last_step_is_only_finished(tmp_path, whole):
    folder, data = whole
    assert in_a_process(tmp_path, data) == 0
    (tmp_path / "final.pt").unlink()
    assert in_a_process(tmp_path, data, (die_in_step, 0)) == 0  # no step is left to die in
    check_same(tmp_path, folder)


def test_a_broken_checkpoint_is_named(tmp_path):
    objective = torch.nn.Linear(2, 2)
    optimizer = training.build_optimizer(objective, SETTINGS)
    training.save_checkpoint(tmp_path, objective, optimizer, training.Progress(step=3), "")
    assert training.load_checkpoint(tmp_path, objective, optimizer, "").step == 3
    whole = (tmp_path / "state.pt").read_bytes()
    for broken in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        (tmp_path / "state.pt").write_bytes(broken)
        with pytest.raises(ValueError, match="state.pt cannot be read.*remove"):
            training.load_checkpoint(tmp_path, objective, optimizer, "")
