"""Tasks of lm-evaluation-harness, run by lm-eval itself on a model that is already loaded."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib.util
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError, brief

# lm-eval's own defaults: with them our figures are those of its command line.
SEED, FEWSHOT_SEED = 1234, 1234


def load_tasks(tasks: Sequence[str], task_path: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Finds tasks and their data; needs no model, so that mistakes show before one is loaded.

    Args:
        tasks: Names of tasks, groups or tags, globs over them, or paths of task YAML files.
        task_path: Directories with more task YAML files.

    Returns:
        What `run_tasks` takes.

    Raises:
        UserError: lm-eval is not installed, a task does not exist or its data cannot be had.
    """
    with _quiet():
        manager, names = _find(tasks, task_path)
        try:
            return dict(manager.load(names))
        except Exception as error:  # the datasets library raises anything
            raise UserError(
                f"tasks {', '.join(names)}: cannot be loaded: {type(error).__name__}: "
                f"{brief(error)}"
            ) from error


def check_tasks(tasks: Sequence[str], task_path: Sequence[str | Path] = ()) -> list[str]:
    """Finds tasks by name, without their data.

    Raises:
        UserError: lm-eval is not installed, or a task does not exist.
    """
    with _quiet():
        return _find(tasks, task_path)[1]


def _find(tasks: Sequence[str], task_path: Sequence[str | Path]) -> tuple[Any, list[str]]:
    """lm-eval's index in which the tasks are found, and their names."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks need lm-eval: pip install 'mctk[eval]'")
    directories = tuple(str(directory) for directory in task_path)
    for directory in directories:
        if not Path(directory).is_dir():
            raise UserError(f"task path: no directory {directory}")
    # Indexing lm-eval's own 14 000 tasks takes many seconds; look at the user's first.
    manager = _manager(directories, False)
    try:
        return manager, match_tasks(tasks, manager.all_tasks)
    except UserError:
        manager = _manager(directories, True)
        return manager, match_tasks(tasks, manager.all_tasks)


@functools.lru_cache(maxsize=4)
def _manager(directories: tuple[str, ...], defaults: bool) -> Any:
    """lm-eval's index of tasks, kept: two models are mostly evaluated one after the other."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(directories) or None, include_defaults=defaults)


def run_tasks(
    model: Any,
    tokenizer: Any,
    loaded: dict[str, Any],
    *,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    batch_size: int | str = 1,
    seed: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluates lm-eval tasks.

    Args:
        model: A loaded causal language model.
        tokenizer: Its tokenizer.
        loaded: From `load_tasks`; used up by this.
        num_fewshot: Examples in the prompt; None leaves it to each task, and a task that says 0
            keeps 0 (lm-eval's rule).
        limit: Documents per task, or their fraction if below 1; for smoke tests.
        batch_size: A number, or "auto".
        seed: Of the few-shot examples; None is lm-eval's default.
        progress: Whether lm-eval shows its progress bars on stderr.

    Returns:
        By task (and group) name: "metrics" {name: {"value", "stderr"}}, "version", "n_shot",
        "samples" (documents), "chance" (expected accuracy of guessing, None if unknown),
        "constant" (True if every answer was the same choice) and "group" (the group whose part
        the task is, or None). JSON-able.
    """
    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        if num_fewshot is not None and default != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED if seed is None else seed)
    random.seed(0 if seed is None else seed)
    np.random.seed(SEED if seed is None else seed)
    torch.manual_seed(SEED if seed is None else seed)

    with _quiet():
        lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        if not progress:
            for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(lm, request, functools.partial(getattr(lm, request), disable_tqdm=True))
        result = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=True)
    return _summary(result)


def match_tasks(tasks: Sequence[str], known: Sequence[str]) -> list[str]:
    """Resolves names, globs and paths of YAML files to names that lm-eval knows, each once.

    Raises:
        UserError: Nothing matches one of them; gives the nearest names.
    """
    names: dict[str, None] = {}
    for task in tasks:
        if task in known or (Path(task).suffix == ".yaml" and Path(task).is_file()):
            found = [task]
        else:
            found = fnmatch.filter(known, task)
        if not found:
            close = difflib.get_close_matches(task, known, n=3)
            hint = f" (did you mean {', '.join(close)}?)" if close else ""
            raise UserError(
                f"tasks: lm-eval has no task {task!r}{hint}; `lm-eval ls tasks` lists them, "
                "--task-path adds a directory of your own"
            )
        names.update(dict.fromkeys(found))
    return list(names)


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    """Brings lm-eval's result, with keys such as "acc_stderr,none", into a tidy form."""
    parents = {
        child: group
        for group, children in (result.get("group_subtasks") or {}).items()
        for child in children
    }
    entries: dict[str, Any] = {}
    for name, values in result["results"].items():
        metrics: dict[str, dict[str, float | None]] = {}
        for key, value in values.items():
            metric, _, selector = key.partition(",")
            if not selector or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = values.get(f"{metric}_stderr,{selector}")
            label = metric if selector == "none" else f"{metric} ({selector})"
            metrics[label] = {
                "value": float(value),
                "stderr": float(stderr) if _is_number(stderr) else None,
            }
        samples = (result.get("samples") or {}).get(name) or []
        kind = (result.get("configs") or {}).get(name, {}).get("output_type")
        chance, constant = _guessing(samples) if kind == "multiple_choice" else (None, None)
        entries[name] = {
            "metrics": metrics,
            "version": result.get("versions", {}).get(name),
            "n_shot": result.get("n-shot", {}).get(name),
            "samples": values.get("sample_len"),
            "chance": chance,
            "constant": constant,
            "group": parents.get(name),
        }
    return entries


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _guessing(samples: list[dict[str, Any]]) -> tuple[float | None, bool | None]:
    """Expected accuracy of guessing, and whether the model always gave the same choice."""
    import numpy as np

    if not samples:
        return None, None
    inverse, answers = [], set()
    for sample in samples:
        responses = sample["filtered_resps"]
        # Mutual information asks every choice a second time, without its question.
        choices = len(responses) // (2 if "acc_mutual_info" in sample["metrics"] else 1)
        if choices < 1:
            return None, None
        inverse.append(1 / choices)
        answers.add(int(np.argmax([response[0] for response in responses[:choices]])))
    return math.fsum(inverse) / len(inverse), len(samples) > 1 and len(answers) == 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-eval's log down to errors: it warns of a ready-made model, which we mean."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
