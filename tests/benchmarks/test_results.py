"""Results that nobody reads are not kept."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_result_is_read_by_a_text_or_by_code():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    results = {Path(path).name for path in tracked if path.startswith("benchmarks/results/")}
    assert len(results) > 10
    texts = [ROOT / path for path in tracked if path.endswith((".md", ".py")) and not path.startswith("tests/")]
    named = {name for path in texts if path.exists() for name in re.findall(r"\w+\.json", path.read_text())}
    assert results - named == set()
