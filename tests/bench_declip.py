"""Seconds of one training step with DeCLIP's terms, beside those of the same loss without them.

    python tests/bench_declip.py                # preset demo, 1 thread, as each of its runs has
    python tests/bench_declip.py openi --steps 5

The steps of the candidates take turns, loading included; the median counts. Nothing is trained for long, so no stage 1 is needed.
"""
import argparse
import statistics
import tempfile
import time

import torch

from cxrvlm.data import load_studies, make_tokenizer, open_store
from cxrvlm.declip import build_objective, training_set
from cxrvlm.settings import load_arm, load_settings, replace
from cxrvlm.training import build_optimizer, load_batches, start_device, train_step


def candidates():
    "Name -> arm, from generic weights: each loss, without and with DeCLIP."
    for loss in ("infonce", "gloria", "combined"):
        for weight in (0.0, 0.2):
            changes = {"image_init": "generic", "text_init": "generic", "loss": loss, "alpha": weight, "beta": weight, "gamma": weight}
            yield f"{loss}{' + DeCLIP' if weight else ''}", load_arm("ours").model_copy(update=changes)


def stepper(settings, arm, studies, store, tokenizer, accelerator):
    "A function that makes the next step and returns its seconds."
    objective = build_objective(settings, arm, tokenizer, 0, len(studies)).to(accelerator.device).train()
    optimizer = build_optimizer(objective, settings)
    batches = enumerate(load_batches(training_set(studies, store, tokenizer, settings, arm), settings, 0))

    def step():
        start = time.perf_counter()
        number, batch = next(batches)
        train_step(objective, batch, optimizer, accelerator, 0, number)  # reads the terms' values, so it waits for a GPU
        return time.perf_counter() - start

    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("preset", nargs="?", default="demo")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    settings = replace(load_settings(options.preset), declip_queue=200)  # so that it is full soon
    accelerator, (studies, _) = start_device(settings), load_studies(settings)
    studies = studies[studies.split == "train"].head(400)
    store, tokenizer = open_store(settings, studies, tempfile.mkdtemp()), make_tokenizer(settings, studies)
    steppers = {name: stepper(settings, arm, studies, store, tokenizer, accelerator) for name, arm in candidates()}
    warm = 2 + settings.declip_queue // settings.batch_size
    times = {name: [] for name in steppers}
    for number in range(warm + options.steps):
        for name, step in steppers.items():
            seconds = step()
            if number >= warm:
                times[name].append(seconds)
    print(f"preset {options.preset}, {accelerator.device}, {torch.get_num_threads()} threads, {options.steps} steps")
    for name, seconds in times.items():
        median, plain = statistics.median(seconds), statistics.median(times[name.removesuffix(" + DeCLIP")])
        print(f"{name:20} {1000 * median:8.1f} ms   x {median / plain:.2f}")
