"""pyproject.toml holds together: extras that name extras, exact versions for all, and what the Makefile installs."""

from __future__ import annotations

import re
import tomllib

from tree.package import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_extras_that_extras_name_exist() -> None:
    named = {
        extra
        for requirements in EXTRAS.values()
        for requirement in requirements
        if (of_ours := re.match(r"myserve\[(.*)\]", requirement))
        for extra in of_ours[1].split(",")
    }
    assert named and named <= set(EXTRAS)


def test_extras_that_the_makefile_and_the_container_install_exist() -> None:
    texts = "".join((ROOT / name).read_text() for name in ("Makefile", "Containerfile", "README.md"))
    named = {
        extra for group in re.findall(r"(?:'\.|myserve)\[([\w,]+)\]", texts) for extra in group.split(",")
    }
    assert named and named <= set(EXTRAS)


def test_every_dependency_has_an_exact_version() -> None:
    pinned = {
        re.split("==", line)[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    plain = {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    wanted = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    names = {re.split(r"[\[<>=!~; ]", line)[0].lower() for line in wanted} - {"myserve"}
    assert names - plain == set()
