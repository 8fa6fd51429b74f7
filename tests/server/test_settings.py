"""The environment's words, each with its effect."""

from __future__ import annotations

import pytest

from myserve.errors import RequestError
from myserve.server.settings import DEFAULT_ON_DEMAND, EMBEDDED_MODEL, Settings


def test_a_bare_server_has_the_embedded_model_and_the_seeds_on_demand() -> None:
    settings = Settings.from_env({})
    assert tuple(settings.models) == (EMBEDDED_MODEL, DEFAULT_ON_DEMAND)
    assert settings.preload == (EMBEDDED_MODEL,)
    assert not settings.force_echo


def test_the_operators_models_are_all_there_is() -> None:
    settings = Settings.from_env({"MYSERVE_MODEL": "a=models/a, org/b", "MYSERVE_ALLOW_MODELS": "org/c"})
    assert settings.models == {"a": "models/a", "org/b": "org/b"}
    assert settings.preload == ("a", "org/b")


def test_on_demand_models_can_be_others_or_none() -> None:
    assert tuple(Settings.from_env({"MYSERVE_ALLOW_MODELS": "org/c"}).models) == (EMBEDDED_MODEL, "org/c")
    assert tuple(Settings.from_env({"MYSERVE_ALLOW_MODELS": ""}).models) == (EMBEDDED_MODEL,)


def test_what_the_engine_is_told() -> None:
    env = {"MYSERVE_DTYPE": "float32", "MYSERVE_DEVICE": "cpu", "TRUST_REMOTE_CODE": "1"}
    engine = Settings.from_env(env).engine
    assert (engine.dtype, engine.device, engine.trust_remote_code) == ("float32", "cpu", True)


@pytest.mark.parametrize(
    "env", [{"MYSERVE_DTYPE": "fp23"}, {"MYSERVE_FORCE_ECHO": "maybe"}, {"TRUST_REMOTE_CODE": "2"}]
)
def test_a_typo_is_an_error_and_no_default(env: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="must be one of"):
        Settings.from_env(env)


def test_a_server_without_models_is_none() -> None:
    with pytest.raises(RequestError, match="no model to serve"):
        Settings(models={})
