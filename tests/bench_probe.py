"""The probe and the bootstrap at the paper's scale: `python tests/bench_probe.py`. The target: under 120 s on 2 cores."""
import resource
import time

import numpy as np
import pandas as pd
import torch

from cxrvlm.downstream import linear_probe, zero_shot

N, D, L = 17_652, 2_048, 12
rng = np.random.default_rng(0)
x = np.maximum(rng.normal(size=(N, D)) @ rng.normal(size=(D, D)) / D**0.5, 0).astype(np.float32)  # correlated, as of a ReLU
w = rng.normal(size=(D, L)) / D**0.5
shares = np.geomspace(0.3, 0.01, L)
score = (x - x.mean(0)) @ w * 2 + rng.normal(size=(N, L))
labels = pd.DataFrame((score > np.quantile(score, 1 - shares, axis=0).diagonal()).astype(float)).rename(columns=str)
patients = rng.integers(0, 6_500, N)
for task in ("probe", "probe, 1,000 resamples", "zero-shot, 1,000 resamples"):
    wall, cpu = time.perf_counter(), time.process_time()
    if task.startswith("probe"):
        table = linear_probe(x, labels, patients, resamples=1000 if "resamples" in task else 0)
    else:
        images, prompts = torch.from_numpy(x[:, :128]), torch.randn(2, L, 128)
        table = zero_shot(images, *prompts, labels, patients, resamples=1000)
    print(f"{task}: {time.perf_counter() - wall:.0f} s, CPU {time.process_time() - cpu:.0f} s; notes {set(table.note)}; "
          f"mean AUROC {table.auroc.mean():.3f}; peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB", flush=True)
