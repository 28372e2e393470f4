"""A model of a few layers, and its codes."""

import torch
from torch import nn

import qins


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 60, bias=False), nn.Embedding(10, 7))


def converted(codec, group="default"):
    m = model()
    qins.convert(m, codec, group_size=group)
    return m
