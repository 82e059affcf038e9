from __future__ import annotations

import pytest

from fvlm_cli.quickstart.folders import fresh_folder
from fvlm_core.errors import ConfigError


def test_an_earlier_run_is_kept(tmp_path):
    first = fresh_folder(tmp_path / "runs" / "out")
    assert first == tmp_path / "runs" / "out"
    (first / "summary.json").write_text("{}")
    second = fresh_folder(first)
    assert second == tmp_path / "runs" / "out-2"
    assert fresh_folder(first) == tmp_path / "runs" / "out-3"  # one that is being written to is not shared
    assert (first / "summary.json").read_text() == "{}"


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    assert fresh_folder(tmp_path / "out") == tmp_path / "out"


@pytest.mark.parametrize("place", ["taken", "taken/below"])
def test_a_file_in_the_way_is_refused(tmp_path, place):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ConfigError, match=r"--output .*taken.* name a"):
        fresh_folder(tmp_path / place)
    assert (tmp_path / "taken").read_text() == "mine"
