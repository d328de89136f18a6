"""Which training arguments of transformers go with a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmfast.errors import describe
from mmfast.methods.base import Learner

# Arguments that have one value here, and why.
_FIXED: dict[str, tuple[Any, str]] = {
    "max_steps": (-1, "stages are counted in epochs"),
    "gradient_accumulation_steps": (1, "a method takes all its steps with each batch"),
    "label_smoothing_factor": (0.0, "MethodTrainer takes label_smoothing"),
    "load_best_model_at_end": (False, "the best weights of each stage are put back at its end"),
    "train_sampling_strategy": ("random", "the method decides what an epoch trains on"),
    "dataloader_drop_last": (False, "the method decides what an epoch trains on"),
    "data_seed": (None, "the order of samples follows from seed"),
    "auto_find_batch_size": (False, "a run that begins anew would go on with what it has trained"),
    "activation_checkpointing": (False, "encoders do that by themselves, before they are in the model"),
    "torch_compile": (False, "methods look into the model: compile its encoders"),
    "bf16_full_eval": (False, "methods read features between epochs, and go on with the same weights"),
    "fp16_full_eval": (False, "methods read features between epochs, and go on with the same weights"),
}
_OPTIONS = ("callbacks", "processing_class", "optimizer_cls_and_kwargs")


def check_arguments(args: Any, options: Mapping[str, Any]) -> None:
    """Raise if training arguments of transformers, or options of its Trainer, are the method's to decide."""
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"MethodTrainer must get options among {', '.join(_OPTIONS)}, got {name}")
    for name, (wanted, reason) in _FIXED.items():
        if (value := getattr(args, name, wanted)) != wanted:
            raise ValueError(f"{name} must be {wanted!r}, as {reason}, got {describe(value)}")
    if args.fsdp or args.deepspeed:
        kind = "fsdp" if args.fsdp else "deepspeed"
        raise ValueError(f"{kind} must not be set: it splits parameters, and methods look into whole ones")
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu must be 1 in each process, got {args.n_gpu}: start one process a GPU by torchrun, or "
            "show one by CUDA_VISIBLE_DEVICES"
        )
    if args.world_size > 1 and not args.ddp_find_unused_parameters:
        raise ValueError(
            "ddp_find_unused_parameters must be True for several processes, as a method's step may leave "
            f"parts of the learner out, got {args.ddp_find_unused_parameters}"
        )


def epochs_of_first_stage(learner: Learner, num_epochs: float) -> int:
    """Return the epochs that the stages behind the first one leave for it."""
    others = learner.stages(1)[1:]
    epochs = num_epochs - sum(stage.epochs for stage in others)
    if epochs < 1 or epochs != int(epochs):
        named = " and ".join(f"{stage.epochs} of the stage {stage.name}" for stage in others)
        least = f"a whole number above {named}, epochs of all stages" if others else "a whole number"
        raise ValueError(f"num_train_epochs must be {least}, got {num_epochs:g}")
    return int(epochs)
