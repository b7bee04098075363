"""What is built from the sources: the source distribution is whole, and its description can be read anywhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_source_distribution_holds_every_committed_file(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout, whose committed files it compares")
    program = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    # A copy, so that the build leaves nothing behind in the checkout.
    copy = tmp_path / "copy"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    committed = sorted(name.decode() for name in listed if name and (ROOT / name.decode()).is_file())
    for name in committed:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).symlink_to(ROOT / name)
    built = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True, check=True)
    with tarfile.open(tmp_path / built.stdout.splitlines()[-1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert sorted(set(committed) - held - {".gitignore"}) == []


def test_the_description_has_no_relative_link_and_its_python_runs() -> None:
    text = (ROOT / PROJECT["readme"]).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "PACKAGE.md", "exec"), names)
    assert names["y"].shape == (4, 1000, 512)  # type: ignore[attr-defined]


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", text, flags=re.MULTILINE) == [PROJECT["version"]]


def test_the_project_names_a_page() -> None:
    assert all(url.startswith("https://") for url in PROJECT["urls"].values())
