"""The package as a library: what a wheel holds, and that its requirements are those of the scripts."""

import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from helpers.data import REPOSITORY

import embedding_finetune


def requirements(name):
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_requirements_files_and_the_package_ask_for_the_same(device):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {*project["dependencies"], *project["optional-dependencies"][device]}
    assert asked == requirements(f"requirements_{device}.txt")


@pytest.mark.slow
def test_a_wheel_has_its_version_its_dependencies_and_the_page_of_the_report(tmp_path):
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if name.startswith("embedding_finetune/") or name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
    package = {name for name in files.splitlines() if name.startswith("embedding_finetune/")}
    assert package <= names
    assert any(name.endswith("report_template.html") for name in package)
    assert re.search(r"^Version: (.*)$", metadata, re.MULTILINE)[1] == embedding_finetune.__version__
    assert "Requires-Dist: torch" in metadata
    assert "Requires-Python: >=3.11" in metadata
