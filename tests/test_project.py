"""The repository keeps its own promises: the README's tree is complete, the demo runs, imports stay light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nextflow_ar

ROOT = Path(__file__).parent.parent
IN_CHECKOUT = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="needs the checkout")


@IN_CHECKOUT
def test_the_readme_lists_every_file() -> None:
    text = (ROOT / "README.md").read_text()
    for folder in ("src", "tests", "examples", "benchmarks", "recipes", "docs"):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            inside = any(part in name for part in ("__pycache__", "checkpoints/", "golden/bundle"))
            empty = path.name == "__init__.py" and not path.read_text().strip()
            if path.is_file() and not inside and not empty:
                assert f"\n{name} " in text, f"README's tree lacks {name}"


@IN_CHECKOUT
def test_files_and_functions_stay_short() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        source = path.read_text()
        assert source.count("\n") < 500, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"


@IN_CHECKOUT
def test_the_demo_leaves_a_page(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count('<div class="card">') == 12 + 4 + 4
    assert page.count("data:image/png;base64,") == 20 + 12 * 8 + 4 * 8
    assert "a red circle on a blue background" in page and 'src="http' not in page
    assert len(list((tmp_path / "out" / "drawn").glob("*.png"))) == 12


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, nextflow_ar; print(sorted({'torch', 'transformers', 'PIL', 'typer'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert told.stdout.strip() == "[]", told
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        nextflow_ar.Nothing  # noqa: B018
