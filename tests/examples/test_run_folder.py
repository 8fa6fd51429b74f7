"""A run never overwrites another, and what is gone on with is the same run."""

from __future__ import annotations

import json

import pytest


def test_a_second_run_has_a_folder_of_its_own_and_the_latest_is_gone_on_with(tmp_path):
    from support.run_folder import folder_to_resume, new_folder

    config = {"seed": 7, "steps": 50, "resume": False}
    folders = [new_folder(tmp_path / "grpo", config) for _ in range(3)]
    assert [folder.name for folder in folders] == ["grpo", "grpo-2", "grpo-3"]
    assert json.loads((folders[0] / "config.json").read_text()) == config
    assert folder_to_resume(tmp_path / "grpo", {**config, "steps": 60, "resume": True}) == folders[2]


def test_what_cannot_be_gone_on_with_says_why(tmp_path):
    from support.run_folder import RunError, folder_to_resume, new_folder

    with pytest.raises(RunError, match="there is no run"):
        folder_to_resume(tmp_path / "grpo", {})
    new_folder(tmp_path / "grpo", {"seed": 7, "learning_rate": 1e-4})
    with pytest.raises(RunError, match=r"--learning-rate 0\.0001: go on with the same"):
        folder_to_resume(tmp_path / "grpo", {"seed": 7, "learning_rate": 3e-5})


def test_an_asynchronous_run_is_not_resumed_in_silence(tmp_path):
    import asyncio

    from grpo_async import AsyncConfig, train
    from support.run_folder import RunError

    with pytest.raises(RunError, match="depends on the clock"):
        asyncio.run(train(AsyncConfig(run=str(tmp_path / "run"), resume=True)))
    assert not (tmp_path / "run").exists()


def test_a_misspelt_correction_is_refused(capsys):
    from grpo import Config, parse_args

    assert parse_args(Config, ["--correction", "mass"]).correction == "mass"
    with pytest.raises(SystemExit):
        parse_args(Config, ["--correction", "kpet"])
    assert "invalid choice: 'kpet'" in capsys.readouterr().err
