"""Run the demo and draw what it printed as docs/demo.svg: `python examples/record_demo.py`, on a machine that is idle.

Every line of the picture comes from that run; only the path of this checkout is left out.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "demo.svg"
COLUMNS = 100


def main() -> int:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in done.stdout.splitlines():
        shown = line.replace(f"{Path(sys.executable).parent}/", "").replace(str(Path.home()), "~")
        console.print(Text(shown, style="bold" if shown.startswith("$") else "cyan" if shown.startswith(">") else ""))
    picture = console.export_svg(title="make demo")
    # Without web fonts: the picture must not fetch anything, and a monospace font is everywhere.
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
    PICTURE.write_text("\n".join(line.rstrip() for line in picture.splitlines()) + "\n", encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: {len(picture):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
