"""instructor's first page: a pydantic model comes back, by tools and by JSON schema."""

from __future__ import annotations

from typing import Any

import pytest

instructor = pytest.importorskip(
    "instructor", reason="instructor is not installed: tests/clients/conftest.py says how"
)
openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")


class User(pydantic.BaseModel):  # type: ignore[name-defined,misc]
    name: str
    age: int


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_a_model_comes_back(served: Any, mode: str) -> None:
    client = instructor.from_openai(
        openai.OpenAI(base_url=served.base_url, api_key="any"), mode=getattr(instructor.Mode, mode)
    )
    for seed in range(5):
        user = client.create(
            model=served.model,
            response_model=User,
            messages=[{"role": "user", "content": "John Doe is 30 years old."}],
            seed=seed,
            max_tokens=200,
            max_retries=0,
        )
        assert isinstance(user, User)
