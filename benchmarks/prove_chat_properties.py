"""The properties of the chat format hold over 10,000 random examples each (hypothesis, the nightly profile)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SECONDS = 900
QUICK_SECONDS = 15
TESTS = Path(__file__).parents[1] / "tests/chat/test_properties.py"


def main(quick: bool) -> dict[str, str | int]:
    profile = "quick" if quick else "nightly"
    command = [sys.executable, "-m", "pytest", str(TESTS), "-q", "-p", "no:cacheprovider", "--hypothesis-show-statistics"]
    command += ["--timeout", "3600"]
    done = subprocess.run(
        command, cwd=TESTS.parents[2], env={**os.environ, "HYPOTHESIS_PROFILE": profile}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passing = [int(number) for number in re.findall(r"(\d+) passing", done.stdout)]
    properties = re.findall(r"(\d+) passed", done.stdout)
    return {"profile": profile, "properties": int(properties[-1]), "examples": sum(passing)}
