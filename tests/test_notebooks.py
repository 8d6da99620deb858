"""Notebooks run, are clean, and hold what their code gives; what is generated from them is up to date."""
from pathlib import Path

import nbformat
import pytest

import notebooks

FIX = "\nIf the change is meant, `make outputs` stores it."


@pytest.fixture(scope="session")  # once for each process that runs tests, whatever it runs between two notebooks
def fresh(tmp_path_factory) -> Path:
    "A copy of the working tree, to run notebooks in."
    return notebooks.copy_tree(tmp_path_factory.mktemp("fresh"))


def test_generated_files_are_up_to_date(tmp_path):
    root = notebooks.copy_tree(tmp_path)  # a copy in which no notebook was run
    notebooks.generate(root)
    faults = notebooks.differences(notebooks.ROOT, root)
    assert not faults, "\n".join(faults) + FIX


@pytest.mark.timeout(1800)  # for a notebook that hangs, and not for a slow machine
@pytest.mark.parametrize("path", notebooks.all_notebooks(notebooks.ROOT))
def test_a_notebook_gives_what_it_stores(fresh, path):
    notebooks.run(fresh, "nbdev-test", path, "--save")
    notebooks.run(fresh, "nbdev-clean", "--fname", path)
    faults = notebooks.compare_notebooks(notebooks.ROOT / path, fresh / path)
    assert not faults, "\n".join(faults) + FIX


def edit(path: Path, change) -> None:
    "Change the first code cell with an output."
    notebook = nbformat.read(path, as_version=4)
    change(next(cell for cell in notebook.cells if cell.get("outputs")))
    nbformat.write(notebook, path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda cell: cell.update(execution_count=7), "not clean"),
        (lambda cell: cell.metadata.update(collapsed=True), "not clean"),
        (lambda cell: cell.outputs.clear(), "the stored output is not what the code gives"),
        (lambda cell: cell.outputs[0].update(data={"text/plain": "42"}), "the stored output is not what the code gives"),
    ],
)
def test_a_changed_notebook_is_noticed(tmp_path, change, complaint):
    good, bad = notebooks.ROOT / "nbs/09_losses.ipynb", tmp_path / "09_losses.ipynb"
    bad.write_bytes(good.read_bytes())
    assert notebooks.compare_notebooks(bad, good) == []
    edit(bad, change)
    (fault,) = notebooks.compare_notebooks(bad, good)
    assert complaint in fault


def test_a_stale_export_is_noticed(tmp_path):
    stored, fresh = tmp_path / "stored", tmp_path / "fresh"
    for root in (stored, fresh):
        (root / "cxrvlm").mkdir(parents=True)
        (root / "cxrvlm/losses.py").write_text("tau = 0.5\n")
        (root / "README.md").write_text("# cxrvlm\n")
    assert notebooks.differences(stored, fresh) == []
    (stored / "cxrvlm/losses.py").write_text("tau = 0.4\n")
    (fresh / "cxrvlm/new.py").write_text("")
    assert notebooks.differences(stored, fresh) == ["cxrvlm/losses.py is stale", "cxrvlm/new.py is stale"]


def test_a_failing_notebook_fails(tmp_path):
    root = notebooks.copy_tree(tmp_path)
    edit(root / "nbs/09_losses.ipynb", lambda cell: cell.update(source="assert 1 == 2"))
    with pytest.raises(AssertionError, match="09_losses"):
        notebooks.run(root, "nbdev-test", "nbs/09_losses.ipynb")
