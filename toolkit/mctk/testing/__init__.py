"""A conformance kit for methods: one call tries a method on tiny models of several families.

    from mctk.testing import assert_conforms

    def test_my_method():
        assert_conforms("decompose/my_method")

On each family whole runs are made: with a size that an allocator chooses, with one that the recipe
states, and with so little text that experts lack it. Every call of the method's hook is looked at.
A finding begins with the name of its check:

- shapes: the hook returns terms, of banks that it was given, of their shapes.
- finite: no term holds NaN or infinity.
- arguments: the hook leaves its arguments as they are.
- determinism: the same call gives the same terms.
- statistics: nothing is read that `needs` does not declare.
- layout: the terms are those that `layout` says, to the parameter and byte; with other options too.
- sizes: `sizes` ascends to DENSE, and each setting stores what it says.
- identity: at size DENSE the terms are what they were.
- curve: `curve` falls to 0; squared errors are those that the terms make on the tokens.
- options: every option changes something: what is asked for, stored, foretold, made or
  refused.
- errors: no exception but `UserError`; a size that cannot be is refused by the plan.
- accounting: written sizes are the plan's.
- budget: no more is kept than the budget allows.
- gate: the files give the logits of the passes, streamed and by `from_pretrained`, bit for bit.
- run: the run goes through.
- families: at least one of the families is not refused.

An allocator is tried on made-up size curves: allocation (every bank gets a setting that it has),
budget (no more is spent, and what is left buys no step more), errors (a budget below the least is
refused; curves hold errors only for an allocator that asks for them), determinism and options.

The methods that ship with mctk pass the same kit. It needs no pytest.
"""

from .kit import Conformance, assert_conforms, check_method
from .models import FAMILIES, save_tiny
from .watch import Finding

__all__ = [
    "FAMILIES",
    "Conformance",
    "Finding",
    "assert_conforms",
    "check_method",
    "save_tiny",
]
