"""The installed Python's documentation as data: nothing held back is trained on."""

from __future__ import annotations

from examples.demo.standard_library import load_standard_library


def test_the_standard_library_is_split_by_module():
    library = load_standard_library()
    assert len(library.train) > 3000 and len(library.test) > 300
    held_back = {entry.module for entry in library.test}
    assert held_back.isdisjoint(entry.module for entry in library.train)
    trained_on = {entry.document for entry in library.train}
    assert trained_on.isdisjoint(entry.document for entry in library.test)
    entry = next(e for e in [*library.train, *library.test] if e.name == "shutil.copyfile")
    assert entry.summary == "Copy data from src to dst in the most efficient way possible."
    assert entry.package == entry.module == "shutil"
    assert entry.document.startswith("def copyfile(src, dst") and entry.summary not in entry.document


def test_the_data_sets_are_what_they_say():
    library = load_standard_library(limit=1500)
    by_document = {entry.document: entry for entry in library.train}
    by_summary = {entry.summary for entry in library.train}
    retrieval = library.retrieval()
    assert retrieval.column_names == ["anchor", "positive", "negative"] and len(retrieval) > 300
    for row in retrieval:
        assert row["anchor"] in by_summary and row["positive"] != row["negative"]
        assert by_document[row["positive"]].module == by_document[row["negative"]].module
    assert retrieval.to_dict() == library.retrieval().to_dict() != library.retrieval(seed=1).to_dict()
    packages = library.classification(negatives=2)
    assert packages.column_names == ["anchor", "positive", "negative_1", "negative_2"] and len(packages) > 300
    package_of = {" ".join(e.docstring.split())[:600]: set() for e in library.train}
    for entry in library.train:
        package_of[" ".join(entry.docstring.split())[:600]].add(entry.package)
    for row in packages:
        anchor = package_of[row["anchor"]]
        assert anchor & package_of[row["positive"]]
        assert len(anchor) > 1 or row["negative_1"] != row["anchor"]
    queries, documents, relevant = library.evaluation()
    assert set(queries) <= set(documents) and all(relevant[q] == {q} for q in queries)
    assert len(set(queries.values())) == len(queries)
