"""A question about a state becomes a prompt, behind which the labels of its options are the next token.

Prompt, options, labels and answers are transformers' own (`transformers.decision`): the model is asked by the same
tokens here as there.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from myserve.errors import RequestError
from myserve.server.prompts.codec import Codec
from myserve.server.prompts.lengths import check_lengths
from myserve.wire.chat import ChatMessage

__all__ = ["AskedQuestion", "DecisionPrompts", "load_library"]

MOST_LABELS = 255  # OpenAI's limit of choices
# where a template knows of thoughts, an answer begins without one, as in transformers
WITHOUT_THOUGHT = {"enable_thinking": False}


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    """A question of transformers' type, the prompt that asks it, and the id of each option's label."""

    question: Any
    prompt: Sequence[int]
    label_ids: tuple[int, ...]
    temperature: float  # of the labels' scores, before the softmax


def load_library() -> Any:
    """Return `transformers.decision`. Raises RequestError where the installed transformers has none."""
    try:
        return import_module("transformers.decision")
    except ImportError:
        raise RequestError(
            f"decisions need transformers 5.23 or newer, and this server runs {version('transformers')}; its operator "
            "may upgrade it",
            code="unsupported_parameter",
        ) from None


class DecisionPrompts:
    """One model's questions. `folder` may hold settings of them, as transformers saves them (`decision.json`)."""

    def __init__(self, codec: Codec, folder: str | None = None) -> None:
        self._codec = codec
        self._folder = folder if folder is not None and Path(folder).is_dir() else None
        self._ids: dict[str, int | None] = {}  # of labels

    @cached_property
    def _config(self) -> Any:
        """The model's settings, with labels of which each is a token of its own."""
        config = load_library().DecisionConfig.from_pretrained(self._folder)
        if config.chat_template is not None:
            raise RequestError(
                "this model brings a decision template, which is made for a decision head; this server reads labels "
                "by the model's language head alone",
                code="unsupported_parameter",
            )
        letters = self._letters()
        # a tokenizer that cuts Yes in pieces is asked by letters
        words = ["Yes", "No"] if self._ids_of(["Yes", "No"]) is not None else letters[:2]
        return replace(config, labels={"noul": words, "choice": letters, "score": letters} | config.labels)

    def _letters(self) -> list[str]:
        """Return A to Z as transformers has them, then AA to ZZ as far as each is one token."""
        single = list(string.ascii_uppercase)
        known = set(self._ids_of(single) or ())
        for pair in (first + second for first in single[:26] for second in string.ascii_uppercase):
            ids = self._ids_of([pair])
            if ids is not None and ids[0] not in known and len(single) < MOST_LABELS:
                single.append(pair)
                known.add(ids[0])
        return single

    def _ids_of(self, labels: Sequence[str]) -> tuple[int, ...] | None:
        """Return the id of each label; None unless each is a token, and no two the same."""
        single = tuple(one for one in map(self._id_of, labels) if one is not None)
        return single if len(set(single)) == len(labels) else None

    def _id_of(self, label: str) -> int | None:
        """Return the label's token; None unless it is one. Looked up once: hundreds of questions have the same."""
        if label not in self._ids:
            ids = self._codec.encode(label, add_special_tokens=False)
            # one that the tokenizer does not know is a token too, and reads otherwise
            alone = len(ids) == 1 and self._codec.decode(ids).strip() == label
            self._ids[label] = ids[0] if alone else None
        return self._ids[label]

    def parse(self, questions: Mapping[str, Any]) -> list[Any]:
        """Return transformers' questions. Raises RequestError that tells all that is wrong with them."""
        for name, question in questions.items():
            # transformers looks it up in a table
            if isinstance(question.get("type"), list | dict):
                raise RequestError(f"question {name!r:.80}: its type must be a string", param="questions")
        try:
            parsed: list[Any] = load_library().parse_questions(dict(questions), self._config)
        except ValueError as error:
            raise RequestError(str(error), param="questions") from error
        except RecursionError:
            raise RequestError("a question is nested too deeply", param="questions") from None
        return parsed

    def ask(
        self, state: Any, question: Any, max_model_len: int, template_kwargs: Mapping[str, Any]
    ) -> AskedQuestion:
        """Return the prompt of one question. Raises RequestError."""
        label_ids = self._ids_of(question.labels)
        if label_ids is None:
            raise RequestError(
                f"the labels {', '.join(question.labels)} are not each a token of its own in this model's tokenizer",
                param="questions",
            )
        template = load_library().DECISION_PROMPT
        text = self._codec.fill(template, {"state": state, "question": question}, param="state")
        check_lengths([text], self._codec, max_model_len, param="state")
        message = ChatMessage(role="user", content=text)
        prompt = self._codec.encode_chat([message], WITHOUT_THOUGHT | dict(template_kwargs))
        temperature = float(self._config.temperature.get(question.type, 1.0))
        return AskedQuestion(question, prompt, label_ids, temperature)
