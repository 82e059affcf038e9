"""The programs in the README run as they are printed."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_runs(tiny, capsys):
    programs = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    for program in programs:
        exec(program.replace("path/to/checkpoint", str(tiny("qwen2_vl"))), names)
    out = capsys.readouterr().out
    assert "precision=<Precision.NF4: '4bit'>" in out
    assert out.endswith("offload\n")
