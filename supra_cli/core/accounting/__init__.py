"""What a model and a run will take: parameters, state, memory by part, FLOPs, steps. Nothing is allocated.

No formula per architecture: the real model runs the real loss on tensors without storage, and what that would allocate
and multiply is counted. So the numbers hold for every base, mixer and stage, other people's included.
"""

from supra_cli.core.accounting.model import ModelPlan, measure
from supra_cli.core.accounting.run import GPUS, UTILISATION, Memory, Plan, StagePlan, plan, student_config

__all__ = [
    "GPUS",
    "UTILISATION",
    "Memory",
    "ModelPlan",
    "Plan",
    "StagePlan",
    "measure",
    "plan",
    "student_config",
]
