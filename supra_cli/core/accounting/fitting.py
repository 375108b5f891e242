"""The nearest setting with which a plan fits a GPU: smaller passes, recomputing, a smaller optimizer, more GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from supra_cli.core.accounting.run import GPUS, ROOM, Plan, StagePlan
from supra_cli.core.train.build import stage_of

COUNTS = (1, 2, 4, 8, 16)
"""Numbers of GPUs that are tried."""
NODE = 8
"""GPUs in a node, at most."""


@dataclass(frozen=True)
class Setting:
    gpus: int
    changes: tuple[str, ...]
    """`stages.0.activation_checkpointing=true`, for --set."""
    memory_bytes: int
    """On each GPU."""
    host_bytes: int
    """In CPU memory, for each GPU."""

    def command(self, run: str) -> str:
        """What starts `uptrain ...`, on each node."""
        nodes = next(
            nodes for nodes in range(1, self.gpus + 1) if self.gpus % nodes == 0 and self.gpus // nodes <= NODE
        )
        each = self.gpus // nodes
        torchrun = ["torchrun", f"--nproc-per-node {each}", "-m supra_cli"]
        if nodes > 1:
            torchrun[1:1] = [f"--nnodes {nodes}", "--rdzv-backend c10d", "--rdzv-endpoint HOST:29500"]
        begun = ["supra"] if self.gpus == 1 else torchrun
        return " ".join([*begun, run, *(f"--set {change}" for change in self.changes)])


def nearest(plan: Plan, gpu: str, counts: Sequence[int] = COUNTS) -> Setting | None:
    """The first that fits by the plan, in the order of harm: each stage's smaller micro-batches, then activation
    checkpointing, then 8-bit moments, then the optimizer's state in CPU memory; then all of it on more GPUs.
    """
    for gpus in counts:
        changes, memories = [], []
        for number, stage in enumerate(plan.stages):
            for changed in _settings(stage, gpus):
                memory = stage.memory(gpus, stage.spec.model_copy(update=changed))
                if memory.total <= ROOM * GPUS[gpu][0] * 1e9:
                    memories.append(memory)
                    changes += [f"stages.{number}.{key}={str(value).lower()}" for key, value in changed.items()]
                    break
        if len(memories) == len(plan.stages):
            most = max(memory.total for memory in memories), max(memory.host for memory in memories)
            return Setting(gpus, tuple(changes), *most)
    return None


def as_written(plan: Plan, gpu: str, counts: Sequence[int] = COUNTS) -> Setting | None:
    """The fewest on which it fits without a change."""
    gpus = next((count for count in counts if plan.fits(gpu, count)), None)
    return gpus and Setting(gpus, (), plan.memory_bytes(gpus), plan.host_bytes(gpus))


def _settings(stage: StagePlan, gpus: int) -> Iterator[dict[str, object]]:
    """What to change of a stage's keys, the least harm first. 8-bit moments are for one GPU."""
    recipe, spec = stage.recipe, stage.spec
    optimizers = [spec.optimizer, "adamw8bit", "adamw-offload"]
    if gpus > 1:
        optimizers = [name.replace("adamw8bit", "adamw") for name in optimizers]
    recomputing = sorted({spec.activation_checkpointing, stage_of(spec).teacher != "shared"})
    most = min(recipe.micro_rows(spec), -(-recipe.rows(spec) // gpus))
    for optimizer in dict.fromkeys(optimizers):
        for checkpointing in recomputing:
            for halved in range(most.bit_length()):
                tokens = (most >> halved) * recipe.seq_len(spec) if halved else spec.micro_batch_tokens
                wanted = {"optimizer": optimizer, "activation_checkpointing": checkpointing}
                wanted["micro_batch_tokens"] = tokens
                yield {key: value for key, value in wanted.items() if value != getattr(spec, key)}
