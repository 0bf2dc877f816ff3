"""The scan without the process around it: ``python -m benchmarks.scan_alone FILE VALUE...`` prints its seconds."""

from __future__ import annotations

import sys
import time

from gradscope.sources import open_source
from gradscope.value_clip import ValueClip


def main() -> None:
    source = open_source(sys.argv[1])
    start = time.perf_counter()
    (step,) = source.read_steps(range(1))
    for value in sys.argv[2:]:
        ValueClip.total(
            spectrum.value_clip(float(value)) for spectrum in step.spectra if spectrum is not None
        ).direction_change_deg()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
