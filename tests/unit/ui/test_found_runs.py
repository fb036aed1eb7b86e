"""Which folders are runs and comparisons, and what is not searched."""

import pytest

from selftrans.ui import found_runs
from selftrans.ui.found_runs import Folders, search
from tests.support.ui_runs import begun


def test_runs_and_comparisons_are_found_and_links_are_not(tmp_path):
    given, other = tmp_path / "given", tmp_path / "other"
    begun(given / "one")
    begun(given / "below" / "compared" / "a-seed0")
    begun(other / "linked")
    (given / "below" / "compared" / "compare.json").write_text("{}")
    (given / "link").symlink_to(other)
    (given / "vae").mkdir()
    (given / "vae" / "config.json").write_text("{}")  # of diffusers
    damaged = given / "damaged"
    (damaged / "stage2" / "checkpoints").mkdir(parents=True)
    (damaged / "config.json").write_text("{")
    found = search([given.resolve()])
    assert [run.name for run in found.runs.values()] == ["below/compared/a-seed0", "damaged", "one"]
    assert [table.name for table in found.tables.values()] == ["below/compared"] and found.notes == ()
    assert len({*found.runs, *found.tables}) == 4
    again = search([(given / "one").resolve()])
    assert [run.name for run in again.runs.values()] == ["one"], "a run itself may be given"


def test_runs_of_one_name_in_several_folders_have_the_name_of_the_folder(tmp_path):
    for path in ("first/vanilla-seed0", "second/vanilla-seed0", "second/other", "x/runs/one", "y/runs/one"):
        begun(tmp_path / path)
    roots = [tmp_path / name for name in ("first", "second", "x/runs", "y/runs")]
    names = [run.name for run in search([root.resolve() for root in roots]).runs.values()]
    paths = [str(root.resolve() / "one") for root in roots[2:]]
    assert names == ["first/vanilla-seed0", "other", "second/vanilla-seed0", *paths]


def test_a_large_tree_is_searched_in_part_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(found_runs, "MOST", 3)
    for name in "abcdef":
        (tmp_path / name).mkdir()
    (note,) = search([tmp_path.resolve()]).notes
    assert note.endswith("holds more than 3 folders; only those were searched")


def test_a_folder_that_does_not_exist_is_refused_and_ids_are_not_paths(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder; give a run, or a folder with runs in it"):
        Folders([tmp_path / "nowhere"])
    begun(tmp_path / "one")
    folders = Folders([tmp_path])
    (key,) = folders.listing().runs
    assert key.isalnum() and folders.run(key).name == "one"
    for wrong in ("one", "../one", str(tmp_path / "one"), ""):
        with pytest.raises(LookupError, match="no such run"):
            folders.run(wrong)
