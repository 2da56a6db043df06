"""Shapes in annotations are checked under test; tests see eight fake devices and one process."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("qaperso", "beartype.beartype")
