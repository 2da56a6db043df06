"""Shapes in annotations are checked under test; tests see eight fake devices and one process."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax  # noqa: E402
from checking import install  # noqa: E402

# Compiling takes nearly all the time of tests of models this small.
jax.config.update("jax_disable_most_optimizations", True)

install()
