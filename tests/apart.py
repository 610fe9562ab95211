"""Runs a file of tests in an interpreter of its own.

A subclass of Event is there for the rest of the process, and so are its columns: no other test may see them. So these
tests are written in files that pytest does not collect by itself, and are run from here.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent


def cases(file: Path) -> list[str]:
    """Return the names of the tests in *file*, without importing it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [node.name for node in functions if node.name.startswith("test_")]


def outcomes(file: Path, **environment: str) -> dict[str, str]:
    """Run *file*; return for each test why it did not pass, which is nothing if it did."""
    with TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(file)]
        done = subprocess.run(  # noqa: S603 - our own interpreter
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if not report.exists():
            raise AssertionError(done.stdout + done.stderr)
        found: dict[str, str] = {}
        for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 - pytest has just written it
            name = case.attrib["name"].partition("[")[0]
            problems = [child.text or child.attrib.get("message", "") for child in case if child.tag in PROBLEMS]
            found[name] = "\n".join([found.get(name, ""), *problems]).strip()
        return found


PROBLEMS = {"failure", "error", "skipped"}
