"""The products that compute half are the whole products."""

import pytest
import torch
from mctk.linalg.products import transposed_lower_product, upper_product


@pytest.mark.parametrize("n", [1, 5, 64, 65, 600])
def test_panels_cover_everything(n):
    random = torch.Generator().manual_seed(n)
    left = torch.randn(n, 9, generator=random, dtype=torch.float64)
    lower = torch.randn(n, n, generator=random, dtype=torch.float64).tril()
    torch.testing.assert_close(upper_product(left, left), (left @ left.t()).triu())
    torch.testing.assert_close(transposed_lower_product(lower, left), lower.t() @ left)
