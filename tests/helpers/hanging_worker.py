"""A worker process whose steps hang for as long as a file is there.

python hanging_worker.py FILE CARD ID JOIN GATE
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pdserve.core import config
from pdserve.core.card import ModelCard
from pdserve.core.config import Deployment
from pdserve.core.ids import Role
from pdserve.core.plan import StepPlan
from pdserve.simulation.engine import SimulatedEngine, SimulatedModel, SimulatedStep
from pdserve.worker import process, times
from pdserve.worker.budget import Budget

times.HUNG_AFTER_S = 0.5
GATE = Path(sys.argv[5])


class Hanging(SimulatedEngine):
    def launch(self, plan: StepPlan) -> SimulatedStep:
        while GATE.exists():
            time.sleep(0.01)
        return super().launch(plan)


def build(deployment: Deployment, card: ModelCard, post: process.Post) -> process.Built:
    budgets = Budget.of_all(deployment.pools, on_gpu=False)
    widest = Budget.widest(budgets.values())
    engine = Hanging(
        SimulatedModel(card.vocab_size, card.eos_token_ids),
        num_blocks=64,
        max_slots=widest.num_slots,
        max_context=card.max_context,
        max_step_tokens=widest.max_step_tokens,
    )
    return engine, budgets, 0.1


if __name__ == "__main__":
    file, card, worker_id, join = sys.argv[1:5]
    post = process.Post(Role.MIXED, worker_id, join)
    sys.exit(process.run(config.load(Path(file)), ModelCard.read(Path(card)), post, build))
