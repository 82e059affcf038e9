"""The programs in the README run as they are printed, one after the other."""

import re
from pathlib import Path

from transformers import AutoModelForImageTextToText

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_runs(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    programs = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(programs) == 2
    names = {}
    for program in programs:
        exec(program.replace("path/to/checkpoint", str(folder)), names)
    assert names["trainer"].state.global_step == 2
    assert "language" in capsys.readouterr().out
    AutoModelForImageTextToText.from_pretrained("out/merged")
