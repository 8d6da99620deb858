"""Ours beside its reference, in one process and on the same inputs: `python -m benchmarks`, or `make benchmarks`.

versions.py    the two versions of the package, and the few functions through which both are called
cases.py       what a line is: the reference, ours, a check that they agree, and the target; and how it is timed
report.py      the machine, the table, the JSON
steps.py       a training step beside that of commit 07c8bb8
loops.py       the same beside plain loops with open_clip's loss, and with lightly's SimCLR
large.py       a step of the paper's size; for a GPU
pipeline.py    loading and augmenting
local.py       the local similarity, and retrieval by it
evaluation.py  AUROC and the probe
texts.py       rewording, tokenising, phantoms and MIMIC's table
"""
