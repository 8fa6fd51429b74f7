"""Every option is declared once and read from the command line, the environment and a file, in this order."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from myserve.engine.config import EngineConfig
from myserve.errors import RequestError
from myserve.options import options_of
from myserve.server.settings import DEFAULT_ON_DEMAND, EMBEDDED_MODEL, OPTIONS, Settings


def test_a_bare_server_has_the_embedded_model_and_the_specifications_on_demand() -> None:
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


def test_every_field_of_the_engine_is_an_option_and_of_the_server_all_but_the_models() -> None:
    assert {field.name for field in fields(EngineConfig)} == options_of(EngineConfig).keys()
    by_hand = {field.name for field in fields(Settings)} - options_of(Settings).keys()
    assert by_hand == {"models", "preload", "engine"}


def test_no_option_is_declared_twice() -> None:
    assert not options_of(EngineConfig).keys() & options_of(Settings).keys()
    flags = [declared.flag for declared in OPTIONS.values()]
    assert len(flags) == len(set(flags))


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_the_command_line_counts_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "serve.yaml", "max-num-seqs: 1\nmax_queue: 1\nport: 1\nkv-cache-bytes: 2GiB\n")
    env = {"MYSERVE_MAX_QUEUE": "2", "MYSERVE_PORT": "2"}
    settings = Settings.read({"port": "3"}, env, file)
    assert (settings.engine.max_num_seqs, settings.engine.max_queue, settings.port) == (1, 2, 3)
    assert settings.engine.kv_cache_bytes == 2 << 30
    assert Settings.read({}, {"MYSERVE_CONFIG": str(file)}).port == 1


def test_every_option_can_be_set_from_every_source(tmp_path: Path) -> None:
    """One value of each kind, in each place: none is read from one source and forgotten in another."""
    texts = {
        bool: "on", int: "100", float: "0.5", str: "text",
    }  # fmt: skip
    for name, declared in OPTIONS.items():
        text = declared.choices[-1] if declared.choices else texts[declared.kind]
        text = "text=folder" if name == "lora" else text
        more = {"max_num_batched_tokens": "1000", "ssl_certfile": "file"}
        more.pop(name, None)
        variables = {OPTIONS[other].variable: value for other, value in more.items()}
        default = Settings.read(more, {})
        by_option = Settings.read({**more, name: text}, {})
        by_variable = Settings.read({}, {**variables, declared.variable: text})
        file = write(tmp_path / f"{name}.yaml", f"{declared.key}: {text}")
        by_file = Settings.read(more, {}, file)
        assert by_option == by_variable == by_file
        if declared.default not in (True, declared.choices and declared.choices[-1]):
            assert by_option != default, name


def test_a_file_names_models_as_the_command_line_does(tmp_path: Path) -> None:
    folder = tmp_path / "lr=1e-4" / "step-10"
    folder.mkdir(parents=True)
    file = write(tmp_path / "serve.yaml", f"model: {folder}\n")
    assert Settings.read({}, {}, file).models == {"step-10": str(folder)}
    assert Settings.read({"model": (str(folder),)}, {}).models == {"step-10": str(folder)}
    # as it always was: a variable's folder is served under what stands there
    assert Settings.read({}, {"MYSERVE_MODEL": str(folder)}).models == {str(folder): str(folder)}
    named = write(tmp_path / "named.yaml", f"model: {folder}\nserved-model-name: [a, b]\n")
    assert Settings.read({}, {}, named).models == {"a": str(folder), "b": str(folder)}


def test_names_for_several_models_are_ambiguous() -> None:
    with pytest.raises(RequestError, match="write name=folder for each"):
        Settings.read({"model": "a=x, b=y", "served_model_name": ["c"]}, {})


@pytest.mark.parametrize("text", ["port: [", "- port", "prot: 1", "port: eighty"])
def test_a_wrong_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(RequestError, match=r"wrong\.yaml"):
        Settings.read({}, {}, write(tmp_path / "wrong.yaml", text))
    with pytest.raises(RequestError, match="cannot be read"):
        Settings.read({}, {}, tmp_path / "missing.yaml")


def test_a_path_is_as_good_as_its_text() -> None:
    here: Any = Path("some") / "folder"
    settings = Settings(models={"mine": here}, engine=EngineConfig(draft_model=here), weights_dir=here)
    assert (settings.models["mine"], settings.engine.draft_model, settings.weights_dir) == (str(here),) * 3
