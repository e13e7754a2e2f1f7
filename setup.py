"""What pyproject.toml cannot say: the wheel carries `recipes/` as data of the package.

Recipes that name a model or text of the clone stay out: outside of it they would not run.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = Path("recipes")
PACKAGED = Path("mctk", "shipped_recipes")


class BuildWithRecipes(build_py):
    """Copies the recipes beside the modules; in an editable install they are read in place."""

    def run(self) -> None:
        """Builds as always, and copies the recipes."""
        super().run()
        if self.editable_mode:
            return
        self.mkpath(str(Path(self.build_lib, PACKAGED)))
        for recipe in self._recipes():
            self.copy_file(str(recipe), str(Path(self.build_lib, PACKAGED, recipe.name)))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What was written, so that it can be uninstalled."""
        outputs = super().get_outputs(include_bytecode)
        if self.editable_mode:
            return outputs
        return outputs + [str(Path(self.build_lib, PACKAGED, r.name)) for r in self._recipes()]

    @staticmethod
    def _recipes() -> list[Path]:
        of_the_clone = re.compile(r"^model: \.|\bdemo/", flags=re.MULTILINE)
        return [
            path
            for path in sorted(RECIPES.glob("*.yaml"))
            if not of_the_clone.search(path.read_text(encoding="utf-8"))
        ]


setup(cmdclass={"build_py": BuildWithRecipes})
