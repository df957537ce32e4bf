import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# The models of the tests are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
