"""`doctor`: what is wrong with a machine, a checkpoint, a codec, data or an adapter, and what to do about it."""

from higgstune.diagnosis.adapter import check_applied
from higgstune.diagnosis.examine import doctor
from higgstune.diagnosis.report import Finding, Report

__all__ = ["Finding", "Report", "check_applied", "doctor"]
