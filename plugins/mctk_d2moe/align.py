"""What enters down, when the experts' intermediate neurons were put into another order."""

from __future__ import annotations

from torch import Tensor


def reorder_moment(moment: Tensor, order: Tensor | None) -> Tensor:
    """Returns second moments of what enters down, ``[E, I, I]``, in another order ``[E, I]``."""
    if order is None:
        return moment
    index = order.to(moment.device)
    rows = moment.gather(1, index[:, :, None].expand_as(moment))
    return rows.gather(2, index[:, None, :].expand_as(moment))
