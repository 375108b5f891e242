"""What a model and a run will take, on one GPU or several: parameters, state, memory by part, FLOPs, steps.

No formula per architecture: the real model runs the real loss on tensors without storage, PyTorch counts what is
multiplied and what autograd keeps, and the rest follows from the numbers of parameters. So it holds for every base,
mixer and stage, other people's included. Nothing is allocated.
"""

from supra_cli.core.accounting.fitting import COUNTS, Setting, as_written, nearest
from supra_cli.core.accounting.model import ModelPlan, measure
from supra_cli.core.accounting.run import GPUS, ROOM, UTILISATION, Memory, Plan, StagePlan, plan, student_config

__all__ = ["COUNTS", "GPUS", "ROOM", "UTILISATION", "Memory", "ModelPlan", "Plan", "Setting", "StagePlan", "as_written"]
__all__ += ["measure", "nearest", "plan", "student_config"]
