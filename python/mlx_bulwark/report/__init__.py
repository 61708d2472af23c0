"""The report that a person reads, and the regular security assessment."""

from .page import Report
from .parts import Section

__all__ = ["Report", "Section"]
