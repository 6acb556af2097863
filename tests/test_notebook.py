"""The notebook runs from top to bottom, and what it was committed with is what it shows.

Written again by ``jupyter execute --inplace notebooks/first_steps.ipynb``.
"""

import re
from itertools import groupby
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "first_steps.ipynb"
NUMBER = re.compile(r"\d[\d,]*\.?\d*")


def outputs(notebook) -> list[tuple[str, list[tuple[str, ...]], str]]:
    """Return the source, the kinds of the outputs and the printed text of each code cell."""
    return [
        (
            cell.source,
            # Printed lines arrive in any number of pieces.
            [kind for kind, _ in groupby((each.output_type, *sorted(each.get("data", {}))) for each in cell.outputs)],
            "".join(each.text for each in cell.outputs if each.output_type == "stream"),
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_it_shows_what_it_was_committed_with(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    committed = nbformat.read(NOTEBOOK, as_version=4)
    notebook = nbformat.from_dict(committed)
    for cell in notebook.cells:
        cell.outputs = []
    # From its own folder, where a reader opens it.
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=120, resources=where).execute()
    for (source, kinds, printed), (_, old_kinds, old_printed) in zip(
        outputs(notebook), outputs(committed), strict=True
    ):
        assert kinds == old_kinds, source
        assert NUMBER.sub("#", printed) == NUMBER.sub("#", old_printed), source
        # Another processor rounds differently, and training goes another way.
        values, old_values = (
            [float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (printed, old_printed)
        )
        assert values == pytest.approx(old_values, rel=0.1), source


def test_it_was_committed_as_it_ran():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", NOTEBOOK.read_text(encoding="utf-8")):
        assert (NOTEBOOK.parent / target).exists(), target
