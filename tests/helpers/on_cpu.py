"""The base of an adapter, on the CPU: what most tests load."""

from higgstune import BaseSpec

CPU = BaseSpec(device="cpu")
