"""The versions of the host libraries: what is locked is allowed, and what is called the lowest is what is tried."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from st_llm_embed.modules.llm_backbone import REQUIREMENTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
LEFT_TO_INSTALL_SH = {"torch"}


def pins(name: str) -> dict[str, list[Requirement]]:
    """The lock's versions by package; one may have several, for different Pythons."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "examples" / f"{name}.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(requirement.name, []).append(requirement)
    return found


def dependencies() -> list[Requirement]:
    """All that pyproject.toml names but this package itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (line for lines in project["optional-dependencies"].values() for line in lines)
    found = [Requirement(line) for line in (*project["dependencies"], *extras)]
    return [own for own in found if own.name not in {"st-llm-embed", *LEFT_TO_INSTALL_SH}]


def version(pin: Requirement) -> str:
    return str(pin.specifier).removeprefix("==")


def test_what_is_locked_is_allowed():
    locked = pins("locked")
    assert len(dependencies()) >= 15
    for own in dependencies():
        for pin in locked[own.name.lower()]:
            assert own.specifier.contains(version(pin)), (str(own), str(pin))


def test_the_lowest_that_is_allowed_is_what_the_suite_runs_on():
    lowest = pins("lowest")
    for own in dependencies():
        (bound,) = (s.version for s in own.specifier if s.operator == ">=")
        for pin in lowest[own.name.lower()]:
            bare, tried = (re.sub(r"(\.0)+$", "", text) for text in (bound, version(pin)))
            assert tried == bare, f"{own} says {bound}, examples/lowest.txt {pin}: run examples/lock.sh or raise it"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("name", ["locked", "lowest"])
def test_each_python_has_one_version_of_each_package(name, python):
    here = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
    for package, own in pins(name).items():
        matching = [pin for pin in own if pin.marker is None or pin.marker.evaluate(here)]
        assert len(matching) <= 1, (package, python)
    for needed in ("transformers", "sentence-transformers", "peft", "mteb"):
        assert any(pin.marker is None or pin.marker.evaluate(here) for pin in pins(name)[needed])


def test_unknown_hosts_are_refused():
    script = "set -e; . examples/install.sh; install test"
    environment = {"PATH": "/usr/bin:/bin", "HOSTS": "oldest"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "HOSTS=oldest is unknown. Valid values: locked, lowest, newest."


def test_published_models_ask_for_what_is_tried():
    bounds = {own.name: own.specifier for own in dependencies()}
    for name, requirement in REQUIREMENTS.items():
        assert requirement["specifier"] in str(bounds[name]).split(",")
