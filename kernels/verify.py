"""Run the kernels' correctness tests on this machine; a benchmark that finds them red reports no speed.

Run by hand:  python kernels/verify.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The lab runs on machines that have neither the project's environment nor its plugins.
OPTIONS = ["-c", "/dev/null", "--rootdir", str(ROOT), "--import-mode=importlib", "-p", "no:cacheprovider", "-q"]


def main() -> int:
    """The exit code of the tests of `tests/kernels`."""
    command = [sys.executable, "-m", "pytest", *OPTIONS, str(ROOT / "tests" / "kernels")]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def require_green() -> None:
    """Stop unless every test passes."""
    if main():
        raise SystemExit("The kernels' tests are red here: no speed is reported. See above for what failed.")


if __name__ == "__main__":
    raise SystemExit(main())
