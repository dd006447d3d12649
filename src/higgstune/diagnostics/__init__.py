"""`doctor`: finds faults of a machine, a checkpoint, a codec, data or an adapter, and says what to do."""

from higgstune.diagnostics.adapter import check_applied
from higgstune.diagnostics.examine import doctor
from higgstune.diagnostics.report import Finding, Report

__all__ = ["Finding", "Report", "check_applied", "doctor"]
