"""The gate: what is checked before an array is trusted, in training and at inference."""

from ..readers import ReadError, read
from .augmentation import GuardedAugmentation, augmentation
from .detectors import register as register_detector
from .domain import rule
from .drift import Drift, DriftReport, DriftResult
from .frames import to_pandera
from .inputs import GateCounts, GatedOutput, InputError, InputGate
from .numerics import LayerNumerics, NumericsReport, probe_numerics
from .quarantine import Dropped, Quarantine, read_quarantine
from .report import GateError, RuleResult, ValidationReport
from .rules import (
    Contributors,
    DomainRule,
    Field,
    NearDuplicates,
    Outlier,
    Outliers,
    Relation,
    SchemaError,
    Series,
    Trusted,
)
from .schema import Schema, Validated
from .squeezing import JPEG, BitDepth, FeatureSqueezing, MedianSmoothing, straight_through
from .stream import Dataset, Stream, dataset, stream
from .two_sample import (
    PSI,
    TwoSample,
    benjamini_hochberg,
    chi_square,
    classifier_two_sample,
    kolmogorov_smirnov,
    maximum_mean_discrepancy,
    population_stability_index,
    wasserstein,
)

__all__ = [
    "JPEG",
    "PSI",
    "BitDepth",
    "Contributors",
    "Dataset",
    "DomainRule",
    "Drift",
    "DriftReport",
    "DriftResult",
    "Dropped",
    "FeatureSqueezing",
    "Field",
    "GateCounts",
    "GateError",
    "GatedOutput",
    "GuardedAugmentation",
    "InputError",
    "InputGate",
    "LayerNumerics",
    "MedianSmoothing",
    "NearDuplicates",
    "NumericsReport",
    "Outlier",
    "Outliers",
    "Quarantine",
    "ReadError",
    "Relation",
    "RuleResult",
    "Schema",
    "SchemaError",
    "Series",
    "Stream",
    "Trusted",
    "TwoSample",
    "Validated",
    "ValidationReport",
    "augmentation",
    "benjamini_hochberg",
    "chi_square",
    "classifier_two_sample",
    "dataset",
    "kolmogorov_smirnov",
    "maximum_mean_discrepancy",
    "population_stability_index",
    "probe_numerics",
    "read",
    "read_quarantine",
    "register_detector",
    "rule",
    "straight_through",
    "stream",
    "to_pandera",
    "wasserstein",
]
