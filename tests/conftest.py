"""Shared test set-up: without a CUDA device Triton kernels are interpreted, and tests marked ``gpu`` skip visibly."""

import os

import pytest
import torch

# Triton reads it when a kernel is decorated, so before anything imports the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
