"""Calibration: a model's activations determine its codes, and how many bits each layer gets."""

from .activations import Layer, Text, cut, split
from .calibrating import CalibratedModule, CalibrationReport, calibrate
from .choosing import Rounding, choose_codes, choose_layer
from .planning import Plan, plan, plan_layers
from .store import Choice, Store

__all__ = [
    "CalibratedModule",
    "CalibrationReport",
    "Choice",
    "Layer",
    "Plan",
    "Rounding",
    "Store",
    "Text",
    "calibrate",
    "choose_codes",
    "choose_layer",
    "cut",
    "plan",
    "plan_layers",
    "split",
]
