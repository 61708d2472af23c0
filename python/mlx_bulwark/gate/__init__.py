"""The gate: what is checked before an array is trusted, in training and at inference."""

from .domain import rule
from .drift import Drift, DriftReport, DriftResult
from .frames import to_pandera
from .inputs import GateCounts, GatedOutput, InputError, InputGate
from .quarantine import Dropped, Quarantine, read_quarantine
from .readers import ReadError, read
from .report import GateError, RuleResult, ValidationReport
from .rules import Contributors, DomainRule, Field, NearDuplicates, Outlier, Relation, SchemaError, Series, Trusted
from .schema import Schema, Validated
from .squeezing import JPEG, BitDepth, FeatureSqueezing, MedianSmoothing, straight_through
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
    "InputError",
    "InputGate",
    "MedianSmoothing",
    "NearDuplicates",
    "Outlier",
    "Quarantine",
    "ReadError",
    "Relation",
    "RuleResult",
    "Schema",
    "SchemaError",
    "Series",
    "Trusted",
    "TwoSample",
    "Validated",
    "ValidationReport",
    "benjamini_hochberg",
    "chi_square",
    "classifier_two_sample",
    "kolmogorov_smirnov",
    "maximum_mean_discrepancy",
    "population_stability_index",
    "read",
    "read_quarantine",
    "rule",
    "straight_through",
    "to_pandera",
    "wasserstein",
]
