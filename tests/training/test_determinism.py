"""A training under ``torch.use_deterministic_algorithms``, resumed; ``test_gpu.py`` does it on a GPU."""

import torch

from support.cli import LM
from support.resume import check_resume


def test_it_resumes_bit_for_bit(lm_data, tmp_path):
    settings = {**LM, "moe_router": "top-p", "moe_hard_update": None, "moe_anneal_updates": None}
    torch.use_deterministic_algorithms(True)
    try:
        check_resume(lm_data, tmp_path, settings, stops=[9])
    finally:
        torch.use_deterministic_algorithms(False)
