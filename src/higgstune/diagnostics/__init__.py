"""`doctor`: what is wrong with a machine, a checkpoint, a codec, data or an adapter, and what to do about it."""

from higgstune.diagnostics.adapter import check_applied
from higgstune.diagnostics.examine import doctor
from higgstune.diagnostics.report import Finding, Report

__all__ = ["Finding", "Report", "check_applied", "doctor"]
