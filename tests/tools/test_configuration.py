"""docs/configuration.md is what the declarations give."""

from __future__ import annotations

import re

from myserve.server.settings import OPTIONS
from tools import configuration


def test_the_page_is_up_to_date() -> None:
    assert configuration.PAGE.read_text("utf-8") == configuration.page(), "run: python -m tools.configuration"


def test_the_page_has_every_option_and_variable() -> None:
    page = configuration.page()
    for declared in OPTIONS.values():
        assert f"`{declared.variable}`" in page
        assert declared.name == "model" or f"`{declared.flag}`" in page


def test_the_file_that_it_shows_can_be_read() -> None:
    import yaml

    from myserve.options import Source, read_options

    (shown,) = re.findall(r"```yaml\n(.*?)```", configuration.page(), re.DOTALL)
    read = read_options(OPTIONS, [Source.file("serve.yaml", yaml.safe_load(shown), OPTIONS)])
    assert read["kv_cache_bytes"] == 2 << 30 and read["prefix_caching"] is True
