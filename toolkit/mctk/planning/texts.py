"""Whether a run's texts hold enough, told while it is planned."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ..data import check_template, evaluation_windows
from ..errors import UserError
from ..evaluate.harness import check_tasks
from ..evaluate.loading import load_tokenizer
from ..recipe import draw_calibration, placed

if TYPE_CHECKING:
    from .plan import Plan


def check_calibration(plan: Plan) -> dict[str, Any] | None:
    """Draws the calibration sequences, so that too little text is found now.

    Text that only a hub has is not fetched for a plan, and without a tokenizer in the model's
    directory nothing can be counted; the plan then says that the text was not checked.

    Raises:
        RecipeError: There is too little text.
    """
    calibration = plan.recipe.calibration
    if calibration is None:
        return None
    known = {
        "sequences": calibration.sequences,
        "length": calibration.length,
        "tokens": calibration.sequences * calibration.length,
        "propagate": plan.recipe.propagate,
    }
    sources = calibration.source if isinstance(calibration.source, list) else [calibration.source]
    remote = any(source.dataset is not None for source in sources)
    chats = [source for source in sources if source.chat]
    try:
        tokenizer = _tokenizer(plan) if chats or not remote else None
    except _NoTokenizer as error:
        return {**known, "checked": False, "why": str(error)}
    with placed(plan.recipe):
        for source in chats:
            check_template(tokenizer, source)
    if remote:
        return {**known, "checked": False, "why": "datasets are fetched by the run"}
    windows = draw_calibration(plan.recipe, tokenizer)
    return {**known, "checked": True, "digest": windows.digest}


def check_evaluation(plan: Plan) -> dict[str, Any] | None:
    """Looks at texts and tasks of the evaluation.

    Raises:
        RecipeError: A text is shorter than one window.
        UserError: A task does not exist.
    """
    section = plan.recipe.evaluate
    if section is None:
        return None
    if section.tasks:
        check_tasks(section.tasks)
    return {"windows": count_windows(plan), "tasks": list(section.tasks)}


def count_windows(plan: Plan) -> dict[str, int | None]:
    """The windows of each evaluation text; None of a dataset, which the run fetches.

    Without a tokenizer in the model's directory nothing can be counted.

    Raises:
        RecipeError: A text is shorter than one window.
    """
    texts = plan.recipe.evaluate.perplexity if plan.recipe.evaluate is not None else []
    windows: dict[str, int | None] = {text.name: None for text in texts}
    local = [text for text in texts if text.dataset is None]
    chats = [text for text in texts if text.chat]
    with contextlib.suppress(_NoTokenizer), placed(plan.recipe):
        tokenizer = _tokenizer(plan) if local or chats else None
        for text in chats:
            check_template(tokenizer, text)
        for text in local:
            found = evaluation_windows(tokenizer, text, text.length, text.windows)
            windows[text.name] = found.ids.shape[0]
    return windows


class _NoTokenizer(Exception):
    """The model's directory has none that loads; text cannot be counted then."""


def _tokenizer(plan: Plan) -> Any:
    try:
        return load_tokenizer(plan.source.path, plan.recipe.trust_remote_code)
    except UserError as error:
        raise _NoTokenizer(str(error)) from error
