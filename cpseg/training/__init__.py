"""Students from few labels and many filtered ones: objective, trainer, and parts of both."""

from cpseg.training.averaging import MovingAverage
from cpseg.training.batches import Batches, BatchKey, Labeled, Normalize, load
from cpseg.training.chance import generator_for
from cpseg.training.checkpoints import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    seed_everything,
    set_random_state,
)
from cpseg.training.comparison import (
    Comparison,
    Relabeled,
    StudentResult,
    biased_annotator,
    compare_on_shapes,
)
from cpseg.training.config import train_from_file, trainer_from_file
from cpseg.training.cross_fitting import Correction, CrossFitted, cross_fit
from cpseg.training.distributed import Processes, processes
from cpseg.training.evaluation import Evaluation, evaluate
from cpseg.training.journal import Journal
from cpseg.training.learner import Learner
from cpseg.training.mixing import Mix, cutmix
from cpseg.training.objective import (
    Batch,
    Merge,
    Own,
    Stage,
    StepOutput,
    Targets,
    TwoStageObjective,
    labeling,
)
from cpseg.training.plugin import OnlineAnnotator, PseudoLabelStore, confidence_thresholds
from cpseg.training.recipes import (
    conformal_sam,
    self_training,
    supervised,
    unimatch_like,
)
from cpseg.training.refining import Example, Refined, refine
from cpseg.training.schedules import Complement, Constant, Exponential, Linear, Poly, Schedule
from cpseg.training.students import UNet, logits_of
from cpseg.training.targets import (
    Denominator,
    JointMode,
    MergeMode,
    class_weights_from,
    masked_cross_entropy,
    merge_pseudo_labels,
    multiply_probabilities,
    pool_probabilities,
)
from cpseg.training.train_config import TrainConfig
from cpseg.training.trainer import FitResult, Step, Trainer

__all__ = [
    "Batch",
    "BatchKey",
    "Batches",
    "Comparison",
    "Complement",
    "Constant",
    "Correction",
    "CrossFitted",
    "Denominator",
    "Evaluation",
    "Example",
    "Exponential",
    "FitResult",
    "JointMode",
    "Journal",
    "Labeled",
    "Learner",
    "Linear",
    "Merge",
    "MergeMode",
    "Mix",
    "MovingAverage",
    "Normalize",
    "OnlineAnnotator",
    "Own",
    "Poly",
    "Processes",
    "PseudoLabelStore",
    "Refined",
    "Relabeled",
    "Schedule",
    "Stage",
    "Step",
    "StepOutput",
    "StudentResult",
    "Targets",
    "TrainConfig",
    "Trainer",
    "TwoStageObjective",
    "UNet",
    "biased_annotator",
    "class_weights_from",
    "compare_on_shapes",
    "confidence_thresholds",
    "conformal_sam",
    "cross_fit",
    "cutmix",
    "evaluate",
    "generator_for",
    "labeling",
    "load",
    "load_checkpoint",
    "logits_of",
    "masked_cross_entropy",
    "merge_pseudo_labels",
    "multiply_probabilities",
    "pool_probabilities",
    "processes",
    "random_state",
    "refine",
    "save_checkpoint",
    "seed_everything",
    "self_training",
    "set_random_state",
    "supervised",
    "train_from_file",
    "trainer_from_file",
    "unimatch_like",
]
