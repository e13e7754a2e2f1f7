"""lm-evaluation-harness's own command line, which then knows mctk's format.

    python -m mctk.lm_eval --model hf --model_args pretrained=runs/small --tasks arc_easy

stands for `lm_eval` with the same arguments; `accelerate launch -m mctk.lm_eval` works as well.
"""

from __future__ import annotations

import importlib.util
import sys

from . import hook


def main() -> None:
    """Registers the format with transformers, and hands over to lm-eval."""
    hook.install()
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("Error: lm-eval is not installed: pip install 'mctk[eval]'")
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
