"""NEFTune: given the same uniform draw, our noisy loss and its gradients are those of the hook of `transformers`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from polm.objectives.ntp import build_ntp
from polm.tokens import Objective, build_document, collate

ALPHA = 5.0


@pytest.mark.parametrize("seed", [0, 11])
def test_one_sequence(seed: int, learner: PreTrainedModel, model: PreTrainedModel, agree: Any) -> None:
    ids = np.array([5, 9, 12, 7, 30, 31, 8, 8, 2])
    model.train()
    handle = activate_neftune(model, ALPHA)
    torch.manual_seed(seed)
    logits_TV = model(input_ids=torch.from_numpy(ids)[None]).logits[0]
    deactivate_neftune(model, handle)
    their_loss = torch.nn.functional.cross_entropy(logits_TV[:-1].float(), torch.from_numpy(ids[1:]))
    plain = build_ntp()
    objective = Objective("ntp", plain.compute, needs=type(plain.needs)(embedding_noise=ALPHA))
    quiet = torch.nn.functional.cross_entropy(
        model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1].float(), torch.from_numpy(ids[1:])
    )
    assert abs(quiet.item() - their_loss.item()) > 1e-3  # the noise does show
    agree(their_loss, model, objective, learner, [collate([build_document(ids)], seed=seed)])
