"""A process without mctk tries to load checkpoints: `python fresh_plain.py DIRECTORY`."""

import json
import sys
from pathlib import Path

from transformers import AutoModel, AutoModelForCausalLM


def attempt(loader, directory):
    try:
        loader.from_pretrained(directory)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


found = {}
for directory in sorted(Path(sys.argv[1]).iterdir()):
    found[directory.name] = attempt(AutoModelForCausalLM, directory)
    found[directory.name + " headless"] = attempt(AutoModel, directory)
assert "mctk" not in sys.modules
print(json.dumps(found))
