from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_in_the_readme_runs(demo_model: Path, tmp_path: Path) -> None:
    """The whole block, in a process of its own, says Paris."""
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Fits on cpu" in result.stdout
    assert "Paris" in result.stdout
    assert "bytes of weights, as previewed" in result.stdout
    assert "AutoModelForCausalLM.from_pretrained(" in result.stdout


def test_every_file_that_the_readme_names_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
