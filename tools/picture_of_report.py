"""Picture of a verification report for the README: `tools/picture_of_report.py REPORT.html docs/images/report.png`.

Needs Chromium (Debian: chromium).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Run Chromium without a window on the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--height", type=int, default=1020, help="pixels of the page that are shown")
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("Chromium is needed: install the package chromium")
    if not arguments.report.is_file():
        sys.exit(f"{arguments.report} doesn't exist; make one with `make demo`")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--virtual-time-budget=5000",
                f"--user-data-dir={profile}",
                f"--window-size=1000,{arguments.height}",
                f"--screenshot={arguments.picture.resolve()}",
                arguments.report.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )


if __name__ == "__main__":
    main()
