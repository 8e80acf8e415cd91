"""Predicted against measured decoding speed on this machine: the demo model in full precision and offloaded to disk.

    python benchmarks/speed.py

Run it while nothing else is busy: it measures the machine first, then generates. It empties the cache of quantized
weights.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import workbench as wb
from workbench import weight_cache

CASES = {
    "bfloat16, in memory": {},
    "float32, in memory": {"precision": wb.FullPrecision(dtype="float32")},
    "a quarter on disk": {"max_memory": {"cpu": "200MiB", "disk": "10GiB"}},
    "int8, in memory": {"precision": wb.Int8()},
    "nf4, in memory": {"precision": wb.FourBit()},
    "all on disk": {"strategy": "custom", "device_map": {"": "disk"}},
    "all on disk, 100 MiB": {
        "strategy": "custom",
        "device_map": {"": "disk"},
        "max_memory": {"cpu": "100MiB", "disk": "10GiB"},
    },
}


def main() -> None:
    """Print the table."""
    print(f"{platform.machine()}, {os.cpu_count()} cores; torch {version('torch')}, accelerate {version('accelerate')}")
    print(wb.calibrate())
    print(f"\n{'':22} {'tokens a second':^29} {'seconds to load':^29}")
    heads = f"{'predicted':>10} {'measured':>10} {'error':>7}"
    print(f"{'demo model':22} {heads} {heads}")
    for name, options in CASES.items():
        wb.load(wb.Recipe(model="demo", **options)).unload()  # what is done once for a model and a precision
        weight_cache.empty()  # with kept weights a load only maps them
        session = wb.load(wb.Recipe(model="demo", **options))
        session.generate("Tell me a story.", max_new_tokens=4)  # the first run warms caches and pools
        measured = []
        for _ in range(3):
            session.generate("Tell me a long story about a king.", max_new_tokens=40)
            measured.append(session.last_stats.tokens_per_second)
        middle = sorted(measured)[1]
        predicted = wb.predict_speed(session.placement, session.skeleton).tokens_per_second
        loaded = session.load_report.seconds
        load = wb.predict_load_seconds(session.placement, session.skeleton)
        speeds = f"{predicted:10.1f} {middle:10.1f} {100 * (predicted / middle - 1):+6.0f} %"
        print(f"{name:22} {speeds} {load:10.2f} {loaded:10.2f} {100 * (load / loaded - 1):+6.0f} %")
        session.unload()


if __name__ == "__main__":
    main()
