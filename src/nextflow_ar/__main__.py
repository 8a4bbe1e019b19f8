"""``python -m nextflow_ar``: the command ``nextflow-ar``."""

from __future__ import annotations

from nextflow_ar.app.cli import main

if __name__ == "__main__":
    main()
